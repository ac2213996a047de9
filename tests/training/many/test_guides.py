"""The guide runs: its Python is executed, its jobs file is read."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from roadie.training.many import Plan, RunSettings
from roadie.training.many.job import job_keys

GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "train-many.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)


def test_the_python_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "train-many.md", "exec"), {"__name__": "guide"})
    sheep, cows = capsys.readouterr().out.splitlines()
    assert sheep.startswith("sheep finished ")
    assert cows.endswith(" adapters/cows")
    first, last = map(float, re.findall(r"\d+\.\d+", cows))
    assert last < first
    assert (tmp_path / "adapters" / "sheep" / "adapter_config.json").exists()


def test_the_jobs_file_of_the_guide_is_valid(tmp_path):
    from roadie.training.many import read_jobs

    (text,) = blocks("yaml")
    (tmp_path / "jobs.yaml").write_text(text)
    plan = read_jobs(tmp_path / "jobs.yaml")
    assert isinstance(plan, Plan)
    assert plan.settings == RunSettings(max_tokens_per_step=8192)
    assert [job.name for job in plan.jobs] == ["french", "terse", "legal"]


def test_the_guide_names_every_setting_there_is():
    assert [key for key in job_keys() if not re.search(rf"\b{key}\b", GUIDE)] == []
    assert [key for key in asdict(RunSettings()) if not re.search(rf"\b{key}\b", GUIDE)] == []
