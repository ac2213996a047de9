"""What guidellm asks through: its own backend of OpenAI's API, each of whose requests names a model of its own.

Its processes find it by importing this module, which alone imports guidellm's parts.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from typing import Any, Literal

from guidellm.backends import Backend
from guidellm.backends.openai import OpenAIHTTPBackend
from guidellm.schemas.backends import BackendArgs, OpenAIHTTPBackendArgs

from roadie.traffic.models import Popularity

KIND: Literal["roadie_adapters"] = "roadie_adapters"


@BackendArgs.register(KIND)
class AdaptersArgs(OpenAIHTTPBackendArgs):
    """Those of guidellm, and `Popularity`."""

    kind: Literal["roadie_adapters"] = KIND
    models: list[str]
    skew: float
    popularity_seed: int


@Backend.register(KIND)
class AdaptersBackend(OpenAIHTTPBackend):
    """Asks for one of many models, by the text of the request."""

    async def resolve(self, request: Any, request_info: Any, history: Any = None) -> AsyncIterator[Any]:
        """Guidellm's, with the model of this request."""
        asked = self._args
        popularity = Popularity(tuple(asked.models), asked.skew, asked.popularity_seed)
        one = copy.copy(self)  # the same connections; requests run side by side
        one._args = asked.model_copy(update={"model": popularity.of(str(request.columns))})
        async for found in OpenAIHTTPBackend.resolve(one, request, request_info, history):
            yield found
