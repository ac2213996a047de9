"""multipart/form-data, read piece by piece: what a part holds goes to a sink as it comes, and is never whole in memory.

\r\n--BOUNDARY\r\n  headers  \r\n\r\n  content  \r\n--BOUNDARY--        (RFC 7578; the first line break may be missing)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from email.utils import collapse_rfc2231_value
from typing import TypeAlias

from roadie.serving.http.failures import ApiError

MAX_HEAD_BYTES, MAX_PARTS = 8192, 16

Sink: TypeAlias = Callable[[bytes], object]


@dataclass(frozen=True)
class Head:
    """What is said of a part: the field that it is of, and the name of its file; None where it is no file."""

    name: str
    filename: str | None


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type names. Raises `ApiError`: 415 for another type, 400 without a boundary."""
    message = Message()
    message["content-type"] = content_type
    if message.get_content_type() != "multipart/form-data":
        raise ApiError(415, "got a body that is no form; wanted Content-Type: multipart/form-data", "not_a_form")
    boundary = str(message.get_boundary(""))
    if not 0 < len(boundary) <= 200 or not boundary.isascii():
        raise _wrong("no boundary of 1 to 200 characters in Content-Type")
    return boundary.encode()


class Form:
    """A body as it comes; `feed` it, and then `end` it. begin: called with the head of each part, gives its sink.

    Both raise `ApiError` (400) for what is no form.
    """

    def __init__(self, boundary: bytes, begin: Callable[[Head], Sink]) -> None:
        self._line, self._begin = b"\r\n--" + boundary, begin
        self._buffer = bytearray(b"\r\n")
        self._sink: Sink = len
        self._step: Callable[[], bool] = self._content
        self._num_parts = 0

    def feed(self, data: bytes) -> None:
        """Some more of the body."""
        self._buffer += data
        while self._step():
            pass

    def end(self) -> None:
        """There is no more."""
        if self._step != self._rest:
            raise _wrong("no end of the last part")

    def _content(self) -> bool:
        place = self._buffer.find(self._line)
        length = place if place >= 0 else max(0, len(self._buffer) - len(self._line) + 1)
        if length:
            self._sink(bytes(self._buffer[:length]))
        del self._buffer[: length + (len(self._line) if place >= 0 else 0)]
        if place >= 0:
            self._step = self._after
        return place >= 0

    def _after(self) -> bool:
        """What follows a boundary: two hyphens where it is the last, or the end of the line."""
        if len(self._buffer) < 2:
            return False
        if self._buffer.startswith(b"--"):
            self._step = self._rest
            return True
        if not self._buffer.startswith(b"\r\n"):
            raise _wrong("something behind a boundary")
        self._step = self._head
        return True

    def _head(self) -> bool:
        place = self._buffer.find(b"\r\n\r\n")
        if place > MAX_HEAD_BYTES or (place < 0 and len(self._buffer) > MAX_HEAD_BYTES):
            raise _wrong(f"more than {MAX_HEAD_BYTES} bytes of headers of a part")
        if place < 0:
            return False
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise _wrong(f"more than {MAX_PARTS} parts")
        self._sink = self._begin(_head_of(bytes(self._buffer[2:place])))
        del self._buffer[: place + 4]
        self._step = self._content
        return True

    def _rest(self) -> bool:
        self._buffer.clear()
        return False


def _head_of(head: bytes) -> Head:
    message = HeaderParser().parsestr(head.decode("utf-8", "replace"))
    if str(message.get("content-disposition", "")).partition(";")[0].strip().lower() != "form-data":
        raise _wrong("a part that is not said to be form-data")
    name, filename = (message.get_param(key, header="content-disposition") for key in ("name", "filename"))
    if name is None:
        raise _wrong("a part without a name")
    return Head(
        _plain(collapse_rfc2231_value(name)), None if filename is None else _plain(collapse_rfc2231_value(filename))
    )


def _plain(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def _wrong(got: str) -> ApiError:
    return ApiError(400, f"got a form with {got}; wanted multipart/form-data as RFC 7578 has it", "invalid_form")
