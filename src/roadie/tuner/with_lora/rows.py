"""Which LoRA adapter each row of a batch uses, in a model with RoAd and LoRA, and for how long.

Legend: B rows of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from roadie.bank.blends import BASE
from roadie.bank.checkpointing import checkpoints_keep_rows
from roadie.bank.layout import Choice, calls_noted, can_be_turned_off
from roadie.errors import RoutingError


class LoraChoice:
    """An adapter's name for each of B rows, None for no LoRA; expansion: how many consecutive rows generation makes of one."""

    def __init__(self, names: Sequence[str | None], expansion: int = 1) -> None:
        self.names = tuple(names)
        self.rows = Choice(torch.arange(len(self.names)), expansion)

    def places(self, x: Tensor, site: nn.Module) -> dict[str | None, list[int]]:
        """What x ``[B, ...]`` or ``[B T, in]``, the input of the linear layer `site`, has in front, by the adapter it uses."""
        count = len(self.rows.placed(x, site))
        places: dict[str | None, list[int]] = {}
        for place in range(count):
            places.setdefault(self.names[place * len(self.names) // count], []).append(place)
        return places


class LoraRouting:
    """The choice in force, shared by the LoRA layers of one model; None: all rows use the active adapters."""

    def __init__(self) -> None:
        self.choice: LoraChoice | None = None

    @contextmanager
    def in_force(self, choice: LoraChoice | None) -> Iterator[None]:
        """Within the block the choice holds; None: nobody chose."""
        before, self.choice = self.choice, choice
        try:
            yield
        finally:
            self.choice = before

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraRouting:
        copy = memo[id(self)] = LoraRouting()
        return copy


@contextmanager
def lora_rows(model: nn.Module, names: Sequence[str | None], *, expansion: int = 1) -> Iterator[None]:
    """Within the block, row b of every batch uses the LoRA adapter ``names[b]``, in inference and in training.

    model: what `add_lora` gave. names: B names; None or "__base__": no LoRA in this row. expansion: how many consecutive rows
    generation makes of one (beams, returned sequences). Which RoAd adapter a row uses is chosen beside it, by `roadie.rows`
    or by `adapter_names`. Raises `RoutingError` for unknown names, and where LoRA is merged.
    """
    layers = [module for module in model.modules() if isinstance(getattr(module, "lora_routing", None), LoraRouting)]
    choice = LoraChoice(tuple(None if name == BASE else name for name in _checked(layers, names)), expansion)
    routing = layers[0].lora_routing
    assert isinstance(routing, LoraRouting)
    with ExitStack() as stack:
        stack.enter_context(calls_noted(model, lambda: None if routing.choice is None else routing.choice.rows))
        stack.enter_context(can_be_turned_off(lambda: routing.in_force(None)))
        stack.enter_context(routing.in_force(choice))
        if torch.is_grad_enabled():
            stack.enter_context(checkpoints_keep_rows(model, lambda: routing.in_force(choice)))
        yield


def _checked(layers: Sequence[Any], names: Sequence[str | None]) -> Sequence[str | None]:
    if isinstance(names, str):
        raise RoutingError(f"got {names!r}; wanted a sequence with one LoRA adapter for each row")
    known = {name for layer in layers for name in layer.lora_A}
    unknown = sorted({repr(name) for name in names if name is not None and name != BASE and name not in known})
    if unknown or not layers:
        raise RoutingError(
            f"got LoRA adapter(s) {', '.join(unknown) or 'of a model without LoRA'}; wanted some of {sorted(known)}, or None; "
            "add them with add_lora first"
        )
    if any(layer.merged for layer in layers):
        raise RoutingError(
            "got rows of LoRA adapters while LoRA is merged; wanted it unmerged; call unmerge_adapter first"
        )
    return names
