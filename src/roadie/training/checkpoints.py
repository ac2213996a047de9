"""The working folder of a training run: ``OUTPUT.training``, beside the output that appears only at the end.

    settings.json     what the run was asked to do, and the loss before it; a run is resumed only with the same settings
    checkpoint-N/     written by transformers' Trainer: adapter, optimizer, scheduler, random states, trainer_state.json

Trainer writes ``trainer_state.json`` last, so that a checkpoint in which it is whole is whole itself: what an
interruption left half written is passed over. The folder is removed when the output has been written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadie.checkpoint.replacement import replace_file
from roadie.errors import ConfigError
from roadie.training.folders import OutputExists, check_free
from roadie.training.interruption import NOTHING, Saved

SETTINGS_NAME = "settings.json"
STATE_NAME = "trainer_state.json"


@dataclass(frozen=True)
class WorkFolder:
    """Where a run keeps its checkpoints; `checkpoint` is the one to go on from, `loss_before` was measured at its start."""

    path: Path
    checkpoint: Path | None = None
    loss_before: float | None = None


def work_path(output: Path) -> Path:
    """The working folder that belongs to an output folder."""
    return output.with_name(f"{output.name}.training")


def check_output(output: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise `ConfigError` or `OutputExists` unless a run may start (or, with `resume`, go on) towards `output`."""
    if overwrite and resume:
        raise ConfigError("got overwrite and resume; wanted one of them: start anew, or go on")
    advice = "train into another folder, or anew (--overwrite)"
    check_free(output, overwrite=overwrite, advice=f"this training is finished; {advice}" if resume else advice)
    work = work_path(output)
    if work.exists() and not (overwrite or resume):
        raise OutputExists(
            f"{work}: got the working folder of a run that did not finish; wanted none; go on with it (--resume), or "
            "start anew (--overwrite)"
        )


def open_work(output: Path, settings: Mapping[str, Any], *, resume: bool) -> WorkFolder:
    """The working folder for `output`: the former one with `resume` (where there is one), else a new one.

    Raises `ConfigError` where the former run had other settings.
    """
    path = work_path(output).absolute()  # Trainer records the path of its best checkpoint
    if resume and (path / SETTINGS_NAME).is_file():
        former = _read_settings(path / SETTINGS_NAME)
        _check_same(former["settings"], settings, path)
        return WorkFolder(path, last_complete(path), former["loss_before"])
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return WorkFolder(path)


def former_rate(output: Path) -> float | None:
    """The learning rate of the run that was interrupted on its way to `output`; None where there is none."""
    settings = work_path(output) / SETTINGS_NAME
    return _read_settings(settings)["settings"].get("learning_rate") if settings.is_file() else None


def record_start(path: Path, settings: Mapping[str, Any], loss_before: float) -> None:
    """Write settings.json into the working folder, whole or not at all; the run can be resumed from then on."""
    content = {"settings": dict(settings), "loss_before": loss_before}
    replace_file(path / SETTINGS_NAME, json.dumps(content, indent=2, sort_keys=True) + "\n")


def saved_in(folder: Path) -> Saved:
    """What an interrupted run leaves in its working folder, which is removed where that is nothing but settings."""
    checkpoint = last_complete(folder)
    if checkpoint is not None:
        return Saved(f"Kept: the checkpoint after step {_steps(checkpoint)} in {folder}.", can_go_on=True)
    ours = folder.is_dir() and all(
        path.name.startswith((SETTINGS_NAME, f".{SETTINGS_NAME}-", "checkpoint-", "tmp-checkpoint-"))
        for path in folder.iterdir()
    )
    if ours:
        shutil.rmtree(folder, ignore_errors=True)
    return NOTHING


def last_complete(folder: Path) -> Path | None:
    """The checkpoint with the most steps among those written to their end; None where there is none."""
    complete = {_steps(path): path for path in folder.glob("checkpoint-*") if _is_complete(path)}
    return complete[max(complete)] if complete else None


def logged(checkpoint: Path) -> list[dict[str, Any]]:
    """What Trainer had logged when it wrote a whole checkpoint."""
    history: list[dict[str, Any]] = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    return history


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
        return bool(state["global_step"] == _steps(checkpoint))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(content["settings"]), "loss_before": float(content["loss_before"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: got a damaged record of the former run ({error}); start anew (--overwrite)"
        ) from error


def _check_same(former: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    differing = sorted(key for key in former.keys() | now.keys() if former.get(key) != now.get(key))
    if differing:
        changes = "; ".join(f"{key} was {former.get(key)!r} and is {now.get(key)!r}" for key in differing)
        raise ConfigError(
            f"{path}: got other settings than the interrupted run ({changes}); wanted the same; repeat them, or start "
            "anew (--overwrite)"
        )
