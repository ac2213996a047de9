"""A request while it is active: what it asked for, what it has had, and what to tell it next."""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable
from dataclasses import replace
from typing import Any

from roadie.serving.engine import FinishReason, GenerationRequest, OnOutput, Output, TokenLogprob, Usage
from roadie.serving.grammars import Progress
from roadie.serving.leases import Key, Lease, names_of
from roadie.serving.sampling import Chosen, RowSampler
from roadie.serving.scoring import PromptScorer
from roadie.serving.text import TextStream


class ActiveRequest:
    """One request from its submission to its last output; the engine's loop is its only writer."""

    def __init__(
        self,
        request: GenerationRequest,
        key: Key,
        on_output: OnOutput,
        tokenizer: Any,
        eos_ids: Collection[int],
        progress: Progress | None = None,
    ) -> None:
        rules = request.sampling
        self.request, self.key, self.on_output = request, key, on_output
        self.lease: Lease | None = None
        self.num_generated = 0
        self.num_cached = 0
        self.is_cancelled = False
        self.finish: FinishReason | None = None
        self.submitted_s, self.started_s = time.monotonic(), 0.0
        self._ends = frozenset(rules.stop_token_ids) | (frozenset() if rules.ignore_eos else frozenset(eos_ids))
        self.sampler = RowSampler(rules, request.prompt_ids, self._ends, progress)
        self._progress = progress
        self.scorer = PromptScorer(request.prompt_ids, request.scoring, reads_all=rules.max_tokens > 0)
        self._text = (
            None
            if tokenizer is None
            else TextStream(
                tokenizer,
                request.prompt_ids,
                rules.stop,
                include_stop=rules.include_stop,
                skip_special=rules.skip_special_tokens,
                min_tokens=rules.min_tokens,
            )
        )

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def tenant(self) -> str:
        """Who is charged."""
        return self.request.tenant

    @property
    def flow(self) -> Hashable:
        """What it shares the tenant's turn with: the adapter, or blend."""
        return self.key

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters it uses."""
        return names_of(self.key)

    @property
    def most_tokens(self) -> int:
        """Tokens of the prompt, and all that may be generated."""
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.request.sampling.max_tokens - self.num_generated

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(len(self.request.prompt_ids), self.num_generated, self.num_cached)

    def start(self, lease: Lease) -> None:
        """It has a slot, and joins the batch."""
        self.lease, self.started_s = lease, time.monotonic()

    def advance(self, chosen: Chosen) -> Output:
        """Take a token in, which is left alone where none is wanted; what to tell of it. Sets `finish` with the last one."""
        scores = self.scorer.logprobs if self.num_generated == 0 else ()
        if self.num_remaining == 0:
            return replace(self.last(FinishReason.LENGTH), prompt_logprobs=scores)
        if self._progress is not None and self._progress.failure is not None:
            return self.last(FinishReason.FAILED, self._progress.failure)
        self.num_generated += 1
        text = self._shown(chosen.token_id)
        if self.finish is None:
            self.finish = self._end_after_token()
            text += self._text.end() if self._text is not None and self.finish is not None else ""
        logprobs: tuple[TokenLogprob, ...] = () if chosen.logprob is None else (chosen.logprob,)
        usage = self.usage if self.finish is not None else None
        return Output(self.id, (chosen.token_id,), text, logprobs, self.finish, usage, prompt_logprobs=scores)

    def _end_after_token(self) -> FinishReason | None:
        """Whether a token that ends nothing by itself was the last."""
        if self._progress is not None and self._progress.is_over:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_remaining <= 0 else None

    def _shown(self, token_id: int) -> str:
        if token_id in self._ends:
            self.finish = FinishReason.STOP
            return self._text.end() if self._text is not None else ""
        if self._text is None:
            return ""
        text, is_stopped = self._text.push(token_id)
        if is_stopped:
            self.finish = FinishReason.STOP
        return text

    def last(self, finish: FinishReason, error: Exception | None = None) -> Output:
        """The last output of a request that ends without a token."""
        self.finish = finish
        text = self._text.end() if self._text is not None and self.num_generated else ""
        return Output(self.id, text=text, finish=finish, usage=self.usage, error=error)
