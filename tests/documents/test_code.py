"""Every block of code in the documents is run, here or by the test of its page, or says why not."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from tests.guides import DOCS, all_blocks, blocks_of, run

ROOT = DOCS.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]}
CODE, SHOWN = {"python", "bash"}, {"text", "yaml", "json"}
# Pages whose code needs more than a folder, or is compared with what the page says.
RUN_BY = {
    "README.md": "tests/documents/test_documents.py",
    "docs/combining.md": "tests/documents/test_combining.py",
    "docs/engine.md": "tests/engine/test_guide.py",
    "docs/fine-tuning-api.md": "tests/train_service/fine_tuning/test_guide.py",
    "docs/fit.md": "tests/benchmarks/test_fit.py",
    "docs/inspecting.md": "tests/documents/test_inspecting.py",
    "docs/ray.md": "tests/ray/test_guide.py",
    "docs/serving.md": "tests/serving/http/test_document.py",
    "docs/subspaces.md": "tests/benchmarks/test_subspaces.py",
    "docs/train-many.md": "tests/training/many/test_guides.py",
    "docs/train-service.md": "tests/train_service/test_tinker_guide.py",
    "docs/tutorials/training-service.md": "tests/train_service/test_tinker_guide.py",
    "docs/tutorials/trl.md": "tests/training/test_trl_tutorial.py",
    "docs/vllm.md": "tests/vllm/test_guide.py",
}


@cache
def run_here() -> list[str]:
    """Pages with Python that no other test runs."""
    return [
        page
        for page, path in sorted(PAGES.items())
        if page not in RUN_BY and any(block.language == "python" for block in all_blocks(path.read_text("utf-8")))
    ]


@pytest.mark.parametrize("page", run_here())
def test_the_python_of_a_page_is_one_program(page: str, tmp_path: Path) -> None:
    blocks = blocks_of(page.removeprefix("docs/"))
    assert blocks
    run(blocks, tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    assert len(re.findall("^ *```", text, flags=re.MULTILINE)) == 2 * len(all_blocks(text))
    for block in all_blocks(text):
        assert block.language in CODE | SHOWN, block
        is_run = page in RUN_BY or (block.language == "python" and page in run_here())
        assert block.language in SHOWN or is_run or block.not_run, block


@pytest.mark.parametrize(("page", "test"), RUN_BY.items())
def test_the_tests_of_pages_name_them(page: str, test: str) -> None:
    assert page in PAGES
    assert Path(page).name in (ROOT / test).read_text(encoding="utf-8") or page == "README.md"


def test_what_is_said_before_a_block_is_read() -> None:
    text = (
        "a\n<!-- not run: no network -->\n```bash\nls\n```\n<!-- runs: bash -->\n```text\nb\n```\n\n```python\n1\n```\n"
    )
    found = [(block.language, block.code, block.not_run) for block in all_blocks(text)]
    assert found == [("bash", "ls\n", "no network"), ("text", "b\n", None), ("python", "1\n", None)]
