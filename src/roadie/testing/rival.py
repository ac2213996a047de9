"""PEFT's own RoAd, as the rival in anchors and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def stock_peft() -> Iterator[type]:
    """Within the block, PEFT's ROAD is PEFT's own; gives its RoadConfig class and puts roadie back afterwards.

    Build every rival inside, and `assert_stock` it: a rival that is secretly ours would be compared with itself. Making a
    roadie config inside raises `RegistrationError`.
    """
    from peft import mapping
    from peft.utils import PeftType

    from roadie.tuner.registry import stock_entries

    with stock_entries():
        config = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROAD]
        assert config.__module__.startswith("peft."), f"PEFT's ROAD is {config.__module__}, not PEFT's own"
        yield config


def is_stock(model: nn.Module) -> bool:
    """Whether every RoAd layer of a model (and there is one) is PEFT's own."""
    layers = [module for module in model.modules() if hasattr(module, "road_theta")]
    return bool(layers) and all(type(layer).__module__.startswith("peft.") for layer in layers)
