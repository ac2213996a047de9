"""A bank of adapters: every row is what it would be alone, whatever its neighbours are and whoever came and went."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.patience import HANG_S
from torch import Tensor, nn

import roadie
from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.bank import AdapterBank
from roadie.errors import AdapterError, BankFull, ConfigError, RoutingError, UnsupportedLayer
from roadie.rotation import Rotation, from_parameters, parameter_size, rotate, to_parameters
from roadie.sites.rows import Choice
from roadie.testing import randomise, tiny_llama

WIDTHS = {"up": 32, "down": 16}
KINDS = [("road_1", 8), ("road_2", 4), ("road_4", 16), ("road_1", 2), ("road_2", 16)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, WIDTHS["up"]), nn.Linear(WIDTHS["up"], WIDTHS["down"])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def adapter(seed: int, targets: tuple[str, ...] = ("up", "down"), kind: tuple[str, int] | None = None) -> Adapter:
    """An adapter of the net whose values, variant and group size follow from its seed."""
    variant, group_size = kind or KINDS[seed % len(KINDS)]
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in targets:
        size = parameter_size(variant, WIDTHS[path])
        theta, alpha = (torch.randn(size, generator=generator) * 0.3 for _ in range(2))
        layers[path] = LayerParameters(theta, 1 + alpha, variant, group_size)
    return Adapter(layers, {"variant": variant, "group_size": group_size})


def alone(net: Net, x: Tensor, rotations: dict[str, Rotation]) -> Tensor:
    """What one adapter makes of x, computed without the bank."""
    hidden = net.up(x)
    hidden = rotate(hidden, rotations["up"]) if "up" in rotations else hidden
    result = net.down(hidden.tanh())
    return rotate(result, rotations["down"]) if "down" in rotations else result


def rotations_of(value: Adapter) -> dict[str, Rotation]:
    return {path: layer.rotation for path, layer in value.layers.items()}


def check_rows(
    net: Net, bank: AdapterBank, wanted: dict[str, Adapter], names: list[str | None], grad: bool = False
) -> None:
    x = torch.randn(len(names), 3, 16, generator=torch.Generator().manual_seed(len(names)))
    with torch.set_grad_enabled(grad), bank.rows(names):
        y = net(x)
    for row, name in enumerate(names):
        rotations = rotations_of(wanted[name]) if name is not None else {}
        torch.testing.assert_close(y[row], alone(net, x[row : row + 1], rotations)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_every_row_is_what_it_is_alone_over_variants_group_sizes_and_target_sets(grad: bool) -> None:
    net = Net()
    targets = [("up", "down"), ("up",), ("down",)]
    wanted = {f"a{seed}": adapter(seed, targets[seed % 3]) for seed in range(12)}
    with AdapterBank(net, slots=12) as bank:
        for name, value in wanted.items():
            bank.admit(name, value)
        names = [*wanted, None, "a3", None, "a3"]
        check_rows(net, bank, wanted, names, grad)
        check_rows(net, bank, wanted, names[::-1], grad)


def test_without_rows_and_after_closing_the_model_is_the_base_model() -> None:
    net, x = Net(), torch.randn(2, 16)
    base = net(x)
    bank = AdapterBank(net, slots=2)
    bank.admit("a", adapter(0))
    assert torch.equal(net(x), base)
    with bank.rows(["a", None]):
        assert not torch.equal(net(x)[0], base[0])
    bank.close()
    assert torch.equal(net(x), base)
    assert not net.up._forward_hooks


def test_a_slot_a_token_of_a_packed_batch() -> None:
    net = Net()
    values = {name: adapter(seed) for seed, name in enumerate("ab")}
    x = torch.randn(1, 5, 16)
    with AdapterBank(net, slots=2) as bank, torch.no_grad():
        for name, value in values.items():
            bank.admit(name, value)
        names = ["b", None, "a", "a", "b"]
        with bank.rows(bank.slots(names)[None]):
            y = net(x)
        for token, name in enumerate(names):
            rotations = rotations_of(values[name]) if name else {}
            torch.testing.assert_close(y[:, token], alone(net, x[:, token], rotations), rtol=1e-5, atol=1e-6)


def test_the_least_recently_used_adapter_gives_way_and_comes_back_as_it_was() -> None:
    net = Net()
    wanted = {f"a{seed}": adapter(seed) for seed in range(5)}
    with AdapterBank(net, slots=3) as bank:
        for name in ("a0", "a1", "a2"):
            bank.admit(name, wanted[name])
        bank.pin("a1")
        bank.slots(["a0"])  # used just now
        gc.collect()
        bank.admit("a3", wanted["a3"])
        assert set(bank.names) == {"a0", "a1", "a3"}
        bank.admit("a4", wanted["a4"])
        assert set(bank.names) == {"a1", "a3", "a4"}
        with pytest.raises(RoutingError, match="'a0', which is not in the bank"):
            bank.slots(["a0"])
        bank.admit("a0", wanted["a0"])
        check_rows(net, bank, wanted, ["a0", "a1", "a4", None])


def test_a_full_bank_in_which_everything_is_pinned_or_read_admits_nothing_and_replaces_still() -> None:
    net = Net()
    wanted = {"a": adapter(0), "b": adapter(1)}
    with AdapterBank(net, slots=2, wait_s=0.05) as bank:
        for name, value in wanted.items():
            bank.admit(name, value)
        bank.pin("a")
        held = bank.slots(["b"])
        with pytest.raises(BankFull, match="got no free slot"):
            bank.admit("c", adapter(2))
        assert set(bank.names) == {"a", "b"}
        bank.replace("b", adapter(7))
        check_rows(net, bank, wanted | {"b": adapter(7)}, ["a", "b"])
        with torch.no_grad():  # whoever asked before goes on with what was there
            x = torch.randn(1, 16)
            with bank.rows(held):
                y = net(x)
            torch.testing.assert_close(y, alone(net, x, rotations_of(wanted["b"])), rtol=1e-5, atol=1e-6)
        with pytest.raises(BankFull):
            bank.replace("b", adapter(8))  # the spare slot is the one that is still being read
        del held
        gc.collect()
        bank.replace("b", adapter(8))
        check_rows(net, bank, wanted | {"b": adapter(8)}, ["a", "b"])


def test_a_bad_adapter_changes_nothing() -> None:
    net = Net()
    good = adapter(0)
    nan = Adapter({"up": LayerParameters(torch.full((16,), torch.nan), torch.ones(16), "road_1", 8)})
    foreign = Adapter({"elsewhere.up": good.layers["up"]})
    narrow = Adapter({"up": LayerParameters(torch.zeros(8), torch.ones(8), "road_1", 8)})
    with AdapterBank(net, slots=2) as bank:
        bank.admit("a", good)
        for value, why in ((nan, "not finite"), (foreign, "elsewhere.up"), (narrow, "16 outputs")):
            for act in (bank.admit, bank.replace):
                with pytest.raises(AdapterError, match=why):
                    act("b" if act == bank.admit else "a", value)
        with pytest.raises(ConfigError, match="in the bank already"):
            bank.admit("a", good)
        for act in (bank.evict, bank.pin, bank.unpin):
            with pytest.raises(RoutingError, match="not in the bank"):
                act("b")
        with pytest.raises(ConfigError, match="adapter name"):
            bank.admit("no/name", good)
        assert bank.names == ("a",)
        check_rows(net, bank, {"a": good}, ["a", None])


@pytest.mark.parametrize(
    "slots", [torch.tensor([0.0]), torch.tensor(0), torch.tensor([-2]), torch.tensor([99])], ids=str
)
def test_slots_that_are_none(slots: Tensor) -> None:
    with AdapterBank(Net(), slots=2) as bank, pytest.raises(RoutingError), bank.rows(slots):
        pass


@pytest.mark.parametrize(
    "wishes", ["a", {"a": 1.0}, [3], [{"a": "much"}], [{"a": float("nan")}], [{"a": True}]], ids=str
)
def test_wishes_that_are_none(wishes: Any) -> None:
    with AdapterBank(Net(), slots=2) as bank:
        bank.admit("a", adapter(0))
        with pytest.raises(RoutingError, match="got"):
            bank.slots(wishes)


def test_sources_are_values_folders_and_live_adapters(tmp_path: Path) -> None:
    model = randomise(roadie.get_peft_model(Net(), roadie.RoadConfig(target_modules=["up"], group_size=8)))
    net = Net()
    x = torch.randn(2, 16)
    with torch.no_grad():
        wanted = model(x)
    model.save_pretrained(str(tmp_path))
    with AdapterBank(net, slots=3) as bank, torch.no_grad():
        bank.admit("live", (model, "default"))
        bank.admit("folder", tmp_path)
        bank.admit("value", checkpoint.load(tmp_path))
        for name in ("live", "folder", "value"):
            with bank.rows([name, name]):
                torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-6)
        with pytest.raises(AdapterError, match="no layer with it"):
            bank.admit("other", (model, "other"))
        with pytest.raises(AdapterError, match="int"):
            bank.admit("other", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generation_with_left_padding_cache_and_beams(settings: dict[str, int]) -> None:
    llama = tiny_llama(initializer_range=0.3)
    llama.generation_config.eos_token_id = None
    peft = roadie.get_peft_model(
        tiny_llama(initializer_range=0.3), roadie.RoadConfig(target_modules="all-linear", group_size=16)
    )
    peft.add_adapter("other", roadie.RoadConfig(target_modules=["q_proj", "down_proj"], group_size=8, variant="road_2"))
    randomise(peft)
    peft.base_model.model.generation_config.eos_token_id = None
    prompts = torch.arange(4 * 5).reshape(4, 5) * 7 % 128
    mask = torch.ones_like(prompts)
    mask[1, :2] = 0
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask, **settings}
    names = ["default", None, "other", "default"]
    wanted = peft.generate(prompts, adapter_names=[name or "__base__" for name in names], **arguments)
    with AdapterBank(llama, slots=4) as bank:
        for name in ("default", "other"):
            bank.admit(name, (peft, name))
        with bank.rows(names, expansion=settings.get("num_beams", 1)):
            assert torch.equal(llama.generate(prompts, **arguments), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_again_with_the_rows_it_had(reentrant: bool) -> None:
    peft = randomise(roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(target_modules="all-linear", group_size=16)))
    embeddings = torch.randn(2, 5, 64)
    gradients = []
    for checkpointing in (False, True):
        llama = tiny_llama().train().requires_grad_(False)
        if checkpointing:
            llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
        x = embeddings.clone().requires_grad_()
        with AdapterBank(llama, slots=2) as bank:
            bank.admit("a", (peft, "default"))
            with bank.rows(["a", None]):
                loss = llama(inputs_embeds=x).logits.sin().sum()
            loss.backward()  # when the block is over
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("names", [["default", None], [None, "default"]], ids=str)
def test_an_encoder_decoder_model(names: list[str | None]) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)

    def model() -> Any:
        torch.manual_seed(0)
        return T5ForConditionalGeneration(config).eval()

    peft = randomise(roadie.get_peft_model(model(), roadie.RoadConfig(target_modules=["q", "v", "wo"], group_size=16)))
    tokens = torch.arange(2 * 6).reshape(2, 6) + 2
    arguments = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    wanted = peft.generate(input_ids=tokens, adapter_names=[name or "__base__" for name in names], **arguments)
    plain = model()
    with AdapterBank(plain, slots=2) as bank:
        bank.admit("default", (peft, "default"))
        with bank.rows(names, expansion=2):
            assert torch.equal(plain.generate(tokens, **arguments), wanted)


def test_bytes_are_what_the_sizes_say() -> None:
    with AdapterBank(Net(), slots=9) as bank:
        bank.admit("a", adapter(0))
        assert bank.bytes_per_adapter == 2 * 4 * (32 + 16)
        assert bank.nbytes == 10 * bank.bytes_per_adapter
    with AdapterBank(Net(), slots=9, dtype=torch.bfloat16) as bank:
        bank.admit("a", adapter(0))
        assert bank.bytes_per_adapter == 2 * 2 * (32 + 16)


def test_growing_keeps_what_is_there_and_is_counted() -> None:
    net = Net()
    wanted = {f"a{seed}": adapter(seed) for seed in range(6)}
    with AdapterBank(net, slots=2) as bank:
        bank.admit("a0", wanted["a0"])
        bank.admit("a1", wanted["a1"])
        before = bank.storage_version
        bank.grow(6)
        assert bank.storage_version == before + 1
        for name in ("a2", "a3", "a4", "a5"):
            bank.admit(name, wanted[name])
        check_rows(net, bank, wanted, [*wanted, None])
        with pytest.raises(ConfigError, match="does not shrink"):
            bank.grow(3)


def test_the_same_rows_again_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in decoding, where each step has a block of its own; what was written in between is seen."""
    looked_up = []
    find = Choice._find

    def counted(choice: Choice, y: Tensor, *others: Any) -> Any:
        looked_up.append(y.shape)
        return find(choice, y, *others)

    monkeypatch.setattr(Choice, "_find", counted)
    net, names = Net(), ["a0", None, "a1", "a0"]
    wanted = {"a0": adapter(0), "a1": adapter(1)}
    with AdapterBank(net, slots=3) as bank:
        for name, value in wanted.items():
            bank.admit(name, value)
        for _ in range(3):
            check_rows(net, bank, wanted, names)
        assert len(looked_up) == 1  # for both layers, whose outputs have the same rows
        for again in (names[::-1], [*names, "a1"]):
            looked_up.clear()
            check_rows(net, bank, wanted, again)
            assert len(looked_up) == 1
        for change in (bank.replace, bank.grow, bank.replace):
            if change == bank.grow:
                bank.grow(bank.num_slots + 3)
            else:
                wanted["a1"] = adapter(len(looked_up) + 5)
                bank.replace("a1", wanted["a1"])
            looked_up.clear()
            for _ in range(2):
                check_rows(net, bank, wanted, names)
            assert len(looked_up) == (0 if change == bank.grow else 1)  # the slots are where they were


