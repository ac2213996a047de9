"""The server's page, photographed for docs/serving.md: ``python scripts/page_example.py``, with a Chromium on this machine.

The embedded model answers one prompt with each of its adapters, of one of them half as much again.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from chromium import Page, chromium, installed
from report_example import save_small

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
PICTURES = {"light": (1100, "light"), "dark": (1100, "dark"), "phone": (390, "light")}
SERVE = "import sys; from roadie.cli import main; main()"
MOST_S = 300.0
ASK = """
const strength = [...document.querySelectorAll('.column input[type=range]')].at(-1);
strength.value = 1.5;
strength.dispatchEvent(new Event('input', {bubbles: true}));
document.getElementById('prompt').value = 'The turtle';
document.getElementById('run').click();
"""
ANSWERED = "[...document.querySelectorAll('.measured')].every(each => each.textContent.includes('a second'))"


def main() -> None:
    program = installed()
    if program is None:
        raise SystemExit("got no Chromium on this machine; wanted one; run: apt install chromium")
    with serving() as address, chromium(program) as browser:
        for name, (width, scheme) in PICTURES.items():
            page = browser.open(address, width=width, scheme=scheme)
            wait(lambda page=page: page.evaluate("document.querySelectorAll('.column').length >= 4"))
            page.evaluate(ASK)
            wait(lambda page=page: page.evaluate(ANSWERED))
            photograph(page, IMAGES / f"serving-page-{name}.png")


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server of the embedded model, for the length of a block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-c", SERVE, "serve", "--port", str(port)])
    try:
        wait(lambda: process.poll() is not None or is_ready(address))
        yield address
    finally:
        process.terminate()
        process.wait()


def is_ready(address: str) -> bool:
    try:
        with urlopen(f"{address}/ready") as answer:
            return bool(answer.status == 200)
    except URLError:
        return False


def wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + MOST_S
    while not until():
        if time.monotonic() > end:
            raise SystemExit(f"got nothing within {MOST_S:.0f} s; wanted the page and its answers")
        time.sleep(0.5)


def photograph(page: Page, path: Path) -> None:
    if page.complaints:
        raise SystemExit(f"{path.name}: {page.complaints}")
    save_small(page.screenshot(), path)


if __name__ == "__main__":
    main()
