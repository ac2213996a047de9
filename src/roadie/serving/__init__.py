"""Serving: one base model, many adapters, each request its own or its own blend, all in one batch.

`engine` is the contract; `batch_engine` fulfils it with transformers' continuous batching:

    registry = Registry.open("adapters")    # a folder of adapters, and what is known of them
    engine = ContinuousBatchingEngine(model, tokenizer, registry, EngineSettings(num_slots=64))
    engine.start()
"""

from __future__ import annotations

from roadie.serving.batch_engine import ContinuousBatchingEngine
from roadie.serving.engine import (
    AdapterState,
    AdapterStatus,
    AdapterWish,
    Engine,
    EngineLimits,
    EngineSettings,
    FinishReason,
    GenerationRequest,
    OnDisk,
    OnOutput,
    Output,
    Sampling,
    Scoring,
    Statistics,
    TokenLogprob,
    Unload,
    Usage,
)
from roadie.serving.registry import Registry
from roadie.serving.streams import stream

__all__ = [
    "AdapterState",
    "AdapterStatus",
    "AdapterWish",
    "ContinuousBatchingEngine",
    "Engine",
    "EngineLimits",
    "EngineSettings",
    "FinishReason",
    "GenerationRequest",
    "OnDisk",
    "OnOutput",
    "Output",
    "Registry",
    "Sampling",
    "Scoring",
    "Statistics",
    "TokenLogprob",
    "Unload",
    "Usage",
    "stream",
]
