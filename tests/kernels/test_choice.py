"""Which implementation computes: asked for or chosen, never another one than was asked for."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.kernels import builds, cases
from torch.utils._python_dispatch import TorchDispatchMode

from roadie.errors import KernelError
from roadie.kernels import RotationTable, choice, cpu, refusals, rotate, stamp, using
from roadie.kernels.cpu import CpuImplementation
from roadie.testing.accuracy import assert_same_bits

HERE = torch.device("cpu")
compiled = cases.needs_compiled_kernel


class NoOperation(TorchDispatchMode):
    """Refuses every operation of torch, as checkpointing of chosen operations refuses those it has not seen in forward."""

    def __torch_dispatch__(self, operation: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"got {operation}")


@pytest.mark.parametrize("problem", [None, "there is none"])
def test_content_is_compared_without_operations_of_torch(problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if problem is None and cases.no_compiled_kernel() is not None:
        pytest.skip("there is no compiled kernel")
    if problem is not None:
        monkeypatch.setattr(stamp, "loaded", lambda: SimpleNamespace(callable=None))
    tensors = {"a": torch.randn(3, 4), "b": torch.empty(0), "c": torch.ones(2, dtype=torch.bfloat16)}
    watched = stamp.Stamp([(tensors, name) for name in tensors])
    with NoOperation():
        assert watched.holds()
    tensors["c"].data[1] = 2.0  # which torch does not count
    with NoOperation():
        assert not watched.holds()


def _written(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a"].data[1, 2] += 1.0


def _with_other_memory(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a"].data = tensors["a"].data.clone()


def _another(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a"] = tensors["a"].clone()


def _gone(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["a"]


def _smaller(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a"].resize_(2, 4)


@pytest.mark.parametrize("change", [_written, _with_other_memory, _another, _gone, _smaller])
@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("count", [1, 40])
def test_a_stamp_sees(
    change: Callable[[dict[str, torch.Tensor]], None], is_compiled: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_compiled and cpu.loaded().callable is None:
        pytest.skip("there is no compiled way")
    if not is_compiled:
        monkeypatch.setattr(stamp, "loaded", lambda: SimpleNamespace(callable=None))
    each = [{"a": torch.randn(3, 4), "b": torch.zeros(5)} for _ in range(count)]
    watched = stamp.Stamp([(tensors, name) for tensors in each for name in tensors])
    assert watched.holds()
    each[-1]["b"] += 0.0  # what is written holds what it held
    assert watched.holds()
    assert watched.holds()  # where the first look noted where to look
    change(each[-1])
    assert not watched.holds()


def _counted(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a"] += 0.0


def _trained(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a"].requires_grad_()


@pytest.mark.parametrize("change", [_counted, _trained, _with_other_memory, _another, _gone])
@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("which", ["a", "ab"], ids=["some", "all"])
def test_a_stamp_of_what_is_elsewhere_sees(
    change: Callable[[dict[str, torch.Tensor]], None], is_compiled: bool, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where content is not compared; these tensors are only called elsewhere."""
    if is_compiled and cpu.loaded().callable is None:
        pytest.skip("there is no compiled way")
    if not is_compiled:
        monkeypatch.setattr(stamp, "loaded", lambda: SimpleNamespace(callable=None))
    tensors = {"a": torch.randn(3, 4), "b": torch.zeros(5)}
    elsewhere = [id(tensors[name]) for name in which]
    monkeypatch.setattr(stamp, "_is_on_cpu", lambda tensor: id(tensor) not in elsewhere)
    watched = stamp.Stamp([(tensors, name) for name in tensors])
    assert watched.holds()
    tensors["a"].data[0, 0] = 7.0  # which nobody can see there
    assert watched.holds()
    change(tensors)
    assert not watched.holds()


@pytest.fixture
def _fresh_choice() -> Iterator[None]:
    """What was found once is remembered: forgotten before and after."""
    for remembered in (cpu.loaded, choice._best):
        remembered.cache_clear()
    yield
    for remembered in (cpu.loaded, choice._best):
        remembered.cache_clear()


def used(dtype: torch.dtype = torch.float32, table_dtype: torch.dtype = torch.float32) -> str:
    return choice.chosen(HERE, dtype, table_dtype).name


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, RotationTable]:
    b = cases.batch(3, 8, 4, dtype=dtype)
    return b.x, RotationTable(b.turns.direct, b.turns.cross, 4)


@compiled
def test_cpus_use_the_compiled_kernel_where_it_can_work() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert used(dtype) == used(dtype, dtype) == used(torch.float32, dtype) == "cpu"
    assert used(torch.float64, torch.float64) == used(torch.float32, torch.float64) == "eager"
    assert used(torch.bfloat16, torch.float16) == "eager"


