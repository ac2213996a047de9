"""Adapters that every process holds whole: equal at the start, and with gradients that are averaged over the processes.

    replicas = replicate_adapters(model, mesh)
    loss.backward()                             the gradients are the average of those of all processes
    with replicas.no_sync(): ...                not in here: for all backward passes of a step but the last
    replicas.average_gradients()                by hand, where replicate_adapters(..., on_backward=False)

The vectors of all layers travel as one tensor, once a backward pass. A parameter that took part in no process has no gradient
afterwards; one that took part in some has the average in all, those that did not use it counting as zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh

from roadie.distributed.layers import adapter_parameters

Group = dist.ProcessGroup | DeviceMesh | None


class Replicas:
    """Adapters of one model in several processes; made by `replicate_adapters`."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self._parameters = parameters
        self._group = group
        self._is_due = False
        self._syncs = True
        self._hooks: list[Any] = []

    def average_gradients(self) -> None:
        """Replace the gradients of all adapters that are trained by their average over the processes; all must call it."""
        self._is_due = False
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
            _average([parameter for parameter in trained if parameter.dtype == dtype], self._group)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the block backward passes leave the gradients as they are in each process, to be averaged later."""
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    def remove(self) -> None:
        """From now on nothing is averaged on its own."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watch(self) -> None:
        for parameter in self._parameters:
            trained = parameter.requires_grad
            parameter.requires_grad_(True)  # also those that are trained later: a hook stays, but is taken only then
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))
            parameter.requires_grad_(trained)

    def _on_gradient(self, _: Tensor) -> None:
        if self._syncs and not self._is_due:
            self._is_due = True
            Variable._execution_engine.queue_callback(self.average_gradients)


def replicate_adapters(model: nn.Module, group: Group = None, *, on_backward: bool = True) -> Replicas:
    """Give every process of `group` the adapters of the first one, and average their gradients at the end of each backward.

    group: a process group, a device mesh (all of its processes), or None for all processes; on_backward: False where a
    process may have a batch in which no row uses an adapter that is trained: it would never come to the average, for
    which the others wait. Call `Replicas.average_gradients` before the optimizer's step then.
    Raises `AdapterError` for a model without RoAd layers. Adapters that are added later are not among them.
    """
    process_group = _process_group(group)
    parameters = adapter_parameters(model)
    _copy_from_first(parameters, process_group)
    replicas = Replicas(parameters, process_group)
    if on_backward:
        replicas._watch()
    return replicas


def _process_group(group: Group) -> dist.ProcessGroup | None:
    if not isinstance(group, DeviceMesh):
        return group
    return group.get_group() if group.ndim == 1 else group._flatten().get_group()


def _copy_from_first(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    source = dist.get_global_rank(group, 0) if group is not None else 0
    with torch.no_grad():
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            chosen = [_local(parameter) for parameter in parameters if parameter.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in chosen])
            dist.broadcast(flat, src=source, group=group)
            for tensor, part in zip(chosen, flat.split([tensor.numel() for tensor in chosen]), strict=True):
                tensor.copy_(part.view_as(tensor))


def _average(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """One message: all gradients (zeros where there is none), and which of them there are."""
    absent = [parameter.grad is None for parameter in parameters]
    locals_ = [_local(parameter) for parameter in parameters]
    pieces = [
        torch.zeros_like(local) if parameter.grad is None else _local(parameter.grad)
        for parameter, local in zip(parameters, locals_, strict=True)
    ]
    presence = torch.tensor([0.0 if one else 1.0 for one in absent], dtype=pieces[0].dtype, device=pieces[0].device)
    with torch.no_grad():
        flat = torch.cat([*(piece.flatten() for piece in pieces), presence])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        *averages, presence = flat.split([*(piece.numel() for piece in pieces), len(absent)])
        used = (presence > 0).tolist() if any(absent) else [True] * len(absent)
        for parameter, piece, average, is_used in zip(parameters, pieces, averages, used, strict=True):
            piece.copy_(average.view_as(piece))
            if parameter.grad is None and is_used:
                parameter.grad = _like(piece, parameter)


def _local(tensor: Tensor) -> Tensor:
    """The memory of this process, of a DTensor too."""
    return getattr(tensor, "_local_tensor", tensor)


def _like(local: Tensor, parameter: nn.Parameter) -> Tensor:
    if local.shape == parameter.shape and not hasattr(parameter, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    whole: Any = parameter
    return DTensor.from_local(local, whole.device_mesh, whole.placements, run_check=False)
