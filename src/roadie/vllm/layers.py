"""vLLM's six linear layers with LoRA, of which only the position in the model is kept: their output is rotated, and their input.

A layer of vLLM may be several layers of the model on disk: q, k and v in one, gate and up in one. Its outputs are then
the parts one after the other, on this device those of its rank. `RotatedLayer.placed` brings what an adapter says about
the parts into that order, and refuses what would tear a pair apart.

A row-parallel layer holds a partial sum of all outputs; rotating is linear, so that the sum of the rotated is the rotated
sum. Its bias is added on rank 0, before the rotation, as it is everywhere else.

**Inputs.** The parts of a layer have one input, which adapters rotate for each part in another way. So the layer is given the
rotated inputs of all parts after one another, as if there were more tokens, and of what each gives its own part is taken: the
weights are read once, and multiplied once a part. An engine without tables for inputs does nothing of this.

Where vLLM compiles, the number of tables is fixed when layers are made (`Settings.stages`, `Settings.input_stages`); where it
does not (None), tables for more rotations in a row, and for inputs, are made when the first adapter needs them.

Legend: P parts of a layer, T tokens, D outputs of the layer on this device, D_i of one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
from roadie.vllm.settings import KEY, Packing, Settings

Rotations = Sequence[Rotation]  # in a row, of one part of a layer; none: the identity
TableRotations = tuple[Rotations, ...]  # those of each table of a layer

making = Settings()  # of the layers that are being made; set by `worker.RoadModelManager`


if TYPE_CHECKING:

    class LayerWithLora:
        """What is held of vLLM's layers with LoRA, which stand behind `RotatedLayer`."""

        base_layer: Any
        lora_config: Any
        punica_wrapper: Any
        device: torch.device
        input_size: int  # on this device, as all of them
        output_size: int
        tp_size: int

        def set_mapping(self, punica_wrapper: Any) -> None: ...
        def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...
        def slice_lora_a(self, lora_a: Tensor) -> Tensor: ...

else:
    LayerWithLora = object


class RotatedLayer(LayerWithLora):
    """What the six have in common; put before vLLM's class, whose methods of the same names it replaces."""

    settings = making
    input_tables: tuple[SlotTable, ...] = ()

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Make the tables: `max_loras` slots, all of them the identity."""
        self.lora_config, self.settings, self.num_slots = lora_config, making, max_loras
        widths, stages = part_widths(self), making.stages or 1
        self.table_widths = (sum(widths),) if making.packing is Packing.WHOLE else widths
        self.slot_tables = tuple(slot_table(max_loras, width, self.device, stages) for width in self.table_widths)
        if making.input_stages:
            self.make_input_tables(making.input_stages)

    def make_input_tables(self, stages: int = 1) -> None:
        """Make a table of the inputs of each part, all of them the identity."""
        width = self.input_size
        self.input_tables = tuple(slot_table(self.num_slots, width, self.device, stages) for _ in part_widths(self))

    def set_mapping(self, punica_wrapper: Any) -> None:
        """Read the slots of tokens from `punica_wrapper`; what no step has written yet is the base."""
        super().set_mapping(punica_wrapper)
        punica_wrapper._token_lora_indices.fill_(-1)

    @property
    def tables(self) -> tuple[SlotTable, ...]:
        """All of them."""
        return (*self.input_tables, *self.slot_tables)

    def reset_lora(self, index: int) -> None:
        """Make slot `index` the identity."""
        for table in self.tables:
            table.clear([index])

    def set_lora(self, index: int, lora_a: TableRotations, lora_b: TableRotations) -> None:
        """Put what `placed_inputs` and `placed` gave into slot `index`."""
        if any(lora_a) and not self.input_tables:
            self.make_input_tables()
        written = (*lora_a, *lora_b) if self.input_tables else lora_b
        for table, rotations in zip(self.tables, written, strict=True):
            if rotations:
                table.write([index], rotations)
            else:
                table.clear([index])

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The base layer on its rotated inputs, rotated: where there are several parts, on the inputs of all of them at once."""
        if self.input_tables:
            flat = x.flatten(0, -2)
            slots = self.punica_wrapper._token_lora_indices[: flat.shape[0]]
            x = torch.cat([rotate(flat, table.current, slots).view(x.shape) for table in self.input_tables])
        return super().apply(x, bias)

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        """What `apply` has the base layer give, each row by the rotation of its token's slot; x is not looked at."""
        if len(self.input_tables) > 1:
            widths = part_widths(self)
            of_inputs = output.unflatten(0, (len(widths), -1)).unbind()
            output = torch.cat([of_input.split(widths, -1)[i] for i, of_input in enumerate(of_inputs)], dim=-1)
        y = output.flatten(0, -2)
        slots = self.punica_wrapper._token_lora_indices[: y.shape[0]]
        if len(self.slot_tables) == 1:
            return rotate(y, self.slot_tables[0].current, slots, into_x=True).view(output.shape)
        parts = y.split(self.table_widths, dim=-1)
        rotated = [
            rotate(part, table.current, slots, into_x=True) for part, table in zip(parts, self.slot_tables, strict=True)
        ]
        return torch.cat(rotated, dim=-1).view(output.shape)

    def placed(self, parts: Sequence[Rotations]) -> TableRotations:
        """Rotations of the outputs of the model's layers, whole ones, as this device's tables want them.

        Raises `AdapterError` where a size does not fit, and `ConfigError` where pairs would be torn apart, the parts
        have several group sizes, or there is no room for so many.
        """
        if self.base_layer.skip_bias_add and self.base_layer.bias is not None:
            raise ConfigError(
                "got a layer whose bias vLLM adds later, so that it would not be rotated; wanted a bias inside the layer; "
                "leave this layer out of the adapter"
            )
        check_widths(full_widths(self), parts, "outputs")
        _check_room(parts, self.settings.stages, "stages")
        local = on_this_rank(self, parts)
        if len(self.slot_tables) > 1:
            return tuple(_joined([part], [width]) for part, width in zip(local, self.table_widths, strict=True))
        return (_joined(local, part_widths(self)),)

    def placed_inputs(self, parts: Sequence[Rotations]) -> TableRotations:
        """As `placed`, of the inputs of the parts."""
        check_widths([self.base_layer.input_size] * len(part_widths(self)), parts, "inputs")
        _check_room(parts, self.settings.input_stages, "input_stages")
        if self.tp_size == 1 or not isinstance(self, RowParallelLinearWithLoRA):
            return tuple(parts)
        here = self.slice_lora_a(torch.arange(self.base_layer.input_size).unsqueeze(0)).squeeze(0)
        return tuple([_taken_from(rotation, here, self.tp_size, "inputs") for rotation in part] for part in parts)


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


