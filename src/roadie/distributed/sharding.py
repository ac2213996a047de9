"""FSDP2: the base model in shards, the adapters whole in every process.

    replicas = shard_model(model, mesh)         blocks and root through torch's fully_shard, adapters through replicate_adapters

An adapter is two short vectors a layer. Sharded with the base they would be gathered layer by layer, in dozens of messages of a
few KiB; whole they cost nothing to hold, and their gradients one message a step. Other parameters that are trained (whole
modules, biases) are sharded, and their gradients averaged, by FSDP2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from roadie.distributed.layers import adapter_parameters
from roadie.distributed.replicas import Replicas, replicate_adapters
from roadie.errors import ConfigError


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    blocks: Sequence[str] | None = None,
    on_backward: bool = True,
    **options: Any,
) -> Replicas:
    """Shard an adapted model by FSDP2, but for its adapters, which every process keeps whole with averaged gradients.

    mesh: as in torch's `fully_shard` (None: all processes); blocks: class names of the modules that are gathered one at a time;
    None: those that the model names in `_no_split_modules`; on_backward: as in `replicate_adapters`; options: those of
    `fully_shard` (mp_policy, reshard_after_forward, offload_policy). Make the optimizer afterwards.
    Raises `ConfigError` where no block is found, `AdapterError` for a model without RoAd layers.
    """
    adapters = set(adapter_parameters(model))
    wanted = set(blocks or getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in wanted]
    if not found:
        raise ConfigError(
            f"got blocks {sorted(wanted)}, of which the model has none; wanted class names of its blocks, such as "
            "blocks=['LlamaDecoderLayer']"
        )
    for module in [*found, model]:
        fully_shard(module, mesh=mesh, ignored_params=adapters, **options)
    return replicate_adapters(model, mesh, on_backward=on_backward)
