"""Reading training texts: files, folders or hub data sets to records that know where they came from.

A record is one of three frozen values:

    Text         {"text": ...}                          loss on every token
    Completion   {"prompt": ..., "completion": ...}     loss on the completion only
    Chat         {"messages": [{"role": ..., "content": ...}, ...]}   loss on the assistant's turns only

Files named ``*.jsonl``, ``*.ndjson`` or ``*.json`` hold one JSON object a line; other keys are ignored. Every other file
is plain text in UTF-8: one `Text` with ``packed=True``, whose tokens are later cut into full blocks. A folder is read
recursively in the order of its paths, hidden files left out. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadie.errors import RoadieError

logger = logging.getLogger("roadie")

JSON_LINES = (".jsonl", ".ndjson", ".json")
PLAIN_TEXT = (
    ".txt",
    ".text",
    ".md",
    ".rst",
    ".tex",
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".rs",
    ".go",
    ".js",
    ".ts",
    ".java",
    ".html",
)


class DataError(RoadieError, ValueError):
    """A training text is missing, unreadable, or not in one of the documented forms."""


@dataclass(frozen=True)
class Text:
    """A text to be learnt whole; `packed` texts are joined and cut into blocks instead of being one example each."""

    text: str
    where: str
    packed: bool = False


@dataclass(frozen=True)
class Completion:
    """A prompt, and the completion to be learnt."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Chat:
    """A conversation of (role, content) turns, in which the assistant's turns are learnt."""

    turns: tuple[tuple[str, str], ...]
    where: str


Record = Text | Completion | Chat


def read(sources: str | Path | Sequence[str | Path]) -> Iterator[Record]:
    """The records of files, folders and hub data sets, in order.

    A source that does not exist here is taken for a hub data set ``owner/name`` or ``owner/name:config`` (its "train"
    split), which needs the package `datasets`. Raises `DataError`, naming file and line, for whatever cannot be used.
    """
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        yield from _read_source(source)


def _read_source(source: str | Path) -> Iterator[Record]:
    path = Path(source)
    if path.is_dir():
        for file in _files_of(path):
            yield from _read_file(file)
    elif path.is_file():
        yield from _read_file(path)
    else:
        yield from _read_hub(str(source))


def _files_of(folder: Path) -> list[Path]:
    inside = (path for path in folder.rglob("*") if path.is_file())
    visible = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    chosen = sorted(path for path in visible if path.suffix.lower() in JSON_LINES + PLAIN_TEXT)
    if not chosen:
        raise DataError(
            f"{folder}: got a folder of {len(visible)} files, none of them text; wanted names ending in "
            f"{', '.join(JSON_LINES + PLAIN_TEXT)}; name the files one by one to read others as plain text"
        )
    if len(chosen) < len(visible):
        logger.warning("%s: left out %d files that are neither text nor JSON lines", folder, len(visible) - len(chosen))
    return chosen


def _read_file(path: Path) -> Iterator[Record]:
    if path.suffix.lower() in JSON_LINES:
        yield from (parse_record(value, where) for value, where in json_objects(path))
    else:
        yield Text(_whole_text(_content(path), path), str(path), packed=True)


def _content(path: Path) -> bytes:
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise DataError(f"{path}: got an empty file; wanted text or JSON lines; remove it from the data")
    return raw


def _whole_text(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{path}, line {number}", error) from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{where}: got byte 0x{error.object[error.start]:02x}, which is not UTF-8; wanted UTF-8; convert the file"
    )


def json_objects(path: Path) -> Iterator[tuple[object, str]]:
    """The values of a file of JSON lines, each with its place ("FILE, line N"); blank lines are passed over."""
    for number, line in enumerate(_content(path).split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _json_value(line, where), where


def _json_value(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: got bad JSON ({error.msg} at column {error.colno}); wanted one JSON object a line"
        ) from None


def parse_record(value: object, where: str) -> Record:
    """The record a JSON object stands for; `where` names its place in messages. Raises `DataError`."""
    if not isinstance(value, Mapping):
        raise DataError(
            f'{where}: got a JSON {type(value).__name__}; wanted one object a line, such as {{"text": ...}}'
        )
    if "messages" in value:
        return Chat(_turns(value["messages"], where), where)
    if "prompt" in value or "completion" in value:
        prompt = _string(value, "prompt", where, may_be_empty=True)
        return Completion(prompt, _string(value, "completion", where), where)
    return Text(_string(value, "text", where), where)


def _string(value: Mapping[str, Any], key: str, where: str, *, may_be_empty: bool = False) -> str:
    if key not in value:
        raise DataError(
            f'{where}: got keys {sorted(map(str, value))} without {key!r}; wanted "text", or "prompt" and '
            '"completion", or "messages"'
        )
    text = value[key]
    if not isinstance(text, str) or not (text or may_be_empty):
        raise DataError(f"{where}: got {key}={text!r}; wanted a string{'' if may_be_empty else ' that is not empty'}")
    return _valid_unicode(text, key, where)


def _valid_unicode(text: str, key: str, where: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: got {text[error.start]!r} in {key}, half of a surrogate pair; wanted Unicode; write both halves"
        ) from None
    return text


def _turns(messages: object, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f'{where}: got messages={messages!r}; wanted a list of objects with "role" and "content"')
    turns = tuple(_turn(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1))
    if not any(role == "assistant" for role, _ in turns):
        raise DataError(f"{where}: got no message of the assistant; wanted one at least, since only those are learnt")
    return turns


def _turn(message: object, where: str) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(f'{where}: got {message!r}; wanted an object with "role" and "content"')
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise DataError(f"{where}: got {key}={message.get(key)!r}; wanted a string")
    return message["role"], _valid_unicode(message["content"], "content", where)


def _read_hub(source: str) -> Iterator[Record]:
    name, _, config = source.partition(":")
    rows = _hub_rows(name, config or None, source)
    for number, row in enumerate(rows, start=1):
        yield parse_record(row, f"{source}, row {number}")


def _hub_rows(name: str, config: str | None, source: str) -> Iterable[object]:
    missing = f"{source}: got neither a file nor a folder"
    if name.count("/") != 1 or not all(name.split("/")):
        raise DataError(f'{missing}; wanted a path, or a hub data set "owner/name"; check the spelling')
    try:
        import datasets
    except ImportError:
        raise DataError(f"{missing}; a hub data set needs the package datasets; run: pip install datasets") from None
    try:
        return datasets.load_dataset(name, config, split="train")
    except Exception as error:  # the package raises many kinds, from the network and from the data set itself
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{missing}, and no hub data set could be loaded ({type(error).__name__}: {reason})") from error
