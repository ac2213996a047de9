"""From LoRA adapters as PEFT saves them: the change is the one that PEFT's own merging makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from roadie import checkpoint, fit
from roadie.errors import CheckpointError, ConfigError, UnsafeCheckpointError
from roadie.rotation import rotate_weight

G = 4


class Net(nn.Module):
    """Two linear layers, one with a bias, a Conv1D and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.up = nn.Linear(12, 8)
        self.out = nn.Linear(12, 8, bias=False)
        self.c_fc = Conv1D(8, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.up(x) + self.out(x) + self.c_fc(x)


def adapted(tmp_path: Path, **settings: Any) -> tuple[nn.Module, nn.Module, Path, Path]:
    """A net, the same with a LoRA adapter merged by PEFT, and the folders of both parts."""
    net = Net()
    base = tmp_path / "base"
    base.mkdir()
    save_file(net.state_dict(), base / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    arguments = {"target_modules": ["up", "out"], "r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings}
    model = peft.get_peft_model(net, peft.LoraConfig(**arguments))
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:  # they start as the lengths of the rows, which change nothing
            parameter.data *= 1 + torch.rand_like(parameter)
    model.save_pretrained(tmp_path / "lora")
    merged = model.merge_and_unload()
    plain = Net()
    plain.load_state_dict(before)
    return plain, merged, base, tmp_path / "lora"


def check(found: fit.Fit, plain: nn.Module, merged: nn.Module) -> None:
    """What the report says of each layer is what PEFT's merged weights show; the same fit comes from them."""
    for path, report in found.layers.items():
        weights = []
        for model in (plain, merged):
            module = model.get_submodule(path)
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            bias = [] if module.bias is None else [module.bias[:, None]]
            weights.append(torch.cat((weight, *bias), 1).detach().double())
        before, after = weights
        # PEFT merges in float32: each element of the sum is rounded, and so are the products.
        noise = 8 * torch.finfo(torch.float32).eps * float(after.abs().norm())
        assert report.change == pytest.approx(float((after - before).norm()), abs=noise)
        left = after - rotate_weight(before, found.adapter.layers[path].rotation)
        assert report.error == pytest.approx(float(left.norm()), abs=noise)
        best = fit.best_rotation(fit.moments(before, after, G), "road_2")
        torch.testing.assert_close(found.adapter.layers[path].rotation.direct.double(), best.direct, rtol=0, atol=1e-5)
        assert 0 < report.share_explained < 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["up"]},
        {"rank_pattern": {"up": 2}, "alpha_pattern": {"up": 7}},
        {"target_modules": ["c_fc"], "fan_in_fan_out": True},
        {"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True},
    ],
    ids=["lora", "rslora", "dora", "bias", "patterns", "conv1d", "dora-conv1d"],
)
def test_the_change_is_that_of_a_merge(tmp_path, settings) -> None:
    plain, merged, base, lora = adapted(tmp_path, **settings)
    found = fit.from_lora(lora, base, group_size=G)
    assert set(found.layers) == set(settings.get("target_modules", ["up", "out"]))
    check(found, plain, merged)
    assert found.not_fitted == ()
    checkpoint.save(found.adapter, tmp_path / "adapter")
    assert set(checkpoint.load(tmp_path / "adapter").layers) == set(found.layers)


def test_what_a_rotation_can_say_is_found(tmp_path) -> None:
    """A LoRA of full rank that turns: B A = (R - I) W."""
    net, base, lora = Net(), tmp_path / "base", tmp_path / "lora"
    for folder in (base, lora):
        folder.mkdir()
    save_file({"out.weight": net.out.weight.detach()}, base / "model.safetensors")
    theta, alpha = 0.3 * torch.randn(2, 8)
    rotation = fit.best_rotation(fit.moments(torch.eye(8), torch.eye(8), G), "road_2")
    rotation = type(rotation)(rotation.direct + theta, rotation.cross + alpha, G)
    weight = net.out.weight.detach().double()
    change = rotate_weight(weight, rotation) - weight
    prefix = "base_model.model.out.lora"
    factors = {f"{prefix}_A.weight": change.float().contiguous(), f"{prefix}_B.weight": 2 * torch.eye(8)}
    save_file(factors, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 4}))
    found = fit.from_lora(lora, base, group_size=G)
    got = found.adapter.layers["out"].rotation
    assert float((got.direct - rotation.direct).abs().max()) < 1e-6
    assert float((got.cross - rotation.cross).abs().max()) < 1e-6


def test_other_tensors_and_untargeted_layers_are_reported(tmp_path) -> None:
    _, _, base, lora = adapted(tmp_path, target_modules=["up", "out", "embed"], modules_to_save=["c_fc"])
    found = fit.from_lora(lora, base, group_size=G, target_modules=["out"])
    names = {each.name for each in found.not_fitted}
    assert {"base_model.model.up.lora_A.weight", "base_model.model.embed.lora_embedding_A"} <= names
    assert any("c_fc" in name for name in names)
    assert list(found.layers) == ["out"]


def test_the_config_names_the_base_of_the_lora(tmp_path) -> None:
    _, _, base, lora = adapted(tmp_path, task_type=None)
    edit(lora, base_model_name_or_path="org/base", task_type="CAUSAL_LM")
    config = fit.from_lora(lora, base, group_size=G).adapter.config
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/base", "CAUSAL_LM")


def edit(lora: Path, **changes: Any) -> None:
    file = lora / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "IA3"}, "'IA3'; wanted 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alpha_pattern": {"(": 3}}, "not a regular expression"),
    ],
)
def test_other_kinds_are_refused(tmp_path, changes, text) -> None:
    _, _, base, lora = adapted(tmp_path)
    edit(lora, **changes)
    with pytest.raises(CheckpointError, match=text):
        fit.from_lora(lora, base, group_size=G)


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    _, _, base, lora = adapted(tmp_path)
    file = lora / "adapter_model.safetensors"
    tensors = load_file(file)
    up = "base_model.model.up.lora_B.weight"
    for change, text in (
        ({up: torch.randn(6, 3)}, r"shape \[6, 3\]; wanted \[8, 3\]"),
        ({up: None}, "one factor of two"),
        ({up: torch.randn(8, 2)}, "rank 2"),
        ({up: torch.full((8, 3), torch.nan)}, "not finite"),
        ({"base_model.model.x.lora_A.weight": torch.randn(3, 12), "base_model.model.x.lora_B.weight": torch.randn(8, 3)},
         "x.weight: got no such weight"),
    ):  # fmt: skip
        save_file({key: tensor for key, tensor in {**tensors, **change}.items() if tensor is not None}, file)
        with pytest.raises(CheckpointError, match=text):
            fit.from_lora(lora, base, group_size=G)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="no linear layer is"):
        fit.from_lora(lora, base, group_size=G, target_modules=["q_proj"])
    file.rename(lora / "adapter_model.bin")
    with pytest.raises(UnsafeCheckpointError):
        fit.from_lora(lora, base, group_size=G)
    with pytest.raises(CheckpointError, match="no such file"):
        fit.from_lora(tmp_path / "none", base)
