"""The LoRA tuner beside RoAd: PEFT's, with layers of our own, that touches LoRA layers alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from roadie.errors import ConfigError, UnsupportedLayer
from roadie.linear import refusals
from roadie.sites.rows import Routing
from roadie.tuner.injection import base_of, quantization_backend
from roadie.tuner.layer import linear_features
from roadie.tuner.merging import all_or_none
from roadie.tuner.targeting import with_names_of_all_linear
from roadie.tuner.with_lora.layer import LoraLinear
from roadie.tuner.with_lora.rows import LoraChoice

# What plain LoRA leaves out, and the value that says so. Some change the base weight, of which RoAd makes R W; others read it.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "ensure_weight_tying": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
}
_OF_ROAD = ("modules_to_save", "trainable_token_indices")


class LoraTuner(LoraModel):
    """PEFT's LoRA on the base model of a RoAd model, around roadie's layers; made by `add_lora`."""

    tuner_layer_cls = LoraLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see PEFT's BaseTuner. Layers that the model does not call are no more for LoRA than for RoAd."""
        reasons = refusals(model)
        config = self._prepare_adapter_config(self.peft_config[adapter_name], self.get_model_config(model))
        with_names_of_all_linear(config, model, reasons)
        for path, reason in reasons.items():
            if self._check_target_module_exists(config, path):
                raise UnsupportedLayer(f"LoRA beside RoAd, at {path!r}: {reason}; put it into exclude_modules")
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = self.layers()
        routing: Routing[LoraChoice] = next((layer.lora_routing for layer in layers), Routing())
        for layer in layers:
            layer.lora_routing = routing
            layer.train(model.training)

    def _create_new_module(
        self, lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        try:
            linear_features(base_of(target), quantization_backend(target, self.model))
        except UnsupportedLayer as error:
            raise UnsupportedLayer(f"LoRA beside RoAd, at {kwargs['target_name']!r}: {error}") from None
        wanted = {name: kwargs[name] for name in ("r", "lora_alpha", "target_name")}
        return LoraLinear(target, adapter_name, lora_config, **wanted)

    def layers(self) -> list[LoraLinear]:
        """The LoRA layers, in module order."""
        return [module for module in self.model.modules() if isinstance(module, LoraLinear)]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make LoRA adapters the active ones; what RoAd does stays as it is."""
        layers = self.layers()
        if any(layer.merged for layer in layers):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging LoRA first.", stacklevel=2)
            self.unmerge_adapter()
        for layer in layers:
            layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for layer in self.layers():
            layer.enable_adapters(enabled)

    def check_merge(self, adapter_names: list[str] | None, *, finite: bool) -> None:
        """Raise `MergeError` where a layer refuses to merge; changes nothing."""
        for layer in self.layers():
            layer.check_merge(layer.active_adapters if adapter_names is None else adapter_names, finite=finite)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge LoRA into every layer, or into none if one of them refuses: RoAd has to be merged before."""
        self.check_merge(adapter_names, finite=safe_merge)
        layers = self.layers()
        for layer in layers:
            if set(layer.active_adapters if adapter_names is None else adapter_names) & set(layer.lora_A):
                layer.check_order()
        with all_or_none(layers):
            for layer in layers:
                layer.merge(adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Take all merges of LoRA back; RoAd stays merged."""
        for layer in self.layers():
            layer.unmerge()


def plain_config(config: Any) -> LoraConfig:
    """A copy of a LoRA config that can stand beside RoAd; raises `ConfigError` for others."""
    if type(config) is not LoraConfig:
        raise ConfigError(
            f"got a {type(config).__name__}; wanted peft.LoraConfig; other methods do not stand beside RoAd in one model"
        )
    for name, allowed in _PLAIN.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            todo = "name it in the RoadConfig instead" if name in _OF_ROAD else f"use {name}={allowed[0]!r}"
            raise ConfigError(
                f"got {name}={value!r} for LoRA beside RoAd; wanted {' or '.join(map(repr, allowed))}: z = R W x + B A x is "
                f"plain LoRA over a base weight that stays as it is; {todo}"
            )
    return copy.deepcopy(config)
