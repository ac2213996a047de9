"""Which adapter a request asks for: by `model`, or by the extra field `adapters`.

"base", or the base model's own name     no adapter
"legal"                                  an adapter
"legal=1.5"                              more of it;  0.5: half;  -1: its inverse
"legal=0.7+terse=0.3"                    a blend
"base:legal=0.7+terse=0.3"               the same, with the base model named
"base" and {"legal": 0.7, "terse": 0.3}  the same, as `model` and `adapters`

Names may have ``= + :`` in them, too. The base model's names go first, then whatever is exactly an adapter's name; within a blend
a name ends before the first ``=`` that a weight and a ``+``, or the end, follow. What that does not reach, `adapters` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from roadie.bank.blends import check_weights, from_text, without_base
from roadie.errors import RoutingError
from roadie.serving.engine import AdapterWish
from roadie.serving.http.failures import ApiError, unknown_model
from roadie.serving.http.keys import Caller
from roadie.serving.places import name_problem

BASE = "base"
MAX_MODEL_CHARS = 4096


@dataclass(frozen=True)
class ModelNames:
    """What the base model of a server answers to, its own name first; has_adapter: whether one is called exactly so.

    may_use: whether a caller may use, and see, an adapter.
    """

    base: tuple[str, ...]
    has_adapter: Callable[[str], bool] = lambda name: False
    may_use: Callable[[Caller, str], bool] = Caller.may_use

    def wish(self, model: str, adapters: Mapping[str, float] | None, caller: Caller) -> AdapterWish:
        """What to ask the engine for. Raises `ApiError`: 404 where a caller may not use an adapter, 400 for bad weights."""
        wish = self._wish(model, adapters, caller)
        names = () if wish is None else (wish,) if isinstance(wish, str) else tuple(wish)
        if not all(name_problem(name) is None and self.may_use(caller, name) for name in names):
            raise unknown_model(shown(model, adapters))
        return wish

    def _wish(self, model: str, adapters: Mapping[str, float] | None, caller: Caller) -> AdapterWish:
        if adapters is None and self._is_exact(model, caller):
            return model
        wanted = self._without_base(model)
        if adapters is None:
            is_exact = wanted is not None and self._is_exact(wanted, caller)
            return wanted if wanted is None or is_exact else parse_wish(wanted)
        if wanted is not None:
            raise ApiError(
                400,
                "got adapters beside a model that is not the base model; wanted adapters in one place; try model='base'",
                "invalid_value",
                param="adapters",
            )
        with _as_api_error():
            check_weights(adapters)
        return dict(adapters) or None

    def _is_exact(self, name: str, caller: Caller) -> bool:
        """Whether a name that could be read otherwise is that of an adapter, which this caller may use."""
        if name in self.base or not ("=" in name or ":" in name):
            return False
        return name_problem(name) is None and self.may_use(caller, name) and self.has_adapter(name)

    def _without_base(self, model: str) -> str | None:
        return without_base(model, self.base)


def shown(model: str, adapters: Mapping[str, float] | None) -> str:
    """What was asked for, for messages."""
    return model if adapters is None else ", ".join(adapters)


def parse_wish(text: str) -> AdapterWish:
    """`roadie.bank.blends.from_text`. Raises `ApiError`."""
    with _as_api_error():
        return from_text(text)


@contextmanager
def _as_api_error() -> Iterator[None]:
    try:
        yield
    except RoutingError as error:
        raise ApiError(400, str(error), "invalid_value", param="model") from None
