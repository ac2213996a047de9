"""The summary of an adapter file, against numbers known by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.errors import CheckpointError
from roadie.training.summary import Range, summarise


@pytest.fixture
def path(tmp_path):
    def layer(theta, alpha, outputs=8, variant="road_1"):
        number = outputs // 2 if variant == "road_1" else outputs
        thetas, alphas = torch.zeros(number), torch.ones(number)
        thetas[1], alphas[2] = theta, alpha
        return LayerParameters(thetas, alphas, variant, 4)

    layers = {
        "model.layers.0.q_proj": layer(math.radians(30), 0.5),
        "model.layers.1.q_proj": layer(math.radians(-45), 1.0),
        "model.layers.0.up_proj": layer(math.radians(10), -2.0, outputs=16, variant="road_2"),
    }
    config = {
        "base_model_name_or_path": "owner/base",
        "group_size": 4,
        "modules_to_save": ["lm_head"],
        "peft_type": "ROAD",
        "target_modules": ["q_proj", "up_proj"],
        "variant": "road_1",
        "variant_pattern": {"up_proj": "road_2"},
    }
    other = {"base_model.model.lm_head.weight": torch.zeros(3, 8)}
    checkpoint.save(Adapter(layers, config, other), tmp_path / "adapter")
    return tmp_path / "adapter"


def close(found, least, most):
    assert (found.least, found.most) == pytest.approx((least, most), abs=1e-5)


def test_the_numbers(path):
    summary = summarise(path)
    assert (summary.base_model, summary.layers, summary.parameters) == ("owner/base", 3, 8 + 8 + 32)
    assert summary.num_bytes == 4 * (8 + 8 + 32 + 24)
    assert summary.file_bytes == (path / "adapter_model.safetensors").stat().st_size
    assert (summary.variants, summary.group_sizes, summary.dtypes) == (("road_1", "road_2"), (4,), ("float32",))
    assert (summary.modules_to_save, summary.targets) == (("lm_head",), ("q_proj", "up_proj"))
    assert summary.other == (("base_model.model.lm_head.weight", (3, 8)),)
    assert summary.extras == {"variant_pattern": {"up_proj": "road_2"}}
    close(summary.scale, 0.5, 2.0)
    close(summary.angle_degrees, -45, 180)  # alpha = -2 is a scale of 2 and half a turn


def test_layers_of_one_name_are_taken_together(path):
    q, up = summarise(path).kinds
    assert (q.name, q.layers, q.out_features, q.variants, q.parameters) == ("q_proj", 2, (8,), ("road_1",), 16)
    assert (up.name, up.layers, up.out_features, up.variants, up.parameters) == ("up_proj", 1, (16,), ("road_2",), 32)
    close(q.angle_degrees, -45, 30)
    close(q.scale, 0.5, 1.0)


def test_an_adapter_that_changes_nothing(path):
    adapter = checkpoint.load(path)
    layers = {
        name: LayerParameters(torch.zeros_like(p.theta), torch.ones_like(p.alpha), p.variant, 4)
        for name, p in adapter.layers.items()
    }
    checkpoint.save(Adapter(layers, adapter.config, {}), path)
    summary = summarise(path)
    assert (summary.angle_degrees, summary.scale) == (Range(0, 0), Range(1, 1))
    assert summary.other == ()


def test_a_summary_survives_json(path):
    mapping = json.loads(json.dumps(asdict(summarise(path))))
    assert mapping["kinds"][0]["name"] == "q_proj"
    assert mapping["config"]["modules_to_save"] == ["lm_head"]


def test_a_damaged_file_is_refused(path):
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="adapter_model"):
        summarise(path)


def test_no_model_library_is_loaded(path):
    script = f"""
import sys
from roadie.training.adapters import adapter_folder
from roadie.training.summary import summarise
with adapter_folder({str(path)!r}) as folder:
    print(summarise(folder).layers, sorted({{"transformers", "peft", "accelerate", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert done.stdout.strip() == "3 []", done.stderr
