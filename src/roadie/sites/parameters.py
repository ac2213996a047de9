"""From the parameters of adapters to tables: those of all sites in a handful of operations.

A model has a hundred sites and more, each of them small: made one by one, their rotations would cost what hundreds of small
operations cost. Parameters of one kind are made as those of one long site, which their groups allow: none crosses a border.

Legend: D features of a site, S slots, k adapters of one kind, n parameters of theta (and of alpha) of one rotation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from roadie.kernels import Chain, RotationTable, table_of
from roadie.kernels.constants import constant
from roadie.kernels.keeping import PLAIN
from roadie.kernels.table import vectors_of
from roadie.rotation import Rotation, from_parameters, parameter_gradients, split_stages
from roadie.sites.table import ANY_SIZE, NO_ROTATION


class Part(NamedTuple):
    """One rotation of one adapter at one site: theta and alpha, and how to read them.

    theta, alpha: ``[K n]``, of the K stages of a chain, of which this is number `stage`.
    """

    theta: Tensor
    alpha: Tensor
    variant: str
    group_size: int
    stage: int
    num_stages: int


Slot: TypeAlias = Sequence[Part]
"""The stages of one slot, the first applied first; none: the identity."""


def parts_of(theta: Tensor, alpha: Tensor, variant: str, stages: Sequence[int]) -> list[Part]:
    """The stages of one adapter, whose parameters ``[K n]`` lie end to end."""
    return [Part(theta, alpha, variant, size, stage, len(stages)) for stage, size in enumerate(stages)]


class Plan:
    """How the tables of some sites are made of the parameters of their slots: what stays the same when values change."""

    def __init__(self, sites: Sequence[Sequence[Slot]]) -> None:
        blocks: list[list[Part]] = []
        self._stages = [
            [_Stage.of(slots, number, blocks) for number in range(max([0, *map(len, slots)]))] for slots in sites
        ]
        self._stored: list[Tensor] = []
        self._stages_of: list[tuple[int, int]] = []
        for part in itertools.chain.from_iterable(blocks):
            self._stored += (part.theta, part.alpha)
            self._stages_of += 2 * [(part.stage, part.num_stages)]
        self._has_chains = set(self._stages_of) != {(0, 1)}
        self._kinds = _kinds(blocks)
        self._num_blocks = len(blocks)
        # Whether each table is one block as it is.
        tables = list(itertools.chain.from_iterable(self._stages))
        self._are_parts = list(map(len, blocks)) == [stage.num_slots for stage in tables]

    def chains(self) -> list[Chain | None]:
        """The tables ``[S, D]`` of the slots of each site, one for each stage; None where all are the identity.

        Differentiable. Each table is memory of its own, or a part of one; those of `kept` alone are ever written to again.
        """
        parameters = self._parameters()
        return self._chains(
            _apply(self, *parameters) if self._wants_gradient() else self.vectors(self.wholes(parameters))
        )

    def kept(self) -> tuple[list[Chain | None], list[Tensor]]:
        """As `chains`, without gradient, and the memory that all of them are: for `write_anew`."""
        wholes = self.wholes(self._parameters())
        chains = self._chains(self.vectors(wholes))
        return chains, self._memory(wholes, chains)

    def write_anew(self, memory: Sequence[Tensor]) -> None:
        """The values of now into the memory that `kept` gave; no operation for each site where tables are parts of it."""
        wholes = self.wholes(self._parameters())
        for into, made in zip(memory, self._memory(wholes), strict=True):
            into.copy_(made)

    def _memory(self, wholes: Sequence[Rotation], chains: Sequence[Chain | None] | None = None) -> list[Tensor]:
        if self._are_parts:
            return [vector for whole in wholes for vector in (whole.direct, whole.cross)]
        chains = self._chains(self.vectors(wholes)) if chains is None else chains
        return [vector for chain in chains for vector in vectors_of(chain or ())]

    def _parameters(self) -> list[Tensor]:
        if not self._has_chains:
            return self._stored
        each = zip(self._stored, self._stages_of, strict=True)
        return [split_stages(vector, count)[stage] for vector, (stage, count) in each]

    def _chains(self, vectors: Sequence[Tensor]) -> list[Chain | None]:
        return [tuple([stage.table(vectors, len(stages)) for stage in stages]) or None for stages in self._stages]

    def _wants_gradient(self) -> bool:
        """Whether autograd wants to know, and nothing else of torch looks on: compilers, transforms, tracers, forward mode."""
        return (
            torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and torch._C._functorch.peek_interpreter_stack() is None
            and torch._C._get_tracing_state() is None
            and torch.autograd.forward_ad._current_level < 0
            and {*map(type, self._stored)}.issubset(PLAIN)
            and any(map(attrgetter("requires_grad"), self._stored))
        )

    def wholes(self, parameters: Sequence[Tensor]) -> list[Rotation]:
        """The blocks of each kind, end to end; differentiable, in float32 or wider."""
        return [
            from_parameters(*_end_to_end(kind.blocks, parameters), kind.variant, kind.group_size)
            for kind in self._kinds
        ]

    def vectors(self, wholes: Sequence[Rotation]) -> list[Tensor]:
        """direct and cross ``[k, D]`` of each block of k parts, in turn."""
        made: list[Any] = [None] * (2 * self._num_blocks)
        for kind, whole in zip(self._kinds, wholes, strict=True):
            each, width = sum(kind.sizes), whole.direct.numel()
            sizes = [size * width // each for size in kind.sizes]
            split = zip(kind.blocks, whole.direct.split(sizes), whole.cross.split(sizes), strict=True)
            for (number, parts, _), direct, cross in split:
                made[2 * number], made[2 * number + 1] = direct.view(len(parts), -1), cross.view(len(parts), -1)
        return made

    def gradients(self, grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The adjoint of `wholes` and `vectors`; None for the parameters of blocks of which there are no gradients."""
        found: list[Tensor | None] = [None] * len(parameters)
        for kind in self._kinds:
            used: list[_Block] = []
            vectors: tuple[list[Tensor], list[Tensor]] = [], []
            for block in kind.blocks:
                both = grads[2 * block.number], grads[2 * block.number + 1]
                if both[0] is None and both[1] is None:
                    continue
                used.append(block)
                for into, grad, other in zip(vectors, both, both[::-1], strict=True):
                    into.append((torch.zeros_like(other) if grad is None else grad).flatten())  # type: ignore[arg-type]
            if not used:
                continue
            theta, alpha = _end_to_end(used, parameters)
            of_direct, of_cross = map(torch.cat, vectors)
            whole = parameter_gradients(of_direct, of_cross, theta, alpha, kind.variant, kind.group_size)
            sizes: list[int] = []
            places: list[int] = []
            for block in used:
                places += block.parts
                sizes += [block.size // len(block.parts)] * len(block.parts)
            split = zip(
                places, whole[0].to(theta.dtype).split(sizes), whole[1].to(alpha.dtype).split(sizes), strict=True
            )
            for part, of_theta, of_alpha in split:
                found[2 * part], found[2 * part + 1] = of_theta, of_alpha
        return found


class _Block(NamedTuple):
    """Parts of one kind at one stage of a site, by number, and how many parameters of theta (and of alpha) they have."""

    number: int
    parts: range
    size: int


class _Kind(NamedTuple):
    """Blocks that are made as one. sizes: theirs."""

    variant: str
    group_size: int
    blocks: list[_Block]
    sizes: list[int]


def _kinds(blocks: Sequence[Sequence[Part]]) -> list[_Kind]:
    found: dict[object, _Kind] = {}
    begin = 0
    for number, block in enumerate(blocks):
        first, end = block[0], begin + len(block)
        key = first.variant, first.group_size, first.theta.dtype, first.alpha.dtype, first.theta.device
        kind = found.setdefault(key, _Kind(first.variant, first.group_size, [], []))
        kind.sizes.append(sum([part.theta.numel() // part.num_stages for part in block]))
        kind.blocks.append(_Block(number, range(begin, end), kind.sizes[-1]))
        begin = end
    return list(found.values())


def _end_to_end(blocks: Sequence[_Block], parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """theta and alpha of all parts, as those of one long site."""
    vectors: tuple[list[Tensor], list[Tensor]] = [], []
    for block in blocks:
        for part in block.parts:
            vectors[0].append(parameters[2 * part])
            vectors[1].append(parameters[2 * part + 1])
    if len(vectors[0]) == 1:
        return vectors[0][0], vectors[1][0]
    return torch.cat(vectors[0]), torch.cat(vectors[1])


class _Vectors(torch.autograd.Function):
    """`Plan.vectors` as one step of autograd for all sites.

    Autograd by itself would give a gradient of zero, and not none, to the parameters of sites that took no part: weight decay
    and momentum would then move them.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.save_for_backward(*parameters)  # to be told where they were changed since
        ctx.set_materialize_grads(False)
        return tuple(plan.vectors(plan.wholes(parameters)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.plan.gradients(grads, ctx.saved_tensors)


# Without looking at thousands of parameters for transforms, of which there are none where a gradient is wanted.
_apply = super(torch.autograd.Function, _Vectors).apply


class _Stage(NamedTuple):
    """One stage of the slots of a site: which blocks it is made of, and which slots these are."""

    num_slots: int
    sizes: list[int | None]
    blocks: list[int]
    members: list[list[int]]

    @classmethod
    def of(cls, slots: Sequence[Slot], number: int, blocks: list[list[Part]]) -> _Stage:
        """Adds what it is made of to `blocks`."""
        kinds: dict[object, list[int]] = {}
        sizes: list[int | None] = [None] * len(slots)
        for index, slot in enumerate(slots):
            if number < len(slot):
                part, sizes[index] = slot[number], slot[number].group_size
                kinds.setdefault((part.variant, part.group_size, part.theta.dtype, part.alpha.dtype), []).append(index)
        begin = len(blocks)
        blocks += [[slots[index][number] for index in members] for members in kinds.values()]
        return cls(len(slots), sizes, list(range(begin, len(blocks))), list(kinds.values()))

    def table(self, vectors: Sequence[Tensor], num_stages: int) -> RotationTable:
        """vectors: those of all blocks, as `Plan.vectors` gives them."""
        first = 2 * self.blocks[0]
        if len(self.blocks) == 1 and len(self.members[0]) == self.num_slots:
            return table_of(vectors[first], vectors[first + 1], self.sizes[:1])  # type: ignore[arg-type]
        direct, cross = (torch.cat([vectors[2 * block + which] for block in self.blocks]) for which in (0, 1))
        order = [index for members in self.members for index in members]
        direct, cross = _in_order(direct, cross, order, self.num_slots)
        return table_of(direct, cross, self._group_sizes(num_stages))

    def _group_sizes(self, num_stages: int) -> list[int]:
        """A slot without this rotation has group size 0; in a table that stands alone it is the identity, of any size."""
        sizes = {size for size in self.sizes if size is not None}
        absent = NO_ROTATION if num_stages > 1 else sizes.pop() if len(sizes) == 1 else ANY_SIZE
        return [absent if size is None else size for size in self.sizes]


def _in_order(direct: Tensor, cross: Tensor, order: list[int], num_slots: int) -> tuple[Tensor, Tensor]:
    """Row k of the result is the row that stands for slot order[k]; slots that are not in `order` get the identity."""
    if order == list(range(num_slots)):
        return direct, cross
    one = torch.ones(1, direct.shape[1], dtype=direct.dtype, device=direct.device)
    direct, cross = torch.cat((direct, one)), torch.cat((cross, torch.zeros_like(one)))
    position = {slot: row for row, slot in enumerate(order)}
    rows = constant([position.get(slot, len(order)) for slot in range(num_slots)], torch.int64, direct.device)
    return direct.index_select(0, rows), cross.index_select(0, rows)
