"""The commands of docs/vllm.md run as written, but for the port, and vLLM's command, which its CPU build lacks."""

from __future__ import annotations

import pytest
from tests.patience import HANG_S

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "vllm.md"


def blocks(kind: str) -> list[str]:
    """The code that is marked as something that runs."""
    text = GUIDE.read_text(encoding="utf-8")
    return re.findall(rf"<!-- runs: {kind} -->\n```\w+\n(.*?)```", text, flags=re.DOTALL)


class Reader:
    """Someone who types the commands, in a folder of their own."""

    def __init__(self, folder: Path, port: int) -> None:
        bin_folder = Path(sys.executable).parent
        self.folder, self.port = folder, port
        self.environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}

    def run(self, script: str) -> str:
        """What a script prints; variables of the scripts before are known to it."""
        script = script.replace("localhost:8000", f"localhost:{self.port}")
        keep = f"set -e; touch {self.folder}/known; . {self.folder}/known\n{script}\ndeclare -p MODEL > {self.folder}/known"
        done = subprocess.run(
            ["bash", "-c", keep], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=HANG_S
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Someone who has made the two adapters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    someone = Reader(tmp_path_factory.mktemp("guide"), port)
    someone.run(blocks("bash")[0])
    return someone


def test_the_server_is_started_asked_and_changed_as_the_guide_says(reader: Reader) -> None:
    _, ask, change, blend = blocks("bash")
    (command,) = blocks("server")
    assert "vllm serve $MODEL" in command
    started = command.replace("vllm serve $MODEL", "exec $PYTHON -m vllm.entrypoints.openai.api_server --model $MODEL")
    started = f". ./known; {started.strip()} --port {reader.port} --dtype float32 --enforce-eager --max-model-len 256"
    started = re.sub(r"\. \./known; (\w+=1) exec", r". ./known; export \1; exec", started)
    log = reader.folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["bash", "-c", started],
            cwd=reader.folder,
            env={**reader.environment, "PYTHON": sys.executable},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        wait(process, reader.port, log)
        answer = json.loads(reader.run(ask))
        assert answer["model"] == "zen"
        assert answer["usage"]["completion_tokens"] == 8
        printed = reader.run(change)
        blended = re.findall(r'"model":"(.*?)"', reader.run(blend))
    finally:
        process.terminate()
        process.wait(timeout=HANG_S)
    assert blended == ["base:zen=0.7+calm=0.3", "zen=0.5"]
    assert printed.count("Success: LoRA adapter 'still' added successfully.") == 2
    assert "Success: LoRA adapter 'still' removed successfully." in printed
    models = json.loads(re.search(r'\{"object":"list".*?\}\]\}(?=Success|$)', printed)[0])
    assert {model["id"]: model.get("parent") for model in models["data"]} == {
        "base": None,
        "zen": "base",
        "still": "base",
    }


def wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    give_up_s = time.monotonic() + HANG_S
    while time.monotonic() < give_up_s:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=HANG_S):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-3000:])


def test_the_python_of_the_guide_runs(reader: Reader) -> None:
    (code,) = blocks("python")
    code = code.replace("max_model_len=256", "max_model_len=256, enforce_eager=True")
    (reader.folder / "program.py").write_text(code)
    printed = reader.run("python program.py")
    assert len(printed.strip().splitlines()) >= 3
