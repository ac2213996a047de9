"""Adapters on several processes: data parallel, sharded, tensor parallel; what is RoAd's own about each of them.

    shard_model(model, mesh)            FSDP2: the base in shards, the adapters whole
    replicate_adapters(model, group)    equal adapters in all processes, with averaged gradients
    tensor_parallel(model, mesh)        each process has a part of every layer, and of its adapter
    full_adapter(model)                 the whole adapter, for a file; load_full_adapter puts one in

Names resolve on first use. docs/distributed.md is the guide.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roadie.distributed.processes import Processes, join, joined
    from roadie.distributed.replicas import Replicas, replicate_adapters
    from roadie.distributed.sharding import shard_model
    from roadie.distributed.slices import tensor_parallel
    from roadie.distributed.whole import full_adapter, load_full_adapter

__all__ = [
    "Processes",
    "Replicas",
    "full_adapter",
    "join",
    "joined",
    "load_full_adapter",
    "replicate_adapters",
    "shard_model",
    "tensor_parallel",
]

_MODULES = {
    "processes": ("Processes", "join", "joined"),
    "replicas": ("Replicas", "replicate_adapters"),
    "sharding": ("shard_model",),
    "slices": ("tensor_parallel",),
    "whole": ("full_adapter", "load_full_adapter"),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
