"""Jobs, what happened to them, and the models that they made, in the database.

validating_files -> queued -> running -> succeeded
   |                  |          |   \\-> failed
   \\-> failed         \\<-> paused <-/         cancelled: from any of the first four
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Row
from typing import Any

from roadie.serving.http.failures import ApiError, unknown_model
from roadie.train_service.database import Database, Write
from roadie.train_service.progress import Progress

UNFINISHED = ("validating_files", "queued", "running", "paused")
ACTIVE = ("validating_files", "queued", "running")


@dataclass(frozen=True)
class Job:
    """One job. hyperparameters: as asked for, or as they are where "auto" has been decided; times: Unix, whole seconds."""

    number: int
    id: str
    tenant: str
    status: str
    created_at: int
    finished_at: int | None
    model: str
    training_file: str
    validation_file: str | None
    method: str
    hyperparameters: Mapping[str, Any]
    seed: int
    suffix: str | None
    metadata: Mapping[str, str] | None
    is_validated: bool
    error: Mapping[str, Any] | None
    fine_tuned_model: str | None
    trained_tokens: int | None
    result_file: str | None

    @classmethod
    def of(cls, row: Row) -> Job:
        """A row of the table."""
        values = {key: row[key] for key in row.keys()}  # noqa: SIM118 (not a mapping)
        for key in ("hyperparameters", "metadata", "error"):
            values[key] = None if values[key] is None else json.loads(values[key])
        return cls(**{**values, "is_validated": bool(row["is_validated"])})

    @property
    def as_json(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "created_at": self.created_at,
            "finished_at": self.finished_at,
            "model": self.model,
            "fine_tuned_model": self.fine_tuned_model,
            "organization_id": self.tenant,
            "status": self.status,
            "error": self.error,
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "result_files": [] if self.result_file is None else [self.result_file],
            "trained_tokens": self.trained_tokens,
            "hyperparameters": {key: value for key, value in self.hyperparameters.items() if key != "beta"},
            "method": {"type": self.method, self.method: {"hyperparameters": dict(self.hyperparameters)}},
            "seed": self.seed,
            "estimated_finish": None,
            "integrations": [],
            "metadata": self.metadata,
        }


@dataclass(frozen=True)
class Model:
    """An adapter that a job made: at its end, or at a step before."""

    id: str
    name: str
    tenant: str
    job: str
    step: int
    folder: Path
    created_at: int
    metrics: Mapping[str, float]

    @property
    def as_json(self) -> dict[str, Any]:
        """A checkpoint, as OpenAI's API has it."""
        return {
            "id": self.id,
            "object": "fine_tuning.job.checkpoint",
            "created_at": self.created_at,
            "fine_tuned_model_checkpoint": self.name,
            "fine_tuning_job_id": self.job,
            "metrics": dict(self.metrics),
            "step_number": self.step,
        }


