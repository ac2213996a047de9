"""Texts: every form is read as documented, and what cannot be used is refused with file and line."""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace

import pytest

from roadie.training.rows import Chat, Completion, DataError, Instruction, Preference, Text
from roadie.training.text import read

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
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r'neither a file nor a folder, and got no datasets; .* pip install "roadie\[train\]"'
    ):
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


CHAT_ROWS = [
    ('{"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}', "c", "d"),
    ('{"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]}', "c", "d"),
    (
        '{"conversations": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "text": "e"}',
        "c",
        "d",
    ),
]


@pytest.mark.parametrize(("line", "asked", "answered"), CHAT_ROWS)
def test_sharegpt_is_a_chat_in_other_words(tmp_path, line, asked, answered):
    path = write(tmp_path / "rows.jsonl", line.encode())
    assert list(read(path)) == [Chat((("user", asked), ("assistant", answered)), f"{path}, line 1")]


def test_a_system_prompt_beside_a_sharegpt_conversation_is_its_first_turn(tmp_path):
    row = {"system": "s", "conversations": [{"from": "user", "value": "c"}, {"from": "assistant", "value": "d"}]}
    path = write(tmp_path / "rows.jsonl", json.dumps(row).encode())
    assert next(iter(read(path))).turns == (("system", "s"), ("user", "c"), ("assistant", "d"))


@pytest.mark.parametrize(
    ("row", "given"),
    [({"input": "i"}, "i"), ({"input": ""}, ""), ({"input": None}, ""), ({}, ""), ({"text": "all"}, "")],
)
def test_alpaca_rows_are_instructions(tmp_path, row, given):
    path = write(tmp_path / "rows.jsonl", json.dumps({"instruction": "t", "output": "o", **row}).encode())
    assert list(read(path)) == [Instruction("t", given, "o", f"{path}, line 1")]


def test_what_was_read_as_one_form_and_has_keys_of_another_is_what_it_was(tmp_path):
    """A null is no key, and a form that is there as a whole goes before one that is begun."""
    rows = [
        {"text": "a", "prompt": None, "completion": None},
        {"text": "a", "instruction": "t"},
        {"prompt": "p", "completion": "c", "chosen": "x", "rejected": "y"},
    ]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    first, second, third = read(path)
    assert (first.text, second.text, third.completion) == ("a", "a", "c")
    assert isinstance(list(read(path, preferences=True))[2], Preference)


SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}, {"role": "assistant", "content": "n"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SAID[0]], "chosen": [SAID[1]], "rejected": [SAID[2]]},
        {"prompt": "q", "chosen": [SAID[1]], "rejected": [SAID[2]]},
        {"prompt": "q", "chosen": [SAID[0], SAID[1]], "rejected": [SAID[0], SAID[2]]},
        {"chosen": [SAID[0], SAID[1]], "rejected": [SAID[0], SAID[2]], "messages": [SAID[0], SAID[1]]},
        {"prompt": [{"from": "human", "value": "q"}], "chosen": [SAID[1]], "rejected": [{"from": "gpt", "value": "n"}]},
    ],
)
def test_preferences_in_messages(tmp_path, row):
    path = write(tmp_path / "rows.jsonl", json.dumps(row).encode())
    wanted = (("user", "q"),), (("assistant", "y"),), (("assistant", "n"),)
    assert list(read(path, preferences=True)) == [Preference(*wanted, f"{path}, line 1")]


def test_equal_answers_are_two_answers(tmp_path):
    row = {"chosen": [SAID[0], SAID[1]], "rejected": [SAID[0], SAID[1]]}
    (record,) = read(write(tmp_path / "rows.jsonl", json.dumps(row).encode()))
    assert (record.prompt, record.chosen, record.rejected) == ((("user", "q"),), *2 * [(("assistant", "y"),)])


def test_preferences_in_texts(tmp_path):
    path = write(tmp_path / "rows.jsonl", b'{"prompt": "q", "chosen": "y", "rejected": "n"}')
    assert list(read(path)) == [Preference("q", "y", "n", f"{path}, line 1")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "t"}, "without 'output'"),
        ({"output": "t"}, "without 'instruction'"),
        ({"instruction": "t", "output": ""}, "got output=''"),
        ({"instruction": "t", "output": "o", "input": 3}, "got input=3"),
        ({"instruction": "t", "output": "o", "history": [["a", "b"]]}, r"got history=\[\['a', 'b'\]\] beside"),
        ({"instruction": "t", "output": "o", "system": "s"}, "got system='s' beside"),
        ({"conversations": []}, r"got conversations=\[\]"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "no message of the assistant"),
        (
            {"conversations": [{"from": "tool", "value": "a"}]},
            "message 1: got from='tool'; wanted one of human, user, gpt",
        ),
        ({"conversations": [{"from": "gpt", "value": None}]}, "message 1: got value=None"),
        ({"chosen": "a", "rejected": "b"}, "without 'prompt'"),
        ({"prompt": "q", "chosen": "a"}, "without 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": ["b"]}, r"got rejected=\['b'\]"),
        ({"prompt": [SAID[0]], "chosen": [SAID[0]], "rejected": [SAID[2]]}, "part at message 1"),
        ({"chosen": [SAID[1]], "rejected": [SAID[2]]}, "part at message 1"),
        ({"question": "q", "answer": "a"}, r"got keys \['answer', 'question'\]"),
    ],
)
def test_a_row_of_no_known_form_is_named_with_what_was_found(tmp_path, row, said):
    path = write(tmp_path / "bad.jsonl", GOOD + json.dumps(row).encode())
    with pytest.raises(DataError, match=said) as caught:
        list(read(path))
    assert str(caught.value).startswith(f"{path}, line 2")


def test_the_forms_that_are_known_are_named(tmp_path):
    with pytest.raises(DataError) as caught:
        list(read(write(tmp_path / "bad.jsonl", b'{"question": "q"}')))
    for word in (
        "text",
        "prompt",
        "completion",
        "messages",
        "conversations",
        "instruction",
        "output",
        "chosen",
        "rejected",
    ):
        assert f'"{word}"' in str(caught.value)


def test_one_list_of_rows_is_read_and_each_is_at_its_line(tmp_path):
    path = write(
        tmp_path / "alpaca.json",
        b'[\n  {\n    "instruction": "t",\n    "output": "[1, 2]"\n  },\n  {"text": "a"}, {"text": "b"},\n\n  {"txt": "c"}\n]\n',
    )
    records = read(path)
    places = [next(records).where.removeprefix(f"{path}, line ") for _ in range(3)]
    assert places == ["2", "6", "6"]
    with pytest.raises(DataError, match=r"alpaca\.json, line 8: got keys \['txt'\]"):
        next(records)


@pytest.mark.parametrize(
    ("content", "said"), [(b'[\n{"text": "a"},\n', "line 3: got bad JSON"), (b"[[]]", "got a JSON list")]
)
def test_a_bad_list_is_named_by_its_line(tmp_path, content, said):
    with pytest.raises(DataError, match=said):
        list(read(write(tmp_path / "rows.json", content)))