def test_one_that_was_asked_for_is_used_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = used()
    with using("eager"):
        assert used() == "eager"
        if not cases.no_compiled_kernel():
            with using("cpu"):
                assert used() == "cpu"
        assert used() == "eager"
    assert used() == before
    with pytest.raises(ZeroDivisionError), using("eager"):
        raise ZeroDivisionError
    assert used() == before


def test_another_thread_is_not_affected() -> None:
    found: list[str] = []
    before = used()
    with using("eager"):
        thread = threading.Thread(target=lambda: found.append(used()))
        thread.start()
        thread.join()
    assert found == [before]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KernelError, match="'fast'; wanted one of cpu, eager, triton"), using("fast"):
        pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_one_that_cannot_work_says_why_and_nothing_takes_its_place(dtype: torch.dtype) -> None:
    with (
        using("cpu"),
        pytest.raises(KernelError, match=rf"'cpu' for {dtype} .* it knows float32, bfloat16 and float16"),
    ):
        rotate(torch.ones(3, 8, dtype=dtype), batch()[1], None)
    x, table = batch(torch.bfloat16)
    half = RotationTable(table.direct.half(), table.cross.half(), 4)
    with (
        using("cpu"),
        pytest.raises(KernelError, match=r"tables in float32 or torch\.bfloat16, and got torch\.float16"),
    ):
        rotate(x, half, None)


def test_backward_uses_what_is_asked_for_then() -> None:
    x, table = batch(torch.float64)
    z = rotate(x.requires_grad_(), table, None)
    with using("cpu"), pytest.raises(KernelError, match="it knows float32"):
        z.sum().backward()


def test_reasons_are_visible() -> None:
    reasons = refusals(HERE, torch.float64)
    assert reasons["eager"] is None
    assert "it knows float32, bfloat16 and float16, and got torch.float64" in reasons["cpu"]
    assert "the tensors are on cuda" in refusals(torch.device("cuda"), torch.float32)["cpu"]
    assert refusals(HERE, torch.int64)["eager"] == "it rotates floating-point tensors, and got torch.int64"


@pytest.mark.usefixtures("_fresh_choice")
@pytest.mark.parametrize("state", ["absent", "text", "cut short", "another library"])
def test_a_broken_object_leaves_the_reference(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_rotate.so"
    if state == "text":
        path.write_text("not an object")
    elif state == "cut short":
        path.write_bytes(b"\x7fELF" + bytes(60))
    elif state == "another library":
        if builds.COMPILER is None:
            pytest.skip("there is no C compiler")
        (tmp_path / "empty.c").write_text("int nothing;\n")
        builds.subprocess.run([builds.COMPILER, "-shared", "-fPIC", tmp_path / "empty.c", "-o", path], check=True)
    monkeypatch.setattr(cpu, "LIBRARY", path)
    check_reference_takes_over("installed from source")


@pytest.mark.slow
@compiled
@pytest.mark.usefixtures("_fresh_choice")
@pytest.mark.skipif(builds.COMPILER is None, reason="there is no C compiler")
@pytest.mark.parametrize("told", ["(int64_t)sizeof(Job)", "return INTERFACE"])
def test_an_object_of_another_version_is_not_used(told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(cpu.LIBRARY, tmp_path)
    made = builds.build_changed(tmp_path, "rotate.c", told, f"{told} + 8")
    monkeypatch.setattr(cpu, "LIBRARY", made)
    check_reference_takes_over("another version of roadie; install roadie again")


def check_reference_takes_over(why: str) -> None:
    """The compiled kernel says why it cannot work; what is rotated without a wish is right all the same."""
    assert why in (CpuImplementation().refusal(HERE, torch.float32, torch.float32) or "")
    x, table = batch()
    with using("cpu"), pytest.raises(KernelError, match=why):
        rotate(x, table, None)
    assert used() == "eager"
    with using("eager"):
        wanted = rotate(x, table, None)
    assert_same_bits(rotate(x, table, None), wanted, "chosen")


@pytest.mark.parametrize("device", ["mps", "hpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_devices_without_kernels_use_plain_operations(device: str, dtype: torch.dtype) -> None:
    """Apple's, for one."""
    place = torch.device(device)
    assert choice.chosen(place, dtype, torch.float32).name == "eager"
    for name in ("cpu", "triton"):
        with pytest.raises(KernelError), using(name):
            choice.chosen(place, dtype, torch.float32)


def test_an_amd_device_is_rotated_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls it cuda; compute capabilities are NVIDIA's."""
    runtime = pytest.importorskip("roadie.kernels.triton.runtime")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert runtime.refusal_of(torch.device("cuda"), torch.bfloat16, torch.float32) is None
