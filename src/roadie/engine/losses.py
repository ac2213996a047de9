"""Losses by token: what a logprob is worth, as sums over tokens.

For a token with logprob lp, the advantage A and the logprob q that it was sampled with (r = exp(lp - q)), its loss is

    cross_entropy         -w lp                                           w: weights
    importance_sampling   -w r A                                          REINFORCE with a correction for the sampler
    ppo                   -w min(r A, clip(r, low, high) A)               Schulman et al. 2017, arXiv 1707.06347
    cispo                 -w sg[clip(r, low, high)] lp A                  MiniMax-M1 2025, arXiv 2506.13585
    dro                   -w (lp A - beta/2 (lp - q)^2)                   Richemond et al. 2024, arXiv 2405.19107
    gspo                  -w min(s A, clip(s, low, high) A)               Zheng et al. 2025, arXiv 2507.18071 (GSPO-token):
                          s = sg[exp(mean (lp - q))] lp' / sg[lp']        the mean over the sequence's tokens in the ratio; lp'
                                                                          is the token's own probability, for its gradient
    given                 g lp                                            g: the gradient by lp of a loss that the caller computes

with sg[] for what gets no gradient. A loss is the sum over the tokens of all rows; who wants a mean divides the weights, or the
advantages. These are the losses, and the sums, of Thinking Machines' Tinker; w is 1 where none is given.

`Terms` are what is known of a row before its logprobs are: only tokens with a term have their logits computed.

Legend: n tokens with a term, K targets of each (1, but for cross_entropy and given), R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import TypeAlias

import torch
from torch import Tensor

from roadie.errors import ConfigError

Values: TypeAlias = "Tensor | Sequence[float] | Sequence[Sequence[float]]"


class Loss(str, Enum):
    """The losses; see the module."""

    CROSS_ENTROPY = "cross_entropy"
    IMPORTANCE_SAMPLING = "importance_sampling"
    PPO = "ppo"
    CISPO = "cispo"
    DRO = "dro"
    GSPO = "gspo"
    GIVEN = "given"

    @classmethod
    def parse(cls, name: str | Loss) -> Loss:
        """The loss of this name; raises `ConfigError` for others."""
        try:
            return cls(name)
        except ValueError:
            raise ConfigError(
                f"got loss {name!r}; wanted one of {', '.join(each.value for each in cls)}; compute others yourself, and give "
                "their gradients (given)"
            ) from None


OWN_SETTINGS: Mapping[Loss, Mapping[str, float]] = {
    Loss.PPO: {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    Loss.CISPO: {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    Loss.GSPO: {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
    Loss.DRO: {"beta": 0.1},
}
"""What losses may be told, and what it is where they are not."""

_BY_WEIGHT = (Loss.CROSS_ENTROPY, Loss.GIVEN)


@dataclass(frozen=True, eq=False)
class TrainingRow:
    """One sequence: what the model reads, which token each position is to predict, and what that is worth.

    tokens: N numbers; targets: as many, token i + 1 of the text at position i as a rule; or ``[N, K]``, several for each position
    (cross_entropy, given). The others are floats in the shape of the targets, or thresholds of one loss:
    weights: of cross_entropy, and a factor of the other losses; None: 1.
    advantages, logprobs: A and q of the losses that learn from samples.
    gradients: of given: of the caller's loss by each logprob.
    sequence_ratio_mask: tokens that gspo takes the mean over (not 0); None: those with an advantage.
    clip_low_threshold, clip_high_threshold: by token, instead of those of the call.
    """

    tokens: Sequence[int] | Tensor
    targets: Sequence[int] | Sequence[Sequence[int]] | Tensor
    weights: Values | None = None
    advantages: Values | None = None
    logprobs: Values | None = None
    gradients: Values | None = None
    sequence_ratio_mask: Values | None = None
    clip_low_threshold: Values | None = None
    clip_high_threshold: Values | None = None


@dataclass(frozen=True, eq=False)
class Terms:
    """A row that is ready: tokens; positions ``[n]`` with a term; their targets int64 ``[n, K]``; values float32 ``[n, C]``.

    values: the weights ``[n, K]``, or w, A, q, low, high (beta), and whether the token is in the ratio. num_positions, is_flat:
    N, and whether the caller's targets are ``[N]``.
    """

    loss: Loss
    tokens: Tensor
    positions: Tensor
    targets: Tensor
    values: Tensor
    num_positions: int
    is_flat: bool

    @classmethod
    def of(
        cls,
        row: TrainingRow,
        loss: Loss,
        settings: Mapping[str, float] | None = None,
        vocabulary: int | None = None,
        are_all: bool = False,
    ) -> Terms:
        """What the loss makes of a row; raises `ConfigError` for a row that does not have what the loss wants, or has more.

        settings: some of `OWN_SETTINGS`; vocabulary: what tokens are below; are_all: whether tokens without weight count too.
        """
        told = _told(loss, settings)
        _check_fields(row, loss)
        tokens, targets = _whole_numbers("tokens", row.tokens), _whole_numbers("targets", row.targets)
        _check_shapes(tokens, targets, loss, vocabulary)
        if loss in _BY_WEIGHT:
            values = _weights(row, loss, targets)
            counts = (values != 0).any(dim=1)
        else:
            values = _of_samples(row, loss, targets, told)
            counts = (values[:, 0] != 0) & ((values[:, 1] != 0) | (values[:, 5] != 0) | (loss is Loss.DRO))
        positions = torch.arange(len(tokens)) if are_all else counts.nonzero().squeeze(1)
        shaped = targets.unsqueeze(1) if targets.dim() == 1 else targets
        return cls(
            loss, tokens, positions, shaped[positions], values[positions], len(tokens), is_flat=targets.dim() == 1
        )

    def spread(self, logprobs: Tensor) -> Tensor:
        """Logprobs ``[n, K]`` in the shape of the caller's targets; NaN where none was computed."""
        whole = logprobs.new_full((self.num_positions, logprobs.shape[1]), math.nan)
        whole[self.positions] = logprobs
        return whole.squeeze(1) if self.is_flat else whole


