"""What computes here: versions, devices, and for each device and dtype which implementation rotates, and why not another."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from roadie.kernels import refusals
from roadie.kernels.choice import chosen
from roadie.version import __version__

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LIBRARIES = ("torch", "peft", "transformers", "accelerate", "bitsandbytes", "torchao", "triton")


@dataclass(frozen=True)
class Dispatch:
    """Which implementation rotates activations of a dtype on a device; `refused`: those that cannot, with the reason."""

    device: str
    dtype: str
    used: str
    refused: dict[str, str]


@dataclass(frozen=True)
class Runtime:
    """Versions (None: not installed), torch's threads, and the choice for every device and dtype."""

    roadie: str
    python: str
    versions: dict[str, str | None]
    threads: int
    choices: tuple[Dispatch, ...]


def inspect_runtime() -> Runtime:
    """Look at this machine and this environment; allocates nothing on any device."""
    return Runtime(
        roadie=__version__,
        python=platform.python_version(),
        versions={name: _version(name) for name in LIBRARIES},
        threads=torch.get_num_threads(),
        choices=tuple(_dispatch(device, dtype) for device in _devices() for dtype in DTYPES),
    )


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        devices += [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]
    return devices


def _dispatch(device: torch.device, dtype: torch.dtype) -> Dispatch:
    refused = {name: reason for name, reason in refusals(device, dtype).items() if reason is not None}
    used = chosen(device, dtype, torch.float32).name
    return Dispatch(str(device), str(dtype).removeprefix("torch."), used, refused)


def _version(name: str) -> str | None:
    if name == "torch":  # with the build, which tells a CPU from a CUDA one
        return str(torch.__version__)
    try:
        return version(name)
    except PackageNotFoundError:
        return None
