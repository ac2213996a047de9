"""The commands of docs/ray.md run as written, but for the port."""

from __future__ import annotations

import pytest
from tests.patience import HANG_S

pytest.importorskip("ray", reason="needs Ray, which has an environment of its own: make test-ray")

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.ray.cluster import Cluster, environment, until_gone, wait_until_ready
from tests.serving.http.harness import free_port

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "ray.md"
RUN = 'import sys; sys.argv[0] = "roadie"; from roadie.cli import main; main()'


def blocks(kind: str) -> list[str]:
    """The code that is marked as something that runs."""
    text = GUIDE.read_text(encoding="utf-8")
    return re.findall(rf"<!-- runs: {kind} -->\n```\w+\n(.*?)```", text, flags=re.DOTALL)


def test_a_deployment_is_described_started_asked_and_changed_as_the_guide_says(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "bin").mkdir()
    for name, call in (("python", '"$@"'), ("roadie", f"-c '{RUN}' \"$@\"")):
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/sh\nexec {sys.executable} {call}\n")
        command.chmod(0o755)
    variables = {**environment(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}

    def bash(script: str) -> str:
        script = "set -e\n" + script.replace("localhost:8000", f"localhost:{port}").replace(
            "port: 8000", f"port: {port}"
        )
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=HANG_S
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    describe, ask, change = blocks("bash")
    assert f"http://127.0.0.1:{port}" in bash(describe)
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {blocks('server')[0]}"],
            cwd=tmp_path,
            env=variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until_ready(Cluster(f"http://127.0.0.1:{port}", tmp_path, process))
        printed = bash(ask)
        assert '"parent":"roadie-tiny"' in printed
        assert json.loads(printed[printed.index('{"id":"cmpl') :])["usage"]["completion_tokens"] == 8
        head = ask[: ask.index("curl")]
        assert re.findall(r'"state":"(\w+)"', bash(head + change)) == ["resident", "resident", "known"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_S) == 0
    finally:
        for pid in until_gone(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
