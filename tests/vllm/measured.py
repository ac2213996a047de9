"""What tests and benchmarks read from a running engine; functions that run in its workers take the worker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


def count_adapters_of_steps(worker: Any) -> None:
    """From now on, remember how many adapters the steps have."""
    manager = worker.model_runner.lora_manager
    worker.adapters_of_steps, apply = [], manager._apply_adapters

    def counted(lora_requests: Any) -> None:
        worker.adapters_of_steps.append(len(lora_requests))
        apply(lora_requests)

    manager._apply_adapters = counted


def most_adapters_of_a_step(worker: Any) -> int:
    """The largest number since `count_adapters_of_steps`, which ends."""
    del worker.model_runner.lora_manager._apply_adapters
    return max(worker.adapters_of_steps)


def seconds_to_apply(worker: Any, number: int, which: str) -> float:
    """What one step spends on making sure that `number` adapters are in slots, where they are all there already."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    manager = worker.model_runner.lora_manager
    active = list(manager._adapter_manager._active_adapters)[-number:]
    assert len(active) == number
    requests = {LoRARequest(f"name-{i}", i, "unread") for i in active}
    apply = type(manager)._apply_adapters if which == "ours" else LRUCacheWorkerLoRAManager._apply_adapters
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        apply(manager, requests)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def seconds_to_load(llm: Any, requests: Sequence[Any]) -> list[float]:
    """How long each adapter takes from the call until the workers have it in a slot."""
    seconds = []
    for request in requests:
        start = time.perf_counter()
        assert llm.llm_engine.add_lora(request)
        seconds.append(time.perf_counter() - start)
    return seconds


def is_identity_where_empty(worker: Any) -> bool:
    """Whether the first slot that holds no adapter holds the identity in every layer."""
    manager = worker.model_runner.lora_manager._adapter_manager
    slot = next(i for i, adapter in enumerate(manager.lora_index_to_id) if adapter is None)
    tables = [table.current[0] for module in manager.modules.values() for table in module.tables]
    assert tables
    return all((t.direct[slot] == 1).all() and (t.cross[slot] == 0).all() and t.sizes[slot] == 2 for t in tables)


def kinds_of_layers(worker: Any) -> list[str]:
    """The classes of the layers that take adapters."""
    manager = worker.model_runner.lora_manager._adapter_manager
    return sorted({type(module).__name__ for module in manager.modules.values()})


def make_room_for_the_stage_before(worker: Any) -> None:
    """What vLLM's runner for CPUs leaves out where it does not compile, as with LoRA: pipelines fail there without RoAd too."""
    from vllm.distributed import get_pp_group

    runner = worker.model_runner
    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )
