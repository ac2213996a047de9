"""Tinker's routes for what there is: runs, checkpoints and sessions; deleting, expiring, downloading."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import tarfile
import time
from datetime import datetime, timezone
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import FileResponse, Response
from tinker import types

from roadie.serving.http.failures import ApiError
from roadie.serving.http.gate import Right, Route
from roadie.train_service.tinker_api import records
from roadie.train_service.tinker_api.checkpoints import LISTED
from roadie.train_service.tinker_api.records import Checkpoint, Run, Sampler, Session
from roadie.train_service.tinker_api.routes import API, ERRORS, Tenant
from roadie.train_service.tinker_api.service import TinkerService

LINK_S = 3600
MAX_LISTED = 1000
_RUN = f"{API}/training_runs/{{run}}"
_CHECKPOINT = f"{_RUN}/checkpoints/{{segment}}/{{name}}"
ROUTES: dict[str, Route] = {
    f"{API}/training_runs": Route(errors=ERRORS),
    _RUN: Route(errors=ERRORS),
    f"{_RUN}/checkpoints": Route(errors=ERRORS),
    _CHECKPOINT: Route(errors=ERRORS),
    **{
        f"{_CHECKPOINT}/{last}": Route(errors=ERRORS) for last in ("ttl", "archive", "publish", "external_weights_urls")
    },
    f"{API}/files/{{checkpoint}}/{{file}}": Route(Right.NONE, errors=ERRORS),
    f"{API}/checkpoints": Route(errors=ERRORS),
    f"{API}/weights_info": Route(errors=ERRORS),
    f"{API}/samplers/{{sampler}}": Route(errors=ERRORS),
    f"{API}/sessions": Route(errors=ERRORS),
    f"{API}/sessions/{{session}}": Route(errors=ERRORS),
    f"{API}/sessions/{{session}}/finish": Route(errors=ERRORS),
}
Limit = Annotated[int, Query(ge=1, le=MAX_LISTED)]
Offset = Annotated[int, Query(ge=0, le=2**53)]


class TtlBody(BaseModel):
    """When a checkpoint expires: so many seconds from now; None: never."""

    ttl_seconds: float | None


class PathBody(BaseModel):
    """A checkpoint, as clients name it."""

    tinker_path: str


def make_router(service: TinkerService) -> APIRouter:
    """The routes of a service."""
    router = APIRouter(tags=["tinker"])
    for add in (_add_runs, _add_checkpoints, _add_changes, _add_downloads, _add_sessions):
        add(router, service)
    return router


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _words(metadata: str) -> dict[str, str] | None:
    """Of metadata, which comes as any JSON, what the SDK's types give: words."""
    found = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in json.loads(metadata).items()
    }
    return found or None


def _checkpoint(found: Checkpoint) -> types.Checkpoint:
    _, _, name = found.path.partition(f"{found.run}/")
    return types.Checkpoint(
        checkpoint_id=name,
        checkpoint_type=found.kind,
        time=_time(found.made_s),
        tinker_path=found.path,
        size_bytes=found.num_bytes,
        user_metadata=_words(found.metadata),
        expires_at=None if found.expires_s is None else _time(found.expires_s),
    )


def _last(service: TinkerService, run: Run, kind: str) -> types.Checkpoint | None:
    condition = "run = ? AND kind = ? ORDER BY made_s DESC LIMIT 1"
    found = service.records.where(Checkpoint, condition, (run.id, kind))
    return _checkpoint(found[0]) if found else None


def _run(service: TinkerService, run: Run) -> types.TrainingRun:
    return types.TrainingRun(
        training_run_id=run.id,
        base_model=run.base_model,
        model_owner=run.tenant,
        is_lora=True,
        lora_rank=json.loads(run.lora)["rank"],
        last_request_time=_time(run.asked_s),
        last_checkpoint=_last(service, run, "training"),
        last_sampler_checkpoint=_last(service, run, "sampler"),
        user_metadata=_words(run.metadata),
    )


def _add_runs(router: APIRouter, service: TinkerService) -> None:
    @router.get(f"{API}/training_runs")
    def list_runs(tenant: Tenant, limit: Limit = 20, offset: Offset = 0) -> types.TrainingRunsResponse:
        found = service.records.where(
            Run, "tenant = ? ORDER BY made_s DESC, id LIMIT ? OFFSET ?", (tenant, limit, offset)
        )
        total = service.records.count(Run, "tenant = ?", (tenant,))
        cursor = types.Cursor(offset=offset, limit=limit, total_count=total)
        return types.TrainingRunsResponse(training_runs=[_run(service, each) for each in found], cursor=cursor)

    @router.get(_RUN)
    def one_run(run: str, tenant: Tenant) -> types.TrainingRun:
        return _run(service, service.records.require(Run, run, tenant))

    @router.post(f"{API}/weights_info")
    def weights_info(body: PathBody, tenant: Tenant) -> types.WeightsInfoResponse:
        found = service.records.checkpoint_at(body.tinker_path, tenant)
        lora = types.LoraConfig.model_validate_json(found.lora)
        return types.WeightsInfoResponse(
            base_model=found.base_model,
            is_lora=True,
            lora_rank=lora.rank,
            train_unembed=lora.train_unembed,
            train_mlp=lora.train_mlp,
            train_attn=lora.train_attn,
        )


