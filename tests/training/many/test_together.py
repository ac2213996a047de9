"""Jobs that are trained together are what each would be alone: against a plain loop over an adapted model."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftModel as StockPeftModel
from transformers import AutoModelForCausalLM

import roadie
from roadie import checkpoint
from roadie.testing import stock_peft
from roadie.training.encoding import collate
from roadie.training.many import Job, JobStatus, RunSettings, train_many
from roadie.training.many.data import load_data
from roadie.training.many.schedule import learning_rate
from roadie.training.models import ModelSource, load_tokenizer

SHARED = runpy.run_path(str(Path(__file__).parent / "conftest.py"))
losses, OF_LOSSES = SHARED["losses"], SHARED["OF_LOSSES"]


def alone(settings: dict, base: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step and the adapter's tensors, by PEFT's way: a model, torch's AdamW, a loss with padding masked."""
    job = Job.from_mapping(settings)
    recipe, data = job.recipe, load_data(job, load_tokenizer(ModelSource(str(base))), None)
    targets = recipe.target_modules
    config = roadie.RoadConfig(
        variant=recipe.variant,
        group_size=recipe.group_size,
        stages=list(recipe.stages) if recipe.stages else None,
        input_stages=list(recipe.input_stages) if recipe.input_stages else None,
        target_experts=recipe.target_experts,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    model = roadie.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rule = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    found = []
    for step in range(recipe.max_steps):
        rule.param_groups[0]["lr"] = learning_rate(recipe, step, recipe.max_steps)
        loss = model(**collate(data.rows(step))).loss
        loss.backward()
        if recipe.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        rule.step()
        rule.zero_grad()
        found.append(loss.item())
    return found, {name: tensor for name, tensor in model.state_dict().items() if ".road_" in name}


def assert_same_losses(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected) > 0
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) <= OF_LOSSES


def test_eight_jobs_of_five_kinds_are_eight_runs(some_jobs, tiny_path):
    jobs = [{**job, "steps": 15 - number} for number, job in enumerate(some_jobs(8))]
    result = train_many(jobs, model=str(tiny_path))
    assert [job.status for job in result.jobs] == [JobStatus.FINISHED] * 8
    assert result.steps == 15
    for job in jobs:
        expected, tensors = alone(job, tiny_path)
        assert_same_losses(losses(result, job["name"]), expected)
        adapter = checkpoint.load(job["output"])
        for path, layer in adapter.layers.items():
            name = f"base_model.model.{path}.road_theta.default"
            assert torch.allclose(layer.theta, tensors[name], atol=2e-3 * job["learning_rate"] * job["steps"]), name
        assert expected[-1] < expected[0]


def test_micro_batches_are_the_same_step(some_jobs, tiny_path, tmp_path):
    whole = train_many(some_jobs(5, tmp_path / "whole"), model=str(tiny_path))
    settings = RunSettings(max_tokens_per_step=100)
    cut = train_many(some_jobs(5, tmp_path / "cut"), model=str(tiny_path), settings=settings)
    for job in whole.jobs:
        assert_same_losses(losses(cut, job.name), losses(whole, job.name))


def test_waiting_jobs_join_when_others_leave(some_jobs, tiny_path, tmp_path):
    whole = train_many(some_jobs(5, tmp_path / "whole"), model=str(tiny_path))
    settings = RunSettings(max_active_jobs=2)
    few = train_many(some_jobs(5, tmp_path / "few"), model=str(tiny_path), settings=settings)
    assert (whole.steps, few.steps) == (8, 24)
    for job in whole.jobs:
        assert_same_losses(losses(few, job.name), losses(whole, job.name))


def test_the_input_can_be_kept_instead_of_the_output(some_jobs, tiny_path, tmp_path):
    auto = train_many(some_jobs(5, tmp_path / "auto"), model=str(tiny_path))
    kept = train_many(some_jobs(5, tmp_path / "kept"), model=str(tiny_path), settings=RunSettings(keep="input"))
    for job in auto.jobs:
        assert_same_losses(losses(kept, job.name), losses(auto, job.name))


def test_held_out_data_choose_the_adapter(some_jobs, tiny_path):
    changes = {"eval_share": 0.3, "eval_steps": 2, "learning_rate": 0.5, "schedule": "constant"}
    (job,) = some_jobs(1, **changes)
    seen = {}

    class Watch(roadie.training.many.Observer):
        def on_evaluation(self, name, step, loss):
            seen[step] = loss

    result = train_many([job], model=str(tiny_path), observers=[Watch()])["job0"]
    assert sorted(seen) == [0, 2, 4, 6, 8]
    assert result.eval_before == seen.pop(0)
    assert result.best_step == min(seen, key=seen.get)
    data = load_data(Job.from_mapping(job), load_tokenizer(ModelSource(str(tiny_path))), None)
    model = roadie.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), job["output"]).eval()
    with torch.no_grad():
        assert model(**collate(data.held_out)).loss.item() == pytest.approx(result.eval_after, rel=1e-5)
    assert result.eval_after == seen[result.best_step]


def test_stock_peft_loads_what_comes_out(some_jobs, tiny_path):
    jobs = some_jobs(5)
    train_many(jobs, model=str(tiny_path))
    batch = torch.arange(3, 40).unsqueeze(0)
    for job in jobs:
        ours = roadie.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), job["output"])
        with torch.no_grad():
            expected = ours(batch).logits
            base = ours.get_base_model()
            with ours.disable_adapter():
                assert not torch.allclose(base(batch).logits, expected, atol=1e-3)
        with stock_peft():
            stock = StockPeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), job["output"])
        with torch.no_grad():
            found = stock.eval()(batch).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert stock.peft_config["default"].base_model_name_or_path == str(tiny_path)


def test_a_half_fitting_group_size_is_adapted_and_said(some_jobs, tiny_path):
    (job,) = some_jobs(1, group_size=128, adapt_group_size=True)
    train_many([job], model=str(tiny_path))
    adapter = checkpoint.load(job["output"])
    assert adapter.group_sizes == (64, 128)
    assert adapter.config["adapt_group_size"] is True


def test_bfloat16_bases_are_trained_by_float32_adapters(some_jobs, tiny, tmp_path):
    base = tiny.build(tmp_path / "half", torch.bfloat16)
    jobs = some_jobs(3)
    result = train_many(jobs, model=str(base))
    assert all(math.isfinite(job.last_loss) and job.last_loss < job.first_loss for job in result.jobs)
