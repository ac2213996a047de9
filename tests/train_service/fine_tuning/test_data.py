"""Files to rows: OpenAI's forms, what of them is learnt, and which lines cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.train_service.fine_tuning.harness import jsonl, turns

from roadie import embedded
from roadie.train_service.fine_tuning.data import MAX_FAULT_CHARS, MAX_FAULTS, BadFile, NotWanted, Reader, Row
from roadie.train_service.fine_tuning.limits import Limits

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = turns("What is it?", "A turtle.", "Is it?", "It is.")


def reader(template: str | None = None, longest: int = 512, **limits: int) -> Reader:
    tokenizer = embedded.load_tokenizer()
    tokenizer.chat_template = template
    return Reader(tokenizer, longest, Limits(**limits))


def written(path: Path, content: bytes) -> Path:
    file = path / "rows.jsonl"
    file.write_bytes(content)
    return file


def shown(reader: Reader, row: Row) -> tuple[str, str]:
    """What a row is, and what of it is learnt."""
    decode = reader.tokenizer.decode
    return decode(row.tokens.tolist()), decode(row.tokens[row.learnt].tolist())


def read(path: Path, reader: Reader, *rows: Any, method: str = "supervised") -> list[tuple[tuple[str, str], ...]]:
    found = reader.read(written(path, jsonl(rows)), method)
    return [tuple(shown(reader, row) for row in each) for each in found]


def test_without_a_template_each_answer_follows_what_the_server_would_have_put_to_it(tmp_path: Path) -> None:
    rows = read(tmp_path, reader(), {"messages": [{"role": "system", "content": "Be terse."}, *TALK]})
    first = "<s>Be terse.\n\nUser: What is it?\nAssistant:"
    assert rows == [
        ((f"{first} A turtle.</s>", " A turtle.</s>"),),
        ((f"{first} A turtle.\nUser: Is it?\nAssistant: It is.</s>", " It is.</s>"),),
    ]


def test_with_a_template_a_conversation_is_one_row(tmp_path: Path) -> None:
    whole = "<user>What is it?\n<assistant>A turtle.\n<user>Is it?\n<assistant>It is.\n"
    assert read(tmp_path, reader(TEMPLATE), {"messages": TALK}) == [((whole, "A turtle.\nIt is.\n"),)]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_an_answer_of_weight_0_is_not_learnt(tmp_path: Path, template: str | None) -> None:
    talk = [TALK[0], {**TALK[1], "weight": 0}, TALK[2], {**TALK[3], "weight": 1}]
    ((row,),) = read(tmp_path, reader(template), {"messages": talk})
    assert row[1].strip().removesuffix("</s>") == "It is."


def test_prompts_with_completions_and_parts_of_content(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "A "}, {"type": "text", "text": "turtle."}]
    rows = read(
        tmp_path,
        reader(),
        {"prompt": "Say:", "completion": " yes"},
        {"messages": [TALK[0], {**TALK[1], "content": parts}]},
    )
    assert [row[1] for (row,) in rows] == [" yes</s>", " A turtle.</s>"]


def test_preferences(tmp_path: Path) -> None:
    row = {"input": {"messages": TALK[:1]}, "preferred_output": TALK[1:2], "non_preferred_output": TALK[3:]}
    plain = [
        (
            ("<s>User: What is it?\nAssistant: A turtle.</s>", " A turtle.</s>"),
            ("<s>User: What is it?\nAssistant: It is.</s>", " It is.</s>"),
        )
    ]
    assert read(tmp_path, reader(), row, method="dpo") == plain
    ((better, worse),) = read(tmp_path, reader(TEMPLATE), row, method="dpo")
    assert (better[1], worse[1]) == ("A turtle.\n", "It is.\n")


def test_long_rows_are_cut(tmp_path: Path) -> None:
    rows = reader(longest=16).read(
        written(tmp_path, jsonl([{"messages": turns("a " * 100, "b " * 100)}])), "supervised"
    )
    assert len(rows[0][0].tokens) == 16
    assert rows[0][0].num_learnt >= 8


WRONG: list[tuple[bytes, str]] = [
    (b"{", "not JSON"),
    (b"\xff\xfe\xff", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "a JSON list; wanted an object"),
    (b'{"text": "a"}', r"keys \['text'\]; wanted messages"),
    (b'{"messages": []}', "no list of messages"),
    (b'{"messages": [3]}', "messages 1: got no object"),
    (b'{"messages": [{"role": "tool", "content": "a"}]}', "got role 'tool'; wanted one of system"),
    (b'{"messages": [{"role": ["user"], "content": "a"}]}', "got role"),
    (b'{"messages": [{"role": "user", "content": 3}]}', "content that is no text"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
    (jsonl([{"messages": [TALK[0], {**TALK[1], "weight": 0}]}]), "no message of the assistant that is to be learnt"),
    (jsonl([{"messages": [TALK[0], {**TALK[1], "weight": 0.5}]}]), "got weight 0.5; wanted 0 or 1"),
    (jsonl([{"messages": [{**TALK[0], "weight": 0}, TALK[1]]}]), "got weight 0; wanted 0 or 1, of the assistant's"),
    (jsonl([{"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]}]), "no tools"),
    (jsonl([{"messages": TALK, "tools": [{}]}]), "got tools"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    (jsonl([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}]), "parts of content"),
    (b'{"prompt": "a", "completion": 3}', "completion=3"),
]


@pytest.mark.parametrize(("line", "reason"), WRONG)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    good = jsonl([{"messages": TALK}])
    with pytest.raises(BadFile, match=rf"line 3.*{reason}"):
        reader().read(written(tmp_path, good + b"\n" + line.strip() + b"\n" + good), "supervised")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"input": {"messages": TALK[:1]}, "preferred_output": TALK[1:2]},
        {"input": {"messages": TALK[:1]}, "preferred_output": TALK[1:3], "non_preferred_output": TALK[3:]},
        {"input": {"messages": TALK[:1]}, "preferred_output": TALK[:1], "non_preferred_output": TALK[3:]},
        {"input": TALK[:1], "preferred_output": TALK[1:2], "non_preferred_output": TALK[3:]},
        {
            "input": {"messages": TALK[:1], "tools": [1]},
            "preferred_output": TALK[1:2],
            "non_preferred_output": TALK[3:],
        },
    ],
)
def test_a_preference_that_is_wrong_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(BadFile, match=r"line 1: got .*; "):
        read(tmp_path, reader(), row, method="dpo")


def test_many_wrong_lines_are_counted_and_some_are_shown(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"line 1: .*line 5: (?!.*line 6).* \(and 245 more\)") as raised:
        reader().read(written(tmp_path, b"{}\n" * 250), "supervised")
    assert len(raised.value.faults) == MAX_FAULTS
    assert raised.value.faults[-1].startswith(f"line {MAX_FAULTS}:")


def test_what_is_said_of_a_line_is_short(tmp_path: Path) -> None:
    with pytest.raises(BadFile) as raised:
        read(tmp_path, reader(), {"prompt": "a", "completion": [0] * 10_000})
    assert len(raised.value.faults[0]) == MAX_FAULT_CHARS


def test_a_file_is_as_long_as_it_may_be(tmp_path: Path) -> None:
    row = jsonl([{"messages": TALK[:2]}])
    for limits, reason in (
        ({"max_rows": 3}, "line 4: got more than 3 lines"),
        ({"max_tokens": 40}, "got more than"),
        ({"max_line_bytes": 40}, "line 1: got more than 40 bytes"),
    ):
        with pytest.raises(BadFile, match=reason):
            reader(**limits).read(written(tmp_path, row * 5), "supervised")
    for nothing in (b"", b"\n\n"):
        with pytest.raises(BadFile, match="without rows"):
            reader().read(written(tmp_path, nothing), "supervised")


def test_a_line_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    content = json.dumps({"x": "y" * 1000}).encode() + b"\n" + jsonl([{"messages": TALK[:2]}])
    with pytest.raises(BadFile) as raised:
        reader(max_line_bytes=200).read(written(tmp_path, content), "supervised")
    assert raised.value.faults == ("line 1: got more than 200 bytes; wanted fewer; shorten it",)


def test_nobody_reads_on_for_a_job_that_has_ended(tmp_path: Path) -> None:
    with pytest.raises(NotWanted):
        reader().read(written(tmp_path, jsonl([{"messages": TALK[:2]}]) * 100), "supervised", lambda: False)