def test_rows_of_roadie_find_the_bank_and_one_bank_serves_a_model() -> None:
    net = Net()
    with AdapterBank(net, slots=2) as bank:
        bank.admit("a", adapter(0))
        x = torch.randn(1, 16)
        with torch.no_grad():
            with bank.rows(["a"]):
                wanted = net(x)
            with roadie.rows(net, bank.slots(["a"])):
                assert torch.equal(net(x), wanted)
        with pytest.raises(ConfigError, match="serves already"):
            AdapterBank(net)
    AdapterBank(net).close()
    with pytest.raises(ConfigError, match="without linear layers"):
        AdapterBank(nn.ReLU())


def test_a_compiled_model_is_one_program_whatever_the_rows_choose() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    net, counter = Net(), CompileCounter()
    with AdapterBank(net, slots=4) as bank, torch.no_grad():
        for seed in range(4):
            bank.admit(f"a{seed}", adapter(seed))
        compiled = torch.compile(net, fullgraph=True, backend=counter)
        x = torch.randn(3, 16)
        for names in (["a0", "a1", None], ["a3", "a3", "a2"], [None, None, "a1"]):
            with bank.rows(names):
                torch.testing.assert_close(compiled(x), net(x))
        assert counter.frame_count == 1
    torch._dynamo.reset()


