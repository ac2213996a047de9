"""vLLM's six linear layers with LoRA, of which only the position in the model is kept: their output is rotated instead.

A layer of vLLM may be several layers of the model on disk: q, k and v in one, gate and up in one. Its outputs are then
the parts one after the other, on this device those of its rank. `RotatedLayer.placed` brings what an adapter says about
the parts into that order, and refuses what would tear a pair apart.

A row-parallel layer holds a partial sum of all outputs; rotating is linear, so that the sum of the rotated is the rotated
sum. Its bias is added on rank 0, before the rotation, as it is everywhere else.

Legend: D outputs of the layer on this device, D_i of one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from roadie.errors import AdapterError, ConfigError
from roadie.kernels import rotate
from roadie.rotation import Rotation, identity, partner_columns
from roadie.sites.table import ANY_SIZE, SlotTable
from roadie.vllm.settings import Packing

TableRotations = tuple[Rotation | None, ...]  # one for each table of a layer; None: the identity

packing = Packing.WHOLE  # of the layers that are being made; set by `worker.RoadModelManager`


class RotatedLayer:
    """What the six have in common; put before vLLM's class, whose methods of the same names it replaces."""

    def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Make the tables: `max_loras` slots, all of them the identity."""
        self.lora_config = lora_config
        widths = part_widths(self)
        self.table_widths = (sum(widths),) if packing is Packing.WHOLE else widths
        self.slot_tables = tuple(slot_table(max_loras, width, self.device) for width in self.table_widths)

    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        """Read the slots of tokens from `punica_wrapper`; what no step has written yet is the base."""
        super().set_mapping(punica_wrapper)  # type: ignore[misc]
        punica_wrapper._token_lora_indices.fill_(-1)

    def reset_lora(self: Any, index: int) -> None:
        """Make slot `index` the identity."""
        for table in self.slot_tables:
            table.clear([index])

    def set_lora(self: Any, index: int, lora_a: TableRotations, lora_b: None = None) -> None:
        """Put what `placed` gave into slot `index`."""
        for table, rotation in zip(self.slot_tables, lora_a, strict=True):
            if rotation is None:
                table.clear([index])
            else:
                table.write([index], [rotation])

    def _apply_lora_to_output(self: Any, x: Tensor, output: Tensor) -> Tensor:
        """The output of the base layer, each row by the rotation of its token's slot; x is not looked at."""
        y = output.flatten(0, -2)
        slots = self.punica_wrapper._token_lora_indices[: y.shape[0]]
        if len(self.slot_tables) == 1:
            return rotate(y, self.slot_tables[0].current, slots, into_x=True).view(output.shape)
        parts = y.split(self.table_widths, dim=-1)
        rotated = [
            rotate(part, table.current, slots, into_x=True) for part, table in zip(parts, self.slot_tables, strict=True)
        ]
        return torch.cat(rotated, dim=-1).view(output.shape)

    def placed(self: Any, parts: Sequence[Rotation | None]) -> TableRotations:
        """Rotations of the model's layers (None: not adapted), whole ones, as this device's tables want them.

        Raises `AdapterError` where a size does not fit, and `ConfigError` where pairs would be torn apart or the parts
        have several group sizes.
        """
        if self.base_layer.skip_bias_add and self.base_layer.bias is not None:
            raise ConfigError(
                "got a layer whose bias vLLM adds later, so that it would not be rotated; wanted a bias inside the layer; "
                "leave this layer out of the adapter"
            )
        check_widths(full_widths(self), parts)
        local = on_this_rank(self, parts)
        if len(self.slot_tables) > 1:
            return tuple(_joined([part], [width]) for part, width in zip(local, self.table_widths, strict=True))
        return (_joined(local, part_widths(self)),)


class RotatedColumn(RotatedLayer, ColumnParallelLinearWithLoRA):
    """Outputs divided over the ranks, or two such layers that are one in the model too."""


class RotatedMergedColumn(RotatedLayer, MergedColumnParallelLinearWithLoRA):
    """Several layers with divided outputs in one: gate and up."""


class RotatedQKV(RotatedLayer, QKVParallelLinearWithLoRA):
    """q, k and v that are one layer in the model too."""


class RotatedMergedQKV(RotatedLayer, MergedQKVParallelLinearWithLoRA):
    """q, k and v in one."""


class RotatedRow(RotatedLayer, RowParallelLinearWithLoRA):
    """Inputs divided over the ranks; the outputs are partial sums."""


class RotatedReplicated(RotatedLayer, ReplicatedLinearWithLoRA):
    """The whole layer on every rank."""


