"""The compiled implementation for CPUs: rotate.c beside this file, called by ctypes; neither torch nor Python is in it.

It is built when roadie is installed from source (setup.py) where there is a C compiler; without it this implementation
says so and `eager` takes its place. Results of `rotate` are those of `eager` bit for bit.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roadie.errors import KernelError
from roadie.kernels.contract import Implementation, RowRotations

LIBRARY = Path(__file__).with_name("_rotate.so")
BYTES_A_THREAD = 1 << 20  # 20 us or more of work; less takes longer to share out than to do

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
JOB = struct.Struct("@13P12q")  # the struct Job of rotate.c: thirteen pointers, twelve integers
STAGE = struct.Struct("@3Pq")  # the struct Stage
_FAILURES = {
    1: "there was not enough memory for partial sums",
    2: "the tensors are of a dtype that the compiled kernel does not know",
    3: "a slot is not between -1 and the number of slots - 1",
    4: "a group size is not even, or does not divide the number of outputs",
}


class CpuImplementation(Implementation):
    """The compiled kernel; see the module."""

    name = "cpu"

    def refusal(self, device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> str | None:
        """Why the kernel cannot work on such tensors, or None."""
        if device.type != "cpu":
            return f"it computes on the CPU, and the tensors are on {device.type}"
        if dtype not in TYPES:
            return f"it knows float32, bfloat16 and float16, and got {dtype}"
        if table_dtype not in (torch.float32, dtype):
            return f"it wants tables in float32 or {dtype}, and got {table_dtype}"
        return loaded().problem

    def rotate(self, x: Tensor, out: Tensor, turns: RowRotations) -> None:
        """R x into out; see the contract."""
        threads = threads_for(2 * x.numel() * x.element_size() + table_work([turns]))
        _check(loaded().rotate(_job(x, None, out, turns, None, None, threads)))

    def rotate_chain(self, x: Tensor, out: Tensor, chain: Sequence[RowRotations]) -> None:
        """All rotations of a row while it is in the cache; see the contract."""
        threads = threads_for(2 * x.numel() * x.element_size() + table_work(chain))
        job = _job(x, None, out, chain[0], None, None, threads)
        _check(loaded().rotate_chain(stages_of(chain), len(chain), job))

    def backward(
        self,
        grad: Tensor,
        kept: Tensor | None,
        grad_x: Tensor | None,
        turns: RowRotations,
        own: Tensor | None,
        partner: Tensor | None,
    ) -> None:
        """R^T grad into grad_x, and the sums over rows; see the contract."""
        threads = threads_for(3 * grad.numel() * grad.element_size())
        _check(loaded().backward(_job(grad, kept, grad_x, turns, own, partner, threads)))

    def gradient(self, own: Tensor, partner: Tensor, turns: RowRotations, of_output: bool) -> None:
        """From sums to gradients of direct and cross, in place; see the contract."""
        _check(loaded().gradient(_job(own, None, None, turns._replace(slots=None), own, partner, 1), int(of_output)))


class Watched:
    """Tensors, and what they held: to see writes that torch does not count, such as those through ``param.data``."""

    __slots__ = ("_content", "_pairs", "_same", "_tensors")

    def __init__(self, tensors: Sequence[Tensor], content: Sequence[Tensor] | None = None) -> None:
        """Of CPU tensors the content is remembered (a copy of each, made here or given); others are trusted."""
        self._tensors = _on_cpu(tensors)
        with torch.no_grad():
            self._content = list(content) if content is not None else _copies(self._tensors)
        self._pairs = [
            (tensor, copy.data_ptr(), copy.nbytes) for tensor, copy in zip(self._tensors, self._content, strict=True)
        ]
        compare = loaded().same if loaded().problem is None else _same_bytes
        self._same = compare if all(tensor.is_contiguous() for tensor in self._tensors) else None

    @classmethod
    def each(cls, groups: Sequence[Sequence[Tensor]]) -> list[Watched]:
        """One for each group of tensors, all copied together."""
        with torch.no_grad():
            content = iter(_copies([tensor for tensors in groups for tensor in _on_cpu(tensors)]))
        return [cls(tensors, [next(content) for _ in _on_cpu(tensors)]) for tensors in groups]

    def are_unchanged(self) -> bool:
        """Whether all hold what they held."""
        same = self._same
        if same is None:
            return all(map(torch.equal, self._tensors, self._content))
        # The tensor's own memory may have been replaced: its address is asked for each time.
        return all(same(tensor.data_ptr(), address, nbytes) for tensor, address, nbytes in self._pairs)


def _same_bytes(one: int, other: int, nbytes: int) -> bool:
    """`loaded().same` without the compiled kernel: as no operation of torch, since checkpointing of chosen ones records those."""
    return ctypes.string_at(one, nbytes) == ctypes.string_at(other, nbytes)


def _on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.device.type == "cpu"]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """A contiguous copy of each; vectors of one dtype in one operation, however many they are."""
    if len({tensor.dtype for tensor in tensors}) == 1 and all(tensor.dim() == 1 for tensor in tensors):
        return list(torch.cat(tensors).split([tensor.numel() for tensor in tensors]))
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def _job(
    x: Tensor,
    kept: Tensor | None,
    z: Tensor | None,
    turns: RowRotations,
    own: Tensor | None,
    partner: Tensor | None,
    threads: int,
) -> bytes:
    direct, cross, slots, repeat, sizes, group_size = turns
    return JOB.pack(
        x.data_ptr(),
        kept.data_ptr() if kept is not None else 0,
        z.data_ptr() if z is not None else 0,
        direct.data_ptr(),
        cross.data_ptr(),
        slots.data_ptr() if slots is not None else 0,
        sizes.data_ptr() if sizes is not None else 0,
        own.data_ptr() if own is not None else 0,
        partner.data_ptr() if partner is not None else 0,
        *(0,) * 5,
        x.shape[0],
        x.shape[1],
        x.stride(0),
        kept.stride(0) if kept is not None else 0,
        z.stride(0) if z is not None else 0,
        repeat,
        direct.shape[0],
        group_size,
        TYPES[direct.dtype if x is own else x.dtype],
        TYPES[direct.dtype],
        threads,
    )


def stages_of(chain: Sequence[RowRotations]) -> bytes:
    """What the kernel is told of each of several rotations in a row."""
    return b"".join(
        STAGE.pack(
            turns.direct.data_ptr(),
            turns.cross.data_ptr(),
            turns.sizes.data_ptr() if turns.sizes is not None else 0,
            turns.group_size,
        )
        for turns in chain
    )


def table_work(chain: Sequence[RowRotations]) -> int:
    """Bytes of the tables that rows with slots of their own read, at most, twice: they come from memory and not from a cache.

    Rows of one slot find its table in the cache.
    """
    slots, direct = chain[0].slots, chain[0].direct
    if slots is None:
        return 0
    return 4 * len(chain) * min(slots.numel(), direct.shape[0]) * direct.shape[1] * direct.element_size()


def threads_for(nbytes: int) -> int:
    """As many threads as torch uses, but none for less than `BYTES_A_THREAD`."""
    if nbytes < 2 * BYTES_A_THREAD:
        return 1
    return min(torch.get_num_threads(), nbytes // BYTES_A_THREAD)


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError(_FAILURES[1])
    if status:
        raise KernelError(f"got a status of {status} from the compiled kernel: {_FAILURES[status]}")


class _Library:
    """The loaded object, or why there is none."""

    def __init__(self, path: Path) -> None:
        self.problem: str | None = None
        self.rotate: Callable[[bytes], int]
        self.rotate_chain: Callable[[bytes, int, bytes], int]
        self.backward: Callable[[bytes], int]
        self.gradient: Callable[[bytes, int], int]
        self.same: Callable[[int, int, int], int]
        try:
            library = ctypes.CDLL(str(path))
            self.rotate, self.backward = (self._function(library, f"roadie_{name}") for name in ("rotate", "backward"))
            self.gradient = self._function(library, "roadie_gradient", ctypes.c_int)
            self.rotate_chain = self._function(library, "roadie_rotate_chain", ctypes.c_int64, ctypes.c_char_p)
            self.same = library.roadie_same
            self.same.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
            if library.roadie_job_bytes() != JOB.size or library.roadie_stage_bytes() != STAGE.size:
                self.problem = f"{path.name} was built from another version of roadie; install roadie again"
        except (OSError, AttributeError) as error:
            self.problem = (
                f"the compiled kernel cannot be loaded ({error}); it is built when roadie is installed from source "
                "where there is a C compiler"
            )

    @staticmethod
    def _function(library: ctypes.CDLL, name: str, *more: Any) -> Callable[..., int]:
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_char_p, *more], ctypes.c_int
        return function


@cache
def loaded() -> _Library:
    # After torch, so that an object built with OpenMP takes the threads of torch's own runtime.
    return _Library(LIBRARY)
