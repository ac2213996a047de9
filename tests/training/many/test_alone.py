"""What goes wrong in one job stays there; what is wrong in the jobs file is said before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from roadie.errors import ConfigError, UnsupportedLayer
from roadie.training.folders import OutputExists
from roadie.training.many import Job, JobStatus, Plan, RunSettings, read_jobs, train_many
from roadie.training.many.session import Session


def weights(folder) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def poisoned(monkeypatch):
    """From its fifth step on job1 is made of NaN."""
    step = Session._step

    def poison(self):
        if self.step == 4:
            family = self.bank.family_of("job1")
            for stack in family.stacks:
                stack.parameters[:, :, family.names.index("job1")] = float("nan")
        step(self)

    monkeypatch.setattr(Session, "_step", poison)


@pytest.mark.parametrize("kinds", ["alike", "different"])
def test_neighbours_of_a_diverging_job_are_untouched_bit_for_bit(kinds, some_jobs, tiny_path, tmp_path, request):
    alike = {"variant": "road_1", "targets": "all-linear", "group_size": 16} if kinds == "alike" else {}

    def jobs(folder, **second):
        made = some_jobs(4, folder, **alike)
        return [made[0], {**made[1], **second}, *made[2:]]

    healthy = train_many(jobs(tmp_path / "healthy", steps=5), model=str(tiny_path))
    request.getfixturevalue("poisoned")
    result = train_many(jobs(tmp_path / "poisoned"), model=str(tiny_path))
    assert [job.status.value for job in result.jobs] == ["finished", "failed", "finished", "finished"]
    for name in ("job0", "job2", "job3"):
        assert weights(result[name].output) == weights(healthy[name].output)
    failed = result["job1"]
    assert failed.reason.startswith(
        "step 5: got loss nan and gradient norm nan; wanted finite numbers; lower the learning"
    )
    assert failed.steps == 4
    assert not failed.output.exists()
    lines = [json.loads(line) for line in (result.work / "logs" / "job1.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert lines[-1]["failed"] == failed.reason
    assert json.loads((result.work / "run.json").read_text())["outcome"]["job1"]["reason"] == failed.reason


def test_bad_data_fail_their_job_alone(some_jobs, tiny_path):
    jobs = some_jobs(3)
    Path(jobs[1]["data"]).write_text('{"text": "fine"}\n{"tekst": "not"}\n')
    result = train_many(jobs, model=str(tiny_path))
    assert [job.status for job in result.jobs] == [JobStatus.FINISHED, JobStatus.FAILED, JobStatus.FINISHED]
    assert result.failed == (result["job1"],)
    assert f"{jobs[1]['data']}, line 2: got keys" in result["job1"].reason
    assert "line 2" in (result.work / "logs" / "job1.jsonl").read_text()


def test_missing_data_fail_their_job_alone(some_jobs, tiny_path):
    jobs = some_jobs(2)
    Path(jobs[0]["data"]).unlink()
    result = train_many(jobs, model=str(tiny_path))
    assert "got neither a file nor a folder" in result["job0"].reason
    assert result["job1"].status is JobStatus.FINISHED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lerning_rate": 1},
            r"job 'job0': got unknown setting lerning_rate; did you mean learning_rate\?; wanted some of name, .*remove",
        ),
        ({"precision": "float32"}, "unknown setting precision"),
        ({"steps": 0}, r"job 'job0': got steps=0; wanted a whole number of at least 1"),
        ({"targets": []}, r"job 'job0': got targets=\[\]"),
        ({"variant": "road_3"}, "job 'job0': got variant='road_3'; wanted one of road_1"),
        ({"targets": ["nothing"]}, r"job 'job0': got targets=\['nothing'\], which no module.*q_proj"),
        ({"group_size": 48}, "job 'job0': The out_features.*group_size=32"),
        ({"eval_steps": 3}, "eval_steps=3 and nothing held out"),
        ({"eval_share": 0.9, "eval_data": "x.txt"}, "wanted one of them"),
        ({"name": "a/b"}, "got job name 'a/b'"),
        ({"name": "job1"}, "two jobs with name 'job1'"),
        ({"output": ""}, "got output=''"),
        ({"data": 3}, "got data=3"),
    ],
)
def test_a_bad_setting_stops_the_run_before_it_starts(change, message, some_jobs, tiny_path, tmp_path):
    jobs = some_jobs(2)
    with pytest.raises(ConfigError, match=message):
        train_many([{**jobs[0], **change}, jobs[1]], model=str(tiny_path))
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl"}


def test_a_target_that_is_not_linear_stops_the_run(some_jobs, tiny_path):
    with pytest.raises(UnsupportedLayer, match=r"job 'job0': got target model.embed_tokens, a Embedding"):
        train_many(some_jobs(1, targets=["embed_tokens"]), model=str(tiny_path))


def test_jobs_may_not_share_an_output_nor_take_one_that_is_there(some_jobs, tiny_path):
    jobs = some_jobs(2)
    with pytest.raises(ConfigError, match="two jobs with output"):
        train_many([jobs[0], {**jobs[1], "output": jobs[0]["output"]}], model=str(tiny_path))
    Path(jobs[1]["output"]).mkdir(parents=True)
    (Path(jobs[1]["output"]) / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExists, match="not empty"):
        train_many(jobs, model=str(tiny_path))
    assert train_many(jobs, model=str(tiny_path), overwrite=True)["job1"].status is JobStatus.FINISHED


def test_a_jobs_file_is_read_with_defaults(tmp_path):
    path = tmp_path / "jobs.yaml"
    path.write_text(
        "model: some/model\nmax_tokens_per_step: 2048\n"
        'defaults: {steps: 7, learning_rate: 1e-3, output: "out/{name}", data: "{name}.txt"}\n'
        "jobs:\n- {name: a}\n- {name: b, steps: 9, targets: [q_proj], data: [x.txt, '{name}.md']}\n"
    )
    plan = read_jobs(path)
    assert (plan.model, plan.settings) == ("some/model", RunSettings(max_tokens_per_step=2048))
    first, second = plan.jobs
    assert (first.output, first.data, first.recipe.max_steps, first.recipe.learning_rate) == (
        Path("out/a"),
        ("a.txt",),
        7,
        1e-3,
    )
    assert (second.recipe.max_steps, second.recipe.target_modules, second.data) == (9, ("q_proj",), ("x.txt", "b.md"))
    assert Job.from_mapping(second.to_mapping()) == second


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs: []", "no jobs"),
        ("[]", "got list; wanted a mapping"),
        ("jobs: {a: 1}", "wanted a list of jobs"),
        ("jobs: [1]", "got job 1; wanted a mapping"),
        ("jobs: [{name: a, data: x}]", "job 'a': got no output"),
        ("learning_rate: 1\njobs: []", "unknown setting learning_rate.*put it under defaults"),
        ("max_tokens_per_step: 0\njobs: [{name: a, data: x, output: y}]", "max_tokens_per_step=0"),
        ("max_tokens_per_step: 99\njobs: [{name: a, data: x, output: y}]", "max_length=512 for max_tokens_per_step=99"),
        ("jobs: [", "while parsing"),
        ("jobs: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_jobs_file_that_cannot_be_used_is_named(text, message, tmp_path):
    path = tmp_path / "jobs.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_jobs(path)
    assert str(path) in str(caught.value)


def test_a_plan_takes_what_yaml_gives():
    content = yaml.safe_load("jobs: [{name: a, data: x.txt, output: y, steps: 3}]")
    assert Plan.from_mapping(content).jobs[0].recipe.max_steps == 3
