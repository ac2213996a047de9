"""The output embeddings of a causal language model, taken apart from its body: logits of chosen tokens, and of no others.

The body runs with the output embeddings given nothing; what they would have been given is kept, and logits are made of it later,
some tokens at a time. A model that does more than its output embeddings do (a soft cap, a scale) is found out when the engine
is made; for those, one token more goes through the model for each time, whose hidden state is replaced by the chosen ones.

Legend: B rows, T tokens, H hidden features, V vocabulary, n tokens that are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from roadie.errors import ConfigError


class Head:
    """The output embeddings of `model`; raises `ConfigError` where it has none.

    layer: the module; is_all: whether it is all that comes after the body.
    """

    def __init__(self, model: Any) -> None:
        layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(layer, nn.Module):
            raise ConfigError(
                f"got a {type(model).__name__} without output embeddings; wanted a causal language model, such as those of "
                "AutoModelForCausalLM"
            )
        self.layer: nn.Module = layer
        self._model = model
        self._some = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        self.is_all = self._is_all()

    def hidden(self, input_ids: Tensor) -> Tensor:
        """What the output embeddings would be given ``[B, T, H]``; input_ids: ``[B, T]``, padded on the right."""
        kept: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            kept.append(hidden)
            return hidden[:, :0]

        with self._given(keep):
            self._model(input_ids=input_ids, use_cache=False)
        return kept[-1]  # the model may have been run on one row first, to see where rows lie (`roadie.sites.layout`)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states ``[n, H]``: ``[n, V]``, as the model gives them."""
        if self.is_all:
            found: Tensor = self.layer(hidden.unsqueeze(0))[0]
            return found
        return self._through_model(hidden)

    def _through_model(self, hidden: Tensor) -> Tensor:
        with self._given(lambda _: hidden.unsqueeze(0)):
            found: Tensor = self._model(input_ids=self._some[:, :1], use_cache=False).logits[0]
        return found

    @torch.no_grad()
    def _is_all(self) -> bool:
        hidden = self.hidden(self._some)[0]
        hidden = torch.linspace(-8, 8, hidden.numel()).to(hidden).view_as(hidden)  # large enough for a cap to be seen
        return torch.equal(self.layer(hidden.unsqueeze(0))[0].float(), self._through_model(hidden).float())

    @contextmanager
    def _given(self, change: Any) -> Iterator[None]:
        """Within the block the output embeddings are given what `change` makes of their input."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return change(inputs[0]), *inputs[1:]

        handle = self.layer.register_forward_pre_hook(hook, prepend=True)
        try:
            yield
        finally:
            handle.remove()
