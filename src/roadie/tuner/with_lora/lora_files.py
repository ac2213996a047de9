"""LoRA adapters beside RoAd as files: PEFT's format, in which stock PEFT reads and writes them; safetensors only."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from roadie.adapter import PEFT_PREFIX
from roadie.checkpoint import CONFIG_NAME, locate_weights
from roadie.checkpoint.replacement import replace_pair
from roadie.errors import CheckpointError
from roadie.tuner.with_lora.layer import LoraLinear


def is_lora(folder: Path) -> bool:
    """Whether a folder's config says LORA."""
    try:
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("peft_type") == "LORA"


def read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors of a LoRA adapter; raises `CheckpointError` where the folder holds none that can be read."""
    if not is_lora(folder):
        raise CheckpointError(
            f"{folder}: got no {CONFIG_NAME} of LoRA; wanted a folder that save_together or PEFT wrote; is it the one above?"
        )
    try:
        return LoraConfig.from_pretrained(str(folder)), load_file(locate_weights(folder))
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: got {error}; wanted a whole LoRA adapter; save it again") from error


def tensors_of(base: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of a LoRA adapter by their names in the file."""
    found: dict[str, Tensor] = {}
    for path, layer in base.named_modules():
        if isinstance(layer, LoraLinear) and name in layer.lora_A:
            for part, module in (("lora_A", layer.lora_A[name]), ("lora_B", layer.lora_B[name])):
                found |= {f"{PEFT_PREFIX}{path}.{part}.{key}": tensor for key, tensor in module.named_parameters()}
    return found


def fill(base: nn.Module, name: str, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give an adapter the values of a file, all of which are looked at first; raises `CheckpointError` with none written."""
    wanted = tensors_of(base, name)
    if wanted.keys() != tensors.keys():
        raise CheckpointError(
            f"{source}: got {sorted(wanted.keys() ^ tensors.keys())[:3]} in the file or in the model alone; wanted them in both; "
            "use the base model that it was trained on"
        )
    for key, parameter in wanted.items():
        value = tensors[key]
        if value.shape != parameter.shape or not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{source}: got {key} {tuple(value.shape)}; wanted finite numbers {tuple(parameter.shape)}; use the base "
                "model that it was trained on. The model was not changed."
            )
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])


def write(base: nn.Module, config: LoraConfig, name: str, folder: Path) -> None:
    """Write an adapter to `folder`, over one that is there, as a whole or not at all."""
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors_of(base, name).items()}
    replace_pair(folder, config_text(config), tensors)


def config_text(config: LoraConfig) -> str:
    """adapter_config.json as PEFT writes it: for inference, with what is only for this process left out."""
    saved: Any = copy.deepcopy(config)
    saved.inference_mode = True
    with tempfile.TemporaryDirectory() as scratch:
        saved.save_pretrained(scratch)
        return Path(scratch, CONFIG_NAME).read_text(encoding="utf-8")
