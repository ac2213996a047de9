"""The corpus: the same on every call, cut without a leak, and usable where parts of the standard library are missing."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from roadie.embedded import corpus

LONG = 80


def long_paragraphs(documents: tuple[corpus.Document, ...]) -> set[str]:
    """Paragraphs of 80 characters or more, found in another way than the corpus finds them."""
    paragraphs: set[str] = set()
    for document in documents:
        lines: list[str] = []
        for line in [*document.text.split("\n"), ""]:
            if line.strip():
                lines.append(line)
            else:
                paragraphs.add(re.sub(r"\s+", " ", " ".join(lines)).strip())
                lines = []
    return {paragraph for paragraph in paragraphs if len(paragraph) >= LONG}


def installed() -> list[str]:
    def is_installed(kind: str) -> bool:
        try:
            return bool(corpus.split(kind))
        except LookupError:
            return False

    return [kind for kind in corpus.KINDS if is_installed(kind)]


def write(root: Path, name: str, subject: str, characters: int) -> None:
    """A Python file of about so many characters whose paragraphs are all different and about `subject`."""
    paragraphs = (
        f'"""Paragraph {n} of {name} says something about {subject}, and goes on until it is long enough to count."""\n'
        for n in itertools.count()
    )
    text = ""
    while len(text) < characters:
        text += next(paragraphs) + "\n"
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library with every kind but the topics, and files that must not be read."""
    for kind in ("asyncio", "turtledemo", "unittest", "encodings", "idlelib"):
        for number in range(6):
            write(tmp_path, f"{kind}/part{number}.py", kind, 12_000)
    for name in ("os.py", "json/decoder.py"):
        write(tmp_path, name, "everyday things", 5_000)
    for name in (
        "site-packages/foreign.py",
        "json/tests/test_json.py",
        "test/test_os.py",
        "_sysconfigdata_x.py",
        "asyncio/tests/test_loop.py",
    ):
        write(tmp_path, name, "secrets", 5_000)
    (tmp_path / "latin.py").write_bytes("# caf\xe9".encode("latin-1"))
    (tmp_path / "notes.txt").write_text("not Python")
    return tmp_path


def test_three_kinds_are_installed_with_enough_text_on_both_sides():
    kinds = corpus.kinds()
    assert len(set(kinds)) == 3
    for kind in kinds:
        split = corpus.split(kind)
        learnt, measured = (sum(len(document.text) for document in side) for side in (split.train, split.held_out))
        assert learnt > 2 * measured
        assert measured > 20_000


def test_two_readings_are_equal():
    first = corpus.pretraining(), [corpus.split(kind) for kind in installed()]
    corpus.split.cache_clear()
    corpus._of_kind.cache_clear()
    assert first == (corpus.pretraining(), [corpus.split(kind) for kind in installed()])


def test_no_document_and_no_long_paragraph_is_on_two_sides_of_a_split():
    for kind in installed():
        split = corpus.split(kind)
        assert not {document.name for document in split.train} & {document.name for document in split.held_out}
        assert not long_paragraphs(split.train) & long_paragraphs(split.held_out)


def test_no_kind_is_seen_in_pretraining():
    learnt = corpus.pretraining()
    tops = {document.name.split("/")[0] for document in learnt}
    assert not tops & {name for names in corpus.KINDS.values() for name in names}
    for kind in installed():
        split = corpus.split(kind)
        assert not long_paragraphs(learnt) & long_paragraphs(split.train + split.held_out)


def test_kinds_share_no_document():
    names = [
        document.name
        for kind in installed()
        for side in (corpus.split(kind).train, corpus.split(kind).held_out)
        for document in side
    ]
    assert len(names) == len(set(names))


def test_nothing_but_the_standard_library_is_read():
    sides = [side for kind in installed() for side in (corpus.split(kind).train, corpus.split(kind).held_out)]
    for document in itertools.chain(corpus.pretraining(), *sides):
        assert not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(document.name.split("/")), (
            document.name
        )


def test_topics_are_plain_prose():
    if "topics" not in installed():
        pytest.skip("this Python comes without pydoc_data")
    split = corpus.split("topics")
    for document in split.train + split.held_out:
        assert "**" not in document.text
        assert not re.search(r"^\s*[*=]{3,}\s*$", document.text, re.MULTILINE), document.name


def test_missing_kinds_are_replaced_in_the_documented_order(library: Path):
    assert corpus.kinds(library) == ("asyncio", "turtle", "unittest")
    assert corpus.kinds(library, count=2) == ("asyncio", "turtle")
    assert corpus.kinds(library, count=5) == ("asyncio", "turtle", "unittest", "encodings", "idlelib")


def test_a_kind_with_too_little_text_counts_as_missing(library: Path):
    for path in (library / "turtledemo").iterdir():
        path.write_text("pass\n")
    assert corpus.kinds(library) == ("asyncio", "unittest", "encodings")
    with pytest.raises(LookupError, match="'turtle' is not installed"):
        corpus.split("turtle", library)


def test_too_few_kinds_and_unknown_kinds_are_refused(library: Path, tmp_path: Path):
    with pytest.raises(LookupError, match=r"for 5 kinds .* wanted 6"):
        corpus.kinds(library, count=6)
    with pytest.raises(LookupError, match="for 0 kinds"):
        corpus.kinds(tmp_path / "nowhere")
    with pytest.raises(LookupError, match="got the kind 'poems'"):
        corpus.split("poems", library)


def test_foreign_files_tests_and_other_encodings_are_left_out(library: Path):
    assert [document.name for document in corpus.pretraining(library)] == ["json/decoder.py", "os.py"]
    names = {
        document.name
        for side in (corpus.split("asyncio", library).train, corpus.split("asyncio", library).held_out)
        for document in side
    }
    assert names == {f"asyncio/part{number}.py" for number in range(6)}


def test_a_paragraph_that_is_held_out_is_removed_from_what_is_learnt(library: Path):
    held_out = corpus.split("asyncio", library).held_out[0]
    shared = held_out.text.split("\n\n")[0]
    learnt = library / corpus.split("asyncio", library).train[0].name
    for path in (learnt, library / "os.py"):
        path.write_text(f"{path.read_text()}\n   {shared.replace(' ', '  ')}\n\nlast = 1\n")
    corpus.split.cache_clear()
    corpus._of_kind.cache_clear()
    after = corpus.split("asyncio", library)
    assert held_out in after.held_out
    for documents in (after.train, corpus.pretraining(library)):
        assert any("last = 1" in document.text for document in documents)
        assert not long_paragraphs((held_out,)) & long_paragraphs(documents)


def test_importing_the_corpus_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'tokenizers', 'peft'}"
    program = f"import sys, roadie.embedded.corpus; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
