"""Activation checkpointing runs a block again in backward, when `rows` is over: it gets back the rows it had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

InForce = Callable[[], AbstractContextManager[None]]


@contextmanager
def checkpoints_keep_rows(model: nn.Module, in_force: InForce) -> Iterator[None]:
    """Within the block, what transformers checkpoints in `model` runs within `in_force()`, also when it runs again."""
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = []
    for module in model.modules():
        original = module.__dict__.get("_gradient_checkpointing_func")
        if callable(original) and getattr(module, "gradient_checkpointing", False):
            replaced.append((module, original))
            module._gradient_checkpointing_func = _routed(original, in_force)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, original in replaced:
            module._gradient_checkpointing_func = original  # type: ignore[assignment]


def _routed(original: Callable[..., Any], in_force: InForce) -> Callable[..., Any]:
    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def routed(*inputs: Any, **named: Any) -> Any:
            with in_force():
                return function(*inputs, **named)

        return original(routed, *args, **kwargs)

    return checkpoint
