"""Jobs with several rotations in a row, trained together with others: each is what it would be alone."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import roadie
from roadie import checkpoint
from roadie.errors import ConfigError
from roadie.training.many import Job, JobStatus, train_many
from roadie.training.recipe import Recipe

together = runpy.run_path(str(Path(__file__).with_name("test_together.py")))
STAGES = ([2, 4, 16], None, [8, 2], [2, 4, 16])


@pytest.mark.filterwarnings("ignore:this adapter has several rotations")
def test_jobs_of_several_rotations_and_of_one_are_runs_of_their_own(some_jobs, tiny_path):
    changes = {"variant": "road_1", "targets": ["q_proj", "up_proj"], "group_size": 64}
    jobs = [{**job, "stages": stages} for job, stages in zip(some_jobs(4, **changes), STAGES, strict=True)]
    result = train_many(jobs, model=str(tiny_path))
    assert [job.status for job in result.jobs] == [JobStatus.FINISHED] * 4
    for job in jobs:
        expected, tensors = together["alone"](job, tiny_path)
        together["assert_same_losses"](together["losses"](result, job["name"]), expected)
        adapter = checkpoint.load(job["output"])
        for path, layer in adapter.layers.items():
            assert layer.stages == tuple(job["stages"] or [64])
            name = f"base_model.model.{path}.road_theta.default"
            assert torch.allclose(layer.theta, tensors[name], atol=2e-3 * job["learning_rate"] * job["steps"]), name
        assert roadie.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), job["output"])


def test_settings_come_back_and_those_that_mean_nothing_are_refused():
    recipe = Recipe(stages=[2, 16, 64])
    assert recipe.stages == (2, 16, 64)
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe
    job = Job.from_mapping({"name": "a", "data": "x", "output": "y", "stages": [2, 64]})
    assert Job.from_mapping(job.to_mapping()) == job
    for settings, says in (
        ({"stages": []}, "group sizes of rotations in a row"),
        ({"stages": [2, 7]}, "even numbers"),
        ({"stages": [2, 64], "share": "1/2"}, "shared out within one rotation"),
        ({"stages": [2, 64], "group_size": 32}, "which say the group sizes"),
    ):
        with pytest.raises(ConfigError, match=says):
            Recipe(**settings)
