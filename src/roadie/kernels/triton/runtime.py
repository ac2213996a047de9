"""Where Triton's kernels can run: what was compiled for what when triton was imported."""

from __future__ import annotations

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from roadie.kernels.triton.rotation import rotate_kernel

DEVICES = ("cuda", "xpu")  # torch calls AMD's devices cuda, too
OLDEST_FOR_BFLOAT16 = (8, 0)  # compute capability of NVIDIA's A100, the first with bfloat16


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels cannot run on `device`, or None where they can."""
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


def is_interpreted() -> bool:
    """Whether kernels run in the interpreter: roadie's own, and the functions of triton that they call.

    The environment says what would happen to kernels made now. What counts is how these were made, when their modules were
    imported; the variable may have been set or unset since.
    """
    return all(isinstance(function, InterpretedFunction) for function in (rotate_kernel, tl.sum))
