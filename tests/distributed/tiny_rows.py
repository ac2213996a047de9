"""Mixed batches over two processes: each row trains its own adapter, and the processes have rows of different adapters.

Imported by program_sharded.py, which torchrun starts in this folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_training import adapted, batch, whole
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import roadie
from roadie.distributed import Processes, replicate_adapters

WISHES = ["a", "a", "b", "__base__"]  # the first process has no row of b, the second none of a
NAMES = ("a", "b", "c")


def three_adapters() -> Any:
    model = adapted("road_1")
    for number, name in enumerate(NAMES):
        model.add_adapter(name, roadie.RoadConfig(variant=f"road_{2**number}", group_size=8, target_modules=["q_proj"]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".a", ".b", ".c")):
                parameter.requires_grad_(True)
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return model


def gradients(model: Any) -> dict[str, Tensor | None]:
    named = ((name.removeprefix("module."), parameter) for name, parameter in model.named_parameters())
    return {name: None if p.grad is None else whole(p.grad) for name, p in named if p.requires_grad}


def mixed_rows(folder: Path, together: Processes) -> None:
    """Writes the gradients of one process, of DDP by both ways to say what rows want, and of replicas by all ways to wait."""
    own = slice(2 * together.rank, 2 * together.rank + 2)
    ids, found = batch(0), {}

    def backward(model: Any, rows: slice) -> None:
        model(input_ids=ids[rows], labels=ids[rows], adapter_names=WISHES[rows]).loss.backward()

    alone = three_adapters()
    backward(alone, slice(None))
    found["one"] = gradients(alone)
    model = DistributedDataParallel(three_adapters(), find_unused_parameters=True)
    backward(model, own)
    found["ddp_names"] = gradients(model)
    inner = three_adapters()
    model = DistributedDataParallel(inner)
    with roadie.rows(inner, WISHES[own]):
        model(input_ids=ids[own], labels=ids[own]).loss.backward()
    found["ddp_rows"] = gradients(model)
    model = three_adapters()
    replicate_adapters(model)
    backward(model, own)
    found["replicas"] = gradients(model)
    model = three_adapters()
    replicas = replicate_adapters(model)
    with replicas.no_sync():
        backward(model, own)
        found[f"no_sync-{together.rank}"] = gradients(model)
    backward(model, own)
    found["twice"] = gradients(model)
    model = three_adapters()
    replicas = replicate_adapters(model, on_backward=False)
    if together.is_first:  # the other one has nothing to train, and would never come to a hook
        backward(model, own)
    replicas.average_gradients()
    found["by_hand"] = gradients(model)
    torch.save(found, folder / f"rows-{together.rank}.pt")
