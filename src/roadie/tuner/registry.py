"""The single touch-point with PEFT's registry: who answers when a config says ROAD.

PEFT looks its tuners up in four dictionaries under `PeftType.ROAD`. `register` puts roadie's classes there and keeps what
was there; `unregister` puts that back. Nothing else of PEFT is changed, and nothing at import.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import mapping
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType

from roadie.errors import RegistrationError

_DICTIONARIES = (
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
)
_MISSING = object()
_lock = threading.RLock()
_ours: dict[str, Any] = {}
_replaced: dict[str, Any] | None = None
_stock_blocks = 0


def answer_with(config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Say which classes `register` routes ROAD to. `roadie.tuner` does, once it has them: nothing of it can be had before."""
    _ours.update(zip(_DICTIONARIES, (config, model, model, model.prefix), strict=True))


def register() -> None:
    """Route PEFT's ROAD to roadie: `peft.get_peft_model`, `PeftModel.from_pretrained` and the like then use our classes.

    Does nothing if that is so already. Raises `RegistrationError` inside a `stock_peft` block.
    """
    global _replaced
    with _lock:
        if _stock_blocks:
            raise RegistrationError(
                "got a roadie class inside a stock_peft() block; inside it PEFT's own RoAd must be used; "
                "make roadie's configs and models outside the block"
            )
        if _replaced is None:
            _replaced = _swap_in(_ours)


def unregister() -> None:
    """Put back what `register` replaced; does nothing if nothing is registered."""
    global _replaced
    with _lock:
        if _replaced is not None:
            _swap_in(_replaced)
            _replaced = None


def is_registered() -> bool:
    """Whether PEFT's ROAD is routed to roadie now."""
    return _replaced is not None and not _stock_blocks


@contextmanager
def stock_entries() -> Iterator[None]:
    """Within the block PEFT's entries are what they were before `register`; roadie's are put back afterwards."""
    global _stock_blocks
    with _lock:
        before = _swap_in(_replaced) if _replaced is not None else None
        _stock_blocks += 1
    try:
        yield
    finally:
        with _lock:
            _stock_blocks -= 1
            if before is not None:
                _swap_in(before)


def _swap_in(entries: dict[str, Any]) -> dict[str, Any]:
    """Put `entries` into PEFT's dictionaries and return what they replaced."""
    before = {}
    for name, value in entries.items():
        dictionary = getattr(mapping, name)
        before[name] = dictionary.get(PeftType.ROAD, _MISSING)
        if value is _MISSING:
            dictionary.pop(PeftType.ROAD, None)
        else:
            dictionary[PeftType.ROAD] = value
    return before