def test_no_row_is_wrong_while_another_thread_admits_and_replaces() -> None:
    """Each version of an adapter scales by a number of its own: a row must be one version of its own adapter, all the way."""
    net, stop, versions = Net(), threading.Event(), {"a": [1.0], "b": [-1.0]}

    def scaling(factor: float) -> Adapter:
        turns = {path: Rotation(torch.full((width,), factor), torch.zeros(width), 8) for path, width in WIDTHS.items()}
        return Adapter(
            {path: LayerParameters(*to_parameters(turn, "road_2"), "road_2", 8) for path, turn in turns.items()}
        )

    def write() -> None:
        step = 1
        while not stop.is_set():
            step += 1
            for name, sign in (("a", 1.0), ("b", -1.0)):
                factor = sign * (1 + step % 50 / 10)
                versions[name].append(factor)
                bank.replace(name, scaling(factor))
            bank.admit(f"c{step}", scaling(9.0))

    with AdapterBank(net, slots=5) as bank:
        for name, (factor,) in versions.items():
            bank.admit(name, scaling(factor))
            bank.pin(name)
        writer = threading.Thread(target=write)
        writer.start()
        x, checked = torch.randn(1, 16), 0
        with torch.no_grad():
            while checked < 200 or len(versions["a"]) <= 200:
                assert writer.is_alive(), "a replacement failed"
                first = {name: len(versions[name]) - 2 for name in "ab"}  # written down before they are in force
                with bank.rows(["a", "b"]):
                    y = net(x.expand(2, -1))
                for row, name in enumerate("ab"):
                    factors = dict.fromkeys(versions[name][max(0, first[name]) :])
                    possible = [alone(net, x, rotations_of(scaling(factor)))[0] for factor in factors]
                    assert min(float((y[row] - one).abs().max()) for one in possible) < 1e-4
                    checked += 1
        stop.set()
        writer.join()


