"""What adding an adapter may change of a model, noted so that it can be put back: references and flags, no values of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Snapshot:
    """Module by module: attributes, children, parameters, buffers, hooks and the adapters' books; and the model's config."""

    contents: list[tuple[Any, Any]]  # (a live dictionary or list, what it held)
    trainable: list[tuple[nn.Parameter, bool]]

    @classmethod
    def of(cls, model: nn.Module, *others: dict[str, Any]) -> Snapshot:
        """Of a model, and of other dictionaries with the lists that they hold."""
        live: list[Any] = [*others, *(value for other in others for value in other.values() if isinstance(value, list))]
        for module in model.modules():
            live += [module.__dict__, *(value for value in module.__dict__.values() if isinstance(value, dict))]
        live.append(getattr(getattr(model, "config", None), "__dict__", {}))
        return cls([(part, part.copy()) for part in live], [(p, p.requires_grad) for p in model.parameters()])

    def restore(self) -> None:
        for part, before in self.contents:
            part.clear()
            part.extend(before) if isinstance(part, list) else part.update(before)
        self.restore_trainable()

    def restore_trainable(self) -> None:
        for parameter, trainable in self.trainable:
            parameter.requires_grad_(trainable)


@contextmanager
def undone_if_raised(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` if the block raises."""
    try:
        yield
    except BaseException:
        undo()
        raise
