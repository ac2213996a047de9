"""The processes that hold the model: adapters from files into the slots of the layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.lora import utils as lora_utils
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase

from roadie import checkpoint
from roadie.errors import ConfigError
from roadie.vllm import layers
from roadie.vllm.limits import check_supported
from roadie.vllm.matching import layer_rotations
from roadie.vllm.settings import KEY, Settings, settings_of
from roadie.vllm.store import is_road, leave_reason

log = logging.getLogger("vllm.roadie")  # in vLLM's own log


def manager_for(vllm_config: Any, device: Any, embedding_modules: Any, **more: Any) -> LRUCacheWorkerLoRAManager:
    """What a worker of vLLM gets where it asks for a `LRUCacheWorkerLoRAManager`: ours in an engine for RoAd."""
    settings = settings_of(vllm_config.additional_config)
    kind = LoraWorkerManager if settings is None else RoadWorkerManager
    return kind(vllm_config, device, embedding_modules, **more)


class LoraWorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's own, which says what to do about RoAd adapters."""

    def _load_adapter(self, lora_request: Any) -> Any:
        if is_road(lora_request.lora_path):
            raise ConfigError(
                f"got a RoAd adapter ({lora_request.lora_path}) for a server of LoRA adapters; start the server with "
                f"--additional-config '{{\"{KEY}\": true}}'"
            )
        return super()._load_adapter(lora_request)


class RoadModelManager(LRUCacheLoRAModelManager):
    """Which adapter is in which slot; vLLM's own bookkeeping over layers that rotate."""

    settings = Settings()  # of the class that `RoadWorkerManager` makes of it

    def _create_lora_modules(self) -> None:
        """Replace the linear layers; embeddings, lm_head and experts stay vLLM's."""
        linear = {name for name, module in self.model.named_modules() if isinstance(module, LinearBase)}
        self.supported_lora_modules = sorted({name.rpartition(".")[2] for name in linear})
        with _only_rotated_layers(self.settings):
            super()._create_lora_modules()

    def _add_adapter(self, lora: Any) -> None:
        """Keep an adapter; its rotations were made when it was loaded, and need no merging."""
        self._registered_adapters[lora.id] = lora

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> Any:
        """An adapter for warming up: the identity."""
        return LoRAModel(lora_id, rank, {})


@contextmanager
def _only_rotated_layers(settings: Settings) -> Iterator[None]:
    """Within the block, vLLM makes our layers and none of its own."""
    before = lora_utils._all_lora_classes, layers.making
    lora_utils._all_lora_classes, layers.making = layers.ROTATED_LAYERS, settings
    try:
        yield
    finally:
        lora_utils._all_lora_classes, layers.making = before


class RoadWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads adapters and puts them into slots, a step at a time."""

    def __init__(self, vllm_config: Any, device: Any, embedding_modules: Any, **more: Any) -> None:
        check_supported(vllm_config)
        settings = settings_of(vllm_config.additional_config)
        if settings is not None and not vllm_config.model_config.enforce_eager:
            settings = settings.settled()
        self._manager_cls = type("RoadModelManager", (RoadModelManager,), {"settings": settings})
        super().__init__(vllm_config, device, embedding_modules, **more)

    def create_lora_manager(self, model: Any, vllm_config: Any) -> Any:
        """The model with layers that rotate; the log says so, and what their tables take."""
        adapted = super().create_lora_manager(model, vllm_config)
        tables = [table for module in self._adapter_manager.modules.values() for table in module.tables]
        log.info(
            "This worker serves RoAd adapters: %d slots in %d layers, %.1f MiB",
            self._adapter_manager.lora_slots,
            len(self._adapter_manager.modules),
            sum(table.nbytes for table in tables) / 2**20,
        )
        return adapted

    def _load_adapter(self, lora_request: Any) -> Any:
        """The adapter at ``lora_path`` as rotations of the layers; raises before anything of the engine has changed."""
        adapter = checkpoint.load(lora_request.lora_path)
        return LoRAModel(lora_request.lora_int_id, 1, layer_rotations(adapter, self._adapter_manager))

    def _apply_adapters(self, lora_requests: set[Any]) -> None:
        """Put the adapters of a step into slots: O(adapters of the step), where nothing changes a touch each.

        First all that are in a slot are marked as used, so that none of them makes room for another.
        """
        wanted = {request.lora_int_id: request for request in lora_requests if request}
        manager = self._adapter_manager
        if len(wanted) > manager.lora_slots:
            raise RuntimeError(
                f"got {len(wanted)} adapters in one step; wanted at most {manager.lora_slots} (max_loras)"
            )
        absent = [request for number, request in wanted.items() if not _touched(manager, number)]
        for request in absent:
            super().add_adapter(request)

    def add_adapter(self, lora_request: Any) -> bool:
        """Load an adapter by call; False, with the reason beside its copy, where it will not do.

        Never raises: with several workers, vLLM reads the answers up to the first that is an error, takes the others for
        answers to the next call, and the engine dies of it.
        """
        try:
            return bool(super().add_adapter(lora_request))
        except Exception as error:
            log.warning("Refused the RoAd adapter %s: %s", lora_request.lora_name, error)
            leave_reason(lora_request.lora_path, str(error))
            return False


def _touched(manager: Any, adapter_id: int) -> bool:
    """Whether an adapter is in a slot; it is then the one that was used last."""
    if adapter_id not in manager._active_adapters:
        return False
    manager._registered_adapters.touch(adapter_id)
    manager._active_adapters.touch(adapter_id)
    return True
