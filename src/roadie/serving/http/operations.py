"""How the server is: for who watches over it, for Prometheus, and for its page."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from roadie.serving.http.adapters import as_json, visible
from roadie.serving.http.answers import Health, Status, Version
from roadie.serving.http.failures import SERVER, ApiError
from roadie.serving.http.metrics import CONTENT_TYPE
from roadie.serving.http.service import Service, service_of
from roadie.version import __version__

router = APIRouter()
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@router.get("/health", response_model=Health, tags=["operations"], summary="Whether the process lives")
async def health() -> Any:
    """200 as long as the server answers at all."""
    return {"status": "ok"}


@router.get("/ready", response_model=Health, tags=["operations"], summary="Whether requests are taken")
async def ready(request: Request) -> Any:
    """503 while the server starts or stops, and once its engine has failed."""
    service = service_of(request)
    if not (service.engine.is_ready and service.gate.is_open):
        raise ApiError(503, "the server takes no requests now", "not_ready", SERVER, retry_after_s=1)
    return {"status": "ready"}


@router.get("/ping", response_model=Health, tags=["operations"], summary="Whether the process lives")
async def ping() -> Any:
    """As /health, by the name that some platforms ask for."""
    return await health()


@router.get("/version", response_model=Version, tags=["operations"], summary="Which release this is")
async def version() -> Any:
    """The version of roadie."""
    return {"version": __version__}


@router.get("/metrics", response_class=Response, tags=["operations"], summary="Figures for Prometheus")
async def metrics(request: Request) -> Response:
    """Figures of the server; with an administrator's key, or where there are no keys, also of each adapter."""
    service = service_of(request)
    with_names = service.gate.keys is None or service.settings.is_metrics_open or request.state.caller.is_admin
    return Response(service.metrics.text(with_names=with_names), headers={"content-type": CONTENT_TYPE})


@router.get("/v1/status", response_model=Status, tags=["operations"], summary="What the page shows")
async def status(request: Request) -> Any:
    """How the engine stands, and what this key may see of adapters and training."""
    service, caller = service_of(request), request.state.caller
    return {
        "ready": service.engine.is_ready and service.gate.is_open,
        "model": service.settings.model_name,
        "max_context_tokens": service.engine.limits.max_context_tokens,
        "chat": service.prompts.has_template,
        "is_admin": caller.is_admin,
        "figures": _figures(service),
        "adapters": [as_json(status, caller) for status in visible(service, request)],
        "runs": _runs(service, caller.name),
    }


def _runs(service: Service, tenant: str) -> list[dict[str, Any]] | None:
    told = [each.runs_of(tenant) for each in service.extensions if each.runs_of is not None]
    return [asdict(run) for runs in told for run in runs] if told else None


def _figures(service: Service) -> dict[str, Any]:
    now = service.engine.statistics()
    return {
        "running": now.num_running,
        "queued": now.num_queued,
        "slots": now.num_slots,
        "slots_leased": now.num_slots_leased,
        "resident_adapters": now.num_resident,
        "blocks": now.num_blocks,
        "blocks_free": now.num_blocks_free,
        "requests": now.num_requests,
        "prompt_tokens": now.num_prompt_tokens,
        "cached_prompt_tokens": now.num_cached_prompt_tokens,
        "generated_tokens": now.num_generated_tokens,
        "loads": now.num_loads,
        "evictions": now.num_evictions,
        "uptime_s": time.time() - service.started_s,
    }


async def page_file(request: Request) -> Response:
    """A file of the page."""
    name, kind = _PAGE[request.scope["route"].path]
    content = resources.files("roadie.serving.http").joinpath("page").joinpath(name).read_bytes()
    headers = {"content-type": kind, "content-security-policy": _CSP, "cache-control": "no-cache"}
    return Response(content, headers=headers)


for path in _PAGE:
    router.add_api_route(path, page_file, include_in_schema=False)
