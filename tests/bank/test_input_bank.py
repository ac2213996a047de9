"""A bank of adapters of which some rotate a layer's input too: every row is, bit for bit, what it is alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import roadie
from roadie.adapter import INPUT_SUFFIX, Adapter, LayerParameters
from roadie.bank import AdapterBank
from roadie.errors import AdapterError
from roadie.rotation import parameter_size, rotate
from roadie.testing.accuracy import assert_same_bits

WIDTHS = {"up": 32, "gate": 32, "down": 16, "up.road_input": 16, "gate.road_input": 16, "down.road_input": 32}
KINDS: dict[str, dict[str, list[int]]] = {  # the group sizes at each site
    "plain": {"up": [8], "gate": [8], "down": [8]},
    "inputs": {
        "up": [8],
        "up.road_input": [4],
        "gate": [8],
        "gate.road_input": [16],
        "down": [8],
        "down.road_input": [8],
    },
    "deep": {"up": [2, 8], "up.road_input": [16, 2, 4], "down": [4]},
    "one": {"gate": [16], "gate.road_input": [2]},
    "partial": {"up": [8], "down": [4], "down.road_input": [2, 16]},
}
VARIANTS = ("road_1", "road_2", "road_4")


class Net(nn.Module):
    """up and gate are given one tensor."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, conv1d: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = (lambda i, o: Conv1D(o, i)) if conv1d else nn.Linear
        self.up, self.gate, self.down = (make(i, o).to(dtype) for i, o in ((16, 32), (16, 32), (32, 16)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh() * self.gate(x)) + x


def adapter(kind: str, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    variant = VARIANTS[seed % 3]
    layers = {}
    for path, stages in KINDS[kind].items():
        size = len(stages) * parameter_size(variant, WIDTHS[path])
        theta, alpha = (torch.randn(size, generator=generator) * 0.2 for _ in range(2))
        layers[path] = LayerParameters(theta, 1 + alpha, variant, stages)
    return Adapter(layers, {"peft_type": "ROAD", "variant": variant})


def alone(net: Net, x: Tensor, value: Adapter | None) -> Tensor:
    """What one adapter makes of x, computed without the bank."""

    def at(path: str, y: Tensor) -> Tensor:
        return rotate(y, *value.layers[path].rotations) if value is not None and path in value.layers else y

    def through(path: str, y: Tensor) -> Tensor:
        return at(path, net.get_submodule(path)(at(f"{path}{INPUT_SUFFIX}", y)))

    return through("down", through("up", x).tanh() * through("gate", x)) + x


def check_rows(net: Net, bank: AdapterBank, wanted: dict[str, Adapter], names: list[str | None], grad: bool) -> None:
    x = torch.randn(len(names), 3, 16, generator=torch.Generator().manual_seed(len(names))).to(net.down.weight.dtype)
    given = x.clone()
    with torch.set_grad_enabled(grad), bank.rows(names):
        once, again = net(x), net(x)  # the second time by what was prepared in the first
    assert_same_bits(x, given, "what the layers were given")
    with torch.no_grad():
        for row, name in enumerate(names):
            expected = alone(net, x, wanted[name] if name is not None else None)[row]
            assert_same_bits(once[row].detach(), expected, f"row {row}, {name}")
            assert_same_bits(again[row].detach(), expected, f"row {row}, {name}, again")


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_row_is_what_it_is_alone_whoever_came_and_went(dtype: torch.dtype, grad: bool) -> None:
    net = Net(dtype)
    wanted = {f"{kind}{seed}": adapter(kind, seed) for kind in KINDS for seed in range(3)}
    with AdapterBank(net, slots=len(wanted)) as bank:
        bank.admit("plain0", wanted["plain0"])
        check_rows(net, bank, wanted, ["plain0", None], grad)
        bank.admit("inputs1", wanted["inputs1"])  # tables of inputs are made beside what is there
        check_rows(net, bank, wanted, ["plain0", "inputs1", None], grad)
        bank.update({name: value for name, value in wanted.items() if name not in bank})
        names = [*wanted, None, "deep2", None, "one0"]
        check_rows(net, bank, wanted, names, grad)
        bank.grow(20)
        wanted |= {"inputs0": adapter("plain", 7), "plain1": adapter("deep", 8), "new": adapter("inputs", 10)}
        for name in ("inputs0", "plain1"):  # an input no longer rotated, and one that was not
            bank.replace(name, wanted[name])
        bank.admit("new", wanted["new"])
        check_rows(net, bank, wanted, [*names[::-1], "new"], grad)
        check_rows(net, bank, wanted, ["plain0", "plain2", None], grad)  # no row has one


def test_a_bank_of_plain_adapters_has_nothing_of_inputs() -> None:
    net = Net()
    with AdapterBank(net, slots=3) as bank:
        bank.update({"a": adapter("plain"), "b": adapter("plain", 1)})
        before = bank.nbytes
        assert not any(module._forward_pre_hooks for module in net.modules())
        bank.admit("c", adapter("inputs"))
        assert sum(len(module._forward_pre_hooks) for module in net.modules()) == 3
        holders = 3 * 5 * 8  # int64: four slots and the end, in three tables
        assert bank.nbytes == before + 2 * 4 * 4 * (16 + 16 + 32) + holders + _sizes_that_differ(bank)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def _sizes_that_differ(bank: AdapterBank) -> int:
    return sum(
        table.sizes.nbytes
        for held in bank._attached.values()
        for table in held.table.current
        if table.sizes is not None
    )


def test_a_row_without_a_rotation_of_its_input_passes_bit_for_bit() -> None:
    layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.eye(4))
    net = nn.Sequential(layer)
    theta = torch.full((2,), 0.3)
    plain = Adapter({"0": LayerParameters(theta, theta, "road_1", 4)})
    rotated = Adapter({f"0{INPUT_SUFFIX}": LayerParameters(theta, theta, "road_1", 4)})
    x = torch.tensor([[-0.0, torch.inf, 1.0, -0.0], [torch.nan, -0.0, -torch.inf, 2.0], [1.0, 2.0, 3.0, 4.0]])
    seen = []
    with AdapterBank(net, slots=2) as bank, torch.no_grad():
        bank.update({"plain": plain, "rotated": rotated})
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with bank.rows(["plain", None, "rotated"]):
            net(x), net(x)
        with bank.rows(["plain", None, "plain"]):
            net(x), net(x)
        with bank.rows(["plain", None, "rotated"]):
            net(x)
            of_input = bank._attached[f"0{INPUT_SUFFIX}"]
            seen.append(torch.compile(lambda given: of_input.of(given, bool), backend="eager")(x))
    assert all(given is x for given in seen[2:4])  # not even a copy, where no row has one
    for given in seen[:2] + seen[4:]:
        assert torch.equal(given[:2].view(torch.int32), x[:2].view(torch.int32))
        torch.testing.assert_close(given[2], rotate(x[2], rotated.layers[f"0{INPUT_SUFFIX}"].rotation))


def test_a_slot_that_held_one_has_none_again() -> None:
    net, x, seen = Net(), torch.full((1, 16), -0.0), []
    with AdapterBank(net, slots=1) as bank, torch.no_grad():
        for kind in ("inputs", "plain", "plain"):  # there are two slots
            bank.update({"a": adapter(kind)})
        net.up.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with bank.rows(["a"]):
            net(x)
    assert seen[0] is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_blends_and_strengths(dtype: torch.dtype) -> None:
    net = Net(dtype)
    values = {"a": adapter("inputs", 0), "b": adapter("inputs", 3), "plain": adapter("plain", 1)}
    x = torch.randn(1, 6, 16).to(dtype)
    wishes: list[Any] = [{"a": 0.3, "b": 0.7}, {"a": 0.5}, {"a": -1}, None, {"b": 0.5, "plain": 0.5}, "plain"]
    with AdapterBank(net, slots=8) as bank, torch.no_grad():
        bank.update(values)
        with bank.rows(bank.slots(wishes).unsqueeze(0)):  # a slot a token
            y = net(x)
    expected = [
        roadie.mean([values["a"], values["b"]], [0.3, 0.7]),
        roadie.power(values["a"], 0.5),
        roadie.inverse(values["a"]),
        None,
        roadie.mean([values["b"], values["plain"]]),
        values["plain"],
    ]
    for token, wanted in enumerate(expected):
        wide = alone(net.double(), x[:, token].double(), wanted)
        net.to(dtype)
        torch.testing.assert_close(y[:, token].double(), wide, **_tolerance(dtype))


def _tolerance(dtype: torch.dtype) -> dict[str, float]:
    # A dozen roundings on the way, of values of a few units.
    return {"rtol": 0, "atol": 64 * torch.finfo(dtype).eps}


def test_conv1d_has_its_inputs_in_the_other_dimension_of_the_weight() -> None:
    net = Net(conv1d=True)
    with AdapterBank(net, slots=3) as bank:
        wanted = {"a": adapter("inputs"), "b": adapter("deep", 1)}
        bank.update(wanted)
        check_rows(net, bank, wanted, ["a", None, "b"], grad=False)


def test_gradients_through_a_bank_are_those_of_differences() -> None:
    net = Net(torch.float64).requires_grad_(False)
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    with AdapterBank(net, slots=3, dtype=torch.float64) as bank:
        bank.update({"a": adapter("inputs"), "b": adapter("deep", 1), "c": adapter("plain", 2)})
        with bank.rows(["a", None, "b", "c"]):
            assert torch.autograd.gradcheck(net, (x,))


def test_a_compiled_model_is_one_program_whoever_has_inputs() -> None:
    net, count = Net().requires_grad_(False), 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    wanted = {"a": adapter("inputs"), "b": adapter("deep", 1), "plain": adapter("plain", 2)}
    x = torch.randn(3, 2, 16)
    with AdapterBank(net, slots=3) as bank, torch.no_grad():
        bank.update(wanted)
        compiled = torch.compile(net, backend=backend, fullgraph=True)
        for names in (["a", None, "plain"], ["plain", "b", "a"], [None, None, "plain"]):
            with bank.rows(names):
                y = compiled(x)
            for row, name in enumerate(names):
                torch.testing.assert_close(y[row], alone(net, x, wanted.get(name))[row])
    assert count == 1
    torch.compiler.reset()


def test_an_update_is_of_all_sites_or_of_none() -> None:
    net, good = Net(), adapter("inputs")
    broken = dict(good.layers)
    broken["up.road_input"] = LayerParameters(torch.ones(16), torch.full((16,), torch.nan), "road_2", 16)
    narrow = {**good.layers, "down.road_input": good.layers["up.road_input"]}
    elsewhere = {**good.layers, "side.road_input": good.layers["up.road_input"]}
    with AdapterBank(net, slots=2) as bank:
        bank.admit("a", good)
        for layers, says in (
            (broken, r"not finite.*'up\.road_input'"),
            (narrow, r"16 inputs for 'down\.road_input'; wanted 32"),
            (elsewhere, r"side\.road_input: not a linear layer"),
        ):
            with pytest.raises(AdapterError, match=says):
                bank.update({"b": good, "a": Adapter(layers)})
            assert bank.names == ("a",)
        check_rows(net, bank, {"a": good}, ["a", None], grad=False)


def test_rows_that_run_see_the_old_inputs_or_the_new_ones() -> None:
    net, values = Net(), [adapter("inputs", seed) for seed in (0, 3)]
    x, stop, wrong = torch.randn(1, 16), threading.Event(), []
    with torch.no_grad():
        right = [alone(net, x, value) for value in values]

    with AdapterBank(net, slots=3) as bank:
        bank.admit("a", values[0])

        def read() -> None:
            with torch.no_grad():
                while not stop.is_set():
                    with bank.rows(["a"]):
                        ys = [net(x) for _ in range(3)]
                    if not any(all(torch.equal(y, one) for y in ys) for one in right):
                        wrong.append(ys)

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(60):
            bank.replace("a", values[number % 2])
        stop.set()
        reader.join()
    assert not wrong