def token_losses(loss: Loss, logprobs: Tensor, values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The loss of each token ``[n]``; logprobs: ``[n, K]``; values: ``[n, C]`` of `Terms`; rows: int64 ``[n]``."""
    if loss in _BY_WEIGHT:
        worth = torch.where(values == 0, 0.0, values * logprobs).sum(dim=1)
        return worth if loss is Loss.GIVEN else -worth
    lp = logprobs[:, 0]
    weight, advantage, old, low, high, in_ratio = values.unbind(1)
    log_ratio = lp - old
    if loss is Loss.GSPO:
        mean = _means(torch.where(in_ratio != 0, log_ratio.detach(), 0.0), in_ratio, rows, num_rows)
        log_ratio = mean + lp - lp.detach()
    counts = (weight != 0) & ((advantage != 0) | (loss is Loss.DRO))  # of others no infinity is to meet a 0
    lp, log_ratio = (torch.where(counts, values, 0.0) for values in (lp, log_ratio))
    return -weight * _OBJECTIVES[loss](lp, log_ratio, advantage, low, high)


_Objective: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _clipped(ratio: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(ratio, low), high)


def _ratio(lp: Tensor, log_ratio: Tensor, advantage: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return log_ratio.exp() * advantage


def _clipped_ratio(lp: Tensor, log_ratio: Tensor, advantage: Tensor, low: Tensor, high: Tensor) -> Tensor:
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, _clipped(ratio, low, high) * advantage)


def _weighted(lp: Tensor, log_ratio: Tensor, advantage: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return _clipped(log_ratio.detach().exp(), low, high) * lp * advantage


def _quadratic(lp: Tensor, log_ratio: Tensor, advantage: Tensor, low: Tensor, beta: Tensor) -> Tensor:
    return lp * advantage - 0.5 * beta * log_ratio.square()


_OBJECTIVES: Mapping[Loss, _Objective] = {
    Loss.IMPORTANCE_SAMPLING: _ratio,
    Loss.PPO: _clipped_ratio,
    Loss.CISPO: _weighted,
    Loss.DRO: _quadratic,
    Loss.GSPO: _clipped_ratio,
}


def _means(values: Tensor, counted: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """For each token the mean of its row's values ``[n]``."""
    sums, counts = (one.new_zeros(num_rows).index_add_(0, rows, one) for one in (values, counted))
    return (sums / counts.clamp(min=1))[rows]


# What comes in.


def _told(loss: Loss, settings: Mapping[str, float] | None) -> dict[str, float]:
    own = OWN_SETTINGS.get(loss, {})
    for name, value in (settings or {}).items():
        if name not in own:
            raise ConfigError(
                f"got {name!r} for the loss {loss.value}; wanted {', '.join(own) or 'nothing'}; remove it"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ConfigError(f"got {name}={value!r}; wanted a finite number from 0")
    told = {**own, **(settings or {})}
    if told.get("clip_low_threshold", 0.0) > told.get("clip_high_threshold", 0.0):
        raise ConfigError(
            f"got clip_low_threshold={told['clip_low_threshold']} above clip_high_threshold={told['clip_high_threshold']}; "
            "wanted them the other way round"
        )
    return told


_WANTED: Mapping[Loss, tuple[str, ...]] = {
    Loss.CROSS_ENTROPY: (),
    Loss.GIVEN: ("gradients",),
    **{loss: ("advantages", "logprobs") for loss in Loss if loss not in _BY_WEIGHT},
}
_MAY: Mapping[Loss, tuple[str, ...]] = {
    **{loss: ("weights",) for loss in Loss if loss is not Loss.GIVEN},
    Loss.GIVEN: (),
    Loss.PPO: ("weights", "clip_low_threshold", "clip_high_threshold"),
    Loss.CISPO: ("weights", "clip_low_threshold", "clip_high_threshold"),
    Loss.GSPO: ("weights", "clip_low_threshold", "clip_high_threshold", "sequence_ratio_mask"),
}


def _check_fields(row: TrainingRow, loss: Loss) -> None:
    given = [each.name for each in fields(row)[2:] if getattr(row, each.name) is not None]
    missing = [name for name in _WANTED[loss] if name not in given]
    if missing:
        raise ConfigError(f"got no {', '.join(missing)} for the loss {loss.value}; add what is missing")
    others = [name for name in given if name not in (*_WANTED[loss], *_MAY[loss])]
    if others:
        raise ConfigError(f"got {', '.join(others)}, which the loss {loss.value} does not use; remove what is too much")


def _whole_numbers(name: str, values: object) -> Tensor:
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"got {name} that are no numbers in rows of equal length ({error})") from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ConfigError(f"got {name} of {found.dtype}; wanted whole numbers, the ids of tokens")
    return found.detach().to("cpu", torch.int64)


def _check_shapes(tokens: Tensor, targets: Tensor, loss: Loss, vocabulary: int | None) -> None:
    if tokens.dim() != 1 or not len(tokens):
        raise ConfigError(f"got tokens of shape {tuple(tokens.shape)}; wanted one row of at least one token")
    most = 2 if loss in _BY_WEIGHT else 1
    if not 1 <= targets.dim() <= most or len(targets) != len(tokens) or not targets.numel():
        raise ConfigError(
            f"got targets of shape {tuple(targets.shape)} for {len(tokens)} tokens and the loss {loss.value}; wanted one for each"
            f"{', or [N, K]' if most == 2 else ''}"
        )
    for name, ids in (("token", tokens), ("target", targets)):
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
            raise ConfigError(f"got {name} {lowest if lowest < 0 else highest}; wanted 0 to {(vocabulary or 1) - 1}")


def _floats(name: str, values: Values, targets: Tensor) -> Tensor:
    """float32 in the shape of the targets."""
    try:
        found = torch.as_tensor(values).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"got {name} that are no numbers in rows of equal length ({error})") from None
    if found.shape != targets.shape:
        raise ConfigError(
            f"got {name} of shape {tuple(found.shape)}; wanted {tuple(targets.shape)}, one for each target"
        )
    if not bool(torch.isfinite(found).all()):
        raise ConfigError(f"got {name} that are not finite; wanted finite numbers")
    return found


