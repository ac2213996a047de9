"""Every module says what it is in the first line of its docstring, and the glossary names what there is."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
STRUCTURE = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "structure.py")))
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
MODULES = sorted(STRUCTURE.PACKAGE.rglob("*.py"))


def speechless(paths: list[Path]) -> list[str]:
    """The modules whose first line is no sentence, or is also another's."""
    lines = [STRUCTURE.first_line(path) for path in paths]
    return [path.name for path, line in zip(paths, lines, strict=True) if line[-1:] != "." or lines.count(line) > 1]


def test_every_module_says_what_it_is() -> None:
    assert len(MODULES) > 250
    assert speechless(MODULES) == []


@pytest.mark.parametrize(
    ("code", "is_speechless"),
    [
        ('"""Turns pairs."""', False),
        ('"""Turns pairs.\n\nAnd more."""', False),
        ('"""Turns pairs, and goes\non in the next line."""', True),
        ('"""The same as another."""', True),
        ("# A comment.", True),
        ("", True),
    ],
)
def test_what_is_speechless(tmp_path: Path, code: str, is_speechless: bool) -> None:
    other, module = tmp_path / "other.py", tmp_path / "module.py"
    other.write_text('"""The same as another."""')
    module.write_text(code)
    assert ("module.py" in speechless([other, module])) is is_speechless


def test_the_structure_is_printed_from_the_tree(capsys: pytest.CaptureFixture[str]) -> None:
    STRUCTURE.main([])
    printed = capsys.readouterr().out
    folders, lines = [line for line in printed.splitlines() if line.endswith("/")], printed.splitlines()
    assert len(lines) == len(MODULES) + 2 * len(folders)
    assert "roadie/tuner/with_lora/" in folders
    assert lines[lines.index("roadie/fit/") + 1].split(maxsplit=1) == [
        "__init__.py",
        STRUCTURE.first_line(STRUCTURE.PACKAGE / "fit" / "__init__.py"),
    ]


def test_the_structure_of_some_packages(capsys: pytest.CaptureFixture[str]) -> None:
    STRUCTURE.main(["rotation", "checkpoint"])
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.endswith("/")] == ["roadie/", "roadie/checkpoint/"]
    with pytest.raises(SystemExit, match=r"got chekpoint; wanted packages or modules of .*roadie"):
        STRUCTURE.main(["chekpoint"])


def test_the_glossary_is_of_names_that_there_are() -> None:
    """Each word once, and each name in code that is said to have a meaning stands in the code."""
    glossary = ARCHITECTURE.partition("\n## Glossary\n")[2]
    words = [
        word for cell in re.findall(r"^\| ([^|]+) \| ", glossary, flags=re.MULTILINE)[1:] for word in cell.split(", ")
    ]
    assert len(words) > 25
    assert len(words) == len(set(words))
    code = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in MODULES)))
    assert set(re.findall(r"(?<!`)`(\w+)`(?!`)", glossary)) - code == set()
