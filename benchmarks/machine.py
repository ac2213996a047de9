"""Where a record was made: processor, versions, commit, load, and how fast this machine copies memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Budget, measure, threads
from benchmarks.record import ROOT
from benchmarks.statistics import summarise

LIBRARIES = ("torch", "peft", "transformers", "numpy")
COPIED_BYTES = 64 * 2**20


def processor() -> str:
    """The model name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module knows
    return platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug(name: str) -> str:
    """A name for a folder: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_name(device: str = "cpu") -> str:
    """``amd-epyc-2-cores``, or the name of the GPU."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name())
    return f"{slug(processor())}-{cores()}-cores"


def commit() -> dict[str, Any]:
    """The commit of the checkout, and whether src or benchmarks differ from it ("dirty")."""
    revision = _git("rev-parse", "--short=10", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py", "benchmarks/workloads")
    return {"commit": revision, "dirty": bool(changed)}


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Everything about the machine that a reader of the record must know; takes a second of copying."""
    default = torch.get_num_threads()
    return {
        "name": machine_name(device),
        "processor": processor(),
        "cores": cores(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {library: version(library) for library in LIBRARIES},
        "default_threads": default,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "copy_bytes_per_s": {str(count): copy_bandwidth(count) for count in sorted({1, min(2, cores()), default})},
    }


def copy_bandwidth(thread_count: int, nbytes: int = COPIED_BYTES, seconds: float = 0.4) -> float:
    """Bytes read plus bytes written a second by ``b.copy_(a)`` on warm buffers of 64 MiB: the median of many copies."""
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    with threads(thread_count):
        rounds = measure({"copy": lambda: target.copy_(source)}, Budget(seconds))
    return 2 * nbytes / (summarise(rounds, "copy", None)["copy"]["median_ms"] * 1e-3)
