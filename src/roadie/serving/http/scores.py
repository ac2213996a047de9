"""Logprobs of prompts as callers see them: OpenAI's `echo` with `logprobs`, and vLLM's `prompt_logprobs`.

The first token has none, since nothing precedes it: null.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from roadie.serving.engine import TokenLogprob
from roadie.serving.http.pieces import Offsets, Pieces


def logprobs_as_json(logprobs: Sequence[TokenLogprob], offsets: Offsets, pieces: Pieces) -> dict[str, list[Any]]:
    """Tokens, their logprobs, the most likely ones, and where each begins, as completions have them."""
    return {
        "tokens": [pieces.key_of(entry.token_id) for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [pieces.keyed(entry) for entry in logprobs],
        "text_offset": [offsets.next(entry.token_id) for entry in logprobs],
    }


def echoed_as_json(
    text: str, token_ids: Sequence[int], scored: Sequence[TokenLogprob], num_top: int, pieces: Pieces
) -> dict[str, list[Any]]:
    """The same of a prompt, whose text is echoed. scored: all its tokens but the first, with num_top likely ones or more."""
    first = TokenLogprob(token_ids[0], 0.0)
    told = [first, *(replace(entry, top=entry.top[:num_top]) for entry in scored)]
    found = logprobs_as_json(told, prompt_offsets(text, token_ids, pieces), pieces)
    found["token_logprobs"][0] = found["top_logprobs"][0] = None
    return found


def prompt_offsets(text: str, token_ids: Sequence[int], pieces: Pieces) -> Offsets:
    """Where tokens begin in the text that they are made of, or that is made of them.

    Special tokens that are not in it were put around it. Some tokenizers put a space before a text.
    """
    skipped = frozenset(token for token in pieces.special if pieces.text_of(token) not in text)
    first = next((token for token in token_ids if token not in skipped), None)
    has_space_before = first is not None and pieces.text_of(first).startswith(" ") and not text.startswith(" ")
    return Offsets(pieces, -1 if has_space_before else 0, skipped=skipped)


def prompt_logprobs_as_json(
    scored: Sequence[TokenLogprob], num_top: int, pieces: Pieces
) -> list[dict[str, dict[str, Any]] | None]:
    """By id, for each token of a prompt: itself and the likeliest."""
    return [None, *(_by_id(entry, num_top, pieces) for entry in scored)]


def _by_id(entry: TokenLogprob, num_top: int, pieces: Pieces) -> dict[str, dict[str, Any]]:
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:num_top], 1)]
    return {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": pieces.text_of(token_id)}
        for token_id, logprob, rank in ((entry.token_id, entry.logprob, entry.rank), *ranked)
    }
