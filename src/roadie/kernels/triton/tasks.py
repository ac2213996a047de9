"""The rows of a batch in an order in which each task, a run of at most N rows, belongs to one slot.

A batch of one slot needs no list: task i is rows i N to (i + 1) N. A routed batch is sorted by slot, the base first, in the
order of the rows within a slot; the rows of the sorted batch are called virtual. Each slot's virtual rows are cut into runs
of N. How many tasks that gives is known on the device only; the host launches the largest number there can be,

    M = T // N + min(B, S + 1)            each slot in use has at most one task of fewer than N rows

and programs beyond the last task have nothing to do. No value travels to the host, so CUDA graphs can record all of it.

Legend: T rows, B runs of `repeat` rows, S slots, N rows a task; group 0 is the base and group s + 1 is slot s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from roadie.kernels.constants import kept_beside


class Tasks(NamedTuple):
    """order ``[B]``: the runs, sorted by slot; bounds ``[S + 2]``: the first run of each group in that order, and B;
    ends ``[S + 1]``: the number of tasks up to and including each group; group ``[M]``: each task's (S + 1: none).

    All int64.
    """

    order: Tensor
    bounds: Tensor
    ends: Tensor
    group: Tensor

    @property
    def number(self) -> int:
        """M, the number of programs to launch."""
        return len(self.group)


def tasks_of(slots: Tensor, repeat: int, num_slots: int, rows_a_task: int) -> Tasks:
    """The tasks of a routed batch; slots int64 ``[B]``. Those of all layers that read the same slots are made once.

    Not in a graph that is being captured, whose slots may be others in each replay.
    """
    owner = slots if slots._base is None else slots._base  # a batch of [B, T] slots is viewed anew in each layer
    if owner.is_inference() or (slots.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _tasks_of(slots, repeat, num_slots, rows_a_task)
    stream = torch.cuda.current_stream(slots.device).cuda_stream if slots.is_cuda else 0
    key = slots.data_ptr(), slots.shape, stream, slots._version, repeat, num_slots, rows_a_task
    kept: dict[object, Tasks] = kept_beside(owner).setdefault(Tasks, {})
    tasks = kept.get(key)
    if tasks is None:
        if len(kept) == _MOST:
            kept.clear()  # what is left is of slots that have been written to
        tasks = kept[key] = _tasks_of(slots, repeat, num_slots, rows_a_task)
    return tasks


_MOST = 16  # of a tensor of slots


def _tasks_of(slots: Tensor, repeat: int, num_slots: int, rows_a_task: int) -> Tasks:
    ordered, order = torch.sort(slots, stable=True)
    groups = torch.arange(-1, num_slots + 1, device=slots.device)
    bounds = torch.searchsorted(ordered, groups)
    ends = (bounds.diff() * repeat + (rows_a_task - 1)).div_(rows_a_task, rounding_mode="floor").cumsum_(0)
    most = most_tasks(len(slots), repeat, num_slots, rows_a_task)
    group = torch.searchsorted(ends, torch.arange(most, device=slots.device), right=True)
    return Tasks(order, bounds, ends, group)


def most_tasks(num_routed: int, repeat: int, num_slots: int, rows_a_task: int) -> int:
    """M, the largest number of tasks there can be."""
    return num_routed * repeat // rows_a_task + min(num_routed, num_slots + 1)