def _weights(row: TrainingRow, loss: Loss, targets: Tensor) -> Tensor:
    name, given = ("gradients", row.gradients) if loss is Loss.GIVEN else ("weights", row.weights)
    found = torch.ones(targets.shape) if given is None else _floats(name, given, targets)
    return found.unsqueeze(1) if found.dim() == 1 else found


def _of_samples(row: TrainingRow, loss: Loss, targets: Tensor, told: Mapping[str, float]) -> Tensor:
    assert row.advantages is not None
    assert row.logprobs is not None
    ones = torch.ones(targets.shape)
    weight = ones if row.weights is None else _floats("weights", row.weights, targets)
    advantages = _floats("advantages", row.advantages, targets)
    old = _floats("logprobs", row.logprobs, targets)
    limits = []
    for name, value in (
        ("clip_low_threshold", row.clip_low_threshold),
        ("clip_high_threshold", row.clip_high_threshold),
    ):
        limits.append(ones * told.get(name, 0.0) if value is None else _floats(name, value, targets))
    if loss is Loss.DRO:
        limits[1] = ones * told["beta"]
    in_ratio = torch.zeros(targets.shape)
    if loss is Loss.GSPO:
        mask = row.sequence_ratio_mask
        in_ratio = ((advantages if mask is None else _floats("sequence_ratio_mask", mask, targets)) != 0).float()
    return torch.stack((weight, advantages, old, *limits, in_ratio), dim=1)
