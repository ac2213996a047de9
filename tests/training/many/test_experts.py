"""Jobs that train stacked experts beside others: each is what it would be alone; then served together, and merged."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.versions import needs_stacked_experts
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import roadie
from roadie import checkpoint
from roadie.training.many import JobStatus, train_many

together = runpy.run_path(str(Path(__file__).with_name("test_together.py")))
KINDS = ("each", "shared", None, "each")

pytestmark = [pytest.mark.filterwarnings("ignore:this adapter has"), needs_stacked_experts]


@pytest.fixture
def moe_path(tiny_path: Path, tmp_path: Path) -> Path:
    """A mixture of four experts with the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **sizes, **heads, vocab_size=len(tokenizer), num_experts=4, num_experts_per_tok=2, initializer_range=0.2
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


def texts_of(model: Any, path: Path, **arguments: Any) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer(["01 is "] * 4, return_tensors="pt", return_token_type_ids=False)
    made = model.generate(**batch, do_sample=False, max_new_tokens=12, **arguments)
    return tokenizer.batch_decode(made)


def test_jobs_with_experts_are_runs_of_their_own_and_say_the_same_served_and_merged(some_jobs, moe_path):
    changes = {"variant": "road_1", "targets": ["q_proj", "o_proj"], "group_size": 8, "steps": 6}
    jobs = [
        {**job, "target_experts": kind} if kind else job
        for job, kind in zip(some_jobs(4, **changes), KINDS, strict=True)
    ]
    result = train_many(jobs, model=str(moe_path))
    assert [job.status for job in result.jobs] == [JobStatus.FINISHED] * 4
    for job, kind in zip(jobs, KINDS, strict=True):
        expected, tensors = together["alone"](job, moe_path)
        together["assert_same_losses"](together["losses"](result, job["name"]), expected)
        adapter = checkpoint.load(job["output"])
        assert adapter.config.get("target_experts") == kind
        assert adapter.config["target_modules"] == ["o_proj", "q_proj"]
        assert {f"base_model.model.{path}.road_theta.default" for path in adapter.layers} <= tensors.keys()
        assert len(adapter.layers) == len(tensors) // 2 == (8 if kind else 4)
    base = AutoModelForCausalLM.from_pretrained(moe_path)
    with roadie.AdapterBank(base, slots=4) as bank:
        for job in jobs:
            bank.admit(job["name"], job["output"])
        with bank.rows([job["name"] for job in jobs]):
            served = texts_of(base, moe_path)
    assert len(set(served)) > 1
    for row, job in enumerate(jobs):
        model = roadie.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(moe_path), job["output"])
        assert texts_of(model, moe_path)[row] == served[row]
        assert texts_of(model.merge_and_unload(), moe_path)[row] == served[row]


def test_the_command_line_trains_experts_and_shows_them(moe_path, texts, tmp_path):
    from typer.testing import CliRunner

    from roadie.cli.app import app

    run = ["train", str(texts), "-o", str(tmp_path / "a"), "-m", str(moe_path), "--target-experts", "shared"]
    shown = CliRunner().invoke(
        app, [*run, "--group-size", "8", "--max-steps", "2", "--batch-size", "2", "--lr", "0.01"]
    )
    assert shown.exit_code == 0, shown.output
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_experts"] == "shared"
    layers = checkpoint.load(tmp_path / "a").layers
    assert any(bool(layer.theta.any()) for path, layer in layers.items() if path.endswith(".road_down_shared"))
    assert "road_gate_up_shared" in CliRunner().invoke(app, ["info", str(tmp_path / "a")]).output
