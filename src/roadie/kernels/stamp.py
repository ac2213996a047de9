"""Whether tensors are still what something was made of: the same ones, in the same places and memory, with the same content.

torch counts writes, but not those through ``tensor.data``. On the CPU the content is therefore remembered and compared;
elsewhere, where comparing would wait for the device, the count is all there is, and whoever writes past it has to say so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any, TypeAlias

import torch
from torch import Tensor

from roadie.kernels.cpu import loaded, reader
from roadie.kernels.keeping import PLAIN, writes_to

Place: TypeAlias = "tuple[dict[str, Any], str]"
"""A dict, such as the parameters of a module, and a key of it."""

HEAD = Struct("@Pq")  # the first fields of the struct Stamp of kernels/cpu/calls.c
SEEN = Struct("@2P2qP")  # the struct Seen


def can_be_stamped(tensor: Tensor) -> bool:
    """Whether every later write to a parameter will be seen: what may be training elsewhere than on the CPU is not trusted."""
    if type(tensor) not in PLAIN or tensor.is_inference() or tensor.device.type == "meta":
        return False
    return _is_on_cpu(tensor) or not tensor.requires_grad


class Stamp:
    """The tensors in some places as they were when this was made. holds: whether they still are."""

    __slots__ = ("_content", "_places", "_storages", "_tensors", "_then", "holds")

    def __init__(self, places: Sequence[Place], content: Sequence[Tensor] | None = None) -> None:
        """content: a copy of each tensor that is on the CPU, made before; else it is made here."""
        self._places = list(places)
        self._tensors: list[Tensor] = [store[key] for store, key in places]
        on_cpu = [tensor for tensor in self._tensors if _is_on_cpu(tensor)]
        self._content = _copies(on_cpu) if content is None else list(content)
        self._then = list(map(_facts_of, self._tensors))
        # Kept, so that an address cannot come back as another's.
        self._storages = list(map(Tensor.untyped_storage, self._tensors))
        self.holds = self._compiled()

    @classmethod
    def each(cls, groups: Sequence[Sequence[Place]]) -> list[Stamp]:
        """One for each group of places; what is in them is copied together."""
        on_cpu = [[store[key] for store, key in places if _is_on_cpu(store[key])] for places in groups]
        content = iter(_copies([tensor for tensors in on_cpu for tensor in tensors]))
        return [cls(places, [next(content) for _ in of_group]) for places, of_group in zip(groups, on_cpu, strict=True)]

    def _compiled(self) -> Callable[[], bool]:
        """`_holds` in one call of C, where that can be."""
        make, tensors, content = loaded().callable, self._tensors, iter(self._content)
        if make is None or not all(map(Tensor.is_contiguous, tensors)):
            return self._holds
        packed = bytearray(HEAD.pack(reader(), len(tensors)))
        for tensor, (address, _, writes) in zip(tensors, self._then, strict=True):
            copied = next(content).data_ptr() if writes is None else 0
            packed += SEEN.pack(address, copied, tensor.nbytes, -1 if writes is None else writes, 0)
        stores, keys = zip(*self._places, strict=True) if tensors else ((), ())
        kept = self._content, self._storages
        return make(1, (packed, stores, keys, tuple(tensors), "_version", "requires_grad", kept))

    def _holds(self) -> bool:
        content = iter(self._content)
        for (store, key), tensor, then in zip(self._places, self._tensors, self._then, strict=True):
            if store.get(key) is not tensor or _facts_of(tensor) != then:
                return False
            if not (_is_equal(tensor, next(content)) if _is_on_cpu(tensor) else can_be_stamped(tensor)):
                return False
        return True


def _is_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _facts_of(tensor: Tensor) -> tuple[int, torch.Size, int | None]:
    """Where its memory is, its shape, and, but for CPUs, how often it was written to."""
    return tensor.data_ptr(), tensor.shape, None if _is_on_cpu(tensor) else writes_to(tensor)


@torch.no_grad()
def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """A contiguous copy of each; vectors of one dtype in one operation, however many they are."""
    if {*map(Tensor.dim, tensors)} == {1} and len({tensor.dtype for tensor in tensors}) == 1:
        return list(torch.cat(tensors).split(list(map(Tensor.numel, tensors))))
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def _is_equal(tensor: Tensor, content: Tensor) -> bool:
    """Whether the bytes are equal; without operations of torch, since checkpointing of chosen ones records those."""
    if not tensor.is_contiguous():
        return torch.equal(tensor, content)
    return ctypes.string_at(tensor.data_ptr(), content.nbytes) == ctypes.string_at(content.data_ptr(), content.nbytes)
