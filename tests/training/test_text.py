"""Texts: every form is read as documented, and what cannot be used is refused with file and line."""

from __future__ import annotations

import builtins
import logging
import sys
from types import SimpleNamespace

import pytest

from roadie.training.text import Chat, Completion, DataError, Text, read

GOOD = b'{"text": "fine"}\n'


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_every_kind_of_record_is_read(tmp_path):
    path = write(
        tmp_path / "all.jsonl",
        b'\xef\xbb\xbf{"text": "a", "id": 7}\r\n\n{"prompt": "", "completion": "b"}\n'
        b'{"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}',
    )
    assert list(read(path)) == [
        Text("a", f"{path}, line 1"),
        Completion("", "b", f"{path}, line 3"),
        Chat((("user", "c"), ("assistant", "d")), f"{path}, line 4"),
    ]


def test_other_files_are_plain_text(tmp_path):
    path = write(tmp_path / "notes", b'{"text": 1}\nand more')
    assert list(read(path)) == [Text('{"text": 1}\nand more', str(path), packed=True)]


def test_folders_are_read_in_the_order_of_their_paths(tmp_path, caplog):
    for name in ("b/two.md", "a.txt", ".hidden/no.txt", "c.jsonl", ".no.txt", "picture.png"):
        write(tmp_path / name, GOOD)
    with caplog.at_level(logging.WARNING, "roadie"):
        records = list(read([tmp_path]))
    assert [record.where for record in records] == [
        str(tmp_path / "a.txt"),
        str(tmp_path / "b/two.md"),
        f"{tmp_path / 'c.jsonl'}, line 1",
    ]
    assert "left out 1 files" in caplog.text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "bad JSON"),
        (b'["a"]', "got a JSON list"),
        (b'{"txt": "a"}', "without 'text'"),
        (b'{"text": ""}', "not empty"),
        (b'{"text": 3}', "got text=3"),
        (b'{"prompt": "a"}', "without 'completion'"),
        (b'{"completion": "a"}', "without 'prompt'"),
        (b'{"prompt": "a", "completion": ""}', "got completion=''"),
        (b'{"text": "\xff"}', "byte 0xff, which is not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"messages": []}', "wanted a list"),
        (b'{"messages": "hello"}', "wanted a list"),
        (b'{"messages": ["hello"]}', "message 1: got 'hello'"),
        (b'{"messages": [{"role": "assistant"}]}', "got content=None"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = write(tmp_path / "bad.jsonl", GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        list(read(path))
    assert str(caught.value).startswith(f"{path}, line 3")
    assert said in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = write(tmp_path / "latin.txt", "eins\nzwei\nBär".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt, line 3: got byte 0xe4"):
        list(read(path))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_files_are_refused(tmp_path, name, content):
    with pytest.raises(DataError, match="got an empty file"):
        list(read(write(tmp_path / name, content)))


def test_a_folder_without_text_is_refused(tmp_path):
    write(tmp_path / "picture.png", b"x")
    with pytest.raises(DataError, match="a folder of 1 files, none of them text"):
        list(read(tmp_path))


def test_what_does_not_exist_is_refused():
    with pytest.raises(DataError, match="got neither a file nor a folder; wanted a path"):
        list(read("no-such-file.txt"))


def test_hub_data_sets_need_the_package_datasets(monkeypatch):
    real = builtins.__import__

    def without_datasets(name, *rest, **more):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(DataError, match="pip install datasets"):
        list(read("owner/name"))


def test_hub_data_sets_are_read_row_by_row(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"text": "a", "label": 1}, {"text": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    records = read("owner/name:small")
    assert next(records) == Text("a", "owner/name:small, row 1")
    with pytest.raises(DataError, match="owner/name:small, row 2: got text=None"):
        next(records)
    assert asked == [("owner/name", "small", "train")]


def test_a_hub_data_set_that_cannot_be_loaded_is_refused():
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="roadie-tests/no-such: got neither a file nor a folder, and no hub data set"):
        list(read("roadie-tests/no-such"))
