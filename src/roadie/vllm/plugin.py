"""The touches, in one place: what this process of vLLM does otherwise once the plug-in is in it."""

from __future__ import annotations

import logging
from typing import Any

from roadie.errors import ConfigError
from roadie.vllm.contract import refusal
from roadie.vllm.store import is_road

log = logging.getLogger("vllm.roadie")
_state: dict[str, str | None] = {}


def install() -> None:
    """Touch vLLM, once a process; or log why not, and have RoAd adapters refused with that reason."""
    if _state:
        return
    reason = _state["refusal"] = refusal()
    if reason is None:
        _touch()
        return
    log.error("roadie's plug-in is NOT active in this process, and RoAd adapters will be refused: %s", reason)
    _refuse_adapters(reason)


def _touch() -> None:
    from vllm.v1.worker import lora_model_runner_mixin

    from roadie.vllm import frontend, worker

    frontend.touch()
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = worker.manager_for


def _refuse_adapters(reason: str) -> None:
    """Where vLLM reads the config of an adapter, refuse RoAd with `reason`; as far as this vLLM has such a place."""
    try:
        from vllm.lora.peft_helper import PEFTHelper

        original = PEFTHelper.from_local_dir.__func__
    except (ImportError, AttributeError):
        return

    def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        if is_road(lora_path):
            raise ConfigError(f"got a RoAd adapter ({lora_path}), and roadie's plug-in is not active: {reason}")
        return original(cls, lora_path, *args, **kwargs)

    PEFTHelper.from_local_dir = classmethod(from_local_dir)
