"""Several examples in one row, none of which sees another: fewer rows, and little padding.

A row of at most ``length`` tokens holds examples one after the other. Their positions start from 0 again, by which
transformers knows where one ends (it makes attention stay inside each), and the first token of each, which nothing before
it predicts, is not learnt. The losses are those of the same examples in rows of their own, up to rounding.

Whether a model keeps examples apart is seen, not believed: `check_packable`.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch

from roadie.errors import ConfigError
from roadie.training.encoding import IGNORED, Example


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """Rows of at most `length` tokens; each example, longest first, goes into the fullest row that has room for it.

    The rows are in the order of the first example that each holds.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row that is not full: tokens left, its number; sorted
    for number in sorted(range(len(examples)), key=lambda number: -len(examples[number].input_ids)):
        size = len(examples[number].input_ids)
        found = bisect_left(room, (size, -1))
        left, row = room.pop(found) if found < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        if left - size >= 2:  # no example is shorter
            insort(room, (left - size, row))
    return [_joined([examples[number] for number in sorted(row)]) for row in sorted(map(sorted, rows))]


def _joined(examples: Sequence[Example]) -> Example:
    starts, at = [], 0
    for example in examples:
        starts.append(at)
        at += len(example.input_ids)
    return Example(
        tuple(token for example in examples for token in example.input_ids),
        tuple(label for example in examples for label in (IGNORED, *example.labels[1:])),
        tuple(starts),
    )


def check_packable(model: Any) -> None:
    """Raise `ConfigError` unless examples in one row of `model`, a causal language model, stay apart.

    Two are laid into a row, and the gradient of the second one's logits with respect to the first one's embeddings is
    taken: it is exactly 0 where nothing of the first reaches the second, whatever the dtype and the way to compute.
    """
    config = model.config
    refused = f"got packing for {config.model_type}"
    advice = "wanted a model that keeps the examples of a row apart; train without packing (leave out --packing)"
    if "position_ids" not in inspect.signature(_base(model).forward).parameters:
        raise ConfigError(
            f"{refused}, which takes no positions (position_ids), so that no example could start at 0; {advice}"
        )
    if _leak(model):
        raise ConfigError(f"{refused}, in which an example sees the one before it in its row; {advice}")


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _leak(model: Any) -> bool:
    """Whether anything of the first of two examples in a row reaches the logits of the second."""
    half = 4
    embeddings: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    table = model.get_input_embeddings()
    device = table.weight.device
    ids = (torch.arange(2 * half, device=device) % model.config.get_text_config().vocab_size)[None]
    positions = (torch.arange(2 * half, device=device) % half)[None]
    was_training = model.training
    model.eval()
    hook = table.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits[0, half:].float().square().sum(), embeddings[-1])
    finally:
        hook.remove()
        model.train(was_training)
    return bool((gradient[0, :half] != 0).any())