# Order matters: vLLM takes the first that says it can replace a layer.
ROTATED_LAYERS: tuple[type[Any], ...] = (
    *(RotatedColumn, RotatedMergedColumn, RotatedQKV, RotatedMergedQKV, RotatedRow, RotatedReplicated),
)


def slot_table(num_slots: int, out_features: int, device: torch.device) -> SlotTable:
    """A table in memory that never moves, in float32."""
    return SlotTable(out_features, num_slots, torch.float32, device, is_fixed=True)


def part_widths(layer: Any) -> tuple[int, ...]:
    """D_i of each part of vLLM's layer on this device."""
    if isinstance(layer, MergedColumnParallelLinearWithLoRA):
        return tuple(layer.output_slices)
    return (layer.output_size,)


def full_widths(layer: Any) -> tuple[int, ...]:
    """The outputs of each part over all ranks: what an adapter has parameters for."""
    base = layer.base_layer
    if isinstance(layer, MergedQKVParallelLinearWithLoRA):
        keys = base.total_num_kv_heads * base.head_size
        return base.total_num_heads * base.head_size, keys, keys
    if isinstance(layer, QKVParallelLinearWithLoRA):
        return (layer.q_proj_total_size + 2 * layer.kv_proj_total_size,)
    if isinstance(layer, MergedColumnParallelLinearWithLoRA):
        return tuple(layer.output_sizes)
    return (base.output_size,)


def check_widths(widths: Sequence[int], parts: Sequence[Rotation | None]) -> None:
    """Raise `AdapterError` unless each part has the outputs that the layer has."""
    if len(widths) != len(parts):
        raise AdapterError(
            f"got a layer of {len(widths)} parts where vLLM names {len(parts)}; wanted one name a part; leave it out of the "
            "adapter"
        )
    for width, part in zip(widths, parts, strict=True):
        if part is not None and part.out_features != width:
            raise AdapterError(
                f"got {part.out_features} outputs; the model has {width}; use the base model of the adapter"
            )


def on_this_rank(layer: Any, parts: Sequence[Rotation | None]) -> list[Rotation | None]:
    """What of each part is on this rank, in vLLM's own division; raises `ConfigError` where it tears pairs apart."""
    if layer.tp_size == 1:
        return list(parts)
    numbers = [None if part is None else torch.arange(part.out_features).unsqueeze(-1) for part in parts]
    if isinstance(layer, MergedColumnParallelLinearWithLoRA):
        sliced = layer.slice_lora_b(numbers)
    else:
        sliced = [None if numbers[0] is None else layer.slice_lora_b(numbers[0])]
    return [
        None if part is None or here is None else _taken_from(part, here.squeeze(-1), layer.tp_size)
        for part, here in zip(parts, sliced, strict=True)
    ]


def _taken_from(whole: Rotation, outputs: Tensor, num_ranks: int) -> Rotation:
    """The rotation of those of the outputs that a rank has; outputs: int64, their numbers."""
    size, width = whole.group_size, len(outputs)
    partner, _ = partner_columns(size, whole.direct)
    if width % size or not torch.equal(outputs[partner_columns(size, outputs)[0]], partner[outputs]):
        raise ConfigError(
            f"got group_size={size} for a layer with {width} outputs on each of {num_ranks} ranks; every rank must hold "
            "whole groups; use fewer ranks, or an adapter with a smaller group_size"
        )
    return Rotation(whole.direct[outputs], whole.cross[outputs], size)


def _joined(parts: Sequence[Rotation | None], widths: Sequence[int]) -> Rotation | None:
    """The parts one after the other as one rotation; None where none is adapted."""
    sizes = {part.group_size for part in parts if part is not None}
    if not sizes:
        return None
    if len(sizes) > 1:
        _refuse_packed(f"group sizes {sorted(sizes)} in the parts of one layer")
    size = sizes.pop()
    start = 0
    for part, width in zip(parts, widths, strict=True):
        if part is not None and start % size:
            _refuse_packed(f"group_size={size} for a part that starts at output {start}")
        start += width
    every = [part or identity(width, ANY_SIZE) for part, width in zip(parts, widths, strict=True)]
    return Rotation(torch.cat([p.direct.float() for p in every]), torch.cat([p.cross.float() for p in every]), size)


def _refuse_packed(got: str) -> None:
    raise ConfigError(
        f"got {got}, which vLLM keeps as one; wanted one size that fits all of them; start the server with "
        '--additional-config \'{"roadie": {"packing": "parts"}}\', which rotates each part by itself'
    )
