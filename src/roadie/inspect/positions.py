"""Where a layer is: its depth and its kind, read off module paths alone.

model.layers.3.self_attn.q_proj      depth 3, kind "q_proj"
transformer.h.3.attn.c_proj          depth 3, kind "attn.c_proj", because there is "mlp.c_proj" too
encoder.block.3.layer.0.SelfAttention.q, decoder.block.3.layer.0.SelfAttention.q     kinds that begin "encoder." and "decoder."
model.layers.3.mlp.experts.7.up_proj depth 3, kind "up_proj": the experts of a layer have one position
lm_head                              no depth
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_USUAL = (
    *("c_attn", "qkv_proj", "query_key_value", "q_proj", "query", "q", "k_proj", "key", "k", "v_proj", "value", "v"),
    *("o_proj", "out_proj", "o", "c_proj", "dense", "gate_proj", "gate_up_proj", "up_proj", "c_fc", "fc1"),
    *("wi_0", "wi_1", "wi", "down_proj", "fc2", "wo", "lm_head"),
)
"""The order in which a layer of a transformer uses its modules; files have them by the alphabet."""


@dataclass(frozen=True)
class Position:
    """depth: the first whole number in the path, None where there is none; kind: what the layer is called."""

    depth: int | None
    kind: str


def positions_of(paths: Iterable[str]) -> dict[str, Position]:
    """The position of each path; kinds are as short as they can be while different modules have different kinds."""
    words_of = {path: tuple(part for part in path.split(".") if not part.isdigit()) or (path,) for path in paths}
    label_of = {words: _label(words, set(words_of.values())) for words in dict.fromkeys(words_of.values())}
    return {path: Position(_depth(path), label_of[words]) for path, words in words_of.items()}


def in_order(kinds: Iterable[str]) -> list[str]:
    """Each kind once, in the order of use where it is known, else by name."""
    return sorted(set(kinds), key=lambda kind: (*_rank(kind), kind))


def _rank(kind: str) -> tuple[str, int]:
    parent, _, last = kind.rpartition(".")
    return parent, _USUAL.index(last) if last in _USUAL else len(_USUAL)


def _depth(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _label(words: tuple[str, ...], all_words: set[tuple[str, ...]]) -> str:
    """The shortest end of `words` that no others have; with the first word alone where only the beginning differs."""
    for length in range(1, len(words) + 1):
        alike = {other for other in all_words if other[-length:] == words[-length:]}
        if len(alike) == 1:
            return ".".join(words[-length:])
        if len({other[0] for other in alike}) == len(alike):
            return ".".join((words[0], *words[-length:]))
    return ".".join(words)
