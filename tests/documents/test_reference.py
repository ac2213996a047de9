"""The reference has every public name, and a program that uses it."""

from __future__ import annotations

import importlib
import re

import pytest
from tests.guides import DOCS, blocks_of

import roadie

PAGES = sorted(path for path in (DOCS / "reference").glob("*.md") if path.name != "index.md")
SHOWN = {
    name: page for page in PAGES for name in re.findall(r"^::: roadie\.(.+)$", page.read_text("utf-8"), re.MULTILINE)
}
PROGRAMS = {page.name: "\n".join(blocks_of(f"reference/{page.name}")) for page in PAGES}
ELSEWHERE = {"PeftModel", "RoadieError"}  # PEFT's own class; a part of roadie.errors


@pytest.mark.parametrize("name", roadie.__all__)
def test_every_public_name_is_used_in_a_program_and_shown(name: str) -> None:
    assert any(re.search(rf"\broadie\.{name}\b", program) for program in PROGRAMS.values())
    assert name in ELSEWHERE or any(shown == name or shown.startswith(f"{name}.") for shown in SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_every_name_that_is_shown_is_used_in_code_that_is_run(name: str) -> None:
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert any(re.search(rf"\b{name.rpartition('.')[2]}\b", code) for page in pages for code in blocks_of(page))


@pytest.mark.parametrize("name", SHOWN)
def test_every_name_that_is_shown_is_there_and_says_what_it_is(name: str) -> None:
    module, _, attribute = f"roadie.{name}".rpartition(".")
    assert getattr(importlib.import_module(module), attribute).__doc__
