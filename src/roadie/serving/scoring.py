"""Logprobs of the tokens of a prompt, from its logits as they come, those of a step at a time.

    place                 0    1    2   ...   n-2   n-1
    its logits score   token 1    2    3   ...   n-1    what follows the prompt

    ln p(token) = logit(token) - ln sum exp logits      float32, `CHUNK` places at a time

Places before the first that is scored may be skipped: they are where a prefix is shared. Where nothing is generated, the last
token is not read at all: nobody asks what follows it.

Legend: K places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roadie.serving.engine import Scoring, TokenLogprob

CHUNK = 64
"""Places whose log-softmax is held at once, 4 bytes a token of the vocabulary each; the logits are there for a step anyway."""


class PromptScorer:
    """The scored tokens of one prompt. scoring: None where none is; reads_all: whether what follows the prompt is wanted, too."""

    def __init__(self, prompt_ids: tuple[int, ...], scoring: Scoring | None, *, reads_all: bool) -> None:
        self._prompt_ids, self._scoring = prompt_ids, scoring
        self.read_ids = prompt_ids if reads_all else prompt_ids[:-1] or prompt_ids
        self.places = _places(len(prompt_ids), scoring)
        self._found: dict[int, TokenLogprob] = {}

    def take(self, place: int, logits_KV: Tensor) -> None:
        """The logits of K of the places, one after another, from this one on; of a request that began again, once more."""
        assert self._scoring is not None
        for begin in range(place, place + len(logits_KV), CHUNK):
            chunk = logits_KV[begin - place : begin - place + CHUNK]
            tokens = self._prompt_ids[begin + 1 : begin + 1 + len(chunk)]
            self._found.update(enumerate(score(chunk, tokens, self._scoring), begin))

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of the scored tokens, in their order, once the logits of all are there."""
        return tuple(self._found[place] for place in self.places)


def _places(num_tokens: int, scoring: Scoring | None) -> range:
    if scoring is None:
        return range(0)
    last = num_tokens - 1 if scoring.last is None else scoring.last
    return range(num_tokens - 1 - last, num_tokens - 1) if last else range(0)


def score(logits_KV: Tensor, token_ids: Sequence[int], scoring: Scoring) -> list[TokenLogprob]:
    """What there is to say of these K tokens, each by its row of logits; float32 or wider."""
    logprobs_KV = torch.log_softmax(logits_KV, dim=-1, dtype=torch.promote_types(logits_KV.dtype, torch.float32))
    own_K1 = logprobs_KV.gather(-1, torch.tensor(token_ids, device=logits_KV.device)[:, None])
    ranks = ((logprobs_KV > own_K1).sum(dim=-1) + 1).tolist()
    best = logprobs_KV.topk(min(scoring.top, logprobs_KV.shape[-1]))
    others = logprobs_KV[:, list(scoring.token_ids)]
    return [
        TokenLogprob(
            token, own, tuple(zip(ids, top, strict=True)), rank, tuple(zip(scoring.token_ids, more, strict=True))
        )
        for token, own, ids, top, rank, more in zip(
            token_ids,
            own_K1[:, 0].tolist(),
            best.indices.tolist(),
            best.values.tolist(),
            ranks,
            others.tolist(),
            strict=True,
        )
    ]
