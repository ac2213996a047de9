"""Errors as OpenAI's API has them: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong and wherever.

    400  the request itself      401  no key, or a wrong one     403  a key that may not     404  no such route, model, adapter
    405  another method          408  sent too slowly            409  an adapter in use      413  too long     415  not JSON
    429  come back later (Retry-After)                           503  stopping, or failed    504  took too long
    507  no room for the state

A message that could show where files lie is given to administrators alone.
"""

from __future__ import annotations

import json
import logging
import math
import re
import traceback
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from roadie.errors import (
    AdapterBusy,
    AdapterError,
    BankFull,
    CheckpointError,
    ConfigError,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    RoadieError,
    RoutingError,
    ShuttingDown,
    StateNotWritten,
    UnknownAdapter,
)
from roadie.serving.http.fields import LACKING

_log = logging.getLogger("roadie.serving.http")
INVALID, SERVER = "invalid_request_error", "server_error"
MAX_MESSAGE_CHARS = 1000


@dataclass(eq=False)  # not frozen: whoever raises it again sets its traceback
class ApiError(Exception):
    """What a caller is told: an HTTP status, a message, a code for programs, and the parameter that is to blame."""

    status: int
    message: str
    code: str
    type: str = INVALID
    param: str | None = None
    retry_after_s: float | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        message = self.message[:MAX_MESSAGE_CHARS]
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return Response(dumped(self.body), self.status, headers, "application/json")


def dumped(value: Any) -> str:
    """Compact JSON that any reader takes: ASCII, and no NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def unknown_model(model: str) -> ApiError:
    """404, the same for what does not exist and for what this key may not use."""
    shown = model if len(model) <= 200 else f"{model[:200]}..."
    message = f"the model {shown!r} does not exist, or this key may not use it; GET /v1/models lists those it may"
    return ApiError(404, message, "model_not_found", param="model")


_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (UnknownAdapter, 404, "model_not_found"),
    (PromptTooLong, 400, "context_length_exceeded"),
    (QueueFull, 429, "queue_full"),
    (AdapterBusy, 409, "adapter_busy"),
    (ShuttingDown, 503, "shutting_down"),
    (EngineFailed, 503, "engine_failed"),
    (StateNotWritten, 507, "state_not_written"),
    (BankFull, 503, "no_slot_free"),
    (CheckpointError, 400, "adapter_unusable"),
    (AdapterError, 400, "adapter_unusable"),
    (RoutingError, 400, "invalid_value"),
    (ConfigError, 400, "invalid_value"),
)
_TYPES = {404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}
_MENDING_S = {503: 5.0}


def as_api_error(error: BaseException, *, for_admin: bool = False) -> ApiError:
    """What to tell of an exception of the engine; of one that nobody foresaw only that there was one (it is logged)."""
    if isinstance(error, ApiError):
        return error
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            retry_after_s = error.retry_after_s if isinstance(error, QueueFull) else _MENDING_S.get(status)
            type_ = SERVER if status >= 500 else _TYPES.get(status, INVALID)
            return ApiError(status, _message(error, code, for_admin), code, type_, retry_after_s=retry_after_s)
    log_unforeseen(error)
    return ApiError(500, "the server failed at this request; its log says where", "internal_error", SERVER)


def _message(error: Exception, code: str, for_admin: bool) -> str:
    if code in ("adapter_unusable", "state_not_written", "engine_failed") and not for_admin:
        return {
            "adapter_unusable": "the adapter's files cannot be used; who runs the server sees why",
            "state_not_written": "the server could not write its state; who runs it sees why",
            "engine_failed": "the engine has failed; the server has to be started again",
        }[code]
    return str(error)


def log_unforeseen(error: BaseException) -> None:
    """Log the kind of an exception and where it came from; not its message, which may quote a prompt."""
    where = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s (its message is left out: it may quote a request)\n%s", type(error).__name__, where)


def install(app: FastAPI) -> None:
    """Give whatever FastAPI raises by itself the same shape."""
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ApiError, _on_known)
    app.add_exception_handler(RoadieError, _on_known)
    app.add_exception_handler(Exception, _on_unforeseen)


async def _on_known(request: Request, error: Exception) -> Response:
    caller = request.scope.get("state", {}).get("caller")
    return as_api_error(error, for_admin=caller is not None and caller.is_admin).response()


async def _on_unforeseen(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    is_of_a_page = "access-control-request-method" in request.headers  # elsewhere, which may not ask here
    headers = {**(error.headers or {}), **(_allowed(request) if error.status_code == 405 else {})}
    if error.status_code == 405 and request.method == "OPTIONS" and not is_of_a_page:
        return Response(status_code=204, headers=headers)
    codes = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
    messages = {
        400: "got a body that is not JSON in UTF-8; wanted an object",
        404: f"got {request.method} {request.url.path[:200]!r}; there is no such route; /openapi.json lists them",
        405: f"got {request.method} {request.url.path[:200]!r}; wanted another method; see Allow",
    }
    status = error.status_code
    message = messages.get(status, str(error.detail))
    kind = SERVER if status >= 500 else _TYPES.get(status, INVALID)
    return ApiError(status, message, codes.get(status, "error"), kind, headers=headers).response()


def _allowed(request: Request) -> dict[str, str]:
    """Allow, with all methods of a path: starlette knows those of one route, and a path may have several."""
    state = request.app.state
    allowed = state.allowed.get(state.service.gate.routes.of(request.url.path))
    return {} if allowed is None else {"Allow": allowed}


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _validation(error.errors()).response()


_FIELD = re.compile(r"(?!(?:str|int|float|bool|none)$)[A-Za-z0-9_-]+")
_WORD = re.compile(r"[A-Za-z0-9_.:-]{1,40}")


def lacking(param: str | None, what: str) -> ApiError:
    """400 for a field that asks for what this server does not have."""
    message = f"got {param}; this server has no {what}; leave it out"
    return ApiError(400, message, "unsupported_parameter", param=param)


def _validation(problems: Any) -> ApiError:
    """The first problem, without the value, which may be a prompt."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "got a body that is not JSON in UTF-8; wanted an object", "invalid_json")
    param = _param(first)
    if first["type"] == LACKING:
        return lacking(param, first["msg"])
    if first["type"] == "none_required":  # the only thing that a field may be which nobody knows
        return ApiError(400, f"got {param}, which is not known here; leave it out", "unknown_parameter", param=param)
    code = "missing_parameter" if first["type"] == "missing" else "invalid_value"
    # A value that may be of several kinds has a problem with each of them.
    reasons = dict.fromkeys(_reason(problem) for problem in problems if _param(problem) == param)
    return ApiError(400, f"{param or 'body'}: {', or: '.join(list(reasons)[:3])}", code, param=param)


def _reason(problem: Any) -> str:
    """What is wrong, with a value that is one of a few words, as the kind of a part of a message is."""
    if problem["loc"][-1] == "[key]":
        return f"got a key that cannot be one ({problem['msg']})"
    if problem["type"] == "literal_error" and isinstance(problem["input"], str) and _WORD.fullmatch(problem["input"]):
        return f"got {problem['input']!r}; wanted {problem['ctx']['expected']}"
    return str(problem["msg"])


def _param(problem: Any) -> str | None:
    """Where a problem is, by names and numbers; without the kinds of value that were tried there."""
    return ".".join(part for part in map(str, problem["loc"][1:]) if _FIELD.fullmatch(part))[:200] or None
