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
from typing import Any, NoReturn

import torch
from torch import Tensor

from roadie.errors import KernelError
from roadie.kernels.contract import SUMS, Implementation, PreparedRotation, RowRotations, Turns, table_dtypes
from roadie.kernels.keeping import address

LIBRARY = Path(__file__).with_name("_rotate.so")
BYTES_A_THREAD = 1 << 20  # 20 us or more of work; less takes longer to share out than to do

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
JOB = struct.Struct("@6P10q32x")  # the struct Job of job.h: six pointers, ten integers, and room for a stage
STAGE = struct.Struct("@3Pq")  # the struct Stage
PREPARED = struct.Struct("@2P7q")  # the first fields of the struct Prepared of calls.c
_FAILURES = {
    1: "there was not enough memory for partial sums",
    2: "the tensors are of a dtype that the compiled kernel does not know",
    3: "a slot is not between -1 and the number of slots - 1",
    4: "a group size is not even, or does not divide the number of outputs",
}

INTERFACE = 3  # see job.h
# Operations of job.h; after BACKWARD by what is made of the sums: SUMS, OF_INPUT, OF_OUTPUT.
ROTATE, BACKWARD = range(2)
Place = tuple[int, int]
"""Address and stride between rows of what was kept: whoever asks a tensor itself for its address moves it (`address`)."""


