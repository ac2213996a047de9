"""Adapters with several rotations in a row (`stages`), in a PEFT model: what configs say, gradients, one rounding, files."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.models import linear_chain
from torch import Tensor

import roadie
from roadie import checkpoint
from roadie.errors import ConfigError
from roadie.rotation import rotate
from roadie.testing import randomise, tiny_llama
from roadie.testing.accuracy import assert_same_bits

BOTH = ["first", "second"]
VARIANTS = ("road_1", "road_2", "road_4")


def adapted(*, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = roadie.RoadConfig(**{"variant": "road_2", "stages": [2, 8, 16], "target_modules": BOTH, **settings})
    return roadie.get_peft_model(linear_chain(8, 16, 16, dtype=dtype), config)


def x_of(dtype: torch.dtype = torch.float32, rows: int = 3) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def layer_of(model: Any, name: str = "second") -> Any:
    return model.base_model.model.get_submodule(name)


@pytest.mark.parametrize(("variant", "size"), [("road_1", 8), ("road_2", 16), ("road_4", 32)])
def test_a_chain_starts_as_the_identity_with_parameters_for_each_rotation(variant: str, size: int) -> None:
    model = adapted(variant=variant)
    x = x_of()
    with model.disable_adapter():
        plain = model(x)
    assert torch.equal(model(x), plain)
    layer = layer_of(model)
    assert layer.road_theta["default"].shape == (3 * size,)
    assert layer.stages["default"] == (2, 8, 16)
    assert len(layer.rotations("default")) == 3
    with pytest.raises(ConfigError, match="3 rotations in a row; wanted a single rotation"):
        layer.rotation("default")


def test_what_stages_stand_for_is_the_product_of_their_matrices() -> None:
    model = randomise(adapted(variant="road_4"))
    layer = layer_of(model)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    matrix = layer.get_delta_weight("default")
    expected = layer.base_layer(x) @ matrix.mT
    torch.testing.assert_close(layer(x), expected)


def test_a_chain_of_one_is_a_plain_adapter(tmp_path: Path) -> None:
    config = roadie.RoadConfig(stages=[32], target_modules=BOTH)
    assert (config.stages, config.group_size) == (None, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / checkpoint.CONFIG_NAME).read_text())["variant"] == "road_1"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stages": []}, "wanted the group sizes of one or more"),
        ({"stages": "2,16"}, "wanted the group sizes of one or more"),
        ({"stages": [2, 7]}, "must be divisible by 2"),
        ({"stages": [2, 16], "group_size": 32}, r"stages=\[2, 16\] and group_size=32"),
        ({"stages": [2, 16], "group_size_pattern": {"q": 4}}, "and group_size_pattern"),
        ({"stages_pattern": {"(": [2]}}, "not a regular expression"),
        ({"stages_pattern": {"q": []}}, "wanted the group sizes of one or more"),
    ],
)
def test_stages_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        roadie.RoadConfig(**settings)


def test_a_stage_that_does_not_divide_a_layer_is_refused_or_adapted() -> None:
    with pytest.raises(ConfigError, match=r"divisible by group_size \(64\).*out_features=16.*Module: 'first'"):
        adapted(stages=[2, 64])
    model = adapted(stages=[2, 64], adapt_group_size=True)
    assert layer_of(model).stages["default"] == (2, 16)


def test_stages_may_differ_from_module_to_module() -> None:
    model = adapted(stages=None, group_size=4, stages_pattern={"second": [2, 8]})
    assert layer_of(model, "first").group_size["default"] == 4
    assert layer_of(model, "second").stages["default"] == (2, 8)
    with pytest.warns(RuntimeWarning, match=r"stages_pattern keys did not match any targeted module.*third"):
        adapted(stages_pattern={"third": [2, 8]})


@pytest.mark.parametrize("names", [None, ["default", "other", "__base__"]], ids=["plain batch", "mixed batch"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_gradients_are_those_of_differences_also_of_second_order(variant: str, names: list[str] | None) -> None:
    model = adapted(variant=variant, dtype=torch.float64)
    model.add_adapter("other", roadie.RoadConfig(stages=[16, 4], target_modules=BOTH))
    model = randomise(model.double(), scale=0.3)
    used = ("default",) if names is None else ("default", "other")
    parameters = [p for n, p in sorted(model.named_parameters()) if ".road_" in n and n.endswith(used)]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def output(x: Tensor, *_: Tensor) -> Tensor:
        result: Tensor = model(x) if names is None else model(x, adapter_names=names)
        return result

    inputs = (x_of(torch.float64).requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_there_is_one_rounding_however_many_rotations_in_training_too(dtype: torch.dtype, train: bool) -> None:
    model = randomise(adapted(dtype=dtype, variant="road_4"))
    layer = layer_of(model)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.set_grad_enabled(train):
        z = layer(x)
    assert z.requires_grad is train
    assert_same_bits(z.detach(), rotate(layer.base_layer(x), *layer.rotations("default")).detach(), "one rounding")


def test_backward_keeps_one_tensor_of_the_batch() -> None:
    layer = layer_of(randomise(adapted()))
    sizes: list[int] = []
    x = torch.randn(50, 16)
    y = layer.base_layer(x).detach()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer._rotated(y, False)
    assert sizes.count(50 * 16) == 1


@pytest.mark.slow
def test_a_compiled_model_computes_the_same_and_gives_the_same_gradients() -> None:
    model = randomise(adapted())
    x = x_of()
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted, gradients = model(x), torch.autograd.grad(model(x).sin().sum(), trained)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sin().sum(), trained), gradients)


def test_training_lowers_the_loss_and_a_loaded_adapter_gives_the_same(tmp_path: Path) -> None:
    model = adapted(stages=[2, 8, 16], variant="road_1")
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(4))
    teacher = randomise(adapted(stages=[2, 8, 16], variant="road_1"), seed=7, scale=0.5)
    wanted = teacher(x).detach()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(60):
        loss = (model(x) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    with pytest.warns(UserWarning, match="roadie alone loads it, and stock PEFT refuses it"):
        model.save_pretrained(tmp_path)
    again = roadie.PeftModel.from_pretrained(linear_chain(8, 16, 16), tmp_path)
    assert torch.equal(again(x), model(x))


@pytest.mark.slow
def test_stock_peft_refuses_the_files_of_chains_and_of_inputs(tmp_path: Path) -> None:
    code = (
        "import sys, peft\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n"
        "        print(peft.PeftConfig.from_pretrained(folder))\n"
        "    except ValueError as error:\n"
        "        print('REFUSED', error)\n"
        "assert 'roadie' not in sys.modules\n"
    )
    kinds = {"stages": "several rotations in a row", "input_stages": "rotations of inputs"}
    for name, kind in kinds.items():
        config = roadie.RoadConfig(target_modules=["q_proj"], **{name: [2, 16, 64]})
        model = roadie.get_peft_model(tiny_llama(num_hidden_layers=1), config)
        with pytest.warns(UserWarning, match=f"{kind}.*roadie alone loads it, and stock PEFT refuses it"):
            model.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in kinds]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    chains, inputs = done.stdout.splitlines()
    assert chains.startswith("REFUSED Invalid variant roadie-stages:road_1 specified"), done.stdout
    assert inputs.startswith("REFUSED Invalid variant roadie-inputs:road_1 specified"), done.stdout


def test_weights_with_too_few_rotations_are_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="several rotations in a row"):
        adapted(stages=[2, 8]).save_pretrained(tmp_path)
    file = tmp_path / checkpoint.CONFIG_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "stages": [2, 8, 16]}))
    base = linear_chain(8, 16, 16)
    with pytest.raises(ValueError, match=r"road_2 with 3 rotations in a row"):
        roadie.PeftModel.from_pretrained(base, tmp_path)
    assert type(base.first) is torch.nn.Linear


def test_train_only_refuses_a_chain() -> None:
    with pytest.raises(ConfigError, match="several rotations in a row"), roadie.train_only(adapted(), "1/2"):
        pass
