"""A deployment as its users would start it: `roadie deploy` as a process, on a Ray of this machine, ended in good order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import yaml
from tests.patience import HANG_S
from tests.serving.http.harness import ADMIN_KEY, USER_KEY, free_port

from roadie.serving.http.keys import add_to_file, entry_of

ROADIE = "import sys; from roadie.cli import main; main()"
SMALL = {"num_slots": 8, "max_running": 16, "max_batch_tokens": 128, "num_blocks": 256}


@dataclass(frozen=True)
class Cluster:
    """A deployment that runs. session: the group of its processes."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes]

    def http(self, key: str = ADMIN_KEY) -> httpx2.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=HANG_S, trust_env=False)

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def pids(self, title: str = "") -> list[int]:
        """Processes that were started with the deployment and whose command line has `title`."""
        return [pid for pid in members(self.process.pid) if title in command_line(pid)]

    def complete(self, model: str, prompt: str, **more: Any) -> str:
        with self.http() as client:
            answer = client.post("/v1/completions", json={"model": model, "prompt": prompt, "temperature": 0, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]


def command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def members(session: int) -> list[int]:
    """The processes of a session, the dead ones left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


@contextmanager
def deployed(folder: Path, **settings: Any) -> Iterator[Cluster]:
    """A deployment of the adapters in `folder/adapters`; nothing of it is left afterwards."""
    if not (folder / "keys.yaml").exists():
        add_to_file(folder / "keys.yaml", entry_of("operator", ADMIN_KEY, None, is_admin=True))
        add_to_file(folder / "keys.yaml", entry_of("alice", USER_KEY, None, is_admin=False))
    port = free_port()
    content = {"adapters": "adapters", "api_keys": "keys.yaml", "port": port, "limits": SMALL, **settings}
    (folder / "deploy.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-c", ROADIE, "deploy", str(folder / "deploy.yaml")]
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment(folder))
    cluster = Cluster(f"http://127.0.0.1:{port}", folder, process)
    try:
        wait_until_ready(cluster)
        yield cluster
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_S) == 0, cluster.log[-4000:]
    finally:
        left = until_gone(process.pid)
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    assert not left, "processes were left"


def until_gone(session: int) -> list[int]:
    end_s = time.monotonic() + HANG_S
    while (left := members(session)) and time.monotonic() < end_s:
        time.sleep(0.1)
    return left


def environment(folder: Path) -> dict[str, str]:
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": "/tmp", "RAY_worker_register_timeout_seconds": "180"}
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | quiet


def wait_until_ready(cluster: Cluster) -> None:
    end_s = time.monotonic() + HANG_S
    while time.monotonic() < end_s:
        assert cluster.process.poll() is None, cluster.log[-4000:]
        with suppress(httpx2.TransportError):
            if httpx2.get(f"{cluster.url}/ready", trust_env=False).status_code == 200:
                return
        time.sleep(0.3)
    raise TimeoutError(cluster.log[-4000:])