class CpuImplementation(Implementation):
    """The compiled kernel; see the module."""

    name = "cpu"

    def refusal(self, device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> str | None:
        """Why the kernel cannot work on such tensors, or None."""
        if device.type != "cpu":
            return f"it computes on the CPU, and the tensors are on {device.type}"
        if dtype not in TYPES:
            return f"it knows float32, bfloat16 and float16, and got {dtype}"
        if table_dtype not in table_dtypes(dtype):
            return f"it wants tables in float32 or {dtype}, and got {table_dtype}"
        return loaded().problem

    def rotate(self, x: Tensor, out: Tensor, turns: RowRotations) -> None:
        """R x into out; see the contract."""
        self.rotate_chain(x, out, (turns,))

    def prepare(self, chain: Turns, routed_shape: tuple[int, ...], y: Tensor) -> PreparedRotation | None:
        """What is known before, packed for C, which asks the rest of the tensor that is given; see the contract.

        After a base layer has streamed its weight through the caches, Python runs several times slower than in a loop of its
        own: this way takes 2 us there of a layer's 170.
        """
        direct, slots = chain[0].direct, chain[0].slots
        make, routed, width = loaded().callable, 1 if slots is None else slots.numel(), direct.shape[1]
        if make is None or not routed or len(routed_shape) > 2:
            return None
        shape = len(routed_shape), *(*routed_shape, 0, 0)[:2]
        head = PREPARED.pack(reader(), id(Tensor), routed, *shape, table_work(chain), 2 * BYTES_A_THREAD, len(chain))
        job = JOB.pack(
            *(0, 0, 0, 0 if slots is None else slots.data_ptr(), 0, 0),
            *(0, width, width, 0, width, 1, direct.shape[0], TYPES[y.dtype], TYPES[direct.dtype], 1),
        )
        return make(0, (head + job + stages_of(chain), chain))

    def rotate_chain(self, x: Tensor, out: Tensor, chain: Turns) -> None:
        """All rotations of a row while it is in the cache; see the contract."""
        work = 2 * x.nbytes if chain[0].slots is None else 2 * x.nbytes + table_work(chain)
        threads = 1 if work < 2 * BYTES_A_THREAD else threads_for(work)
        given = ROTATE, x, None, out, chain, None, None, threads
        status = loaded().run(*given)
        if status:
            _settle(status, given)

    def backward(
        self,
        grad: Tensor,
        kept: Tensor | None,
        grad_x: Tensor | None,
        turns: RowRotations,
        own: Tensor | None,
        partner: Tensor | None,
        solve: int = SUMS,
    ) -> None:
        """R^T grad into grad_x, and what is made of the sums over rows, in one call; see the contract."""
        self.backward_chain(grad, kept, grad_x, (turns,), own, solve, partner)

    def backward_chain(
        self,
        grad: Tensor,
        kept: Tensor | None,
        grad_x: Tensor | None,
        chain: Turns,
        sums: Tensor | None,
        solve: int,
        partner: Tensor | None = None,
    ) -> None:
        """The same through all rotations of a chain; partner: where it is, if not behind own in `sums`."""
        threads = 1 if 3 * grad.nbytes < 2 * BYTES_A_THREAD else threads_for(3 * grad.nbytes)
        place = None if kept is None else (address(kept), kept.stride(0))
        given = BACKWARD + (SUMS if kept is None else solve), grad, place, grad_x, chain, sums, partner, threads
        status = loaded().run(*given)
        if status:
            _settle(status, given)


def _settle(status: int, given: tuple[Any, ...]) -> None:
    """Compute by ctypes what C could not read; raise for any other status."""
    if status < 0:
        status = loaded().run_by_ctypes(*given)
    if status:
        _fail(status)


def _job(x: Tensor, kept: Place | None, z: Any, chain: Turns, own: Any, partner: Any, threads: int) -> bytes:
    """z, own, partner: a tensor, or None."""
    direct, _, slots, repeat, _, _ = chain[0]
    return JOB.pack(
        x.data_ptr(),
        kept[0] if kept is not None else 0,
        z.data_ptr() if z is not None else 0,
        slots.data_ptr() if slots is not None else 0,
        own.data_ptr() if own is not None else 0,
        partner.data_ptr() if partner is not None else 0,
        x.shape[0],
        x.shape[1],
        x.stride(0),
        kept[1] if kept is not None else 0,
        z.stride(0) if z is not None else 0,
        repeat,
        direct.shape[0],
        TYPES[x.dtype],
        TYPES[direct.dtype],
        threads,
    )


def stages_of(chain: Sequence[RowRotations]) -> bytes:
    """What the kernel is told of each stage of a chain."""
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


def _fail(status: int) -> NoReturn:
    if status == 1:
        raise MemoryError(_FAILURES[1])
    raise KernelError(f"got a status of {status} from the compiled kernel: {_FAILURES[status]}")


@cache
def reader() -> int:
    """The address of the function by which torch tells C what a tensor is; 0 where it has none (before torch 2.10).

    It is that of DLPack's exchange API, a struct of: its version, a pointer to older ones, and functions.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    api = get_pointer(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    major = ctypes.c_uint32.from_address(api).value
    return (ctypes.c_void_p * 6).from_address(api)[5] or 0 if major == 1 else 0


class _Library:
    """The loaded object, or why there is none.

    run: computes, of: the operation, x, where what was kept is, z, `Turns`, own, partner and the number of threads; gives a
    status. callable: makes the callables of calls.c, by their number there and a tuple of what they hold; None where it cannot.
    """

    def __init__(self, path: Path) -> None:
        self.problem: str | None = None
        self.callable: Callable[[int, tuple[Any, ...]], Callable[..., Any]] | None = None
        self.run: Callable[..., int] = self.run_by_ctypes
        try:
            library = ctypes.CDLL(str(path))
            self._run = library.roadie_run
            self._run.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
            told = library.roadie_interface(), library.roadie_job_bytes(), library.roadie_stage_bytes()
            if told != (INTERFACE, JOB.size, STAGE.size):
                self.problem = f"{path.name} was built from another version of roadie; install roadie again"
            elif reader() and hasattr(library, "roadie_callable"):
                self.callable = ctypes.PyDLL(str(path)).roadie_callable
                self.callable.argtypes, self.callable.restype = [ctypes.c_int, ctypes.py_object], ctypes.py_object
                self.run = self.callable(2, (struct.pack("@P", reader()),))
        except (OSError, AttributeError) as error:
            self.problem = (
                f"the compiled kernel cannot be loaded ({error}); it is built when roadie is installed from source "
                "where there is a C compiler"
            )

    def run_by_ctypes(self, operation: int, *given: Any) -> int:
        """As run, where torch does not tell C what its tensors are."""
        return int(self._run(operation, _job(*given), stages_of(given[3]), len(given[3])))


@cache
def loaded() -> _Library:
    # After torch, so that an object built with OpenMP takes the threads of torch's own runtime.
    return _Library(LIBRARY)
