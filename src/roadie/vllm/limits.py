"""What vLLM can do and an engine for RoAd cannot: refused at the start, with the reason."""

from __future__ import annotations

from typing import Any

from vllm import envs

from roadie.errors import ConfigError
from roadie.vllm.settings import KEY


def check_supported(vllm_config: Any) -> None:
    """Raise `ConfigError` for an engine for RoAd with settings that the plug-in cannot serve, with the reason."""
    lora_config = vllm_config.lora_config
    if lora_config is None:
        raise ConfigError(f'got "{KEY}" in additional_config without LoRA; set enable_lora=True (--enable-lora)')
    if lora_config.fully_sharded_loras:
        raise ConfigError(
            "got fully_sharded_loras=True, which divides matrices that RoAd does not have; leave it out: a rotation is "
            "divided like the layer's outputs, without it"
        )
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise ConfigError(
            "got VLLM_LORA_ENABLE_DUAL_STREAM, which computes adapters beside the base layer; a rotation needs the base "
            "layer's output; unset it"
        )
    if lora_config.enable_tower_connector_lora:
        raise ConfigError(
            "got enable_tower_connector_lora=True; RoAd adapters of vision towers are not supported; leave it out"
        )
