"""The part of the training service that speaks OpenAI's fine-tuning API, put together."""

from __future__ import annotations

import contextlib
import copy
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from roadie.errors import StateNotWritten
from roadie.serving import AdapterStatus
from roadie.serving.http.extensions import Extension
from roadie.serving.http.launch import Ground
from roadie.serving.http.naming import BASE
from roadie.serving.registry import Entry
from roadie.train_service.database import Database
from roadie.train_service.fine_tuning.course import Bench
from roadie.train_service.fine_tuning.data import Reader
from roadie.train_service.fine_tuning.files import Files
from roadie.train_service.fine_tuning.jobs import Jobs
from roadie.train_service.fine_tuning.limits import Limits
from roadie.train_service.fine_tuning.routes import Desk, routes
from roadie.train_service.fine_tuning.runner import Runner
from roadie.train_service.fine_tuning.tables import PART
from roadie.train_service.progress import Progress

FOLDER = "fine-tuning"
NUM_READERS = 2


def fine_tuning(
    ground: Ground,
    database: Database,
    state: Path,
    models: Path,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Extension:
    """The part. state: the folder of the service's state; models: a folder within those that adapters may be loaded from.

    progress: told how jobs go on, and shown; others may tell it of their runs.
    """
    limits = limits or Limits()
    database.add(PART)
    states, made = state / "jobs", models / FOLDER
    for folder in (states, made):
        folder.mkdir(exist_ok=True)
    progress = progress or Progress()
    files, jobs = Files(state / "files", database, limits), Jobs(database, made, progress)
    ground.registry.lend(jobs.places)
    engine = ground.engine.training
    longest = min(ground.engine.limits.max_context_tokens, engine.settings.max_tokens_per_pass or 2**31)
    reader = Reader(copy.deepcopy(ground.tokenizer), longest, limits)
    others = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="roadie-fine-tuning")
    base = (*ground.names, BASE)
    runner = Runner(Bench(engine, reader, files, jobs, limits, base, states, made, others, progress))
    desk = Desk(files, jobs, limits, ground.model, base, runner.wake, partial(_let_go, ground, jobs))
    return Extension(desk.router, routes(limits), jobs.owner_of, runner.start, runner.stop, progress.of)


def _let_go(ground: Ground, jobs: Jobs, model: str) -> None:
    """No request may ask for a model from now on; when the last one that has asked is answered, its files go."""

    def gone(_: Future[AdapterStatus]) -> None:
        folder = jobs.forget(model)
        with contextlib.suppress(StateNotWritten):
            ground.registry.remember(model, Entry())
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    ground.engine.unload_adapter(model).add_done_callback(gone)
