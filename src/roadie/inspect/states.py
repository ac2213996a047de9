"""How far a change of the weights moves a model's hidden states: in length, and in direction (Liao & Monz 2024, section 3.1).

For a hidden state x0 of the model as it was, and x of the model as it is, at the same token and layer:

    dM = | ||x|| - ||x0|| | / ||x0||          the change of length, relative
    dD = cos(x, x0)                           the change of direction: 1 is none

Shapes: ``S`` places at which states are read (a transformers model: embeddings, then each block, the last one after the
final norm), ``T`` tokens, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roadie.errors import AdapterError

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class PlaceChange:
    """The change at one place, over all tokens: means as in the paper, and the 10, 50 and 90 % quantiles."""

    place: int
    length: float
    direction: float
    length_quantiles: tuple[float, float, float]
    direction_quantiles: tuple[float, float, float]


@dataclass(frozen=True)
class StateChange:
    """How far `name` moves the hidden states on some text: a `PlaceChange` a place; tokens: how many states a place."""

    name: str
    tokens: int
    places: tuple[PlaceChange, ...]


def change_of_states(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """dM and dD of each hidden state; before, after: ``[..., H]``, any floating dtype; both results ``[...]`` float64.

    A state whose length was 0 has no direction: dM is NaN and so is dD.
    """
    if before.shape != after.shape:
        raise AdapterError(
            f"got hidden states {tuple(before.shape)} before and {tuple(after.shape)} after; wanted equal shapes; use models "
            "of one architecture"
        )
    x0, x = before.double(), after.double()
    length0, length = torch.linalg.vector_norm(x0, dim=-1), torch.linalg.vector_norm(x, dim=-1)
    known = length0 > 0
    relative = torch.where(known, (length - length0).abs() / length0, torch.nan)
    cosine = (x * x0).sum(-1) / (length * length0)
    return relative, torch.where(known, cosine.clamp(-1, 1), torch.nan)


def summarise_states(name: str, parts: Sequence[tuple[Tensor, Tensor]]) -> StateChange:
    """The `StateChange` of what `change_of_states` gave for some texts: pairs of ``[S, T]``, one pair or more.

    Raises `AdapterError` where no state is a number: a model that overflowed.
    """
    lengths, directions = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    places = tuple(_place(name, number, *each) for number, each in enumerate(zip(lengths, directions, strict=True)))
    return StateChange(name, lengths.shape[1], places)


def _place(name: str, number: int, lengths: Tensor, directions: Tensor) -> PlaceChange:
    known = torch.isfinite(lengths) & torch.isfinite(directions)
    if not bool(known.any()):
        raise AdapterError(
            f"{name}: got hidden states at place {number} that are 0 or not finite; wanted numbers; check the model and its dtype"
        )
    lengths, directions = lengths[known], directions[known]
    at = torch.tensor(QUANTILES, dtype=lengths.dtype)
    length_quantiles, direction_quantiles = (tuple(torch.quantile(v, at).tolist()) for v in (lengths, directions))
    return PlaceChange(
        number,
        float(lengths.mean()),
        float(directions.mean()),
        length_quantiles,
        direction_quantiles,
    )
