"""Forms are read as they come: however they are cut into pieces, and whatever is wrong with them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roadie.serving.http.failures import ApiError
from roadie.train_service.fine_tuning.multipart import MAX_HEAD_BYTES, MAX_PARTS, Form, Head, Sink, boundary_of

HEAD = b'Content-Disposition: form-data; name="file"; filename="a b.jsonl"\r\nContent-Type: text/plain'
FIELD = b"content-disposition: FORM-DATA; name=purpose"


def read(*pieces: bytes, boundary: bytes = b"xyz") -> list[tuple[Head, bytes]]:
    found: list[tuple[Head, bytearray]] = []

    def begin(head: Head) -> Sink:
        found.append((head, bytearray()))
        return found[-1][1].extend

    form = Form(boundary, begin)
    for piece in pieces:
        form.feed(piece)
    form.end()
    return [(head, bytes(content)) for head, content in found]


def body(*parts: tuple[bytes, bytes], boundary: bytes = b"xyz") -> bytes:
    return b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, *part) for part in parts) + b"--%b--\r\n" % boundary


@given(
    st.binary(max_size=60), st.sets(st.integers(0, 200), max_size=12), st.sampled_from([b"", b"preamble\r\n", b"\r\n"])
)
def test_whatever_a_file_holds_and_however_it_is_cut(content: bytes, cuts: set[int], before: bytes) -> None:
    tricky = content + b"\r\n--xy\r\n-" + content
    whole = before + body((HEAD, tricky), (FIELD, b""), (FIELD, b"fine-tune")) + b"behind"
    edges = [0, *sorted(cuts), len(whole)]
    found = read(*(whole[start:end] for start, end in pairwise(edges)))
    assert found == [
        (Head("file", "a b.jsonl"), tricky),
        (Head("purpose", None), b""),
        (Head("purpose", None), b"fine-tune"),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"--xyz",
        b"--xyz\r\n",
        b"rubbish",
        body((HEAD, b"abc"))[:-6],
        body((HEAD, b"abc")).replace(b"\r\n\r\n", b"\r\n"),
        body((b"Content-Type: text/plain", b"abc")),
        body((b"Content-Disposition: form-data", b"abc")),
        body((b"Content-Disposition: attachment; name=file", b"abc")),
        b"--xyzw\r\n" + body((HEAD, b"abc")),
        body((b"Content-Disposition: form-data; name=a; b=" + b"x" * MAX_HEAD_BYTES, b"abc")),
        body(*[(FIELD, b"")] * (MAX_PARTS + 1)),
        b"--xyz\r\n" + b"x" * (MAX_HEAD_BYTES + 9),
    ],
)
def test_what_is_no_form_is_said_to_be_none(wrong: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        read(*(wrong[place : place + 1] for place in range(len(wrong))))
    assert (raised.value.status, raised.value.code) == (400, "invalid_form")


def test_content_of_any_length_takes_no_memory() -> None:
    sizes: list[int] = []
    form = Form(b"xyz", lambda head: lambda data: sizes.append(len(data)))
    form.feed(b"--xyz\r\n" + HEAD + b"\r\n\r\n")
    for _ in range(100):
        form.feed(b"x" * 1000)
        assert len(form._buffer) < 10
    form.feed(b"\r\n--xyz--")
    form.end()
    assert sum(sizes) == 100_000


def test_a_boundary_is_what_the_header_says() -> None:
    assert boundary_of('multipart/form-data; charset=utf-8; boundary="a b"') == b"a b"
    for wrong, status in (("", 415), ("application/json", 415), ("multipart/form-data", 400)):
        with pytest.raises(ApiError) as raised:
            boundary_of(wrong)
        assert raised.value.status == status
    with pytest.raises(ApiError):
        boundary_of(f"multipart/form-data; boundary={'x' * 201}")
