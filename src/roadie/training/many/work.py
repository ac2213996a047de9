"""The working folder of a run of many jobs.

    run.json                   what the run was asked to do, a mark of its own, and what became of its jobs
    checkpoint.safetensors     where it stands (`roadie.training.many.snapshot`); removed at the end
    process-N/                 the same, where each process trains jobs of its own
    logs/, tensorboard/        what happened (`roadie.training.many.logs`); these stay

The outputs of finished jobs carry the mark, so that a run that goes on knows which of them are its own.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadie.checkpoint.replacement import replace_file
from roadie.errors import ConfigError
from roadie.training.folders import OutputExists, check_free, check_writable
from roadie.training.many.job import Job
from roadie.training.many.outputs import finished_result
from roadie.training.many.saved import RUN_NAME, snapshots


@dataclass(frozen=True)
class Work:
    """The working folder, the mark of the run, whether it replaces outputs, and whether it goes on."""

    path: Path
    mark: str
    overwrite: bool
    goes_on: bool = False


def default_work(jobs: Sequence[Job]) -> Path:
    """Where a run works unless it is told: ``train-many.training`` beside the output of the first job."""
    return Path(jobs[0].output).parent / "train-many.training"


def check_work(path: Path, jobs: Sequence[Job], *, overwrite: bool, resume: bool) -> Work:
    """The working folder: the former one with `resume` (where there is one), else a new one, which is not made yet.

    Raises `OutputExists` where something would be overwritten that is not the run's own, `OutputRefused` where nothing can
    be written.
    """
    if overwrite and resume:
        raise ConfigError("got overwrite and resume; wanted one of them: start anew, or go on")
    former = _read(path / RUN_NAME) if resume and (path / RUN_NAME).is_file() else None
    if former is not None:
        work = Work(path, former["mark"], former["overwrite"], goes_on=True)
    else:
        check_writable(path / RUN_NAME)
        _check_new(path, overwrite=overwrite)
        work = Work(path, uuid.uuid4().hex, overwrite)
    for job in jobs:  # the run's own outputs may be there
        if finished_result(job, work.mark) is None:
            check_free(Path(job.output), overwrite=work.overwrite)
    return work


def open_work(work: Work, settings: Mapping[str, Any]) -> Work:
    """The folder, ready to be written into; raises `ConfigError` where the former run had other settings."""
    if work.goes_on:
        _check_same(_read(work.path / RUN_NAME)["settings"], settings, work.path)
    else:
        _start(work, settings)
    return work


def former_rates(path: Path) -> dict[str, float]:
    """The learning rate of each job of the run that was interrupted in this folder; empty where there is none."""
    if not (path / RUN_NAME).is_file():
        return {}
    jobs = _read(path / RUN_NAME)["settings"]["jobs"]
    return {job["name"]: job["learning_rate"] for job in jobs if job.get("learning_rate") is not None}


def close_work(work: Work, settings: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
    """Note what became of the jobs, and remove the checkpoint."""
    _write(work, settings, outcome)
    for snapshot in snapshots(work.path):
        snapshot.unlink()
    for folder in work.path.glob("process-*"):
        shutil.rmtree(folder)


def _check_new(path: Path, *, overwrite: bool) -> None:
    if snapshots(path) and not overwrite:
        raise OutputExists(
            f"{path}: got the working folder of a run that did not finish; wanted none; go on with it (--resume), or "
            "start anew (--overwrite)"
        )
    if path.exists() and any(path.iterdir()) and not (path / RUN_NAME).is_file():
        raise OutputExists(f"{path}: got a folder with something else in it; wanted a new one; choose another (--work)")


def _start(work: Work, settings: Mapping[str, Any]) -> None:
    if work.path.exists():
        shutil.rmtree(work.path)
    work.path.mkdir(parents=True)
    _write(work, settings, {})


def _write(work: Work, settings: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
    content = {"mark": work.mark, "overwrite": work.overwrite, "settings": settings, "outcome": outcome}
    replace_file(work.path / RUN_NAME, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in ("mark", "overwrite", "settings")}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: got a damaged record of the former run ({error}); start anew (--overwrite)"
        ) from error


def _check_same(former: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise unless both are the same run; data that could not be read in one of them do not count."""
    differing = sorted(key for key in former.keys() | now.keys() if former.get(key) != now.get(key) and key != "jobs")
    before, after = ({job["name"]: job for job in one["jobs"]} for one in (former, now))
    differing += [
        f"job {name}" for name in sorted(before.keys() | after.keys()) if not _same(before.get(name), after.get(name))
    ]
    if differing:
        raise ConfigError(
            f"{path}: got other settings than the interrupted run ({', '.join(differing)}); wanted the same; repeat "
            "them, or start anew (--overwrite)"
        )


def _same(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> bool:
    if before is None or after is None:
        return False
    unread = before.get("data_sha256") is None or after.get("data_sha256") is None
    return all(
        before.get(key) == after.get(key) for key in before.keys() | after.keys() if key != "data_sha256" or not unread
    )
