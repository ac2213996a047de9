"""Static slots: a graph that was captured once rotates by what they hold at each replay, and nobody asks the device for them.

Without a GPU something stands in for the capture: it writes down what a call does to which memory, refuses what a capture
refuses, and does it again.
"""

from __future__ import annotations

import copy
import gc
import io
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import ref

import pytest
import torch
from tests.laws.tuner import ORDER_OF_SUMS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import roadie
from roadie.adapter import INPUT_SUFFIX, Adapter
from roadie.bank import AdapterBank
from roadie.errors import RoutingError
from roadie.kernels import eager
from roadie.testing import random_adapter, randomise

D = 16
NAMES = ["a", "b", "c"]
READS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__")


class Net(nn.Module):
    """Layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = input_ids
        for layer in self.layers:
            x = layer(x).sin()
        return x


class Captured(TorchDispatchMode):
    """The operations of a call, with the memory that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert "_local_scalar_dense" not in str(function), "a capture cannot wait for a value"
        result = function(*args, **kwargs)
        self._steps.append((function, args, kwargs, tree_flatten(result)[0]))
        return result

    def replay(self) -> None:
        """Do it all again, into the same memory."""
        with torch.no_grad():
            for function, args, kwargs, before in self._steps:
                for into, made in zip(before, tree_flatten(function(*args, **kwargs))[0], strict=True):
                    if isinstance(into, Tensor) and into.data_ptr() != made.data_ptr():
                        into.copy_(made)


@contextmanager
def nobody_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the block no value of a tensor is asked for."""

    def refuse(self: Tensor, *_: Any, **__: Any) -> Any:
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patch:
        patch.setattr(eager, "_check_slots", lambda *_: -1)  # the reference checks what is on a CPU
        for name in READS:
            patch.setattr(Tensor, name, refuse)
        yield


class Host:
    """A model with three adapters, in a bank or as a PeftModel: what rows of them give, and rows by static slots."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float64, net: type[nn.Module] = Net) -> None:
        self.bank: AdapterBank | None = None
        if kind == "bank":
            self.model: Any = net().to(dtype)
            self.bank = AdapterBank(self.model, slots=4, dtype=dtype)
            for seed, name in enumerate(NAMES):
                self.bank.admit(name, random_adapter(self.model, seed=seed, group_size=4))
        else:
            config = roadie.RoadConfig(target_modules=r"layers\.\d+", group_size=4)
            self.model = roadie.get_peft_model(net(), config, adapter_name="a")
            for name in NAMES[1:]:
                self.model.add_adapter(name, config)
            randomise(self.model, seed=1).to(dtype).requires_grad_(False)
        self.model.eval()

    def slots(self, names: list[str]) -> Tensor:
        """The slots of names; a bank's are to be held."""
        if self.bank is not None:
            return self.bank.slots(names)
        return torch.tensor([-1 if name == "__base__" else NAMES.index(name) for name in names])

    def static(self, slots: Tensor) -> AbstractContextManager[Any]:
        return roadie.rows(self.model, slots, static=True)

    def wanted(self, names: list[str], x: Tensor) -> Tensor:
        with roadie.rows(self.model, names), torch.no_grad():
            return self.model(x)


