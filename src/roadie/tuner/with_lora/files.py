"""RoAd and LoRA of one model in a folder: ``road`` and ``lora``, two ordinary adapters of PEFT, each of which loads alone."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn

from roadie import checkpoint
from roadie.checkpoint.replacement import replace_pair, replaced_folder
from roadie.errors import CheckpointError, ConfigError
from roadie.tuner.registry import register
from roadie.tuner.with_lora import lora_files
from roadie.tuner.with_lora.model import add_lora, lora_of

ROAD, LORA = "road", "lora"


def save_together(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    road: str | None = None,
    lora: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write one RoAd and one LoRA adapter of `model` to ``folder/road`` and ``folder/lora``, whole or not at all.

    road, lora: names; None: the active ones. overwrite: whether a folder that is not empty is replaced, once the new one is
    complete. Raises `ConfigError` for names that are not there or not clear, `CheckpointError` where the folder is taken or
    cannot be written.
    """
    tuner = lora_of(model)
    road = _one(road, model.peft_config, model.active_adapters, "RoAd")
    lora = _one(lora, tuner.peft_config, tuner.active_adapters, "LoRA")
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise CheckpointError(
            f"{target}: got a name that is taken; wanted a new folder; choose another, or overwrite=True"
        )
    with replaced_folder(target) as new:
        _write_road(model, road, new / ROAD)
        lora_files.write(tuner.model, tuner.peft_config[lora], lora, new / LORA)


def load_together(
    base_model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    road: str = "default",
    lora: str = "lora",
    is_trainable: bool = False,
) -> Any:
    """A model with the RoAd and the LoRA adapter that `save_together` wrote, under the names `road` and `lora`.

    base_model: a plain model, which is adapted in place, or left alone where this raises. is_trainable: train both, or none.
    Raises `CheckpointError` where one of the two is missing, damaged, or of another model.
    """
    register()
    place = Path(folder)
    checkpoint.load(place / ROAD)
    lora_files.read(place / LORA)
    model = PeftModel.from_pretrained(base_model, str(place / ROAD), adapter_name=road, is_trainable=is_trainable)
    try:
        return add_lora(model, place / LORA, lora, is_trainable=is_trainable)
    except BaseException:
        model.base_model.unload()
        raise


def _write_road(model: Any, name: str, folder: Path) -> None:
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    content = config.to_dict()
    checkpoint.warn_of_chains(content)
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    whole = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    replace_pair(folder, checkpoint.config_text(content), whole)


def _one(name: str | None, known: Any, active: list[str], kind: str) -> str:
    if name is None and len(active) == 1:
        name = active[0]
    if name is None or name not in known:
        raise ConfigError(
            f"got {kind} adapter {name!r} to save; wanted one of {sorted(known)}; name it (active: {list(active)})"
        )
    return name
