"""`add_lora`: a LoRA adapter beside the RoAd adapters of a model, and what such a model can do more.

The model stays the PeftModel it was: its RoAd adapters are used, saved and loaded as before, LoRA adapters by the same
methods under names of their own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from roadie.errors import ConfigError, MergeError
from roadie.tuner.injection import all_or_nothing
from roadie.tuner.merging import all_or_none
from roadie.tuner.model import RoadModel
from roadie.tuner.names import check_name
from roadie.tuner.rotating import RoadLayer
from roadie.tuner.with_lora import lora_files
from roadie.tuner.with_lora.tuner import LoraTuner, plain_config

_TUNER = "_roadie_lora"  # of the tuner, in the base model's __dict__: no submodule, and copied along


def add_lora(
    model: Any,
    source: LoraConfig | str | os.PathLike[str],
    adapter_name: str = "lora",
    *,
    is_trainable: bool | None = None,
) -> Any:
    """Add a LoRA adapter beside the RoAd adapters of `model`: ``z = R W x + B A x``; gives the model, which is a `WithLora` then.

    model: a PeftModel with RoAd. source: a `peft.LoraConfig` for a new adapter, or a folder with one that was saved (by
    `save_together` or by stock PEFT). adapter_name: a name that no adapter of the model has; the first one becomes active.
    is_trainable: None: new ones are trained, loaded ones are not. RoAd's parameters stay trainable or frozen as they are.
    LoRA may adapt other linear layers than RoAd. Raises `ConfigError`, `UnsupportedLayer`, `CheckpointError`, or `MergeError`
    while something is merged; the model is then as it was.
    """
    _check_model(model)
    base = model.get_base_model()
    tuner = _tuner(base)
    _check_name(model, tuner, adapter_name)
    tensors = None
    if isinstance(source, (str, os.PathLike)):
        config, tensors = lora_files.read(Path(source))
    else:
        config = source
    config = plain_config(config)
    trains = tensors is None if is_trainable is None else is_trainable
    _complete(config, model, trains)
    holder: Any = SimpleNamespace(peft_config={}) if tuner is None else tuner
    holder.peft_config[adapter_name] = config
    with all_or_nothing(holder, base, adapter_name):
        tuner = _injected(base, tuner, config, adapter_name)
        if tensors is not None:
            lora_files.fill(base, adapter_name, tensors, str(source))
    tuner.set_requires_grad(adapter_name, trains)
    base.__dict__[_TUNER] = tuner
    if not isinstance(model, WithLora):
        kind: Any = type(model)
        model.__class__ = _with_lora(kind)
    return model


def lora_of(model: Any) -> LoraTuner:
    """The LoRA tuner of a model: PEFT's LoraModel, for what concerns LoRA alone; raises `ConfigError` where there is none."""
    tuner = _tuner(model.get_base_model()) if isinstance(model, PeftModel) else None
    if tuner is None:
        raise ConfigError(f"got a {type(model).__name__} without LoRA beside RoAd; wanted one; use roadie.add_lora")
    return tuner


def without_lora(model: Any) -> AbstractContextManager[None]:
    """Within the block LoRA does nothing: ``R W x``. (``disable_adapter()`` switches both off.)"""
    return _off(lora_of(model).layers())


def without_road(model: Any) -> AbstractContextManager[None]:
    """Within the block RoAd does nothing: ``W x + B A x``."""
    lora_of(model)
    return _off([module for module in model.modules() if isinstance(module, RoadLayer)])


@contextmanager
def _off(layers: list[Any]) -> Iterator[None]:
    if any(layer.merged for layer in layers):
        raise MergeError("got merged adapters to switch off; wanted them unmerged; call unmerge_adapter first")
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


