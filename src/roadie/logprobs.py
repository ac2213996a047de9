"""The logprobs of chosen tokens, and their gradient, without a second tensor of the vocabulary's width that lives on.

    lp = l[target] - ln sum exp l            d lp / d l = onehot(target) - softmax(l)

For backward the logits are kept as they are, and one number a token.

Legend: n tokens, K targets of each, V vocabulary, H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """ln p of the targets ``[n, K]``, float32 or wider; logits: ``[n, V]`` of any floating dtype; targets: int64 ``[n, K]``."""
    found: Tensor = _TargetLogprobs.apply(logits, targets)
    return found


def hidden_logprobs(
    hidden: Tensor, head: Callable[[Tensor, slice], Tensor], targets: Tensor, most_tokens: int
) -> Tensor:
    """As `target_logprobs`, of hidden states ``[n, H]``, of which the logits of at most `most_tokens` are held at a time.

    head: hidden states, and which of the n tokens they are, to logits. Where n is more than that, and a gradient is wanted, the
    logits are computed a second time in backward.
    """
    if len(hidden) <= most_tokens:
        return target_logprobs(head(hidden, slice(0, len(hidden))), targets)

    def of(part: Tensor, place: slice) -> Tensor:
        return target_logprobs(head(part, place), targets[place])

    places = [slice(begin, min(begin + most_tokens, len(hidden))) for begin in range(0, len(hidden), most_tokens)]
    return torch.cat(
        [
            checkpoint(of, hidden[place], place, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else of(hidden[place], place)
            for place in places
        ]
    )


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        total = wide.logsumexp(dim=-1, keepdim=True)
        ctx.save_for_backward(logits, total, targets)
        return wide.gather(-1, targets) - total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, total, targets = ctx.saved_tensors
        grad = grad.to(total.dtype)
        into = torch.sub(logits, total).exp_().mul_(-grad.sum(dim=-1, keepdim=True))
        return into.scatter_add_(-1, targets, grad).to(logits.dtype), None
