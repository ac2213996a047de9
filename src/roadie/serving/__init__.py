"""Serving: one base model, many adapters, each request its own or its own blend, all in one batch.

`engine` is the contract; `continuous_batching` fulfils it with transformers' paged attention:

    registry = Registry.open("adapters")                 # roadie.serving.registry: a folder of adapters and its state
    engine = ContinuousBatchingEngine(model, tokenizer, registry, EngineSettings(num_slots=64))
    engine.start()
"""

from __future__ import annotations

from roadie.serving.engine import (
    AdapterState,
    AdapterStatus,
    AdapterWish,
    Engine,
    EngineLimits,
    EngineSettings,
    FinishReason,
    GenerationRequest,
    OnOutput,
    Output,
    Sampling,
    Statistics,
    TokenLogprob,
    Unload,
    Usage,
)

__all__ = [
    "AdapterState",
    "AdapterStatus",
    "AdapterWish",
    "Engine",
    "EngineLimits",
    "EngineSettings",
    "FinishReason",
    "GenerationRequest",
    "OnOutput",
    "Output",
    "Sampling",
    "Statistics",
    "TokenLogprob",
    "Unload",
    "Usage",
]