class WithLora:
    """What a PeftModel with RoAd can do more once `add_lora` has given it LoRA; made by `add_lora` alone."""

    base_model: RoadModel

    def add_adapter(self, adapter_name: str, peft_config: Any, **kwargs: Any) -> Any:
        """As PEFT's; a LoraConfig adds a LoRA adapter."""
        if isinstance(peft_config, LoraConfig):
            add_lora(self, peft_config, adapter_name, is_trainable=False)  # as PEFT's: frozen until it is made active
            return None
        _check_name(self, lora_of(self), adapter_name)
        return super().add_adapter(adapter_name, peft_config, **kwargs)  # type: ignore[misc]

    def load_adapter(self, model_id: Any, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        """As PEFT's; a folder with LoRA is loaded as LoRA, over the values of the adapter of that name if there is one."""
        if not lora_files.is_lora(Path(model_id)):
            return super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)  # type: ignore[misc]
        tuner = lora_of(self)
        if adapter_name in tuner.peft_config:
            _, tensors = lora_files.read(Path(model_id))
            lora_files.fill(tuner.model, adapter_name, tensors, str(model_id))
        else:
            add_lora(self, model_id, adapter_name, is_trainable=is_trainable)
        return None

    def set_adapter(self, adapter_name: Any, **kwargs: Any) -> None:
        """As PEFT's: makes a RoAd adapter the active one, or a LoRA adapter; the other kind stays as it is."""
        tuner = lora_of(self)
        if any(layer.merged for layer in tuner.layers()):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        if isinstance(adapter_name, str) and adapter_name in tuner.peft_config:
            tuner.set_adapter(adapter_name, **kwargs)
        else:
            super().set_adapter(adapter_name, **kwargs)  # type: ignore[misc]

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, for adapters of both kinds."""
        tuner = lora_of(self)
        if adapter_name in tuner.peft_config:
            tuner.delete_adapter(adapter_name)
        else:
            super().delete_adapter(adapter_name)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; LoRA adapters are saved beside RoAd's, each in the folder of its name, where `load_adapter` finds it."""
        tuner = lora_of(self)
        selected = kwargs.get("selected_adapters")
        names = [name for name in tuner.peft_config if selected is None or name in selected]
        if selected is not None:
            kwargs["selected_adapters"] = [name for name in selected if name not in tuner.peft_config]
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            for name in names:
                lora_files.write(tuner.model, tuner.peft_config[name], name, Path(save_directory, name))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge RoAd and then LoRA (None: the active adapters), into every layer or into none: ``R W + B A``."""
        tuner, road = lora_of(self), self.base_model
        tuner.check_merge(adapter_names, finite=safe_merge)
        of_road = None if adapter_names is None else [name for name in adapter_names if name not in tuner.peft_config]
        of_lora = None if adapter_names is None else [name for name in adapter_names if name in tuner.peft_config]
        with all_or_none(road._layers()):
            if of_road is None or of_road:
                road.merge_adapter(of_road, safe_merge)
            if of_lora is None or of_lora:
                tuner.merge_adapter(of_lora, safe_merge)

    def unmerge_adapter(self) -> None:
        """Take all merges back, LoRA's first and then RoAd's, or none if one of them cannot be."""
        tuner, road = lora_of(self), self.base_model
        for layer in road._layers():
            layer.check_undoable()
        tuner.unmerge_adapter()
        road.unmerge_adapter()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> nn.Module:
        """The base model, a plain one, with ``R W + B A`` for its weights; refused before anything is changed, or done."""
        tuner = lora_of(self)
        tuner.check_merge(adapter_names, finite=safe_merge)
        unloaded: nn.Module = self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)
        unloaded.__dict__.pop(_TUNER, None)
        return unloaded

    def unload(self) -> nn.Module:
        """The base model, without adapters."""
        unloaded: nn.Module = self.base_model.unload()
        unloaded.__dict__.pop(_TUNER, None)
        return unloaded

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[2],), self.__dict__


@cache
def _with_lora(kind: type) -> type:
    return type(f"{kind.__name__}WithLora", (WithLora, kind), {"__module__": __name__, "__doc__": WithLora.__doc__})


def _blank(kind: type) -> Any:
    made: Any = _with_lora(kind)
    return made.__new__(made)


def _tuner(base: nn.Module) -> LoraTuner | None:
    tuner: LoraTuner | None = base.__dict__.get(_TUNER)
    return tuner


def _check_model(model: Any) -> None:
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, RoadModel):
        raise ConfigError(
            f"got a {type(model).__name__}; wanted a model with RoAd; make it with roadie.get_peft_model(model, RoadConfig(...)) "
            "and add LoRA then: RoAd over LoRA would rotate B A x too"
        )
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise MergeError(
            "got a model with merged adapters; wanted them unmerged to add LoRA; call unmerge_adapter first"
        )
    biased = [name for name, config in model.peft_config.items() if getattr(config, "bias", "none") != "none"]
    if biased:
        raise ConfigError(f"got RoAd adapter {biased[0]!r}, which trains biases; wanted bias='none' beside LoRA")


def _check_name(model: Any, tuner: LoraTuner | None, name: str) -> None:
    taken = {*model.peft_config, *(tuner.peft_config if tuner is not None else ())}
    if name in taken:
        raise ConfigError(
            f"got the adapter name {name!r}; wanted one that no adapter has, of either kind ({sorted(taken)}): the same methods "
            "reach both; choose another adapter_name"
        )
    check_name(name, (path for path, _ in model.get_base_model().named_modules()), nn.ModuleDict)


def _complete(config: LoraConfig, model: Any, trains: bool) -> None:
    """What PEFT fills in when it wraps a model."""
    of_road = model.active_peft_config
    config.inference_mode = not trains
    config.task_type = config.task_type or of_road.task_type
    config.base_model_name_or_path = of_road.base_model_name_or_path


def _injected(base: nn.Module, tuner: LoraTuner | None, config: LoraConfig, name: str) -> LoraTuner:
    of_road = base.__dict__.pop(
        "peft_config"
    )  # a tuner takes what lies there for its own configs, and puts these there
    if tuner is None:
        tuner = LoraTuner(base, config, name)
    else:
        tuner.inject_adapter(base, name)
    base.__dict__["peft_config"] = of_road
    tuner._cast_adapter_dtype(name)
    return tuner
