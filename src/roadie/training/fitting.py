"""RoAd adapters fitted to what is on the disk: a fully fine-tuned model or a LoRA adapter, and its base.

Folders, or repositories of the hub (of which nothing but safetensors and JSON is fetched). What a tensor is called and what
its module is called can differ; which modules are linear layers, the model's own class says, built without its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from roadie import checkpoint, fit
from roadie.fit.weights import json_object
from roadie.linear import is_linear, without_refused
from roadie.training.adapters import attach, hub_folder
from roadie.training.corpus import TextSettings
from roadie.training.encoding import Example, collate
from roadie.training.folders import check_free, whole_folder
from roadie.training.group_sizes import tell_of_smaller_groups
from roadie.training.models import ModelSource, as_source, best_device, load_model
from roadie.training.places import check_adapter_place, check_model_place
from roadie.training.text import check_there

ROWS_A_BATCH = 8
OnLayer = Callable[[fit.LayerReport], None]

_MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json"]
_LORA_FILES = [checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME]


@dataclass(frozen=True)
class FitText(TextSettings):
    """A text to fit outputs on, and what is taken for the input of each layer (`roadie.fit.Inputs`)."""

    tokens: int = 16384
    inputs: str = fit.Inputs.ADAPTED.value

    def __post_init__(self) -> None:
        fit.Inputs.parse(self.inputs)
        super().__post_init__()


@dataclass(frozen=True, eq=False)
class FitWritten:
    """A fitted adapter on the disk: where, what it was fitted to, its base model, and the fit."""

    output: Path
    tuned: str
    model: str
    method: str
    fit: fit.Fit

    def to_mapping(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        head = {"output": str(self.output), "tuned": self.tuned, "base_model": self.model, "method": self.method}
        return head | self.fit.to_mapping()


def fit_to_disk(
    tuned: str | Path,
    output: str | Path,
    *,
    model: str | ModelSource | None = None,
    text: FitText | None = None,
    overwrite: bool = False,
    on_layer: OnLayer | None = None,
    **settings: Any,
) -> FitWritten:
    """Write to the folder `output` the RoAd adapter that is nearest to `tuned`: a whole model, or a LoRA adapter.

    model: the base; None takes the one that a LoRA adapter names, else the embedded one. text: fit what the layers give on
    it instead of their weights. settings: of `roadie.fit.Settings`. The folder appears whole or not at all.
    Raises `RoadieError` where the output exists, a file is broken, or the two do not fit together.
    """
    output = Path(output)
    check_free(output, overwrite=overwrite)
    fit.Settings(**settings)
    check_there(text.sources if text is not None else ())
    folder = model_folder(str(tuned))
    is_lora = (folder / checkpoint.CONFIG_NAME).is_file()
    source = as_source(model).for_adapters([_base_named_by(folder)] if is_lora else [])
    check_model_place(source.place)
    if text is not None:
        found = _from_text(folder, is_lora, source, text, on_layer, settings)
    else:
        found = _from_weights(folder, is_lora, source, on_layer, settings)
    sizes = ((path, (layer.group_size,)) for path, layer in found.layers.items())
    tell_of_smaller_groups(sizes, (fit.Settings(**settings).group_size,))
    with whole_folder(output, overwrite=overwrite) as new:
        checkpoint.save(found.adapter, new)
    method = "LoRA adapter" if is_lora else "whole model"
    return FitWritten(output, str(tuned), source.place, f"{method}, {'weights' if text is None else 'outputs'}", found)


def model_folder(name: str, revision: str | None = None) -> Path:
    """The local folder of a model or adapter: a folder, a file in it, or what the hub (or its local copy) has of that name."""
    place = Path(name)
    check_adapter_place(name, "the folder of a model or an adapter", "folder")
    if place.exists():
        return place.parent if place.is_file() else place
    return hub_folder(name, [*_MODEL_FILES, *_LORA_FILES], revision)


def _base_named_by(folder: Path) -> str | None:
    name = json_object(folder / checkpoint.CONFIG_NAME).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _from_weights(
    folder: Path, is_lora: bool, source: ModelSource, on_layer: OnLayer | None, settings: dict[str, Any]
) -> fit.Fit:
    base = model_folder(source.place, source.revision)
    how: dict[str, Any] = {"places": linear_places(base, source), "base_model_name": source.place, "on_layer": on_layer}
    if is_lora:
        return fit.from_lora(folder, base, **how, **settings)
    return fit.from_checkpoints(base, folder, **how, **settings)


def linear_places(folder: Path, source: ModelSource) -> dict[str, fit.Place] | None:
    """The linear layers of the model in `folder` by the path of their tensors; the output head is left out, and what cannot
    be adapted, which is logged.

    The model is built without weights; None where transformers does not know it, and names have to do.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, ImportError):
        return None
    head, prefix = model.get_output_embeddings(), f"{model.base_model_prefix}."
    modules = {path: module for path, module in model.named_modules() if is_linear(module) and module is not head}
    places = {}
    for path in without_refused(model, modules):
        place = fit.Place(path, not isinstance(modules[path], torch.nn.Linear))
        places[path] = place
        places.setdefault(path.removeprefix(prefix), place)  # a model saved without its head lacks the prefix
    return places


def _from_text(
    folder: Path, is_lora: bool, source: ModelSource, text: FitText, on_layer: OnLayer | None, settings: dict[str, Any]
) -> fit.Fit:
    base: Any = load_model(source)
    wanted: Any = (
        _with_lora(source, folder) if is_lora else load_model(replace(source, name=str(folder), revision=None))
    )
    how: dict[str, Any] = {"inputs": text.inputs, "base_model_name": source.place, "on_layer": on_layer}
    return fit.from_activations(
        base.to(best_device()), wanted.to(best_device()), batches(source, text), **how, **settings
    )


def _with_lora(source: ModelSource, folder: Path) -> Any:
    checkpoint.locate_weights(folder)
    return attach(load_model(source), {"tuned": folder})


def batches(source: ModelSource, text: FitText) -> list[dict[str, torch.Tensor]]:
    """Token ids and attention masks of the text, a few rows at a time, at most `text.tokens` tokens of it."""
    chosen = text.examples(source)
    return [_inputs(chosen[start : start + ROWS_A_BATCH]) for start in range(0, len(chosen), ROWS_A_BATCH)]


def _inputs(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(best_device())
        for name, tensor in collate(examples).items()
        if name in ("input_ids", "attention_mask")
    }