@pytest.fixture(params=["bank", "peft"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(request.param)
    yield made
    if made.bank is not None:
        made.bank.close()


def _x(rows: int, tokens: int = 2) -> Tensor:
    return torch.randn(rows, tokens, D, generator=torch.Generator().manual_seed(3)).double()


BATCHES = [["a", "b", "__base__", "c"], ["c", "c", "a", "b"], ["__base__", "b", "b", "a"]]


@torch.no_grad()
def test_slots_that_are_written_to_between_calls_are_those_of_the_next(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, held = _x(4), [host.slots(names) for names in BATCHES]
    wanted = [host.wanted(names, x) for names in BATCHES]
    static = held[0].clone()
    with host.static(static):
        host.model(x)
        for slots, expected in zip(held * 2, wanted * 2, strict=True):
            static.copy_(slots)
            with nobody_reads(monkeypatch):
                found = host.model(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=ORDER_OF_SUMS)


@torch.no_grad()
def test_a_graph_rotates_by_what_the_slots_hold_at_each_replay(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the block in which it was captured, and after other rows."""
    x, held = _x(4), [host.slots(names) for names in BATCHES]
    wanted = [host.wanted(names, x) for names in BATCHES]
    static, graph = held[0].clone(), Captured()
    with host.static(static):
        host.model(x)
        with nobody_reads(monkeypatch), graph:
            result = host.model(x)
    gc.collect()
    for slots, expected in zip(held, wanted, strict=True):
        static.copy_(slots)
        host.wanted(BATCHES[0], x)
        graph.replay()
        torch.testing.assert_close(result, expected, rtol=0, atol=ORDER_OF_SUMS)


@pytest.mark.slow
@torch.no_grad()
def test_blocks_one_after_the_other_share_what_graphs_read(host: Host) -> None:
    x, slots = _x(4), host.slots(BATCHES[0])
    static, graphs = slots.clone(), [Captured(), Captured()]
    results = []
    for graph in graphs:
        with host.static(static):
            host.model(x)
            with graph:
                results.append(host.model(x))
        gc.collect()
    last = host.slots(BATCHES[2])
    static.copy_(last)
    for graph, result in zip(graphs, results, strict=True):
        graph.replay()
        torch.testing.assert_close(result, host.wanted(BATCHES[2], x), rtol=0, atol=ORDER_OF_SUMS)


@torch.no_grad()
def test_layers_that_rotated_by_static_slots_rotate_by_others_right_after(host: Host) -> None:
    x, static = _x(4), host.slots(BATCHES[0]).clone()
    wanted = [host.wanted(names, x) for names in BATCHES]
    for _ in range(2):
        with host.static(static):
            torch.testing.assert_close(host.model(x), wanted[0], rtol=0, atol=ORDER_OF_SUMS)
        for names, expected in zip(BATCHES, wanted, strict=True):
            torch.testing.assert_close(host.wanted(names, x), expected, rtol=0, atol=0)


@torch.no_grad()
def test_slots_of_tokens_and_other_numbers_of_tokens(host: Host) -> None:
    names = ["a", "b", "__base__", "c", "c", "a"]
    flat = host.slots(names)
    x = _x(2, 3)
    wanted = torch.stack(
        [host.wanted([name], part[None, None])[0, 0] for name, part in zip(names, x.view(6, D), strict=True)]
    )
    with host.static(flat.view(2, 3).clone()):
        for _ in range(2):
            torch.testing.assert_close(host.model(x), wanted.view(2, 3, D), rtol=0, atol=ORDER_OF_SUMS)
    static = flat[:4].clone()
    with host.static(static):
        for tokens in (4, 1, 7, 4):
            expected = host.wanted(names[:4], _x(4, tokens))
            torch.testing.assert_close(host.model(_x(4, tokens)), expected, rtol=0, atol=ORDER_OF_SUMS)


def test_static_slots_train_the_adapters_that_they_hold() -> None:
    model = Host("peft").model
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("road_" in name)
    static, x = torch.tensor([0, 2, -1, 0]), _x(4)
    with roadie.rows(model, static, static=True):
        for held in ([0, 2, -1, 0], [1, 1, 1, -1]):
            static.copy_(torch.tensor(held))
            model.zero_grad()
            model(x).sum().backward()
            got = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
            model.zero_grad()
            with roadie.rows(model, torch.tensor(held)):
                model(x).sum().backward()
            for name, gradient in got.items():
                torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=0, atol=0)
            assert any(bool(gradient.any()) for gradient in got.values())


@torch.no_grad()
def test_a_graph_of_a_peft_model_follows_adapters_once_the_model_was_called_again() -> None:
    host = Host("peft")
    x, static, graph = _x(4), host.slots(BATCHES[0]), Captured()
    with host.static(static):
        host.model(x)
        with graph:
            result = host.model(x)
        before = host.wanted(BATCHES[0], x)
        host.model.base_model.model.layers[0].road_theta["a"] += 0.5
        after = host.wanted(BATCHES[0], x)
        graph.replay()
        torch.testing.assert_close(result, before, rtol=0, atol=ORDER_OF_SUMS)
        host.model(x)
        graph.replay()
        torch.testing.assert_close(result, after, rtol=0, atol=ORDER_OF_SUMS)
    assert not torch.equal(before, after)


@torch.no_grad()
def test_a_graph_goes_on_with_the_tables_of_before_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    host = Host("bank")
    bank, x = host.bank, _x(4)
    held = host.slots(BATCHES[0])
    static, graph = held.clone(), Captured()
    with host.static(static):
        host.model(x)
        with graph:
            result = host.model(x)
    wanted, version = host.wanted(BATCHES[0], x), bank.storage_version
    with caplog.at_level(logging.WARNING, logger="roadie"):
        bank.admit("same_kind", random_adapter(host.model, seed=9, group_size=4))
        assert not caplog.messages
        assert bank.storage_version == version
        bank.replace("same_kind", random_adapter(host.model, seed=9, group_size=8))
        assert "capture them again" in caplog.text
        assert bank.storage_version > version
        caplog.clear()
        bank.grow(64)
        assert "has grown to 64 slots" in caplog.text
    for _ in range(5):
        torch.randn(64, D)  # memory that was freed would be used again
    graph.replay()
    torch.testing.assert_close(result, wanted, rtol=0, atol=ORDER_OF_SUMS)
    caplog.clear()
    del static, graph
    gc.collect()
    with caplog.at_level(logging.WARNING, logger="roadie"):
        bank.grow(128)
    assert not caplog.messages


@torch.no_grad()
def test_what_graphs_read_goes_with_the_slots(host: Host) -> None:
    static = host.slots(BATCHES[0]).clone()
    with host.static(static):
        host.model(_x(4))
    kept = ref(static)
    del static
    for _ in range(2):  # layers remember the last rows
        host.wanted(BATCHES[1], _x(4))
    gc.collect()
    assert kept() is None


@torch.no_grad()
def test_slots_can_be_copied_and_saved(host: Host) -> None:
    """Nothing of what graphs read is a part of them."""
    static, file = host.slots(BATCHES[0]).clone(), io.BytesIO()
    with host.static(static):
        host.model(_x(4))
        torch.save(static, file)
        file.seek(0)
        assert torch.equal(torch.load(file), static)
        assert torch.equal(copy.deepcopy(static), static)


@torch.no_grad()
def test_rotated_inputs_and_expanded_rows_follow_static_slots() -> None:
    """Their slots are worked out anew in each call."""
    model = Net().double()
    with AdapterBank(model, slots=4, dtype=torch.float64) as bank:
        for seed, name in enumerate(NAMES):
            adapter = random_adapter(model, seed=seed, group_size=4)
            inputs = {f"{path}{INPUT_SUFFIX}": layer for path, layer in adapter.layers.items() if name == "b"}
            bank.admit(name, Adapter({**adapter.layers, **inputs}))
        held = [bank.slots(names) for names in BATCHES]
        static, x = held[0].clone(), _x(8)
        with bank.rows(static, expansion=2, static=True):
            for slots, names in zip(held * 2, BATCHES * 2, strict=True):
                static.copy_(slots)
                found = model(x)
                with bank.rows(names, expansion=2):
                    torch.testing.assert_close(found, model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "slots", [torch.zeros(4, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)[::2], ["a", "b"]], ids=str
)
def test_what_cannot_be_read_where_it_lies_is_refused(host: Host, slots: Any) -> None:
    with pytest.raises(RoutingError, match="static slots"), host.static(slots):
        pass


@torch.no_grad()
def test_in_debug_mode_values_out_of_range_are_noticed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROADIE_DEBUG", "1")
    static = host.slots(BATCHES[0]).clone()
    with host.static(static):
        host.model(_x(4))
        static.fill_(77)
        with pytest.raises(RuntimeError):
            host.model(_x(4))


@torch.no_grad()
def test_whole_modules_cannot_be_chosen_by_static_slots() -> None:
    config = roadie.RoadConfig(target_modules=["layers.0"], modules_to_save=["layers.1"], group_size=4)
    model = roadie.get_peft_model(Net().double(), config)
    static = torch.zeros(2, dtype=torch.int64)
    with roadie.rows(model, static, static=True), pytest.raises(RoutingError, match="not static"):
        model(_x(2))


class Flat(Net):
    """Its layers see all tokens flat, row by row."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids.flatten(0, 1)).view_as(input_ids)


@pytest.mark.parametrize("kind", ["bank", "peft"])
@torch.no_grad()
def test_layers_that_see_tokens_flat_do_not_rotate_by_the_rows_before(kind: str) -> None:
    """What they remember of other rows, for as many tokens, is not what the static slots say."""
    host = Host(kind, torch.float32, Flat)
    x, held = _x(4, 3).float(), [host.slots(names) for names in BATCHES]
    wanted = [host.wanted(names, x) for names in BATCHES]
    for names, slots, expected in zip(BATCHES, held[1:] + held[:1], wanted[1:] + wanted[:1], strict=True):
        with roadie.rows(host.model, names):
            for _ in range(3):
                host.model(x)
        with host.static(slots.clone()):
            for _ in range(3):
                assert torch.equal(host.model(x), expected)
