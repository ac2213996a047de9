"""The next token of each request, by its own rules.

    logits -> + bias -> repetition penalty -> - presence and frequency -> what may come (min_tokens, grammar) -> greedy: argmax
                                     else: / temperature -> top-k, top-p, min-p -> the token at which the cumulated
                                           probability passes u, uniform in [0, 1) from the request's own generator

Tokens are taken in the order of the vocabulary, so that rounding moves a draw only where u lies at a border. A request draws one
number a token and nobody else draws from its generator: its tokens do not depend on who shares the batch.

The repetition penalty divides the logits of tokens of the prompt and of what was said where they are above 0, and multiplies
them where they are below (Keskar et al., arXiv 1909.05858, as transformers and vLLM have it).

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roadie.serving.engine import Sampling, TokenLogprob
from roadie.serving.grammars import Progress


class RowSampler:
    """One request's rules, its generator, and the tokens it has had.

    ends: the tokens that would end it. progress: of an answer that is kept to a grammar, after which nothing follows.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int] = (),
        ends: Iterable[int] = (),
        progress: Progress | None = None,
    ) -> None:
        self.sampling, self.progress = sampling, progress
        self.counts: Counter[int] = Counter()
        self._prompt = dict.fromkeys(prompt_ids) if sampling.repetition_penalty != 1 else {}
        self._ends = sorted(ends)
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
            self._generator = torch.Generator().manual_seed(seed)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self._generator is None

    @property
    def changes_logits(self) -> bool:
        """Whether there are biases or penalties, or tokens that may not come, or not yet."""
        rules = self.sampling
        has_penalty = rules.presence_penalty or rules.frequency_penalty or rules.repetition_penalty != 1
        return bool(rules.logit_bias or has_penalty or self.progress or (self._ends and self._is_too_short))

    @property
    def _is_too_short(self) -> bool:
        return self.counts.total() < self.sampling.min_tokens

    def adjust(self, logits_V: Tensor) -> None:
        """Apply biases and penalties, and leave out what may not follow, in place."""
        rules = self.sampling
        _add(logits_V, rules.logit_bias)
        if rules.repetition_penalty != 1:
            ids = torch.tensor(list({**self._prompt, **self.counts}), dtype=torch.int64, device=logits_V.device)
            said = logits_V[ids]
            logits_V[ids] = torch.where(said < 0, said * rules.repetition_penalty, said / rules.repetition_penalty)
        if rules.presence_penalty or rules.frequency_penalty:
            penalties = {
                token: -(rules.presence_penalty + rules.frequency_penalty * count)
                for token, count in self.counts.items()
            }
            _add(logits_V, penalties)
        if self.progress is not None:
            logits_V.masked_fill_(~self._allowed(self.progress).to(logits_V.device), -torch.inf)
        elif self._is_too_short:
            logits_V[self._ends] = -torch.inf

    def _allowed(self, progress: Progress) -> Tensor:
        """bool ``[V]``: what the grammar allows; an end where the answer may end, unless it is too short and can go on."""
        allowed_V = progress.allowed()
        if self._is_too_short:
            longer_V = allowed_V.clone()
            longer_V[self._ends] = False
            return longer_V if longer_V.any() else allowed_V
        if progress.is_whole:
            allowed_V[self._ends] = True
        return allowed_V

    def take(self, token_id: int) -> None:
        """The token that was chosen."""
        self.counts[token_id] += 1
        if self.progress is not None and token_id not in self._ends:
            self.progress.take(token_id)

    def uniform(self) -> float:
        """The next number of this request's generator."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


@dataclass(frozen=True)
class Chosen:
    """A token, and its logprobs where they were asked for."""

    token_id: int
    logprob: TokenLogprob | None


def choose(logits_NV: Tensor, rows: Sequence[RowSampler]) -> list[Chosen]:
    """The next token of each row; logits float32, which are left as they are."""
    adjusted = _adjusted(logits_NV, rows)
    tokens = adjusted.argmax(dim=-1).tolist()
    drawn = [place for place, row in enumerate(rows) if not row.is_greedy]
    if drawn:
        picked = _drawn(adjusted[drawn], [rows[place] for place in drawn])
        for place, token in zip(drawn, picked, strict=True):
            tokens[place] = token
    for row, token in zip(rows, tokens, strict=True):
        row.take(token)
    return [
        Chosen(token, _logprob(logits, token, row.sampling.logprobs))
        for logits, token, row in zip(logits_NV, tokens, rows, strict=True)
    ]


def _adjusted(logits_NV: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    places = [place for place, row in enumerate(rows) if row.changes_logits]
    if not places:
        return logits_NV
    logits_NV = logits_NV.clone()
    for place in places:
        rows[place].adjust(logits_NV[place])
    return logits_NV


def _add(logits_V: Tensor, change: Mapping[int, float]) -> None:
    if change:
        ids = torch.tensor(list(change), dtype=torch.int64, device=logits_V.device)
        logits_V[ids] += logits_V.new_tensor(list(change.values()))


def _drawn(logits_NV: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    device = logits_NV.device
    temperature = torch.tensor([[row.sampling.temperature] for row in rows], dtype=torch.float64, device=device)
    probabilities = torch.softmax(logits_NV.double() / temperature, dim=-1)
    probabilities = _truncated(probabilities, [row.sampling for row in rows])
    cumulated = probabilities.cumsum(dim=-1)
    u = torch.tensor([[row.uniform()] for row in rows], dtype=torch.float64, device=device)
    places = torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True)[:, 0]
    return [_possible(line, place) for line, place in zip(probabilities, places.tolist(), strict=True)]


def _possible(probabilities_V: Tensor, place: int) -> int:
    """The place, or the likeliest one where rounding (or a NaN) led past the end or to an excluded token."""
    if place < len(probabilities_V) and float(probabilities_V[place]) > 0:
        return place
    return int(probabilities_V.nan_to_num().argmax())


def _truncated(probabilities_NV: Tensor, rules: Sequence[Sampling]) -> Tensor:
    """Probabilities, zero where top-k, top-p or min-p leave a token out; the likeliest always stays."""
    size = probabilities_NV.shape[-1]
    if all(rule.top_p >= 1 and rule.min_p <= 0 and not 0 < rule.top_k < size for rule in rules):
        return probabilities_NV
    top_p = probabilities_NV.new_tensor([[rule.top_p] for rule in rules])
    min_p = probabilities_NV.new_tensor([[rule.min_p] for rule in rules])
    top_k = torch.tensor([[rule.top_k or size] for rule in rules], device=probabilities_NV.device)
    ordered, order = probabilities_NV.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # what is likelier: top-p keeps tokens until it is reached
    kept = (before < top_p) | (top_p >= 1)  # rounding of the sums leaves nobody out
    kept &= ordered >= min_p * ordered[:, :1]
    kept &= torch.arange(size, device=probabilities_NV.device) < top_k
    kept[:, 0] = True
    return torch.zeros_like(probabilities_NV).scatter(-1, order, ordered * kept)


def _logprob(logits_V: Tensor, token: int, num_top: int | None) -> TokenLogprob | None:
    if num_top is None:
        return None
    logprobs = torch.log_softmax(logits_V.double(), dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = logprobs.topk(min(num_top, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
