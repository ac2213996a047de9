"""docs/troubleshooting.md has a section for every error, and a traceback ends with its anchor; messages do not."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import sys
import traceback
from pathlib import Path

import pytest

from roadie import errors

PAGE = (Path(__file__).resolve().parents[2] / errors.HELP).read_text(encoding="utf-8")
CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__]


def test_every_error_has_a_section_and_every_section_an_error() -> None:
    assert sorted(re.findall(r"^### (.+)$", PAGE, flags=re.MULTILINE)) == sorted(each.__name__ for each in CLASSES)


@pytest.mark.parametrize("kind", [each for each in CLASSES if issubclass(each, errors.RoadieError)])
def test_a_note_names_the_section_and_the_message_stays(kind: type[errors.RoadieError]) -> None:
    error = kind("got 3; wanted 4; count again")
    assert str(error) == "got 3; wanted 4; count again"
    assert error.__notes__ == [f"More: {errors.HELP}#{kind.__name__.lower()}"]
    assert pickle.loads(pickle.dumps(error)).__notes__ == error.__notes__


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tracebacks show notes from Python 3.11 on")
def test_a_traceback_ends_with_the_anchor() -> None:
    class Narrower(errors.BankFull):
        """An error that only a part of roadie knows: its section is that of the public class."""

    for kind, anchor in ((errors.ConfigError, "configerror"), (Narrower, "bankfull")):
        shown = traceback.format_exception(kind("got 3"))
        assert shown[-1] == f"More: {errors.HELP}#{anchor}\n"
        assert shown[-2].endswith(": got 3\n")


def test_notes_of_one_error_are_not_those_of_another() -> None:
    first, second = errors.ConfigError("a"), errors.ConfigError("b")
    first.__notes__.append("of the first alone")
    assert second.__notes__ == errors.ConfigError("c").__notes__


def words_of_the_package() -> str:
    """All string constants of the package, parts of f-strings and neighbours joined."""
    root = Path(errors.__file__).parent
    constants = (
        node.value
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return "\n".join(constants)


def test_messages_that_are_quoted_are_those_of_the_package() -> None:
    """Their parts between what is filled in: values, and `...`."""
    quoted = re.findall(r"^\| `(.+?)` \|", PAGE, flags=re.MULTILINE)
    assert len(quoted) > 7
    words = words_of_the_package()
    parts = [part for text in quoted for part in re.split(r"\.\.\.|\(\d+\)|\b\d+\b", text) if len(part.split()) > 2]
    assert len(parts) >= len(quoted) - 3
    assert [part for part in parts if part.strip() not in words] == []
