"""The application: an engine, and the routes around it, behind a gate.

service = make_service(engine, tokenizer, HttpSettings(), keys)
app = make_app(service)          # any ASGI server runs it; `server.serve` is the one that `roadie serve` uses
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from roadie.serving.engine import Engine
from roadie.serving.http import adapters, chat, completions, failures, openapi, operations, responses, tokens
from roadie.serving.http.extensions import Extension, who_may_use
from roadie.serving.http.gate import Gate
from roadie.serving.http.keys import Keys
from roadie.serving.http.metrics import Metrics
from roadie.serving.http.naming import BASE, ModelNames
from roadie.serving.http.prompts import Prompts
from roadie.serving.http.service import Service
from roadie.serving.http.settings import HttpSettings


def make_service(
    engine: Engine,
    tokenizer: Any,
    settings: HttpSettings,
    keys: Keys | None,
    extensions: Sequence[Extension] = (),
) -> Service:
    """What the routes share. keys: None: everybody may generate, nobody administer."""
    metrics = Metrics(engine, settings.max_labelled_adapters)
    names = dict.fromkeys((settings.model_name, BASE, *settings.model_aliases))
    return Service(
        engine=engine,
        prompts=Prompts(tokenizer, settings.max_prompt_chars),
        names=ModelNames(tuple(names), engine.has_adapter, who_may_use(extensions)),
        settings=settings,
        metrics=metrics,
        gate=Gate(settings, keys, metrics, {path: route for each in extensions for path, route in each.routes.items()}),
        extensions=tuple(extensions),
    )


def make_app(service: Service) -> ASGIApp:
    """The application; the engine is started and stopped by whoever runs it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    failures.install(app)
    own = (completions.router, chat.router, responses.router, tokens.router, adapters.router, operations.router)
    for router in (*own, *(each.router for each in service.extensions)):
        app.include_router(router)
    document = openapi.document(app, service.gate.routes, has_keys=service.gate.keys is not None)
    app.state.allowed = {path: ", ".join(sorted(each)).upper() for path, each in document["paths"].items()}

    @app.get("/openapi.json", include_in_schema=False)
    async def give_document(request: Request) -> Response:
        return JSONResponse(document)

    return _for_pages_elsewhere(service.gate.around(app), service.settings.allowed_origins)


def _for_pages_elsewhere(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """Browsers are told that pages of these origins may ask; without any, an Origin is nothing special."""
    if not origins:
        return app
    told = ["X-Request-Id", "Retry-After"]
    methods = ["GET", "POST", "DELETE"]
    return CORSMiddleware(app, origins, allow_methods=methods, allow_headers=["*"], expose_headers=told)
