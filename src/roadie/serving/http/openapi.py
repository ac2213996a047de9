"""The OpenAPI document: what FastAPI makes of the routes, and what it cannot know of them.

Added: every error a route can answer with, the events of streams, and the keys, on servers that have some. Taken out: the 422 of
FastAPI, which no route answers with.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from roadie.serving.http.answers import ChatChunk, Error
from roadie.serving.http.gate import Right, Route, Routes
from roadie.version import __version__

_MEANING = {
    400: "The request cannot be served as it is.",
    401: "No API key, or one that is not known.",
    403: "The key may not do this, or the Host is another's.",
    404: "There is nothing of this name, or nothing that this key may use.",
    408: "The body came too slowly.",
    409: "The adapter is in use, or being unloaded.",
    410: "It has ended.",
    413: "The body is too long.",
    415: "The body is not said to be JSON.",
    429: "Too many requests; Retry-After says when to come back.",
    500: "The server failed at this request.",
    503: "The server is stopping, or has failed, or has no slot free.",
    504: "The request took too long.",
    507: "The server could not write its state; nothing has changed.",
}
_KEY_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
"""Where a key may stand: OpenAI's clients send the first, Tinker's the second."""
_DESCRIPTION = (
    "One base model and many adapters, by OpenAI's API. The adapter is the `model` of a request, or `base` with the extra field "
    "`adapters`. Streams are server-sent events that end with `data: [DONE]`; an error after the first event is the last event "
    '(`{"error": ...}`).'
)


def document(app: FastAPI, routes: Routes, *, has_keys: bool) -> dict[str, Any]:
    """The document of a server; routes: as its gate has them."""
    found = get_openapi(title="roadie", version=__version__, description=_DESCRIPTION, routes=app.routes)
    schemas = found["components"]["schemas"]
    for model in (Error, ChatChunk):
        _add_schema(schemas, model)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            _complete(path, method, operation, routes[path], has_keys)
    if has_keys:
        found["components"]["securitySchemes"] = _KEY_SCHEMES
    return found


def _add_schema(schemas: dict[str, Any], model: Any) -> None:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    for name, part in schema.pop("$defs", {}).items():
        schemas.setdefault(name, part)
    schemas.setdefault(model.__name__, schema)


def _complete(path: str, method: str, operation: dict[str, Any], route: Route, has_keys: bool) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if route.generates:
        chunk = {"/v1/completions": "Completion", "/v1/responses": "event of OpenAI's Responses API"}.get(
            path, "ChatChunk"
        )
        description = f"Events, each `data: ` and a {chunk} in JSON, the last `data: [DONE]`."
        stream = {"schema": {"type": "string", "description": description}}
        responses["200"]["content"]["text/event-stream"] = stream
    for status in sorted(_errors(path, method, route, has_keys)):
        responses[str(status)] = _error_response(status)
    if has_keys and route.right is not Right.NONE:
        operation["security"] = [{name: []} for name in _KEY_SCHEMES]


def _errors(path: str, method: str, route: Route, has_keys: bool) -> set[int]:
    errors = {400, 403, 408, 413, 500, *route.errors}
    if has_keys and route.right is not Right.NONE:
        errors |= {401}
    if method == "post":
        errors |= {415}
    if route.generates:
        errors |= {404, 429, 503, 504}
    if path.startswith("/v1/models/"):
        errors |= {404}
    if path == "/ready":
        errors |= {503}
    if route.right is Right.ADMIN:
        errors |= {404, 409, 503, 507}
    return errors


def _error_response(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": _MEANING[status],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    if status == 429:
        response["headers"] = {
            "Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}}
        }
    return response
