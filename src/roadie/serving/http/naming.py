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

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from roadie.serving.engine import AdapterWish
from roadie.serving.http.failures import ApiError, unknown_model
from roadie.serving.http.keys import Caller
from roadie.serving.http.settings import MAX_BLEND, MAX_STRENGTH
from roadie.serving.places import name_problem

BASE = "base"
_WEIGHT = r"[+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:e[+-]?\d{1,3})?"
_TERM = re.compile(rf"(.+?)=({_WEIGHT})(?:\+|$)", re.IGNORECASE | re.ASCII | re.DOTALL)
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
        check_weights(adapters)
        return dict(adapters) or None

    def _is_exact(self, name: str, caller: Caller) -> bool:
        """Whether a name that could be read otherwise is that of an adapter, which this caller may use."""
        if name in self.base or not ("=" in name or ":" in name):
            return False
        return name_problem(name) is None and self.may_use(caller, name) and self.has_adapter(name)

    def _without_base(self, model: str) -> str | None:
        """What follows the base model's name; None where nothing does."""
        if model in self.base:
            return None
        for name in self.base:
            if model.startswith(f"{name}:"):
                return model[len(name) + 1 :]
        return model


def shown(model: str, adapters: Mapping[str, float] | None) -> str:
    """What was asked for, for messages."""
    return model if adapters is None else ", ".join(adapters)


def parse_wish(text: str) -> AdapterWish:
    """`NAME`, or `NAME=WEIGHT` joined by `+`. Raises `ApiError`."""
    if "=" not in text:
        return text
    terms = tuple(_terms(text))
    weights = dict(terms)
    if len(weights) < len(terms):
        raise _bad_weights(f"got an adapter twice in {text[:200]!r}; wanted each once")
    check_weights(weights)
    return weights


def _terms(text: str) -> Iterator[tuple[str, float]]:
    position = 0
    while position < len(text):
        term = _TERM.match(text, position)
        if term is None or (term.end() == len(text) and text.endswith("+")):
            raise _bad_weights(f"got {text[:200]!r}; wanted names with weights, as in legal=0.7+terse=0.3")
        yield term[1], float(term[2])
        position = term.end()


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise `ApiError` for too many adapters, or a weight that is no finite number within the limits."""
    if len(weights) > MAX_BLEND:
        raise _bad_weights(f"got a blend of {len(weights)} adapters; wanted at most {MAX_BLEND}")
    for name, weight in weights.items():
        if not math.isfinite(weight) or abs(weight) > MAX_STRENGTH:
            raise _bad_weights(
                f"got weight {weight:g} of adapter {name[:128]!r}; wanted one from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
            )


def _bad_weights(message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", param="model")
