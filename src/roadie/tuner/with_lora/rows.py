"""Which LoRA adapter each row of a batch uses, in a model with RoAd and LoRA, and for how long.

Legend: B rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from roadie.bank.blends import BASE
from roadie.errors import RoutingError
from roadie.sites.rows import Choice, Routing


class LoraChoice(Choice):
    """An adapter's name for each of B rows, None for no LoRA; expansion: how many consecutive rows generation makes of one."""

    def __init__(self, model: nn.Module, names: Sequence[str | None], expansion: int = 1) -> None:
        super().__init__(torch.arange(len(names)), expansion, model=model)
        self.names = tuple(names)

    def by_adapter(self, x: Tensor, site: nn.Module) -> dict[str | None, list[int]]:
        """What x ``[B, ...]`` or ``[B T, in]``, the input of the linear layer `site`, has in front, by adapter: indices."""
        found: dict[str | None, list[int]] = {}
        for index, row in enumerate(self.placed_on_host(x, site).tolist()):
            found.setdefault(self.names[row], []).append(index)
        return found


def lora_rows(model: nn.Module, names: Sequence[str | None], *, expansion: int = 1) -> AbstractContextManager[Any]:
    """Within the block, row b of every batch uses the LoRA adapter ``names[b]``, in inference and in training.

    model: what `add_lora` gave. names: B names; None or "__base__": no LoRA in this row. expansion: how many consecutive rows
    generation makes of one (beams, returned sequences). Which RoAd adapter a row uses is chosen beside it, by `roadie.rows`
    or by `adapter_names`. Raises `RoutingError` for unknown names, and where LoRA is merged.
    """
    layers: list[Any] = [each for each in model.modules() if isinstance(getattr(each, "lora_routing", None), Routing)]
    choice = LoraChoice(model, [None if name == BASE else name for name in _checked(layers, names)], expansion)
    return layers[0].lora_routing.chosen(choice, model)


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
