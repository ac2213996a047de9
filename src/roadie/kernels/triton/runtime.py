"""Where Triton's kernels can run: what was compiled for what when triton was imported."""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from roadie.kernels.contract import table_dtypes
from roadie.kernels.triton.rotation import rotate_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda", "xpu")  # torch calls AMD's devices cuda, too
OLDEST_FOR_BFLOAT16 = (8, 0)  # compute capability of NVIDIA's A100, the first with bfloat16


def refusal_of(device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> str | None:
    """Why kernels cannot work on such tensors on `device`, or None where they can."""
    if dtype not in DTYPES:
        return f"it computes in float32, for float32, bfloat16 and float16, and got {dtype}; float64 would lose digits"
    if table_dtype not in table_dtypes(dtype):
        return f"it takes tables in float32 or in the dtype of the activations, {dtype}, and got {table_dtype}"
    return _refusal_of_device(device, dtype)


def _refusal_of_device(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        if is_interpreted():
            return None
        return (
            "it runs on GPUs; on CPUs it runs in Triton's interpreter, for tests, where TRITON_INTERPRET=1 is set before "
            "triton is imported"
        )
    if device.type not in DEVICES:
        return f"it runs on CUDA, HIP and XPU devices, and got {device.type}"
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_FOR_BFLOAT16:
            return f"bfloat16 needs compute capability 8.0, and this device has {capability[0]}.{capability[1]}"
    return None


@cache
def is_interpreted() -> bool:
    """Whether kernels run in the interpreter: roadie's own, and the functions of triton that they call.

    The environment says what would happen to kernels made now. What counts is how these were made, when their modules were
    imported; the variable may have been set or unset since.
    """
    return all(isinstance(function, InterpretedFunction) for function in (rotate_kernel, tl.sum))
