"""Which models a server has, and which of them a request asks for."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from roadie.errors import ConfigError, ServingError

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Popularity:
    """Zipf's law: the k-th of the models is asked for with weight ``k ** -skew``; with skew 0 all are asked for alike.

    The same prompt is always of the same model, whoever sends it: guidellm has many processes. Raises `ConfigError`.
    """

    models: tuple[str, ...]
    skew: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("got no models to ask for; wanted one at least; name them, or load adapters")
        if not 0 <= self.skew < 100 or math.isnan(self.skew):
            raise ConfigError(f"got skew={self.skew}; wanted 0 to 100")

    def of(self, prompt: str) -> str:
        """The model that is asked."""
        weights = [rank**-self.skew for rank in range(1, len(self.models) + 1)]
        return random.Random(f"{self.seed} {prompt}").choices(self.models, weights)[0]


def models_of(url: str, key: str | None = None) -> tuple[str, ...]:
    """The adapters of a server, or its models where it has none. Raises `ServingError` where it does not answer."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    place = f"{url.rstrip('/').removesuffix('/v1')}/v1/models"
    try:
        opener = build_opener(ProxyHandler({}))
        with opener.open(Request(place, headers=headers), timeout=TIMEOUT_S) as response:
            models = json.load(response)["data"]
    except HTTPError as error:
        raise ServingError(f"got status {error.code} of {place}: {error.read(300).decode(errors='replace')}") from None
    except (URLError, OSError, ValueError, KeyError) as error:
        raise ServingError(f"got no answer of {url!r} ({error}); wanted a server; start it, or check its URL") from None
    return tuple(model["id"] for model in models if model.get("parent")) or tuple(model["id"] for model in models)
