"""Whether tensors are still what something was made of: the same ones, unwritten, in the same memory, with the same content.

torch counts writes, but not those through ``tensor.data``. On the CPU the content is therefore remembered and compared;
elsewhere, where comparing would wait for the device, the count is all there is, and whoever writes past it has to say so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from roadie.kernels.cpu import loaded
from roadie.kernels.keeping import PLAIN, writes_to


def can_be_stamped(tensor: Tensor) -> bool:
    """Whether every later write to a parameter will be seen: what may be training elsewhere than on the CPU is not trusted."""
    if type(tensor) not in PLAIN or tensor.is_inference() or tensor.device.type == "meta":
        return False
    return tensor.device.type == "cpu" or not tensor.requires_grad


class Stamp:
    """Tensors as they were when this was made."""

    __slots__ = ("_addresses", "_arrays", "_content", "_elsewhere", "_on_cpu", "_storages", "_tensors", "_versions")

    def __init__(self, tensors: Sequence[Tensor], content: Sequence[Tensor] | None = None) -> None:
        """content: a copy of each that is on the CPU, made before; else it is made here."""
        self._tensors = list(tensors)
        self._versions = list(map(writes_to, tensors))
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._storages = [
            tensor.untyped_storage() for tensor in tensors
        ]  # kept: an address cannot come back as another's
        self._on_cpu = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        self._elsewhere = [tensor for tensor in tensors if tensor.device.type != "cpu"]
        self._content = _copies(self._on_cpu) if content is None else list(content)
        self._arrays = _arrays(self._on_cpu, self._content)

    @classmethod
    def each(cls, groups: Sequence[Sequence[Tensor]]) -> list[Stamp]:
        """One for each group of tensors, whose content is copied together."""
        on_cpu = [[tensor for tensor in tensors if tensor.device.type == "cpu"] for tensors in groups]
        content = iter(_copies([tensor for tensors in on_cpu for tensor in tensors]))
        return [
            cls(tensors, [next(content) for _ in of_group]) for tensors, of_group in zip(groups, on_cpu, strict=True)
        ]

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors."""
        return len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))

    def is_unwritten(self) -> bool:
        """Whether torch has counted no write since."""
        return list(map(writes_to, self._tensors)) == self._versions

    def holds(self) -> bool:
        """Whether all hold what they held."""
        return (
            self.is_unwritten()
            and all(map(can_be_stamped, self._elsewhere))
            and [tensor.data_ptr() for tensor in self._tensors] == self._addresses
            and self._has_same_content()
        )

    def _has_same_content(self) -> bool:
        if self._arrays is None:
            return all(map(torch.equal, self._on_cpu, self._content))
        if loaded().problem is None:
            return bool(loaded().same(*self._arrays, len(self._on_cpu)))
        # No operations of torch, since checkpointing of chosen ones records those.
        return all(
            ctypes.string_at(now, size) == ctypes.string_at(then, size)
            for now, then, size in zip(*self._arrays, strict=True)
        )


@torch.no_grad()
def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """A contiguous copy of each; vectors of one dtype in one operation, however many they are."""
    if len({tensor.dtype for tensor in tensors}) == 1 and all(tensor.dim() == 1 for tensor in tensors):
        return list(torch.cat(tensors).split([tensor.numel() for tensor in tensors]))
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def _arrays(tensors: list[Tensor], content: list[Tensor]) -> tuple[ctypes.Array[ctypes.c_int64], ...] | None:
    """The addresses now and then, and the sizes in bytes, as the compiled kernel takes them; None for what has gaps."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        return None
    lists = ([t.data_ptr() for t in tensors], [t.data_ptr() for t in content], [t.nbytes for t in content])
    return tuple((ctypes.c_int64 * len(tensors))(*values) for values in lists)
