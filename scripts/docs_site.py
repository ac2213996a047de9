"""Hooks of mkdocs.yml: documents of the repository's root become pages, and links into the sources lead to pages that show them.

Documents are written to be read where they lie, in the repository, with links between files. On the site whatever lies outside of
docs/ is a page as well: README.md is the home, the other documents of the root are pages, a file that is linked is shown whole.
"""

from __future__ import annotations

import os
import posixpath
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that tests read this module where there is no mkdocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {"ARCHITECTURE.md": "architecture.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
HOME = {"README.md": "index.md", "docs": "index.md"}
LINK = re.compile(r"(\]\()(?![a-z]+:)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each document of the root, and for each file that a document links to."""
    from mkdocs.structure.files import File

    for name, uri in DOCUMENTS.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    pages = {(ROOT / "docs" / file.src_uri): file for file in files.documentation_pages()}
    pages |= {ROOT / name: files.get_file_from_path(uri) for name, uri in DOCUMENTS.items()}
    for shown in sorted({path for place, file in pages.items() for path in linked_sources(place, file.content_string)}):
        files.append(File.generated(config, source_uri(shown), content=source_page(shown)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page with its links to what lies outside of docs/ led to the pages of these."""
    here = page.file.src_uri
    place = next((ROOT / name for name, uri in DOCUMENTS.items() if uri == here), ROOT / "docs" / here)

    def led(link: re.Match[str]) -> str:
        target = page_of(repository_path(place, link[2]))
        return link[0] if target is None else link[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    return markdown if here.startswith("source/") else LINK.sub(led, markdown)


def repository_path(place: Path, target: str) -> str:
    """Where a link of the document at `place` leads, from the repository's root on."""
    return Path(os.path.normpath(place.parent / target)).relative_to(ROOT).as_posix()


def page_of(path: str) -> str | None:
    """The page that stands for a path of the repository, None where there is nothing."""
    if path in DOCUMENTS or path in HOME:
        return DOCUMENTS.get(path) or HOME[path]
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return f"{inside}/README.md" if (ROOT / path / "README.md").is_file() else inside
    return source_uri(path) if (ROOT / path).exists() else None


def linked_sources(place: Path, text: str) -> set[str]:
    """Paths of files and folders outside of docs/ to which a document links."""
    targets = (repository_path(place, target) for _, target in LINK.findall(text))
    return {path for path in targets if (page_of(path) or "").startswith("source/")}


def source_uri(path: str) -> str:
    return f"source/{path}.md"


@cache
def source_page(path: str) -> str:
    """A page that shows a file whole, or the names of a folder's files; the search leaves it out."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(each.name for each in place.iterdir() if not each.name.startswith((".", "__pycache__")))
        language, text = "text", "\n".join(names)
    else:
        language = {".py": "python", ".yaml": "yaml", ".md": "markdown"}.get(place.suffix, "text")
        text = place.read_text(encoding="utf-8").rstrip()
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n`````{language}\n{text}\n`````\n"
