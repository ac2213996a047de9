"""`rows(model, slots)`: whoever rotates the layers of a model, a bank or the tuner, is told what each row wants.

Banks announce themselves here when they are made, and the tuner when it is imported, so that neither needs the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from roadie.errors import ConfigError, RoutingError

RowsInForce = Callable[..., AbstractContextManager[Any]]  # of slots, or of what each row wishes for; static

_servers: WeakKeyDictionary[nn.Module, RowsInForce] = WeakKeyDictionary()
_of_tuner: list[Callable[..., AbstractContextManager[Any]]] = []


def serve(model: nn.Module, rows_of_bank: RowsInForce) -> None:
    """From now on a bank serves `model`; raises `ConfigError` where another one does."""
    if model in _servers:
        raise ConfigError("got a model that a bank serves already; close that bank first, or admit into it")
    _servers[model] = rows_of_bank


def stop_serving(model: nn.Module) -> None:
    """The model is served by nobody any more."""
    _servers.pop(model, None)


def announce(rows_of_tuner: Callable[..., AbstractContextManager[Any]]) -> None:
    """How the rows of models with RoAd layers are put in force."""
    _of_tuner[:] = [rows_of_tuner]


def rows(model: nn.Module, slots: Tensor | Sequence[Any], *, static: bool = False) -> AbstractContextManager[Any]:
    """Within the block, row b of every batch uses adapter ``slots[b]``.

    model: one that an `AdapterBank` serves, or a PeftModel or any model with RoAd layers inside, compiled or not. slots: an
    integer tensor, ``[B]`` for a slot a row or ``[B, T]`` for a slot a token; or a sequence of B wishes: adapter names,
    "__base__" (or None) for the base model, and, with a bank, mappings of names to weights. In a bank slots are those of
    `AdapterBank.slots`; in a PeftModel -1 is the base model and k the k-th adapter of ``model.peft_config``.

    The choice is the calling thread's (or task's) own: others may run the model meanwhile, with other rows or with none.
    Works in training too: each row's gradient goes to its own adapter. In a PeftModel trainable adapters that no row uses get a
    gradient of zero: the table holds all adapters, so that a compiled model stays one program whatever the rows choose.
    static: `slots`, an int64 tensor on the model's device, is never copied, and no call asks the device for its values: each
    reads it where it lies, so that it may be written to between calls, and a CUDA graph that was captured in the block rotates
    by what it holds at each replay, also after the block. Call the model once in the block before the capture. Values out of
    range are noticed in debug mode only (``python -X dev``, or ROADIE_DEBUG=1), where the device checks them. In a PeftModel a
    graph goes on rotating by the adapters as they were when the model was last called in such a block.

    Raises `RoutingError` for unknown adapters, slots out of range, or a model that nobody serves.
    """
    rows_of_bank = _servers.get(model)
    if rows_of_bank is not None:
        return rows_of_bank(slots, static=static)
    for of_tuner in _of_tuner:
        return of_tuner(model, slots, static=static)
    raise RoutingError(
        f"got a {type(model).__name__} without adapters; wanted one that an AdapterBank serves, or one with RoAd layers; "
        "make a bank for it, or adapt it with get_peft_model"
    )
