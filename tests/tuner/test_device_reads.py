"""Nobody asks the device for values while rows are routed: on a GPU each question waits for all that it has still to do.

Tensors of the meta device have no values, so that who asks fails. Slots that a layer reads are watched one by one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tuner.test_residents import IDS, _model
from torch import Tensor, nn

import roadie
from roadie.kernels import eager
from roadie.sites import rows

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__"}
ROWS = ["a", "b", "__base__", "a"]


class OnDevice(Tensor):
    """A tensor whose values may be computed with, but not looked at."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.__name__ not in READS, f"the host waits for the device: {function.__name__}"
        return super().__torch_function__(function, types, args, kwargs or {})


def test_the_watch_notices_a_read() -> None:
    for read in (Tensor.tolist, Tensor.cpu, Tensor.unique, bool, int):
        with pytest.raises(AssertionError, match="waits for the device"):
            read(torch.tensor([1]).as_subclass(OnDevice)[:1] + 1)


@torch.no_grad()
def test_slots_are_not_read_where_the_layers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of adapters that are in the bank: the first call puts them there."""
    model = _model("a", "b").requires_grad_(False)
    wanted = model(input_ids=IDS, adapter_names=ROWS).logits
    others = model(input_ids=IDS, adapter_names=ROWS[::-1]).logits
    watched = []

    def moved(tensor: Tensor, device: torch.device) -> Tensor:
        watched.append(tensor)
        return tensor.clone().as_subclass(OnDevice)

    monkeypatch.setattr(rows, "moved", moved)
    monkeypatch.setattr(eager, "_check_slots", lambda *_: -1)  # the reference checks what is on a CPU
    for names, expected in ((ROWS, wanted), (ROWS[::-1], others)) * 2:
        assert torch.equal(model(input_ids=IDS, adapter_names=names).logits, expected)
    assert watched


class Net(nn.Module):
    """Layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x).sin()
        return x


@pytest.mark.parametrize("is_training", [False, True], ids=["no_grad", "training"])
def test_tables_are_made_without_a_look_at_values(is_training: bool) -> None:
    """Of adapters that are trained, whose tables are made of the parameters in each call; of two group sizes, and stages."""
    settings: list[dict[str, Any]] = [{"group_size": 4}, {"stages": [2, 8]}, {"variant": "road_4", "group_size": 8}]
    config = roadie.RoadConfig(target_modules="all-linear", group_size=4)
    model = roadie.get_peft_model(Net(), config, adapter_name="a")
    for name, setting in zip("bc", settings[1:], strict=True):
        model.add_adapter(name, roadie.RoadConfig(target_modules="all-linear", **setting))
    model.requires_grad_(True).to("meta")
    with torch.set_grad_enabled(is_training):
        result = model(inputs_embeds=torch.randn(4, 3, 16, device="meta"), adapter_names=["a", "b", "__base__", "c"])
    assert result.shape == (4, 3, 16)
    if is_training:
        result.sum().backward()
        missing = [name for name, parameter in model.named_parameters() if "road_" in name and parameter.grad is None]
        assert not missing
