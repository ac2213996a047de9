"""A bank of adapters that differ in how many rotations they have in a row: every row is, bit for bit, what it is alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roadie
from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.bank import AdapterBank
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import parameter_size, rotate
from roadie.testing.accuracy import assert_same_bits

WIDTHS = {"up": 32, "down": 16}
KINDS: list[tuple[str, list[int]]] = [
    ("road_1", [8]),
    ("road_2", [2, 8, 16]),
    ("road_4", [16, 2]),
    ("road_1", [2, 16]),
    ("road_2", [4]),
]
TARGETS = (("up", "down"), ("up",), ("down",))


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = (
            nn.Linear(16, WIDTHS["up"], dtype=dtype),
            nn.Linear(WIDTHS["up"], WIDTHS["down"], dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def adapter(seed: int, kind: tuple[str, list[int]] | None = None, targets: tuple[str, ...] | None = None) -> Adapter:
    variant, stages = kind or KINDS[seed % len(KINDS)]
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in targets or TARGETS[seed % 3]:
        size = len(stages) * parameter_size(variant, WIDTHS[path])
        theta, alpha = (torch.randn(size, generator=generator) * 0.2 for _ in range(2))
        layers[path] = LayerParameters(theta, 1 + alpha, variant, stages)
    return Adapter(layers, {"peft_type": "ROAD", "variant": variant, "stages": stages})


def alone(net: Net, x: Tensor, value: Adapter | None) -> Tensor:
    """What one adapter makes of x, computed without the bank."""

    def through(path: str, y: Tensor) -> Tensor:
        return rotate(y, *value.layers[path].rotations) if value is not None and path in value.layers else y

    return through("down", net.down(through("up", net.up(x)).tanh()))


def check_rows(net: Net, bank: AdapterBank, wanted: dict[str, Adapter], names: list[str | None], grad: bool) -> None:
    dtype = net.up.weight.dtype
    x = torch.randn(len(names), 3, 16, generator=torch.Generator().manual_seed(len(names))).to(dtype)
    with torch.set_grad_enabled(grad), bank.rows(names):
        once, again = net(x), net(x)  # the second time by what was prepared in the first
    with torch.no_grad():
        for row, name in enumerate(names):
            expected = alone(net, x, wanted[name] if name is not None else None)[row]
            assert_same_bits(once[row].detach(), expected, f"row {row}, {name}")
            assert_same_bits(again[row].detach(), expected, f"row {row}, {name}, again")


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_row_is_what_it_is_alone_whoever_came_and_went(dtype: torch.dtype, grad: bool) -> None:
    net = Net(dtype)
    wanted = {f"a{seed}": adapter(seed) for seed in range(12)}
    with AdapterBank(net, slots=12) as bank:
        for name in ("a0", "a4"):  # single rotations first: the tables become longer later
            bank.admit(name, wanted[name])
        check_rows(net, bank, wanted, ["a0", None, "a4"], grad)
        bank.update({name: value for name, value in wanted.items() if name not in ("a0", "a4")})
        names = [*wanted, None, "a3", None, "a3"]
        check_rows(net, bank, wanted, names, grad)
        bank.grow(20)
        wanted |= {"a1": adapter(100), "a2": adapter(104), "b": adapter(101)}  # fewer rotations, and more, than before
        for name in ("a1", "a2"):
            bank.replace(name, wanted[name])
        bank.admit("b", wanted["b"])
        check_rows(net, bank, wanted, [*names[::-1], "b"], grad)


def test_a_slot_that_a_chain_had_is_a_single_rotation_again() -> None:
    net, plain = Net(), adapter(0, ("road_1", [8]), ("up", "down"))
    with AdapterBank(net, slots=1) as bank:
        for value in (adapter(1, KINDS[1], ("up", "down")), plain, adapter(2, KINDS[2], ("up",)), plain):
            bank.update({"a": value})
            check_rows(net, bank, {"a": value}, ["a", None], grad=False)


def test_bytes_count_the_tables_of_all_rotations() -> None:
    net = Net()
    with AdapterBank(net, slots=3) as bank:
        bank.admit("a", adapter(0, ("road_1", [8]), ("up", "down")))
        one = bank.nbytes
        assert one == 2 * 4 * sum(WIDTHS.values()) * 4  # direct and cross, 4 slots, float32
        bank.admit("b", adapter(1, ("road_1", [2, 8, 16]), ("up", "down")))
        assert bank.nbytes == 3 * one + 2 * 3 * 4 * 4  # and the group sizes of three tables, int32


def test_gradients_through_a_bank_are_those_of_differences() -> None:
    net = Net(torch.float64)
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    with AdapterBank(net, slots=3, dtype=torch.float64) as bank:
        bank.update({f"a{seed}": adapter(seed, targets=("up", "down")) for seed in range(3)})
        with bank.rows(["a1", None, "a0", "a2"]):
            assert torch.autograd.gradcheck(net, (x,))


def test_files_live_adapters_and_rows_of_a_peft_model(tmp_path: Path) -> None:
    net, value = Net(), adapter(1, KINDS[1], ("up", "down"))
    with pytest.warns(UserWarning, match="several rotations in a row"):
        checkpoint.save(Adapter(value.layers, {**value.config, "target_modules": ["up", "down"]}), tmp_path)
    model: Any = roadie.PeftModel.from_pretrained(Net(), tmp_path, adapter_name="live")
    x = torch.randn(2, 16)
    with AdapterBank(net, slots=2) as bank, torch.no_grad():
        bank.admit("file", tmp_path)
        bank.admit("live", (model, "live"))
        with bank.rows(["file", "live"]):
            y = net(x)
        assert_same_bits(y, alone(net, x, value), "in the bank")
        assert_same_bits(model(x), y, "in PEFT")
        assert_same_bits(model(x, adapter_names=["live", "__base__"])[0], y[0], "rows in PEFT")


def test_blends_go_rotation_by_rotation_where_the_stages_agree() -> None:
    net, kind = Net(), KINDS[1]
    values = {name: adapter(seed, kind, ("up", "down")) for name, seed in (("a", 1), ("b", 6))}
    values["c"] = adapter(3, KINDS[3], ("up", "down"))
    x = torch.randn(4, 16)
    with AdapterBank(net, slots=8) as bank, torch.no_grad():
        bank.update(values)
        wishes: list[Any] = [{"a": 0.3, "b": 0.7}, {"a": 0.5}, {"a": -1}, {"b": 1}]
        with bank.rows(wishes):
            y = net(x)
        expected = [
            roadie.mean([values["a"], values["b"]], [0.3, 0.7]),
            roadie.power(values["a"], 0.5),
            roadie.inverse(values["a"]),
            values["b"],
        ]
        for row, wanted in enumerate(expected):
            torch.testing.assert_close(y[row], alone(net, x, wanted)[row])
        with pytest.raises(
            ConfigError, match=r"group sizes \[2, 8, 16\] and \[2, 16\] in a row.*blend: 0.5 a \+ 0.5 c"
        ):
            bank.slots([{"a": 0.5, "c": 0.5}])
        with pytest.raises(AdapterError, match="wanted none below 0"):
            bank.slots([{"a": 1.5, "b": -0.5}])


def test_what_is_not_finite_is_refused_with_the_layer() -> None:
    value = adapter(1, KINDS[1], ("up",))
    theta = value.layers["up"].theta.clone()
    theta[-1] = torch.nan
    broken = Adapter({"up": LayerParameters(theta, value.layers["up"].alpha, *KINDS[1])})
    with (
        AdapterBank(Net(), slots=2) as bank,
        pytest.raises(AdapterError, match=r"'bad' with values that are not finite.*'up'"),
    ):
        bank.admit("bad", broken)


def test_tables_become_longer_beside_those_that_are_being_read() -> None:
    net, plain = Net(), adapter(0, ("road_1", [8]), ("up", "down"))
    with AdapterBank(net, slots=2) as bank, torch.no_grad():
        bank.admit("a", plain)
        x, slots = torch.randn(1, 16), bank.slots(["a"])
        expected = alone(net, x, plain)
        before = bank._attached["up"].table.current
        bank.admit("b", adapter(1, KINDS[1], ("up", "down")))
        assert bank._attached["up"].table.current[0].direct is before[0].direct
        with bank.rows(slots):
            assert_same_bits(net(x), expected, "a, after the tables became longer")
