"""One step of decoding against a static cache, repeatable and at fixed addresses, so that a CUDA graph can hold it.

Legend: B rows, T tokens that are in the cache already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache, __version__
from transformers.cache_utils import StaticLayer

from benchmarks.harness import Run

# Older transformers do not keep the length in the cache, as a tensor that can be set back.
CAN_STEP_BACK = isinstance(getattr(StaticLayer(max_cache_len=1), "cumulative_length", None), Tensor)


def static_step(model: Any, rows: int, context: int, **arguments: Any) -> Run:
    """A forward over one token a row with `context` tokens in the cache, which is as long again afterwards.

    arguments: go to the model (adapter_names). Positions and mask are given, not derived, since deriving them may ask the
    device how long the cache is, which a graph cannot. Raises RuntimeError for transformers that are too old for it.
    """
    if not CAN_STEP_BACK:
        raise RuntimeError(
            f"got transformers {__version__}, whose StaticLayer has no cumulative_length; try constraints.txt"
        )
    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=context + 1)
    token_B1 = torch.ones(rows, 1, dtype=torch.long, device=device)
    position_B1 = torch.full((rows, 1), context, dtype=torch.long, device=device)
    mask = torch.ones(rows, 1, 1, context + 1, dtype=torch.bool, device=device)
    with torch.no_grad():
        model(
            input_ids=token_B1.expand(rows, context),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **arguments,
        )

    lengths = [layer.cumulative_length for layer in cache.layers]

    def once() -> Tensor:
        with torch.no_grad():
            inputs = {"input_ids": token_B1, "position_ids": position_B1, "attention_mask": mask}
            logits = model(**inputs, past_key_values=cache, use_cache=True, **arguments).logits
            torch._foreach_sub_(lengths, 1)
        return logits

    return once


def captured(run: Run) -> Run:
    """`run` as a CUDA graph: the same kernels on the same memory, without the host between them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels and workspaces in the first calls
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