@pytest.mark.slow
def test_a_plain_model_needs_no_peft() -> None:
    code = (
        "import sys, torch, roadie\n"
        "from torch import nn\n"
        "net = nn.Sequential(nn.Linear(4, 8))\n"
        "layer = roadie.LayerParameters(torch.ones(4), torch.ones(4), 'road_1', 8)\n"
        "bank = roadie.AdapterBank(net, slots=2)\n"
        "bank.admit('a', roadie.Adapter({'0': layer}))\n"
        "with roadie.rows(net, bank.slots(['a', None])): net(torch.ones(2, 4))\n"
        "assert not {'peft', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_S)


def test_blends_of_road_1_are_the_closed_form() -> None:
    net = Net()
    first, second = (adapter(seed, kind=("road_1", 8)) for seed in (1, 2))
    x = torch.randn(1, 16)
    with AdapterBank(net, slots=4) as bank, torch.no_grad():
        bank.admit("first", first)
        bank.admit("second", second)
        for weights in ({"first": 0.7, "second": 0.3}, {"first": 1.5}, {"first": -1}, {"first": -0.5, "second": 2}):
            with bank.rows([weights]):
                y = net(x)
            rotations = {}
            for path in WIDTHS:
                parts = [
                    (value.layers[path], weights.get(name, 0)) for name, value in (("first", first), ("second", second))
                ]
                theta = sum(layer.theta.double() * weight for layer, weight in parts)
                alpha = torch.stack([layer.alpha.double() ** weight for layer, weight in parts]).prod(0)
                rotations[path] = from_parameters(theta, alpha, "road_1", 8)
            torch.testing.assert_close(y, alone(net, x, rotations), rtol=1e-4, atol=1e-5)


def test_a_blend_is_made_once_and_not_kept_when_a_part_of_it_changes() -> None:
    net = Net()
    with AdapterBank(net, slots=4) as bank, torch.no_grad():
        bank.admit("a", adapter(0, kind=("road_1", 8)))
        bank.admit("b", adapter(5, kind=("road_1", 8)))
        wish = {"a": 0.5, "b": 0.5}
        slot = int(bank.slots([wish]))
        assert int(bank.slots([wish])) == slot
        assert torch.equal(
            bank.slots([{"a": 1.0}, {"a": 0.0}, {}, {"a": 1, "b": 0}]),
            torch.tensor([int(bank.slots(["a"])), -1, -1, int(bank.slots(["a"]))]),
        )
        x = torch.randn(1, 16)
        with bank.rows([wish]):
            before = net(x)
        bank.replace("b", adapter(10, kind=("road_1", 8)))
        with bank.rows([wish]):
            after = net(x)
        assert not torch.equal(before, after)
        bank.evict("b")
        with pytest.raises(RoutingError, match="'b', which is not in the bank"):
            bank.slots([wish])


def test_blends_that_do_not_exist_are_refused_with_layer_and_adapter() -> None:
    mirror = Rotation(torch.tensor([1.0, -1.0] * 16), torch.zeros(32), 2)
    reflecting = Adapter({"up": LayerParameters(*to_parameters(mirror, "road_2"), "road_2", 2)})
    with AdapterBank(Net(), slots=4) as bank:
        bank.admit("mirror", reflecting)
        bank.admit("turn", adapter(0, kind=("road_1", 2)))
        bank.admit("wide", adapter(0, kind=("road_1", 8)))
        with pytest.raises(AdapterError, match=r"logarithm.*Layer: 'up'; blend: 0.5 mirror"):
            bank.slots([{"mirror": 0.5}])
        with pytest.raises(AdapterError, match="logarithm"):
            bank.slots([{"mirror": 1, "turn": 1}])
        with pytest.raises(ConfigError, match=r"group sizes \[2, 8\].*Layer: 'up'"):
            bank.slots([{"turn": 0.5, "wide": 0.5}])
        with pytest.raises(AdapterError, match=r"400 turn, which torch.float32 cannot hold in layer 'up'"):
            bank.slots([{"turn": 400}])
        assert int(bank.slots([{"mirror": 2}])) >= 0  # an integer needs no logarithm
        assert int(bank.slots([{"mirror": -1}])) >= 0


class _Reads(Net):
    """Computes with the weight of its second layer, and does not call it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).tanh() @ self.down.weight.t()


def test_an_adapter_of_a_layer_that_the_model_does_not_call_is_refused() -> None:
    with AdapterBank(_Reads(), slots=2) as bank:
        with pytest.raises(AdapterError, match=r"'a' with a rotation of 'down': _Reads\.forward reads its weight"):
            bank.admit("a", adapter(0))
        assert bank.names == ()
        bank.admit("b", adapter(0, ("up",)))


def test_a_layer_that_gives_a_tuple_is_refused_and_one_that_does_so_after_all_is_named() -> None:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, y.softmax(-1)

    routed, net = Net(), Net()
    routed.down = Router(routed.down.in_features, routed.down.out_features)
    with AdapterBank(routed, slots=2) as bank, pytest.raises(AdapterError, match="Router gives a tuple of 2"):
        bank.admit("a", adapter(0))
    net.down.forward = lambda x: (x, x)  # no rule sees this one
    with AdapterBank(net, slots=2) as bank:
        bank.admit("a", adapter(0))
        with bank.rows(["a", None]), pytest.raises(UnsupportedLayer, match=r"down: got a tuple of 2 from Linear"):
            net(torch.randn(2, 16))