def slot_table(num_slots: int, width: int, device: torch.device, stages: int = 1) -> SlotTable:
    """A table in memory that never moves, in float32, with room for so many rotations in a row."""
    return SlotTable(width, num_slots, torch.float32, device, is_fixed=True, num_stages=stages)


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


def check_widths(widths: Sequence[int], parts: Sequence[Rotations], what: str) -> None:
    """Raise `AdapterError` unless each part has the outputs, or inputs, that the layer has."""
    if len(widths) != len(parts):
        raise AdapterError(
            f"got a layer of {len(widths)} parts where vLLM names {len(parts)}; wanted one name a part; leave it out of the "
            "adapter"
        )
    for width, part in zip(widths, parts, strict=True):
        if part and part[0].out_features != width:
            raise AdapterError(
                f"got {part[0].out_features} {what}; the model has {width}; use the base model of the adapter"
            )


def _check_room(parts: Sequence[Rotations], room: int | None, setting: str) -> None:
    """Raise `ConfigError` where a part has more rotations in a row than there may be; None: as many as it likes."""
    most = max(map(len, parts))
    if room is not None and most > room:
        where = "input" if setting == "input_stages" else "output"
        raise ConfigError(
            f"got {most} rotations of a layer's {where} in a row; this engine has room for {room}, which is settled before "
            f'it compiles; start it with --additional-config \'{{"{KEY}": {{"{setting}": {most}}}}}\', or with --enforce-eager'
        )


def on_this_rank(layer: Any, parts: Sequence[Rotations]) -> list[Rotations]:
    """What of each part is on this rank, in vLLM's own division; raises `ConfigError` where it tears pairs apart."""
    if layer.tp_size == 1:
        return list(parts)
    numbers = [torch.arange(part[0].out_features).unsqueeze(-1) if part else None for part in parts]
    if isinstance(layer, MergedColumnParallelLinearWithLoRA):
        sliced = layer.slice_lora_b(numbers)
    else:
        sliced = [None if numbers[0] is None else layer.slice_lora_b(numbers[0])]
    return [
        [_taken_from(rotation, here.squeeze(-1), layer.tp_size, "outputs") for rotation in part]
        for part, here in zip(parts, sliced, strict=True)
    ]


def _taken_from(whole: Rotation, here: Tensor, num_ranks: int, what: str) -> Rotation:
    """The rotation of those of the outputs, or inputs, that a rank has; here: int64, their numbers."""
    size, width = whole.group_size, len(here)
    partner, _ = partner_columns(size, whole.direct)
    if width % size or not torch.equal(here[partner_columns(size, here)[0]], partner[here]):
        raise ConfigError(
            f"got group_size={size} for a layer with {width} {what} on each of {num_ranks} ranks; every rank must hold "
            "whole groups; use fewer ranks, or an adapter with a smaller group_size"
        )
    return Rotation(whole.direct[here], whole.cross[here], size)


def _joined(parts: Sequence[Rotations], widths: Sequence[int]) -> Rotations:
    """The parts one after the other, stage by stage; a part with fewer stages than others has the identity in the last ones."""
    stages = range(max(map(len, parts)))
    return [_joined_stage([part[i] if i < len(part) else None for part in parts], widths) for i in stages]


def _joined_stage(parts: Sequence[Rotation | None], widths: Sequence[int]) -> Rotation:
    """The parts one after the other as one rotation; None: not adapted."""
    sizes = {part.group_size for part in parts if part is not None}
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
