"""How a fault of stock PEFT is shown: one check, which its RoAd fails and ours passes.

A check is a function of an `Implementation` that asserts what ought to hold. The fixture `fault` runs it twice: on PEFT's
own RoAd, where the documented exception (an AssertionError for a silent fault) must come, and on roadie, where none may.

Not here: FSDP1 with PEFT's wrap policy, a fault that roadie has too (tests/tuner/test_fsdp.py); and what the tuner alone
cannot show on a CPU: tensor parallelism, seconds and bytes (benchmarks), memory saved for backward, composition and
inspection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from peft import mapping
from peft.utils import PeftType

import roadie
from roadie.testing import randomise, stock_peft
from roadie.testing.rival import is_stock


@dataclass(frozen=True)
class Implementation:
    """PEFT's own RoAd, or ours: its config class, and ways to adapt a model with it."""

    name: str
    config: type

    @property
    def is_stock(self) -> bool:
        return self.name == "stock"

    def adapt(self, model: Any, adapter: str = "default", **settings: Any) -> Any:
        """`peft.get_peft_model` with a config of these settings."""
        self._check_registry()
        return self.checked(peft.get_peft_model(model, self.config(**settings), adapter_name=adapter))

    def adapt_many(self, model: Any, adapters: Sequence[str], *, scale: float = 0.3, **settings: Any) -> Any:
        """A model with several adapters of the same settings, each with values of its own; the first one is active."""
        adapted = self.adapt(model, adapters[0], **settings)
        for name in adapters[1:]:
            adapted.add_adapter(name, self.config(**settings))
        for seed, name in enumerate(adapters):
            randomise(adapted, seed=seed, scale=scale, adapter=name)
        return self.checked(adapted).eval()

    def load(self, model: Any, folder: Any, **arguments: Any) -> Any:
        """`PeftModel.from_pretrained`."""
        self._check_registry()
        return self.checked(peft.PeftModel.from_pretrained(model, folder, **arguments))

    def checked(self, model: Any) -> Any:
        """The model, if its RoAd layers are this implementation's."""
        assert is_stock(model) == self.is_stock, f"the RoAd layers are not those of {self.name}"
        return model

    def _check_registry(self) -> None:
        tuner = mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ROAD].__module__
        assert tuner.startswith("peft.tuners.road" if self.is_stock else "roadie."), f"PEFT would use {tuner}"

    def __str__(self) -> str:
        return self.name


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def ours() -> Implementation:
    roadie.register()
    return Implementation("roadie", roadie.RoadConfig)


@pytest.fixture
def fault(ours: Implementation) -> Callable[..., None]:
    """Asserts that a check fails on stock PEFT (with `on_stock`, whose message matches `match`) and passes here."""

    def show(
        check: Callable[..., None], *, on_stock: type[BaseException] = AssertionError, match: str, **arguments: Any
    ) -> None:
        with stock_peft() as config, pytest.raises(on_stock, match=match):
            check(Implementation("stock", config), **arguments)
        check(ours, **arguments)

    return show


@pytest.fixture
def both(ours: Implementation) -> Callable[..., None]:
    """Asserts that a check passes on stock PEFT and here: what PEFT does well and we must keep."""

    def show(check: Callable[..., None], **arguments: Any) -> None:
        with stock_peft() as config:
            check(Implementation("stock", config), **arguments)
        check(ours, **arguments)

    return show
