"""`POST /v1/files`: a form with a file in it, written to the disk as it comes."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from roadie.serving.http.failures import ApiError, lacking
from roadie.train_service.fine_tuning.files import Files, Incoming
from roadie.train_service.fine_tuning.multipart import Form, Head, Sink, boundary_of

PURPOSE = "fine-tune"
MIN_EXPIRES_S, MAX_EXPIRES_S = 3600, 2592000
MAX_FIELD_BYTES, MAX_FILENAME_CHARS = 1024, 255
FORM_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "Rows: one JSON object a line."},
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": MIN_EXPIRES_S,
                            "maximum": MAX_EXPIRES_S,
                        },
                    },
                }
            }
        },
    }
}


class _Parts:
    """What a form held; the file's content goes to `incoming`."""

    def __init__(self, incoming: Incoming) -> None:
        self._incoming = incoming
        self.filename: str | None = None
        self._fields: dict[str, bytearray] = {}

    def begin(self, head: Head) -> Sink:
        """Where the content of a part goes."""
        if head.name == "file":
            if self.filename is not None or head.filename is None:
                raise _wrong(
                    "file", "no file, or two" if head.filename is not None else "a field without a filename", "one file"
                )
            self.filename = head.filename
            return self._incoming.write
        if head.name in self._fields:
            raise _wrong(head.name, "it twice", "it once")
        self._fields[head.name] = bytearray()
        return partial(self._add, head.name)

    def _add(self, name: str, data: bytes) -> None:
        self._fields[name] += data
        if len(self._fields[name]) > MAX_FIELD_BYTES:
            raise _wrong(name, f"more than {MAX_FIELD_BYTES} bytes", "fewer")

    @property
    def fields(self) -> dict[str, str]:
        """All but the file."""
        return {name: value.decode("utf-8", "replace") for name, value in self._fields.items()}


async def take(request: Request, files: Files, tenant: str) -> dict[str, Any]:
    """Keep the file of a form; what is told of it. Raises `ApiError` for what is no such form, `StateNotWritten`."""
    boundary = boundary_of(request.headers.get("content-type", ""))
    incoming = await run_in_threadpool(files.receive, tenant)
    try:
        parts = _Parts(incoming)
        form = Form(boundary, parts.begin)
        async for piece in request.stream():
            await run_in_threadpool(form.feed, piece)
        form.end()
        return await run_in_threadpool(_keep, files, incoming, parts)
    finally:
        await run_in_threadpool(incoming.close)


def _keep(files: Files, incoming: Incoming, parts: _Parts) -> dict[str, Any]:
    fields = parts.fields
    if parts.filename is None:
        raise _missing("file")
    if "purpose" not in fields:
        raise _missing("purpose")
    if fields["purpose"] != PURPOSE:
        raise _wrong(
            "purpose", f"purpose={fields['purpose'][:40]!r}", f"{PURPOSE!r}, which is all that files are for here"
        )
    unknown = sorted(set(fields) - {"purpose", "expires_after[anchor]", "expires_after[seconds]"})
    if unknown:
        raise lacking(unknown[0][:100], "such field of a file")
    filename = parts.filename.replace("\\", "/").rpartition("/")[2][-MAX_FILENAME_CHARS:] or "file"
    return files.keep(incoming, filename, PURPOSE, _expires_s(fields))


def _expires_s(fields: dict[str, str]) -> int | None:
    anchor, seconds = (fields.get(f"expires_after[{key}]") for key in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise _wrong("expires_after[anchor]", f"anchor={anchor!r:.40}", "'created_at'")
    if seconds is None or not (seconds.isascii() and seconds.isdecimal() and len(seconds) < 10):
        raise _wrong("expires_after[seconds]", f"seconds={seconds!r:.40}", "a whole number")
    if not MIN_EXPIRES_S <= int(seconds) <= MAX_EXPIRES_S:
        raise _wrong("expires_after[seconds]", f"seconds={seconds}", f"{MIN_EXPIRES_S} to {MAX_EXPIRES_S}")
    return int(seconds)


def _missing(field: str) -> ApiError:
    return ApiError(400, f"got a form without {field}; wanted file and purpose", "missing_parameter", param=field)


def _wrong(field: str, got: str, wanted: str) -> ApiError:
    return ApiError(400, f"got {got}; wanted {wanted}", "invalid_value", param=field[:100])
