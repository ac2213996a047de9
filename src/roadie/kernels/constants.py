"""Integers that a device needs and the host knows, without waiting for the device; and what is kept beside a tensor of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

_MOST = 1024  # tensors that are remembered
_made: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}


def constant(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor ``[n]`` of these values, which nobody may write to.

    On a GPU it is made once: copying it there would wait for all that the GPU has still to do, in every layer of every call.
    """
    if device.type == "cpu" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return torch.tensor(values, dtype=dtype, device=device)
    key = tuple(values), dtype, device
    made = _made.get(key)
    if made is None:
        if len(_made) == _MOST:
            _made.clear()
        with torch.inference_mode(False):  # or it could not be kept for backward
            made = _made[key] = torch.tensor(values, dtype=dtype, device=device)
    return made


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device, without waiting for what that has still to do."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


_beside: dict[int, tuple[ref[Tensor], dict[Any, Any]]] = {}


def kept_beside(tensor: Tensor) -> dict[Any, Any]:
    """What lives as long as a tensor does without being part of it: a copy, or a file, of the tensor has nothing of it."""
    place = id(tensor)
    found = _beside.get(place)
    if found is None:
        found = _beside[place] = ref(tensor, lambda _: _beside.pop(place, None)), {}
    return found[1]
