"""From a folder of state to what `roadie serve --train` has beside its own routes.

DIR/
├── state.sqlite    what the parts of the service remember (`database`)
├── serving.json    which adapters were loaded, pinned, unloaded, where the server has no folder of adapters
├── models/         what tenants have made, in folders that the server may load adapters from
└── weights/        checkpoints of Tinker's clients, and what their runs go on from, in folders without names
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastapi import APIRouter

from roadie.engine import TrainingSettings
from roadie.errors import MissingExtra, StateNotWritten
from roadie.serving.http.extensions import Extension
from roadie.serving.http.launch import Ground, Launch
from roadie.train_service.database import Database
from roadie.train_service.fine_tuning.part import fine_tuning
from roadie.train_service.progress import Progress

_log = logging.getLogger("roadie")
MODELS = "models"


def with_training(launch: Launch, state: Path) -> Launch:
    """The launch of a server that also trains; the folder of its state is made where it is not there.

    Raises `StateNotWritten` where it cannot be.
    """
    try:
        (state / MODELS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateNotWritten(f"{state}: got {error.strerror}; wanted a folder for what tenants train") from None
    folders = launch.folders
    state_file = folders.state_file or (None if folders.adapters else state / "serving.json")
    folders = replace(folders, others=(*folders.others, state / MODELS), state_file=state_file)
    return replace(launch, folders=folders, training=launch.training or TrainingSettings())


def extensions(state: Path) -> Callable[[Ground], Sequence[Extension]]:
    """The parts of the service, for `serving.http.launch.run`. Raises `ConfigError` where another server has the folder."""
    database, progress = Database(state / "state.sqlite"), Progress()

    def extend(ground: Ground) -> Sequence[Extension]:
        jobs = fine_tuning(ground, database, state, state / MODELS, progress=progress)
        return (*_tinker(ground, database, state, progress), jobs, Extension(APIRouter(), {}, stop=database.close))

    return extend


def _tinker(ground: Ground, database: Database, state: Path, progress: Progress) -> Sequence[Extension]:
    """Tinker's API, where its SDK is installed, whose types it speaks in."""
    try:
        from roadie.train_service.tinker_api.extension import extension
    except MissingExtra as lack:
        _log.warning("Tinker's API is left out: %s", lack)
        return ()

    return (extension(ground, database, state / "weights", progress),)
