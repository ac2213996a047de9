"""Which models there are, and for administrators: load, unload and pin; under roadie's own paths, and under vLLM's."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException

from roadie.serving.engine import AdapterStatus, Unload
from roadie.serving.http.answers import AdapterAnswer, AdaptersAnswer, Model, Models
from roadie.serving.http.bodies import LoadBody, LoadLoraBody, PinBody, UnloadBody, UnloadLoraBody
from roadie.serving.http.failures import ApiError, unknown_model
from roadie.serving.http.keys import Caller
from roadie.serving.http.service import Service, service_of
from roadie.serving.places import LeftOut, name_problem

router = APIRouter()
OWNER = "roadie"


@router.get("/v1/models", response_model=Models, tags=["models"], summary="The base model and its adapters")
async def list_models(request: Request) -> Any:
    """The base model first, then the adapters that this key may use; those that are on disk and in no slot are there, too."""
    service = service_of(request)
    names = [status.name for status in visible(service, request)]
    return {"object": "list", "data": [_base_model(service), *(_adapter_model(service, name) for name in names)]}


@router.get("/v1/models/{model:path}", response_model=Model, tags=["models"], summary="One model")
async def one_model(model: str, request: Request) -> Any:
    """The base model, or an adapter that this key may use."""
    service = service_of(request)
    if model in service.names.base:
        return _base_model(service)
    if name_problem(model) is not None:
        raise HTTPException(404)
    if service.engine.has_adapter(model) and service.names.may_use(request.state.caller, model):
        return _adapter_model(service, model)
    raise unknown_model(model)


def _base_model(service: Service) -> dict[str, Any]:
    name = service.settings.model_name
    return {**_model(service, name), "root": name, "parent": None}


def _adapter_model(service: Service, name: str) -> dict[str, Any]:
    return {**_model(service, name), "root": name, "parent": service.settings.model_name}


def _model(service: Service, name: str) -> dict[str, Any]:
    most = service.engine.limits.max_context_tokens
    return {"id": name, "object": "model", "created": service.started_s, "owned_by": OWNER, "max_model_len": most}


def visible(service: Service, request: Request) -> list[AdapterStatus]:
    """The adapters that a caller may use; those that have a name of the base model cannot be asked for."""
    caller, names = request.state.caller, service.names
    found = [status for status in service.engine.adapters() if status.name not in names.base]
    return [status for status in found if names.may_use(caller, status.name)]


def as_json(status: AdapterStatus, caller: Caller) -> dict[str, Any]:
    """An adapter as this caller may see it."""
    secret = {
        "path": status.path,
        "content_hash": status.content_hash,
        "error": status.error,
        "notes": list(status.notes),
    }
    return {
        "name": status.name,
        "state": status.state.value,
        "pinned": status.is_pinned,
        "slot": status.slot,
        "running": status.num_running,
        "queued": status.num_queued,
        "requests": status.num_requests,
        "tokens": status.num_tokens,
        "on_disk": status.on_disk.value,
        **(secret if caller.is_admin else dict.fromkeys(secret)),
    }


@router.get("/v1/adapters", response_model=AdaptersAnswer, tags=["adapters"], summary="Adapters, and where they are")
async def list_adapters(request: Request) -> Any:
    """The adapters that this key may use: state, slot, requests. For administrators also the folders that are none, and why."""
    service, caller = service_of(request), request.state.caller
    left_out = left_out_of(service) if caller.is_admin else ()
    return {
        "object": "list",
        "data": [as_json(status, caller) for status in visible(service, request)],
        "left_out": [vars(each) for each in left_out],
    }


def left_out_of(service: Service) -> tuple[LeftOut, ...]:
    """The folders that are no adapters, and those whose names the base model has."""
    taken = [status for status in service.engine.adapters() if status.name in service.names.base]
    reason = "the base model has its name"
    return (*service.engine.left_out(), *(LeftOut(status.path or status.name, reason) for status in taken))


@router.post("/v1/adapters/load", response_model=AdapterAnswer, tags=["adapters"], summary="Load an adapter")
async def load(body: LoadBody, request: Request) -> Any:
    """Read, check and publish an adapter; requests that run are not held up. With `replace` those that run keep the old one."""
    return await _load(request, body.name, body.path, bool(body.replace))


@router.post("/v1/load_lora_adapter", response_model=AdapterAnswer, tags=["adapters"], summary="Load an adapter (vLLM)")
async def load_lora_adapter(body: LoadLoraBody, request: Request) -> Any:
    """As `/v1/adapters/load`."""
    return await _load(request, body.lora_name, body.lora_path, bool(body.load_inplace))


@router.post("/v1/adapters/unload", response_model=AdapterAnswer, tags=["adapters"], summary="Let an adapter go")
async def unload(body: UnloadBody, request: Request) -> Any:
    """Requests for it are refused from now on, until it is loaded again; answers when it is gone."""
    return await _unload(request, body.name, body.how)


@router.post(
    "/v1/unload_lora_adapter", response_model=AdapterAnswer, tags=["adapters"], summary="Let an adapter go (vLLM)"
)
async def unload_lora_adapter(body: UnloadLoraBody, request: Request) -> Any:
    """As `/v1/adapters/unload` with `how: "wait"`."""
    return await _unload(request, body.lora_name, Unload.WAIT)


@router.post("/v1/adapters/pin", response_model=AdapterAnswer, tags=["adapters"], summary="Keep an adapter in its slot")
async def pin(body: PinBody, request: Request) -> Any:
    """A pinned adapter is loaded, and stays; with `pinned: false` it may give its slot to another again."""
    return await _done(service_of(request).engine.pin_adapter(body.name, body.pinned), request)


async def _load(request: Request, name: str, path: str | None, replace: bool) -> Any:
    if name in service_of(request).names.base:
        message = f"got adapter name {name!r}, which the base model has; wanted another"
        raise ApiError(400, message, "invalid_value", param="name")
    return await _done(service_of(request).engine.load_adapter(name, path, replace=replace), request)


async def _unload(request: Request, name: str, how: Unload) -> Any:
    return await _done(service_of(request).engine.unload_adapter(name, how), request)


async def _done(future: Future[AdapterStatus], request: Request) -> dict[str, Any]:
    """What became of it; goes on where the caller hangs up: it is done, or it is not."""
    return as_json(await asyncio.shield(asyncio.wrap_future(future)), request.state.caller)