class Jobs:
    """See the module; thread-safe. Writing raises `StateNotWritten` for a full disk, and nothing has changed then."""

    def __init__(self, database: Database, models: Path, progress: Progress | None = None) -> None:
        self._database, self._models, self._progress = database, models, progress or Progress()
        self.places: dict[str, Path] = {}
        """Where the adapters of all tenants are, by the names that they are served by."""
        self._owners: dict[str, str] = {}
        for row in database.rows("SELECT * FROM models"):
            self._serve(self._model(row))

    def _model(self, row: Row) -> Model:
        values = {key: row[key] for key in row.keys() if key != "number"}  # noqa: SIM118 (not a mapping)
        return Model(**{**values, "folder": self._models / row["folder"], "metrics": json.loads(row["metrics"])})

    def _serve(self, model: Model) -> None:
        self._owners[model.name] = model.tenant
        self.places[model.name] = model.folder

    def owner_of(self, model: str) -> str | None:
        """Whose a model is; None where no job made it."""
        return self._owners.get(model)

    # Jobs.

    def create(self, tenant: str, most: int, **columns: Any) -> Job:
        """A job that waits for its files to be looked at. Raises `ApiError` where the tenant has too many that have not ended."""
        columns = {
            **columns,
            "id": f"ftjob-{secrets.token_hex(12)}",
            "tenant": tenant,
            "status": "validating_files",
            "created_at": int(time.time()),
        }
        with self._database.transaction() as write:
            marks = ", ".join("?" * len(UNFINISHED))
            count = f"SELECT count(*) FROM jobs WHERE tenant = ? AND status IN ({marks})"
            if write(count, (tenant, *UNFINISHED)).fetchone()[0] >= most:
                message = f"got a job beside {most} that have not ended; wait for one, or cancel one"
                raise ApiError(429, message, "too_many_jobs", "rate_limit_error", retry_after_s=60)
            names, marks = ", ".join(columns), ", ".join("?" * len(columns))
            write(f"INSERT INTO jobs ({names}) VALUES ({marks})", [_stored(value) for value in columns.values()])
            _say(write, columns["id"], f"Created fine-tuning job: {columns['id']}")
            return self.one(tenant, columns["id"])

    def one(self, tenant: str, job_id: str) -> Job:
        """A job. Raises `ApiError`: 404 where the tenant has none of that id."""
        rows = self._database.rows("SELECT * FROM jobs WHERE id = ? AND tenant = ?", (job_id, tenant))
        if not rows:
            message = f"Could not find fine tune: {job_id[:200]}"
            raise ApiError(404, message, "fine_tune_not_found", "not_found_error", param="fine_tuning_job_id")
        return Job.of(rows[0])

    def page(self, tenant: str, limit: int, after: str | None, metadata: Mapping[str, str]) -> list[Any]:
        """Jobs of a tenant, the newest first, one more than the limit where there are more. Raises as `one` does."""
        values: list[Any] = [tenant]
        query = "SELECT * FROM jobs WHERE tenant = ?"
        if after is not None:
            query += " AND number < ?"
            values.append(self.one(tenant, after).number)
        for key, value in metadata.items():
            query += " AND EXISTS (SELECT 1 FROM json_each(metadata) AS each WHERE each.key = ? AND each.value = ?)"
            values += [key, value]
        rows = self._database.rows(f"{query} ORDER BY number DESC LIMIT ?", (*values, limit + 1))
        return [Job.of(row).as_json for row in rows]

    def with_status(self, *statuses: str) -> list[Job]:
        """The jobs of all tenants of these statuses, the oldest first."""
        marks = ", ".join("?" * len(statuses))
        return [
            Job.of(row)
            for row in self._database.rows(f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY number", statuses)
        ]

    def status(self, job_id: str) -> str:
        """How a job stands."""
        (row,) = self._database.rows("SELECT status FROM jobs WHERE id = ?", (job_id,))
        return str(row["status"])

    def move(
        self, job_id: str, since: Sequence[str], to: str, message: str, level: str = "info", **columns: Any
    ) -> Job | None:
        """From one of some statuses to another, with an event and new values: the job then; None where it had none of them."""
        names = "".join(f", {name} = ?" for name in columns)
        marks = ", ".join("?" * len(since))
        with self._database.transaction() as write:
            values = [_stored(value) for value in columns.values()]
            moved = write(
                f"UPDATE jobs SET status = ?{names} WHERE id = ? AND status IN ({marks})", (to, *values, job_id, *since)
            )
            if not moved.rowcount:
                return None
            _say(write, job_id, message, level)
            found = Job.of(write("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone())
        self._progress.stands(job_id, to)
        return found

    def together(self) -> AbstractContextManager[Write]:
        """A block of which all is written down or nothing: no kill comes between an effect and what tells of it."""
        return self._database.transaction()

    def fail(self, job_id: str, code: str, message: str, param: str | None, faults: Sequence[str] = ()) -> None:
        """A job that has not ended otherwise has failed; faults: an event each, before."""
        error = {"code": code, "message": message, "param": param}
        with self.together():
            self.say(job_id, faults, "error")
            self.move(job_id, ACTIVE, "failed", message, "error", error=error, finished_at=int(time.time()))

    def succeed(self, job_id: str, model: Model, add_result: Callable[[], str], trained_tokens: int) -> bool:
        """The model is served from now on, under its name; whether the job was still running.

        add_result: makes the file of the results, whose id it gives, if it was.
        """
        with self.together() as write:
            if self.status(job_id) != "running":
                return False
            self.move(
                job_id,
                ("running",),
                "succeeded",
                "The job has successfully completed",
                fine_tuned_model=model.name,
                result_file=add_result(),
                trained_tokens=trained_tokens,
                finished_at=int(time.time()),
            )
            self._keep(write, model)
        self._serve(model)
        return True

    # Models.

    def keep(self, model: Model) -> None:
        """A model of a step is served from now on, under its name; that of a step made again stays as it was, or deleted."""
        message = f"Checkpoint created at step {model.step}"
        with self.together() as write:
            if write("SELECT 1 FROM events WHERE job = ? AND message = ?", (model.job, message)).fetchone():
                return
            self._keep(write, model)
            _say(write, model.job, message)
        self._serve(model)

    def _keep(self, write: Write, model: Model) -> None:
        values = {**vars(model), "folder": model.folder.name, "metrics": json.dumps(dict(model.metrics))}
        write(
            f"INSERT INTO models ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
            tuple(values.values()),
        )

    def delete_model(self, tenant: str, name: str) -> None:
        """No job has made this model any more; whoever asks lets it go then, and calls `forget`.

        Raises `ApiError`: 404 where the tenant has none of that name, 409 where a job that has not ended goes on from it.
        """
        with self._database.transaction() as write:
            marks = ", ".join("?" * len(UNFINISHED))
            user = write(f"SELECT id FROM jobs WHERE model = ? AND status IN ({marks})", (name, *UNFINISHED)).fetchone()
            if not write("DELETE FROM models WHERE name = ? AND tenant = ?", (name, tenant)).rowcount:
                raise unknown_model(name)
            if user is not None:
                message = f"got model {name!r}, which {user['id']} goes on from; cancel that first, or wait"
                raise ApiError(409, message, "model_in_use", "conflict_error", param="model")

    def forget(self, name: str) -> Path | None:
        """A model is not served any more; its folder."""
        folder = self.places.pop(name, None)
        self._owners.pop(name, None)  # last: what nobody owns may be used by all
        return folder

    def checkpoints(self, job: Job, limit: int, after: str | None) -> list[Any]:
        """The models of a job, the last first, one more than the limit where there are more. Raises `ApiError`."""
        place = self._place("models", "id", job, after)
        rows = self._database.rows(
            "SELECT * FROM models WHERE job = ? AND number < ? ORDER BY number DESC LIMIT ?", (job.id, place, limit + 1)
        )
        return [self._model(row).as_json for row in rows]

    # Events.

    def say(self, job_id: str, messages: Iterable[str], level: str = "info") -> None:
        """Something happened to a job."""
        with self._database.transaction() as write:
            for message in messages:
                _say(write, job_id, message, level)

    def note_step(self, job_id: str, message: str, data: Mapping[str, Any]) -> None:
        """The figures of a step; lost with a loss of power, and then made again."""
        with self._database.transaction(durable=False) as write:
            _say(write, job_id, message, step=data["step"], data=data)

    def forget_steps(self, job_id: str, after: int) -> None:
        """The steps that follow are done again."""
        with self._database.transaction() as write:
            write("DELETE FROM events WHERE job = ? AND step > ?", (job_id, after))

    def figures(self, job_id: str) -> list[dict[str, Any]]:
        """Those of all steps, in order."""
        rows = self._database.rows(
            "SELECT data FROM events WHERE job = ? AND step IS NOT NULL ORDER BY step", (job_id,)
        )
        return [json.loads(row["data"]) for row in rows]

    def events(self, job: Job, limit: int, after: str | None) -> list[Any]:
        """What happened to a job, the newest first, one more than the limit where there are more. Raises `ApiError`."""
        place = self._place("events", "'ftevent-' || number", job, after)
        rows = self._database.rows(
            "SELECT * FROM events WHERE job = ? AND number < ? ORDER BY number DESC LIMIT ?", (job.id, place, limit + 1)
        )
        return [_event(row) for row in rows]

    def _place(self, table: str, key: str, job: Job, after: str | None) -> int:
        if after is None:
            return 2**62
        rows = self._database.rows(f"SELECT number FROM {table} WHERE {key} = ? AND job = ?", (after, job.id))
        if not rows:
            message = f"got after={after[:200]!r}; wanted an id from the page before"
            raise ApiError(400, message, "invalid_value", param="after")
        return int(rows[0]["number"])


def _stored(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value


def _say(
    write: Write,
    job_id: str,
    message: str,
    level: str = "info",
    step: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    write(
        "INSERT INTO events (job, created_at, level, message, step, data) VALUES (?, ?, ?, ?, ?, ?)",
        (job_id, int(time.time()), level, message, step, None if data is None else json.dumps(dict(data))),
    )


def _event(row: Row) -> dict[str, Any]:
    return {
        "id": f"ftevent-{row['number']}",
        "object": "fine_tuning.job.event",
        "created_at": row["created_at"],
        "level": row["level"],
        "message": row["message"],
        "type": "message" if row["data"] is None else "metrics",
        "data": None if row["data"] is None else json.loads(row["data"]),
    }
