"""The site's own scripts: links out of docs/ lead to pages, and what is wrong with a built site is found."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "docs_site.py")))
CHECK = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "docs_check.py")))
PARAMETERS = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "docs_parameters.py")))


@pytest.mark.parametrize(
    ("here", "text", "led"),
    [
        ("fit.md", "[a](../src/roadie/errors.py)", "[a](source/src/roadie/errors.py.md)"),
        ("tutorials/trl.md", "[a](../../examples)", "[a](../source/examples.md)"),
        ("tutorials/trl.md", "[a](../../README.md#install)", "[a](../index.md#install)"),
        (
            "architecture.md",
            "[a](docs/decisions/README.md), [b](CONTRIBUTING.md)",
            "[a](decisions/README.md), [b](contributing.md)",
        ),
        (
            "fit.md",
            "[a](quality.md#x), [b](https://x.org/y.md), [c](#d)",
            "[a](quality.md#x), [b](https://x.org/y.md), [c](#d)",
        ),
        ("fit.md", "[a](../nothing/there.py)", "[a](../nothing/there.py)"),
    ],
)
def test_links_out_of_the_documents_lead_to_pages(here: str, text: str, led: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=here))
    assert SITE.on_page_markdown(text, page, None, None) == led


def test_a_source_is_shown_whole_and_left_out_of_the_search() -> None:
    page = SITE.source_page("src/roadie/version.py")
    assert (ROOT / "src" / "roadie" / "version.py").read_text(encoding="utf-8").rstrip() in page
    assert "exclude: true" in page
    assert "errors.py" in SITE.source_page("src/roadie")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="other.html#there">a</a><img src="a.png"><a href="https://x.org">b</a>', None),
        ('<a href="no.html">a</a>', "no.html leads nowhere"),
        ('<a href="other.html#not-there">a</a>', "other.html#not-there leads nowhere"),
        ('<source srcset="b.png">', "b.png leads nowhere"),
        ('<script src="https://cdn.org/x.js"></script>', "https://cdn.org/x.js would be fetched from elsewhere"),
        ('<link href="//fonts.org/f.css">', "//fonts.org/f.css would be fetched from elsewhere"),
    ],
)
def test_what_is_wrong_with_a_site_is_found(
    body: str, fault: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text(body, encoding="utf-8")
    (tmp_path / "other.html").write_text('<h1 id="there">x</h1>', encoding="utf-8")
    (tmp_path / "a.png").write_bytes(b"")
    assert CHECK.main(tmp_path) == (fault is not None)
    found = capsys.readouterr().out.splitlines()[:-1]
    assert found == ([] if fault is None else [f"index.html: {fault}"])


def test_a_site_without_pages_is_wrong(tmp_path: Path) -> None:
    assert CHECK.main(tmp_path) == 1


def test_what_a_docstring_says_of_parameters_is_a_list() -> None:
    docstring = """Do it: well.

before it. a, b: two
things; None: none of them; c: a third. Raises `E` for
a bad one. d: no parameter.

Args:
    e: a fourth,
        that goes on.
    f: a fifth.

The end: of it."""
    assert (
        PARAMETERS.listed(docstring, {"a", "b", "c", "e", "f"})
        == """Do it: well.

before it.

- `a`, `b`: two things; None: none of them
- `c`: a third.

Raises `E` for a bad one. d: no parameter.


- `e`: a fourth, that goes on.
- `f`: a fifth.

The end: of it."""
    )


def test_all_docstrings_of_a_package_are_rewritten() -> None:
    def member(kind: str, text: str, **rest: object) -> SimpleNamespace:
        kinds = {f"is_{each}": each == kind for each in ("alias", "class", "function", "module")}
        docstring = SimpleNamespace(value=f"It.\n\n{text}")
        return SimpleNamespace(
            **{"docstring": docstring, "members": {}, "parameters": [], "mro": list, **kinds, **rest}
        )

    one = [SimpleNamespace(name="x")]
    method = member("function", "x: one.", parameters=one)
    thing = member("class", "x: one. y: another. z: none.", parameters=one)
    thing.members = {"f": method, "y": member("attribute", "x: one.")}
    other = member("alias", "x: one.", parameters=one)
    module = member("module", "x: one.", members={"Thing": thing, "other": other})
    PARAMETERS.rewrite(SimpleNamespace(members={"module": module}))
    assert method.docstring.value == "It.\n\n- `x`: one."
    assert thing.docstring.value == "It.\n\n- `x`: one.\n- `y`: another. z: none."
    assert {each.docstring.value for each in (other, module, thing.members["y"])} == {"It.\n\nx: one."}
