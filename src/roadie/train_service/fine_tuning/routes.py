"""The routes of files and jobs, as OpenAI's API has them. A tenant is the name of a key; for it there is what it has made."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from roadie.engine.targets import adapted_layers
from roadie.errors import ConfigError, UnsupportedLayer
from roadie.serving.http.failures import ApiError, unknown_model
from roadie.serving.http.gate import Route
from roadie.serving.http.keys import Caller
from roadie.train_service.fine_tuning import bodies, upload
from roadie.train_service.fine_tuning.bodies import JobBody, page
from roadie.train_service.fine_tuning.files import Files
from roadie.train_service.fine_tuning.jobs import ACTIVE, UNFINISHED, Job, Jobs
from roadie.train_service.fine_tuning.limits import Limits
from roadie.train_service.fine_tuning.plan import SETTINGS, adapter_config

_FORM_BYTES = 64 << 10
After: TypeAlias = Annotated[str | None, Query(max_length=128)]
PageSize: TypeAlias = Annotated[int, Query(ge=1, le=1000)]
_METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)


def routes(limits: Limits) -> dict[str, Route]:
    """How the gate treats each path."""
    jobs = "/v1/fine_tuning/jobs"
    one = Route(errors=(404,))
    job = {f"{jobs}/{{job_id}}{verb}": one for verb in ("", "/cancel", "/pause", "/resume", "/events", "/checkpoints")}
    return {
        "/v1/files": Route(is_streamed=True, max_body_bytes=limits.max_file_bytes + _FORM_BYTES, errors=(404, 507)),
        "/v1/files/{file_id}": Route(errors=(404, 409, 507)),
        "/v1/files/{file_id}/content": one,
        "/v1/models/{model}": Route(errors=(404, 409, 507)),
        jobs: Route(errors=(404, 429, 507)),
        **{path: Route(errors=(404, 507)) for path in job},
    }


class Desk:
    """What answers. base: names of the base model; wake: called when there is something for jobs to do; let_go: with a model."""

    def __init__(
        self,
        files: Files,
        jobs: Jobs,
        limits: Limits,
        model: Any,
        base: tuple[str, ...],
        wake: Callable[[], None],
        let_go: Callable[[str], None],
    ) -> None:
        self._files, self._jobs, self._limits = files, jobs, limits
        self._model, self._base, self._wake, self._let_go = model, base, wake, let_go
        self.router = APIRouter()
        for path, method, answer, model_, extra in self._table():
            self.router.add_api_route(
                path, answer, methods=[method], response_model=model_, tags=["fine-tuning"], openapi_extra=extra
            )

    def _table(self) -> list[tuple[str, str, Callable[..., Any], Any, Any]]:
        job = "/v1/fine_tuning/jobs/{job_id}"
        return [
            ("/v1/files", "POST", self.upload_file, bodies.FileObject, upload.FORM_SCHEMA),
            ("/v1/files", "GET", self.list_files, bodies.FilePage, None),
            ("/v1/files/{file_id}", "GET", self.one_file, bodies.FileObject, None),
            ("/v1/files/{file_id}", "DELETE", self.delete_file, bodies.FileDeleted, None),
            ("/v1/files/{file_id}/content", "GET", self.file_content, None, _CONTENT),
            ("/v1/fine_tuning/jobs", "POST", self.create_job, bodies.JobObject, None),
            ("/v1/fine_tuning/jobs", "GET", self.list_jobs, bodies.JobPage, None),
            (job, "GET", self.one_job, bodies.JobObject, None),
            (f"{job}/cancel", "POST", self.cancel_job, bodies.JobObject, None),
            (f"{job}/pause", "POST", self.pause_job, bodies.JobObject, None),
            (f"{job}/resume", "POST", self.resume_job, bodies.JobObject, None),
            (f"{job}/events", "GET", self.list_events, bodies.EventPage, None),
            (f"{job}/checkpoints", "GET", self.list_checkpoints, bodies.CheckpointPage, None),
            ("/v1/models/{model:path}", "DELETE", self.delete_model, bodies.ModelDeleted, None),
        ]

    # Files.

    async def upload_file(self, request: Request) -> Any:
        """Keep a file of rows to train on: one JSON object a line."""
        return await upload.take(request, self._files, _tenant(request))

    def list_files(
        self,
        request: Request,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=64)] = None,
    ) -> Any:
        """The files of this key."""
        found = self._files.page(_tenant(request), limit, after, purpose, is_newest_first=order == "desc")
        return page(found, limit)

    def one_file(self, file_id: str, request: Request) -> Any:
        """What is known of a file."""
        return self._files.one(_tenant(request), file_id)

    def delete_file(self, file_id: str, request: Request) -> Any:
        """A file is gone, unless a job that has not ended learns from it."""
        self._files.delete(_tenant(request), file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    def file_content(self, file_id: str, request: Request) -> Response:
        """What is in a file."""
        return FileResponse(self._files.path(_tenant(request), file_id), media_type="application/octet-stream")

    # Jobs.

    def create_job(self, body: JobBody, request: Request) -> Any:
        """Train an adapter; its model is there when the job has succeeded, under the name `fine_tuned_model`."""
        tenant, hyperparameters = _tenant(request), body.asked()
        told = body.metadata or {}
        self._check_model(body.model, tenant, {key: told[key] for key in SETTINGS if key in told})
        for param in ("training_file", "validation_file"):
            self._check_file(tenant, param, getattr(body, param))
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        job = self._jobs.create(
            tenant,
            self._limits.max_unfinished,
            model=body.model,
            training_file=body.training_file,
            validation_file=body.validation_file,
            method=body.kind,
            hyperparameters=hyperparameters,
            seed=seed,
            suffix=body.suffix,
            metadata=body.metadata,
        )
        self._wake()
        return job.as_json

    def _check_model(self, model: str, tenant: str, settings: dict[str, str]) -> None:
        if model not in self._base and self._jobs.owner_of(model) != tenant:
            raise unknown_model(model)
        if model in self._base:
            try:
                adapted_layers(self._model, adapter_config(settings))
            except (ConfigError, UnsupportedLayer) as error:
                raise ApiError(400, str(error), "invalid_value", param="metadata") from None
        elif settings:
            message = (
                f"got {min(settings)} for a model that was made here; its adapter stays as it is made; leave it out"
            )
            raise ApiError(400, message, "invalid_value", param="metadata")

    def _check_file(self, tenant: str, param: str, file_id: str | None) -> None:
        if file_id is None:
            return
        try:
            found = self._files.one(tenant, file_id)
        except ApiError:
            message = f"got {param}={file_id[:128]!r}; wanted the id of a file that was uploaded"
            raise ApiError(400, message, "invalid_value", param=param) from None
        if found["purpose"] != upload.PURPOSE:
            message = f"got {param}={file_id!r} of purpose {found['purpose']}; wanted {upload.PURPOSE}"
            raise ApiError(400, message, "invalid_value", param=param)

    def list_jobs(self, request: Request, after: After = None, limit: PageSize = 20) -> Any:
        """The jobs of this key, the newest first; `metadata[KEY]=VALUE`: those with that metadata."""
        wanted = {found[1]: value for key, value in request.query_params.items() if (found := _METADATA.fullmatch(key))}
        return page(self._jobs.page(_tenant(request), limit, after, wanted), limit)

    def one_job(self, job_id: str, request: Request) -> Any:
        """How a job stands."""
        return self._job(job_id, request).as_json

    def cancel_job(self, job_id: str, request: Request) -> Any:
        """Let a job end without a model; the models of its epochs stay."""
        return self._move(job_id, request, UNFINISHED, "cancelled", "Fine-tuning job cancelled")

    def pause_job(self, job_id: str, request: Request) -> Any:
        """Let a job wait, after the step that it is at."""
        return self._move(job_id, request, ACTIVE, "paused", "Fine-tuning job paused")

    def resume_job(self, job_id: str, request: Request) -> Any:
        """Let a job that was paused go on where it was."""
        to = "queued" if self._job(job_id, request).is_validated else "validating_files"
        return self._move(job_id, request, ("paused",), to, "Fine-tuning job resumed")

    def _move(self, job_id: str, request: Request, since: tuple[str, ...], to: str, message: str) -> Any:
        job = self._job(job_id, request)
        times: dict[str, Any] = {"finished_at": int(time.time())} if to == "cancelled" else {}
        moved = self._jobs.move(job.id, since, to, message, **times)
        if moved is None:
            status = self._jobs.status(job.id)
            message = f"got {job.id!r}, which is {status}; wanted a job that is {' or '.join(since)}"
            raise ApiError(400, message, "invalid_job_status", param="fine_tuning_job_id")
        self._wake()
        return moved.as_json

    def list_events(self, job_id: str, request: Request, after: After = None, limit: PageSize = 20) -> Any:
        """What happened to a job, the newest first; `data` has the figures of steps."""
        return page(self._jobs.events(self._job(job_id, request), limit, after), limit)

    def list_checkpoints(self, job_id: str, request: Request, after: After = None, limit: PageSize = 10) -> Any:
        """The models of a job: that of its end, and those of the epochs before; they can be chatted with."""
        return page(self._jobs.checkpoints(self._job(job_id, request), limit, after), limit)

    def delete_model(self, model: str, request: Request) -> Any:
        """A model that a job of this key has made is gone; requests that use it already are answered."""
        self._jobs.delete_model(_tenant(request), model)
        self._let_go(model)
        return {"id": model, "object": "model", "deleted": True}

    def _job(self, job_id: str, request: Request) -> Job:
        return self._jobs.one(_tenant(request), job_id)


_CONTENT = {
    "responses": {
        "200": {
            "description": "The bytes that were uploaded, or the figures of a job as CSV.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    }
}


def _tenant(request: Request) -> str:
    caller: Caller = request.state.caller
    return caller.name
