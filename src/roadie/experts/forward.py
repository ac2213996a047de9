"""The forward of stacked experts with rotations between: an implementation in transformers' registry of such.

An experts module asks its config for the name of its implementation, and the registry for what goes by that name. An adapted one
has a config that stands in for its own (`AdaptedConfig`) and says "roadie"; the model's config is left alone. The forward here
does what the implementation of the model's config does, operation by operation, and rotates what the projections give. Where
nobody rotates, that implementation itself is called.

Legend: N tokens, K experts of a token, P = N K pairs of the two, E experts, D outputs, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from roadie.errors import UnsupportedLayer
from roadie.experts.kinds import IMPLEMENTATIONS, ExpertSite, Projection, implementation_of, projections, refusal
from roadie.kernels import Chain, table_of

NAME = "roadie"
_HELD = "_roadie_turns"


class Pairs(NamedTuple):
    """The pairs of a call: the tokens' states ``[N, H]``, and for each pair the number of its token and its expert, ``[P]``."""

    hidden: Tensor
    tokens: Tensor
    experts: Tensor

    def placed(self, choice: Any, experts: nn.Module, of_slot: tuple[int, ...] | None = None) -> Tensor:
        """The slot of each token ``[N]``, of a `Choice`; raises as that does.

        Slots for each token ``[B, T]`` need no look at the model where all N = B T tokens are here: stacked experts are given
        tokens row by row.
        """
        shape = choice.slots.shape
        if len(shape) == 2 and shape[0] != shape[1] and shape.numel() == len(self.hidden):
            of_rows: Tensor = choice.placed(self.hidden.reshape(*shape, -1), experts, of_slot)
            return of_rows.flatten()
        placed: Tensor = choice.placed(self.hidden, experts, of_slot)
        return placed

    def spread(self, chain: Chain, slots: Tensor | None, num_rotations: int) -> tuple[Chain, Tensor | None]:
        """Tables ``[S, n D]`` and slots of tokens ``[N]`` (None: all have slot 0) as tables ``[S n, D]`` and slots of pairs.

        num_rotations: n, of each slot: E, or 1 where the experts share one.
        """
        of_pair = None if slots is None else slots[self.tokens]
        if num_rotations == 1:
            return chain, of_pair
        own = self.experts if of_pair is None else of_pair * num_rotations + self.experts
        return _unfolded(chain, num_rotations), own if of_pair is None else torch.where(of_pair < 0, of_pair, own)


class Turn(Protocol):
    """Who rotates what a projection gives."""

    def rests(self) -> bool:
        """Whether nothing is rotated now."""
        ...

    def of(self, y: Tensor, is_fresh: Callable[[], bool], pairs: Pairs) -> Tensor:
        """y ``[P, D]``, each row rotated as its pair says; is_fresh: whether nobody else holds y."""
        ...


class AdaptedConfig:
    """Stands in for the config of experts: names the implementation here, and is the config of the model for all else."""

    _experts_implementation = NAME

    def __init__(self, adapted: Any) -> None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
        self.__dict__["adapted"] = adapted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["adapted"], name)

    def __reduce__(self) -> tuple[type[AdaptedConfig], tuple[Any]]:
        return AdaptedConfig, (self.__dict__["adapted"],)


def attach(site: ExpertSite, turn: Turn | None = None) -> Callable[[], None]:
    """From now on the experts are computed here; turn: who rotates, before the modules that are the experts' own; gives the end.

    A module of the experts that has the name of a site is a `Turn` as it is.
    """
    experts = site.projection.experts
    if not isinstance(experts.config, AdaptedConfig):
        experts.config = AdaptedConfig(experts.config)
    held = experts.__dict__.setdefault(_HELD, {})
    if turn is not None:
        held.setdefault(site.projection.name, []).append(turn)

    def end() -> None:
        if turn is not None:
            held[site.projection.name].remove(turn)
        release(experts)

    return end


def release(experts: Any) -> None:
    """Give experts that nobody rotates any more their own config again."""
    if isinstance(experts.config, AdaptedConfig) and not any(_turns(experts, each) for each in projections(experts)):
        experts.config = experts.config.adapted
        experts.__dict__.pop(_HELD, None)


def forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts make of the states ``[N, H]`` of tokens, each given to experts ``[N, K]`` with weights ``[N, K]``."""
    before, after = projections(experts)
    turning = [[turn for turn in _turns(experts, each) if not turn.rests()] for each in (before, after)]
    if not any(turning):
        return _as_configured(experts)(experts, hidden_states, top_k_index, top_k_weights)
    name = implementation_of(experts)
    if name not in IMPLEMENTATIONS:
        raise UnsupportedLayer(str(refusal(experts, None)))
    way = _WAYS[name](experts, hidden_states, top_k_index, top_k_weights)
    y = _turned(way.linear(hidden_states[way.pairs.tokens], before), before, turning[0], way.pairs)
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = _turned(way.linear(y, after), after, turning[1], way.pairs)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    return way.joined(y)


def _turns(experts: nn.Module, projection: Projection) -> list[Any]:
    own = [experts._modules.get(name) for name in (ExpertSite(projection, kind).name for kind in ("each", "shared"))]
    held = experts.__dict__.get(_HELD, {}).get(projection.name, ())
    return [*held, *(module for module in own if module is not None)]


def _turned(y: Tensor, projection: Projection, turning: list[Any], pairs: Pairs) -> Tensor:
    if not turning:
        return y
    y = projection.in_order(y)
    for turn in turning:
        y = turn.of(y, lambda: True, pairs)
    return projection.as_stored(y)


def _unfolded(chain: Chain, num_rotations: int) -> Chain:
    tables = []
    for table in chain:
        direct, cross = (vector.view(len(vector) * num_rotations, -1) for vector in (table.direct, table.cross))
        sizes = table.group_sizes
        tables.append(
            table_of(direct, cross, [sizes] if isinstance(sizes, int) else sizes.repeat_interleave(num_rotations))
        )
    return tuple(tables)


def _as_configured(experts: Any) -> Callable[..., Tensor]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = experts.config.adapted._experts_implementation
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, type(experts).forward.__wrapped__)


class _Eager:
    """Expert by expert, each given its tokens in the order in which it is their first choice, their second, and so on."""

    def __init__(self, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        of_pair, order = index.t().flatten().sort(stable=True)
        self.pairs = Pairs(hidden, order % len(hidden), of_pair)
        self._weights = weights.t().flatten()[order]
        self._counts = of_pair.bincount(minlength=projections(experts)[0].num_experts).tolist()

    def linear(self, rows: Tensor, projection: Projection) -> Tensor:
        """``W x + b`` of rows ``[P, in]``, each by its expert."""
        weight, bias = projection.weight, projection.bias
        parts = []
        for number, part in enumerate(rows.split(self._counts)):
            if len(part):
                y = part @ weight[number] if projection.experts.is_transposed else part @ weight[number].mT
                parts.append(y if bias is None else y + bias[number])
        return torch.cat(parts) if parts else rows.new_empty(0, projection.out_features)

    def joined(self, y: Tensor) -> Tensor:
        """The weighted sum over the experts of each token."""
        out = torch.zeros_like(self.pairs.hidden)
        return out.index_add_(0, self.pairs.tokens, (y * self._weights.unsqueeze(-1)).to(out.dtype))


class _Batched:
    """A product for each pair, with the weight of its expert."""

    def __init__(self, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        tokens = torch.arange(len(hidden), device=hidden.device).repeat_interleave(index.shape[-1])
        self.pairs = Pairs(hidden, tokens, index.flatten())
        self._weights = weights

    def linear(self, rows: Tensor, projection: Projection) -> Tensor:
        """As that of `_Eager`."""
        from transformers.integrations import moe

        chosen, bias = self.pairs.experts, projection.bias
        weight = projection.weight[chosen]
        is_transposed = projection.experts.is_transposed
        return moe._batched_linear(rows, weight, None if bias is None else bias[chosen], is_transposed)

    def joined(self, y: Tensor) -> Tensor:
        """As that of `_Eager`."""
        return _summed(y * self._weights.flatten().unsqueeze(-1), self.pairs.hidden, self._weights.shape[-1])


class _Grouped:
    """The pairs sorted by expert, in one product for all experts."""

    def __init__(self, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        of_pair, self._order = index.flatten().sort(stable=True)
        self.pairs = Pairs(hidden, self._order // index.shape[-1], of_pair)
        self._weights, self._num_choices = weights.flatten()[self._order], index.shape[-1]
        each = torch.arange(projections(experts)[0].num_experts, device=hidden.device)
        self._ends = torch.searchsorted(of_pair, each, right=True, out_int32=True)

    def linear(self, rows: Tensor, projection: Projection) -> Tensor:
        """As that of `_Eager`."""
        from transformers.integrations import moe

        bias = None if projection.bias is None else projection.bias[self.pairs.experts]
        return moe._grouped_linear(rows, projection.weight, self._ends, bias, projection.experts.is_transposed)

    def joined(self, y: Tensor) -> Tensor:
        """As that of `_Eager`."""
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(len(back), device=back.device)
        return _summed((y * self._weights.unsqueeze(-1))[back], self.pairs.hidden, self._num_choices)


def _summed(of_pairs: Tensor, hidden: Tensor, num_choices: int) -> Tensor:
    """``[N K, H]``, the pairs of a token after one another, as ``[N, H]``."""
    return of_pairs.view(len(hidden), num_choices, hidden.shape[-1]).sum(dim=1).to(hidden.dtype)


_WAYS: dict[str, Any] = {"eager": _Eager, "batched_mm": _Batched, "grouped_mm": _Grouped}
