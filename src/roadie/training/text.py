"""Reading training texts: files, folders or hub data sets to records (`roadie.training.rows`) that know where they came from.

Files named ``*.jsonl``, ``*.ndjson`` or ``*.json`` hold one JSON object a line, or one list of objects. Every other file
is plain text in UTF-8: one `Text` with ``packed=True``, whose tokens are later cut into full blocks. A folder is read
recursively in the order of its paths, hidden files left out. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from roadie.errors import MissingExtra
from roadie.extras import need
from roadie.training.places import may_be_repository
from roadie.training.rows import DataError, Record, Text, parse_record

logger = logging.getLogger("roadie")

JSON_LINES = (".jsonl", ".ndjson", ".json")
PLAIN_TEXT = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html"),
    *(".py", ".c", ".h", ".cc", ".cpp", ".rs", ".go", ".js", ".ts", ".java"),
)


def read(sources: str | Path | Sequence[str | Path], *, preferences: bool = False) -> Iterator[Record]:
    """The records of files, folders and hub data sets, in order; preferences: as for `parse_record`.

    A source that does not exist here is taken for a hub data set ``owner/name`` or ``owner/name:config`` (its "train"
    split), which needs the package `datasets`. Raises `DataError`, naming file and line, for whatever cannot be used.
    """
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        for value, where in _values(source):
            yield value if isinstance(value, Text) else parse_record(value, where, preferences=preferences)


def check_there(sources: str | Path | Sequence[str | Path]) -> None:
    """Raise `DataError` for a source that looks like a path and does not exist, before anything else is looked for."""
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        if not Path(source).exists() and not may_be_repository(str(source).partition(":")[0]):
            raise DataError(
                f'{source}: got neither a file nor a folder; wanted a path, or a hub data set "owner/name"; check the spelling'
            )


def _values(source: str | Path) -> Iterator[tuple[object, str]]:
    """The rows of a source, each with its place; a file of plain text is one `Text`."""
    path = Path(source)
    if path.is_dir():
        for file in _files_of(path):
            yield from _values_of_file(file)
    elif path.is_file():
        yield from _values_of_file(path)
    else:
        yield from _hub_values(str(source))


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


def _values_of_file(path: Path) -> Iterator[tuple[object, str]]:
    if path.suffix.lower() in JSON_LINES:
        yield from json_objects(path)
    else:
        yield Text(_whole_text(_content(path), path), str(path), packed=True), str(path)


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
    """The values of a file of JSON lines, or of one JSON list, each with its place ("FILE, line N").

    Blank lines are passed over. An item of a list is at the line on which it begins.
    """
    raw = _content(path)
    if raw.lstrip().startswith(b"["):
        yield from _items_of_list(_whole_text(raw, path), path)
        return
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _json_value(line, where), where


_BETWEEN = re.compile(r"[\s,]*")


def _items_of_list(text: str, path: Path) -> Iterator[tuple[object, str]]:
    """The items of a JSON list, one after the other, so that a bad one is named by its line."""
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: got bad JSON ({error.msg} at column {error.colno}); wanted one list of objects, or "
            "one object a line"
        ) from None
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    line = 1 + text.count("\n", 0, place)
    for item in items:
        start = place + len(_BETWEEN.match(text, place)[0])  # type: ignore[index]
        line += text.count("\n", place, start)
        yield item, f"{path}, line {line}"
        place = decoder.raw_decode(text, start)[1]
        line += text.count("\n", start, place)


def _json_value(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: got bad JSON ({error.msg} at column {error.colno}); wanted one JSON object a line"
        ) from None


def _hub_values(source: str) -> Iterator[tuple[object, str]]:
    name, _, config = source.partition(":")
    rows = _hub_rows(name, config or None, source)
    for number, row in enumerate(rows, start=1):
        yield row, f"{source}, row {number}"


def _hub_rows(name: str, config: str | None, source: str) -> Iterable[object]:
    check_there(source)
    missing = f"{source}: got neither a file nor a folder"
    try:
        need("train")
    except MissingExtra as lack:
        raise DataError(f"{missing}, and {lack}") from None
    import datasets

    try:
        return datasets.load_dataset(name, config, split="train")
    except Exception as error:  # the package raises many kinds, from the network and from the data set itself
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{missing}, and no hub data set could be loaded ({type(error).__name__}: {reason})") from error