def _add_checkpoints(router: APIRouter, service: TinkerService) -> None:
    @router.get(f"{_RUN}/checkpoints")
    def of_run(run: str, tenant: Tenant) -> types.CheckpointsListResponse:
        service.records.require(Run, run, tenant)
        found = service.records.where(Checkpoint, f"run = ? AND {LISTED}", (run,))
        return types.CheckpointsListResponse(checkpoints=[_checkpoint(each) for each in found])

    @router.get(f"{API}/checkpoints")
    def of_tenant(tenant: Tenant, limit: Limit = 100, offset: Offset = 0) -> types.CheckpointsListResponse:
        condition = f"tenant = ? AND {LISTED}"
        page = f"{condition} ORDER BY made_s DESC, id LIMIT ? OFFSET ?"
        found = service.records.where(Checkpoint, page, (tenant, limit, offset))
        total = service.records.count(Checkpoint, condition, (tenant,))
        cursor = types.Cursor(offset=offset, limit=limit, total_count=total)
        return types.CheckpointsListResponse(checkpoints=[_checkpoint(each) for each in found], cursor=cursor)


def _named(service: TinkerService, run: str, segment: str, name: str, tenant: str) -> Checkpoint:
    return service.records.checkpoint_at(f"tinker://{run}/{segment}/{name}", tenant)


def _add_changes(router: APIRouter, service: TinkerService) -> None:
    @router.delete(_CHECKPOINT, status_code=204)
    def delete(run: str, segment: str, name: str, tenant: Tenant) -> None:
        service.checkpoints.delete(_named(service, run, segment, name, tenant))

    @router.put(f"{_CHECKPOINT}/ttl", status_code=204)
    def set_ttl(run: str, segment: str, name: str, body: TtlBody, tenant: Tenant) -> None:
        service.checkpoints.set_ttl(_named(service, run, segment, name, tenant), body.ttl_seconds)

    @router.api_route(f"{_CHECKPOINT}/publish", methods=["POST", "DELETE"], include_in_schema=False)
    def publish(run: str, segment: str, name: str) -> None:
        message = "got publish; this server shows checkpoints to their own key alone; share the files (archive)"
        raise ApiError(400, message, "unsupported")


def _add_downloads(router: APIRouter, service: TinkerService) -> None:
    @router.get(f"{_CHECKPOINT}/archive", response_class=Response)
    def archive(run: str, segment: str, name: str, tenant: Tenant) -> Response:
        """The files of a checkpoint, as a tar file."""
        found, content = _named(service, run, segment, name, tenant), io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for file in service.store.files(found.folder):
                tar.add(file, file.name)
        headers = {"content-disposition": f'attachment; filename="{found.name}.tar"'}
        return Response(content.getvalue(), media_type="application/x-tar", headers=headers)

    @router.get(f"{_CHECKPOINT}/external_weights_urls")
    def links(run: str, segment: str, name: str, request: Request, tenant: Tenant) -> types.ExternalWeightsUrlsResponse:
        """Links to the files of a checkpoint, for who has no key, for an hour."""
        found, until = _named(service, run, segment, name, tenant), int(time.time()) + LINK_S
        base = str(request.base_url).rstrip("/")
        urls = {}
        for file in service.store.files(found.folder):
            proof = urlencode({"until": until, "sign": _sign(service, found, file.name, until)})
            urls[file.name] = f"{base}{API}/files/{found.id}/{quote(file.name)}?{proof}"
        return types.ExternalWeightsUrlsResponse(urls=urls, expires=_time(until))

    @router.get(f"{API}/files/{{checkpoint}}/{{file}}", response_class=Response)
    def file(checkpoint: str, file: str, until: Offset, sign: str) -> Response:
        found = service.records.find(Checkpoint, checkpoint)
        if found is None or not _may_read(service, found, file, until, sign):
            raise records.unknown("file", file)
        return FileResponse(
            service.store.path(found.folder) / file, media_type="application/octet-stream", filename=file
        )


def _may_read(service: TinkerService, found: Checkpoint, file: str, until: int, sign: str) -> bool:
    is_signed = hmac.compare_digest(sign.encode("utf-8", "replace"), _sign(service, found, file, until).encode())
    is_there = file in [each.name for each in service.store.files(found.folder)]
    return is_signed and is_there and time.time() <= until


def _sign(service: TinkerService, found: Checkpoint, file: str, until: int) -> str:
    message = f"{found.id}/{found.folder}/{file}/{until}".encode()
    return hmac.new(service.secret, message, hashlib.sha256).hexdigest()


class FinishBody(BaseModel):
    """How a session has ended; taken, and not looked at."""

    reason: Any = None
    detail: str | None = None


def _add_sessions(router: APIRouter, service: TinkerService) -> None:
    @router.get(f"{API}/sessions")
    def list_sessions(tenant: Tenant, limit: Limit = 20, offset: Offset = 0) -> types.ListSessionsResponse:
        page = "tenant = ? ORDER BY made_s DESC, id LIMIT ? OFFSET ?"
        found = service.records.where(Session, page, (tenant, limit, offset))
        return types.ListSessionsResponse(sessions=[each.id for each in found])

    @router.get(f"{API}/sessions/{{session}}")
    def one_session(session: str, tenant: Tenant) -> types.GetSessionResponse:
        found = service.records.require(Session, session, tenant)
        return types.GetSessionResponse(
            training_run_ids=[each.id for each in service.records.where(Run, "session = ?", (found.id,))],
            sampler_ids=[each.id for each in service.records.where(Sampler, "session = ?", (found.id,))],
            user_metadata=_words(found.metadata),
            display_name=found.display_name,
        )

    @router.post(f"{API}/sessions/{{session}}/finish", status_code=204)
    def finish(session: str, body: FinishBody, tenant: Tenant) -> None:
        found = service.records.require(Session, session, tenant)
        service.records.change(Session, found.id, is_finished=1)

    @router.get(f"{API}/samplers/{{sampler}}")
    def one_sampler(sampler: str, tenant: Tenant) -> types.GetSamplerResponse:
        found = service.records.require(Sampler, sampler, tenant)
        return types.GetSamplerResponse(sampler_id=found.id, base_model=found.base_model, model_path=found.path)
