"""What turns a recomputed half-precision tensor back into the original, bit for bit, in a quarter of a byte an element.

The bit patterns of the two tensors, read as integers, differ by 0 or by 1 in nearly every element: the original was
rounded once more on its way. These differences are stored in two bits each (four where the rotation is worse
conditioned), what does not fit goes to a list of exceptions, and where that takes more than a byte an element the
differences are compressed byte plane by byte plane. If nothing helps, the original itself is kept.
"""

from __future__ import annotations

import logging
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("roadie")

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Patch(ABC):
    """Knows how to turn the recomputed tensor into the original."""

    nbytes: int

    @abstractmethod
    def apply(self, recomputed: Tensor) -> Tensor:
        """The original, in the shape, dtype and device of `recomputed`."""


def make_patch(original: Tensor, recomputed: Tensor) -> Patch:
    """The smallest patch that turns `recomputed` into `original`; both of one shape and one floating dtype."""
    bits = _INTEGER[original.element_size()]
    difference = (original.contiguous().view(bits) - recomputed.contiguous().view(bits)).flatten()
    packed = _best_width(difference)
    if packed is not None:
        return packed
    compressed = _Compressed.of(difference)
    if compressed.nbytes <= difference.numel():
        return compressed
    logger.info("%d elements are kept as a copy, to unmerge them exactly: R is badly conditioned", difference.numel())
    return _Copy(original.detach().clone())


def _best_width(difference: Tensor) -> Patch | None:
    """Differences in two or four bits each, whichever is smaller; None where both take more than a byte an element."""
    costs = {}
    for width in (2, 4):
        exceptions = int(torch.count_nonzero(_does_not_fit(difference, width)))
        costs[width] = difference.numel() * width / 8 + exceptions * (4 + difference.element_size())
    width = min(costs, key=lambda candidate: costs[candidate])
    return _Packed.of(difference, width) if costs[width] <= difference.numel() else None


def _does_not_fit(difference: Tensor, width: int) -> Tensor:
    limit = (1 << (width - 1)) - 1
    return (difference > limit) | (difference < -limit)


@dataclass(frozen=True)
class _Packed(Patch):
    codes: Tensor  # uint8, 8 / width codes a byte; an exception's code is the most negative one
    width: int
    where: Tensor  # int32, positions of exceptions
    values: Tensor

    @classmethod
    def of(cls, difference: Tensor, width: int) -> _Packed:
        odd = _does_not_fit(difference, width)
        where = odd.nonzero().flatten()
        codes = torch.where(odd, -(1 << (width - 1)), difference).to(torch.uint8) & ((1 << width) - 1)
        per_byte = 8 // width
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % per_byte)).view(-1, per_byte)
        packed = codes[:, 0].clone()
        for place in range(1, per_byte):
            packed |= codes[:, place] << (place * width)
        return cls(packed, width, where.to(torch.int32), difference[where])

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.codes.nbytes + self.where.nbytes + self.values.nbytes

    def apply(self, recomputed: Tensor) -> Tensor:
        codes = self.codes.to(recomputed.device)
        mask, sign = (1 << self.width) - 1, 1 << (self.width - 1)
        places = [(codes >> shift) & mask for shift in range(0, 8, self.width)]
        signed = (torch.stack(places, dim=1).flatten()[: recomputed.numel()].to(torch.int8) ^ sign) - sign
        difference = signed.to(_INTEGER[recomputed.element_size()])
        difference[self.where.to(recomputed.device).long()] = self.values.to(recomputed.device)
        return _added(recomputed, difference)


@dataclass(frozen=True)
class _Compressed(Patch):
    planes: tuple[bytes, ...]  # zlib, one a byte of the element, low byte first; empty for a plane of zeros

    @classmethod
    def of(cls, difference: Tensor) -> _Compressed:
        size = difference.element_size()
        zigzag = (difference << 1) ^ (difference >> (8 * size - 1))  # small numbers of either sign: high bytes of zero
        planes = zigzag.cpu().numpy().view(np.uint8).reshape(-1, size).T
        return cls(tuple(zlib.compress(plane.tobytes(), 1) if plane.any() else b"" for plane in planes))

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return sum(map(len, self.planes))

    def apply(self, recomputed: Tensor) -> Tensor:
        size, count = recomputed.element_size(), recomputed.numel()
        interleaved: np.ndarray = np.zeros((count, size), dtype=np.uint8)
        for place, plane in enumerate(self.planes):
            if plane:
                interleaved[:, place] = np.frombuffer(zlib.decompress(plane), dtype=np.uint8)
        zigzag = torch.from_numpy(interleaved).view(_INTEGER[size]).flatten().to(recomputed.device)
        without_sign = (zigzag >> 1) & ((1 << (8 * size - 1)) - 1)
        return _added(recomputed, without_sign ^ -(zigzag & 1))


@dataclass(frozen=True)
class _Copy(Patch):
    original: Tensor

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.original.nbytes

    def apply(self, recomputed: Tensor) -> Tensor:
        return self.original.to(recomputed.device).view(recomputed.shape)


def _added(recomputed: Tensor, difference: Tensor) -> Tensor:
    flat = recomputed.contiguous()
    return (flat.view(difference.dtype) + difference.view(flat.shape)).view(recomputed.dtype)
