"""For every test: no network, one thread of torch, the same examples each time, nothing left outside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"

# Set before torch or transformers are imported; processes that tests start inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=str(CACHE / "huggingface"),
    # What inductor has made for AVX2 it takes for AVX-512 too, and then writes beyond tensors: each has its own place.
    TORCHINDUCTOR_CACHE_DIR=str(CACHE / "inductor" / os.environ.get("ATEN_CPU_CAPABILITY", "native")),
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)

# Triton's kernels are interpreted, on the CPU; TRITON_INTERPRET=0 compiles them, for tests/gpu.
os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "roadie",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("roadie")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return ROOT
