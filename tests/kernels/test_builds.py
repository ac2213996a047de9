"""Every way to build the compiled kernel gives the same bits: each instruction set, no OpenMP, no optimisation."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from tests.kernels import builds, cases

from roadie import identity
from roadie.kernels import cpu, prepare_rotation, stamp
from roadie.kernels.contract import OF_OUTPUT
from roadie.kernels.cpu import CpuImplementation
from roadie.kernels.eager import EagerImplementation
from roadie.testing.accuracy import assert_same_bits

CPU, EAGER = CpuImplementation(), EagerImplementation()
BUILDS = {
    "plain": (),
    "unoptimised": ("-O0",),
    "x86-64-v3": ("-march=x86-64-v3",),
    "x86-64-v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}
NEEDED = {
    "x86-64-v3": ("avx2", "fma", "bmi2"),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (2, 4, 8, 16, 6, 32, 48, 64)

pytestmark = [
    pytest.mark.skipif(builds.COMPILER is None, reason="there is no C compiler"),
    cases.needs_compiled_kernel,
]


def flags_of_processor() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


@pytest.fixture(scope="module")
def wanted() -> list[tuple[torch.Tensor, ...]]:
    """What the kernel gives as it was built on installation."""
    return [results(dtype, size) for dtype in DTYPES for size in SIZES]


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.slow
def test_every_build_gives_the_same_bits(name: str, wanted: list[tuple[torch.Tensor, ...]], tmp_path: Path) -> None:
    if not flags_of_processor().issuperset(NEEDED.get(name, ())):
        pytest.skip(f"this processor is not {name}")
    with builds.instead(builds.build(tmp_path, *BUILDS[name])):
        found = [results(dtype, size) for dtype in DTYPES for size in SIZES]
    for ours, theirs in zip(found, wanted, strict=True):
        for value, expected in zip(ours, theirs, strict=True):
            assert_same_bits(value, expected, name)


@pytest.mark.slow
def test_an_object_without_the_callables_does_without_them(tmp_path: Path) -> None:
    """Where a linker cannot leave Python's functions to be found later, calls.c is not built."""
    store = {"a": torch.ones(3)}
    with builds.instead(builds.build(tmp_path, "-O0")):
        assert prepare_rotation(torch.ones(2, 8), identity(8, 4)) is None
        with mock.patch.object(stamp, "loaded", cpu.loaded):
            made = stamp.Stamp([(store, "a")])
        assert made.holds()
        store["a"].data[1] = 2.0
        assert not made.holds()


def results(dtype: torch.dtype, size: int) -> tuple[torch.Tensor, ...]:
    """Everything that the kernel computes, and what it must be."""
    b = cases.batch(40, size * 5, size, num_slots=3, slots=[2, -1, 0, 1] * 5, repeat=2, dtype=dtype, padding=3)
    cases.check_same_bits(CPU, EAGER, b)
    _, own, partner = turned_back = cases.turned_back(CPU, b)
    direct, cross = torch.empty_like(own), torch.empty_like(partner)
    CPU.backward(b.gradient, b.kept, None, b.turns, direct, cross, OF_OUTPUT)
    return cases.turned(CPU, b), *turned_back, direct, cross
