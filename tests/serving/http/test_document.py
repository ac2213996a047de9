"""docs/serving.md: its session runs as it stands, in a shell and in Python, and prints what it says; its tables are true."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.patience import HANG_S
from tests.serving.http.harness import free_port
from tests.versions import NO_ENGINE

from roadie.serving.http.gate import ROUTES, Right
from roadie.serving.http.keys import read_keys

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
SESSION = TEXT.partition("## A session")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```(bash|python|text)\n(.*?)^```$", SESSION, flags=re.MULTILINE | re.DOTALL)
END = "-- the end of the block --"


@contextlib.contextmanager
def shell(folder: Path) -> Iterator[Any]:
    """A function that runs code in one shell, and returns what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    running = subprocess.Popen(
        ["bash"], cwd=folder, env={**os.environ, "PATH": path}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def run(code: str) -> str:
        running.stdin.write(f"{code}\nprintf '\\n%s\\n' '{END}'\n")
        running.stdin.flush()
        return "".join(iter(running.stdout.readline, f"{END}\n"))[:-1]

    run("set -m")
    try:
        yield run
    finally:
        run("kill -9 $(jobs -p) 2> /dev/null")
        running.stdin.close()
        running.stdout.close()
        running.wait(HANG_S)


@pytest.mark.skipif(NO_ENGINE, reason="the engine needs a newer transformers")
@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="there is no bash, or no curl")
def test_the_session_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    port, num_compared, printed = str(free_port()), 0, ""
    with shell(tmp_path) as run:
        for kind, block in BLOCKS:
            code = block.replace("8000", port)
            if kind == "text":
                assert printed == block
                num_compared += 1
            elif kind == "bash":
                printed = run(code)
            else:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(code, "docs/serving.md", "exec"), names)
                printed = out.getvalue()
    names["client"].close()
    assert num_compared >= 6


def test_the_table_of_routes_is_that_of_the_server() -> None:
    rows = re.findall(r"^\| `((?:GET|POST) [^|]*)` \| (.*) \|$", TEXT, flags=re.MULTILINE)
    described = {
        path.replace("NAME", "{model}"): text for cell, text in rows for path in re.findall(r"(/[\w/]*)", cell)
    }
    described |= {"/v1/models/{model}": described.pop("/v1/models/", "")}
    hidden = {"/", "/page.js", "/page.css", "/icon.svg", "/openapi.json"}
    assert set(described) == set(ROUTES) - hidden
    for path, text in described.items():
        assert ("administrators" in text) == (ROUTES[path].right is Right.ADMIN)


def test_the_file_of_keys_in_the_document_is_one(tmp_path: Path) -> None:
    block = re.findall(r"^```yaml\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)[0]
    assert set(yaml.safe_load(block)) == {"keys"}
    (tmp_path / "keys.yaml").write_text(block)
    callers = [caller for _, caller in read_keys(tmp_path / "keys.yaml").entries]
    assert [(caller.name, caller.is_admin) for caller in callers] == [("alice", False), ("operator", True)]
    assert [callers[0].may_use(name) for name in ("legal", "team-a", "terse")] == [True, True, False]
