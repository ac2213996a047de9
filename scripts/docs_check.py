"""Every link, picture and anchor of the built site is there, and nothing is fetched from others: ``docs_check.py build/site``.

mkdocs checks links of Markdown; this reads the pages that came out, and so also what is written as HTML and what the theme adds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"script": "src", "img": "src", "source": "srcset", "link": "href", "iframe": "src"}


@dataclass
class Read(HTMLParser):
    """What a page has: anchors, targets of links, and addresses that a browser fetches with it."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])


def read(path: Path) -> Read:
    page = Read()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def faults_of(path: Path, pages: dict[Path, Read]) -> list[str]:
    """What is wrong with the links of one page."""
    page = pages[path]
    foreign = [f"{address} would be fetched from elsewhere" for address in page.fetched if urlsplit(address).netloc]
    missing = [
        f"{address} leads nowhere"
        for address in [*page.links, *page.fetched]
        if not urlsplit(address).scheme and not urlsplit(address).netloc and not is_there(path, address, pages)
    ]
    return foreign + missing


def is_there(path: Path, address: str, pages: dict[Path, Read]) -> bool:
    parts = urlsplit(address)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if target in pages and parts.fragment:
        return unquote(parts.fragment) in pages[target].anchors or parts.fragment.startswith("__")  # of the theme
    return target.exists()


def main(site: Path) -> int:
    pages = {path: read(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    faults = [f"{path.relative_to(site)}: {fault}" for path in pages for fault in faults_of(path, pages)]
    print(*faults, f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links", sep="\n")
    return int(bool(faults) or not pages)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
