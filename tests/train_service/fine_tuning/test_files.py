"""Files by the official client: they come, are listed by pages, and go; nothing but forms is taken, and nobody sees another's."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import openai
import pytest
from tests.serving.http.harness import Running
from tests.train_service.fine_tuning.harness import ALICE, BOB, KEYS, chats, serving, upload

from roadie.train_service.fine_tuning.files import Incoming
from roadie.train_service.fine_tuning.limits import Limits

ROWS = chats("Yes.")


def test_a_file_is_kept_and_told_of_and_deleted(server: Running) -> None:
    client = server.openai(ALICE)
    file = client.files.create(
        file=("dir/räume.jsonl", io.BytesIO(ROWS)),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(ROWS), "räume.jsonl", "fine-tune")
    assert file.expires_at == file.created_at + 3600
    assert client.files.retrieve(file.id) == file
    assert client.files.wait_for_processing(file.id) == file
    assert client.files.content(file.id).read() == ROWS
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            gone(file.id)


def test_lists_have_pages_in_both_orders(server: Running) -> None:
    client = server.openai(BOB)
    ids = [upload(client, ROWS, f"{number}.jsonl") for number in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids
    page = client.files.list(limit=2, order="asc", after=ids[0])
    assert ([file.id for file in page.data], page.has_more) == (ids[1:3], True)
    assert client.files.list(purpose="batch").data == []
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-none")


def test_what_another_key_has_does_not_exist(server: Running) -> None:
    alice, bob = server.openai(ALICE), server.openai(BOB)
    file_id = upload(alice, ROWS)
    assert file_id not in [file.id for file in bob.files.list()]
    told = []
    for asked in (file_id, "file-none"):
        for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError) as raised:
                call(asked)
            told.append(str(raised.value).replace(asked, ""))
    assert len(set(told)) == 1
    assert alice.files.content(file_id).read() == ROWS


FORM = {"content-type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"{}", 415),
        ({"content-type": "application/json"}, b"{}", 415),
        ({"content-type": "multipart/form-data"}, b"x", 400),
        (FORM, b"", 400),
        (FORM, b"\0" * 100_000, 400),
        (FORM, b"--b--", 400),
        (FORM, b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nx\r\n--b--', 400),
        (FORM, b'--b\r\ncontent-disposition: form-data; name="\xff\x00"\r\n\r\nx\r\n--b--', 400),
        (FORM, b"--b\r\ncontent-disposition: form-data; name*=utf-9''%ff\r\n\r\nx\r\n--b--", 400),
        (FORM, b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n' + b"x" * 5000 + b"\r\n--b--", 400),
    ],
)
def test_garbage_is_refused(server: Running, headers: dict[str, str], body: bytes, status: int) -> None:
    answer = server.http(ALICE).post("/v1/files", content=body, headers=headers)
    assert (answer.status_code, set(answer.json())) == (status, {"error"}), answer.text


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": "assistants"}, "purpose"),
        ({}, "purpose"),
        ({"purpose": "fine-tune", "colour": "red"}, "colour"),
        ({"purpose": "fine-tune", "expires_after[anchor]": "now"}, "expires_after[anchor]"),
        ({"purpose": "fine-tune", "expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        (
            {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "9"},
            "expires_after[seconds]",
        ),
    ],
)
def test_fields_are_looked_at(server: Running, form: dict[str, str], param: str) -> None:
    answer = server.http(ALICE).post("/v1/files", data=form, files={"file": ("a", b"x")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_another_method_is_told_all_that_there_are(server: Running) -> None:
    for path, methods in (("/v1/files", "GET, POST"), ("/v1/files/file-1", "DELETE, GET"), ("/v1/models", "GET")):
        for method in ("PUT", "OPTIONS"):
            answer = server.http(ALICE).request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == ({"PUT": 405, "OPTIONS": 204}[method], methods)


def test_a_file_and_all_of_a_tenant_are_as_large_as_they_may_be(tmp_path: Path) -> None:
    with serving(tmp_path, KEYS, Limits(max_file_bytes=1000, max_tenant_bytes=1500)) as server:
        alice, bob = server.openai(ALICE), server.openai(BOB)
        upload(alice, b"x" * 1000)
        for content, code in (
            (b"x" * 1001, "file_too_long"),
            (b"x" * 600, "storage_limit"),
            (b"x" * 200_000, "body_too_long"),
        ):
            with pytest.raises(openai.APIStatusError) as raised:
                upload(alice, content)
            assert (raised.value.status_code, raised.value.code) == (413, code)
        upload(alice, b"x" * 500)
        upload(bob, b"x" * 1000)
        assert len(list((tmp_path / "files").iterdir())) == 3


def test_a_full_disk_is_told_and_leaves_nothing(
    server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def sync(incoming: Incoming) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    client = server.openai(ALICE)
    before = [file.id for file in client.files.list()]
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda descriptor: sync(None))  # type: ignore[arg-type]
        with pytest.raises(openai.InternalServerError) as raised:
            upload(client, ROWS)
    assert (raised.value.status_code, raised.value.code) == (507, "state_not_written")
    assert [file.id for file in client.files.list()] == before


def test_what_was_left_half_done_is_removed_at_the_start(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        kept = upload(server.openai(), ROWS)
    (tmp_path / "files" / ".incoming-file-1").write_bytes(b"x")
    (tmp_path / "files" / "file-unknown").write_bytes(b"x")
    with serving(tmp_path) as server:
        assert [path.name for path in (tmp_path / "files").iterdir()] == [kept]
        assert server.openai().files.content(kept).read() == ROWS
