"""`RoadModel`: RoAd as a PEFT tuner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING
from peft.utils.other import _set_adapter
from torch import Tensor, nn

from roadie.experts import is_experts
from roadie.tuner.angle_watch import stop_watching, watch_angles
from roadie.tuner.config import RoadConfig
from roadie.tuner.experts import RoadExperts, adapt_experts
from roadie.tuner.injection import (
    Plan,
    TakesBack,
    all_or_nothing,
    base_of,
    layer_config,
    mark_shared_weights,
    quantization_backend,
    with_modules_alone,
)
from roadie.tuner.layer import Linear, linear_features
from roadie.tuner.loading import (
    check_new_values,
    check_sizes_of_values,
    check_stored_sizes,
    check_whole_modules,
    make_new,
    placed,
    source_of_load,
    stored_adapter,
    warn_of_missing,
)
from roadie.tuner.merged import MergedLayer
from roadie.tuner.merging import ExactUnmerge, all_or_none, onloaded
from roadie.tuner.names import check_name, check_names_in
from roadie.tuner.output import KeptForBackward
from roadie.tuner.reference import is_reference, make_reference
from roadie.tuner.rotating import RoadLayer
from roadie.tuner.routing import adapter_rows, shared_routing
from roadie.tuner.snapshot import undone_if_raised
from roadie.tuner.targeting import add_head_of_task, is_target
from roadie.tuner.weighted import CombinationType, add_adapter, weighted_adapter


class RoadModel(BaseTuner):
    """A model whose linear layers are adapted by RoAd (arXiv 2409.00119); made by `get_peft_model`, as PEFT's tuners are.

    Args are those of PEFT's BaseTuner: the model, a `RoadConfig` (or stock PEFT's) or a dict of them by adapter name, and
    the adapter's name. A config that does not fit the model raises before anything is changed.
    """

    prefix: str = "road_"
    peft_config: dict[str, Any]
    tuner_layer_cls = RoadLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING
    _is_in_peft_model: bool = False
    _awaited: tuple[str, TakesBack] | None = None  # an adapter that PEFT is about to load the values of
    _before_off: tuple[list[tuple[nn.Parameter, bool]], list[str]] | None = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_is_in_peft_model"] = isinstance(peft_config, dict)  # as PEFT's own model classes give it
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add the adapter `adapter_name` to `model`, or leave the model as it was and raise; see PEFT's BaseTuner."""
        config = self.peft_config[adapter_name]
        is_shared = any(other is config for name, other in self.peft_config.items() if name != adapter_name)
        source = None if is_shared else source_of_load(config)
        with all_or_nothing(self, model, adapter_name) as take_back:
            check_name(adapter_name)
            if self._is_in_peft_model:
                add_head_of_task(config)
            was_read = source is None and not is_shared and make_new(config, model)
            plan = Plan.make(self, model, config, adapter_name, state_dict)
            plan.warn(config, was_read=was_read)
            # PEFT's load_adapter of an adapter to be trained cannot be told from a new one of a config that was read.
            is_certain = config.inference_mode or len(self.peft_config) == 1 or not self._is_in_peft_model
            stored = None if source is None else stored_adapter(source, is_certain=is_certain)
            if source and stored and is_certain:
                check_stored_sizes(stored, plan, source.name_or_path)
            config.target_modules, config._experts = plan.target_modules, plan.experts
            keys = None if state_dict is None else with_modules_alone(state_dict)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, keys)
            self._share_routing(model)
            mark_shared_weights(model)
            if is_reference(self.peft_config, adapter_name):
                make_reference(model)
            check_names_in(model, self.peft_config, adapter_name)
            if source and stored:
                check_whole_modules(stored, model, adapter_name, source.name_or_path)
        self._awaited = (adapter_name, take_back) if source is not None and self._is_in_peft_model else None
        if type(self.peft_config) is dict:
            self.peft_config = Configs(self.peft_config)
        if not config.inference_mode:
            watch_angles(self, model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model; the tables of all its layers are made first."""
        with self._shared.call(self.model):
            return super().forward(*args, **kwargs)

    def _share_routing(self, model: nn.Module) -> None:
        routing = shared_routing(model)
        for module in model.modules():
            if isinstance(module, RoadLayer):
                module._routing = routing
        routing.changes += 1
        routing.additions += 1
        routing.listen(model)
        self.__dict__["_shared"] = routing

    def _create_and_replace(
        self,
        peft_config: RoadConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if is_experts(target):
            is_active = adapter_name in self.active_adapters
            adapt_experts(target, current_key, adapter_name, peft_config, is_active=is_active)
            return
        backend = quantization_backend(target, self.model)
        config = layer_config(peft_config, current_key, *linear_features(base_of(target), backend))
        if getattr(target, "lies_around_road", False):  # LoRA: R W x + B A x
            around: Any = target
            parent, target_name, target = around, "base_layer", around.base_layer
        if isinstance(target, RoadLayer):
            target.update_layer(adapter_name, config=config, inference_mode=peft_config.inference_mode)
            return
        layer = Linear(target, adapter_name, config, backend=backend)
        layer.path = current_key
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return is_target(peft_config, key)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put `new_module` in the place of `child`; it has its weights already, and its adapter is where it computes.

        PEFT would set the weight again from `child.weight`, which a whole module that was trained along may lack, and
        which is no parameter where single tokens were; and move the adapter of an offloaded layer to the device "meta".
        """
        setattr(parent, child_name, new_module)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """PEFT enters this around every forward and generate, with the arguments of the call."""
        self._awaited = None
        names = kwargs.get("adapter_names")
        rows = nullcontext() if names is None else adapter_rows(self, names, self._rows_made_of_one(kwargs))
        if torch.compiler.is_compiling():
            return rows
        stack = ExitStack()
        stack.callback(self._shared.by.set, None)  # also after an interrupt, of which hooks are not told
        stack.enter_context(rows)
        return stack

    def _rows_made_of_one(self, kwargs: dict[str, Any]) -> int:
        """How many consecutive rows generation makes of each input row: beams, or returned sequences."""
        sources = (kwargs.get("generation_config"), getattr(self.model, "generation_config", None))

        def setting(name: str) -> int:
            values = [kwargs.get(name), *(getattr(source, name, None) for source in sources if source is not None)]
            return next((int(value) for value in values if value is not None), 1)

        return max(setting("num_beams"), setting("num_return_sequences"))

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """As PEFT does, for modules trained whole and tokens too; afterwards each is trainable or frozen as it was before."""
        flags, active = self._before_off or (
            [(p, p.requires_grad) for p in self.model.parameters()],
            list(self.active_adapters),
        )
        super()._enable_adapter_layers(enabled)
        self._before_off = None if enabled else (flags, active)
        if enabled and active == self.active_adapters:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT does; where it was active the next one, by name, becomes so in all of its parts: rotations, modules, tokens."""
        remaining = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        layers = [module for module in self.model.modules() if isinstance(module, RoadLayer)]
        for layer in layers:
            if adapter_name in layer.road_theta:  # PEFT passes over paths with "road_" in them
                layer.delete_adapter(adapter_name)
        if not was_active:
            return
        remaining = remaining or sorted(self.peft_config)[:1]
        for layer in layers:
            layer.set_adapter(remaining)
        if remaining:
            _set_adapter(self.model, remaining)
        self.active_adapter = remaining[0] if len(remaining) == 1 else remaining

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; see PEFT's BaseTuner."""
        self._awaited = None
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As torch does; values of an adapter that PEFT has just added are looked at first, or the adapter goes again."""
        if self._awaited is not None:
            with undone_if_raised(self._awaited[1]):
                check_sizes_of_values(self, prefix, state_dict)
        self._awaited = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _layers(self) -> list[MergedLayer]:
        return [module for module in self.model.modules() if isinstance(module, MergedLayer)]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (None: the active ones) into every layer, or into none if one of them refuses."""
        self._check_merge_allowed()
        mark_shared_weights(self.model)
        if safe_merge:
            self._check_merges(adapter_names)
        layers = self._layers()
        with all_or_none(layers):
            for layer in layers:
                with onloaded(layer):
                    layer.merge(adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Take all merges of all layers back, or none if one of them cannot be."""
        layers = self._layers()
        for layer in layers:
            layer.check_unmerge()
        for layer in layers:
            with onloaded(layer):
                layer.unmerge()

    def _check_merges(self, adapter_names: list[str] | None) -> None:
        for layer in self._layers():
            with onloaded(layer):
                names = layer._to_merge(adapter_names)
                if names:
                    layer.check_merge(names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = self._layers()
        if merge:
            mark_shared_weights(self.model)
            for layer in layers:
                with onloaded(layer):
                    layer._base_weight().check_can_merge()
            if safe_merge:
                self._check_merges(adapter_names)
        kept = [(layer, layer.exact_unmerge) for layer in layers]
        for layer in layers:
            layer.exact_unmerge = ExactUnmerge.NEVER
        try:
            stop_watching(self)
            self._shared.stop_listening(self.model)
            for layer in layers:
                if isinstance(layer, RoadExperts):  # which PEFT, which replaces modules, knows nothing of
                    if merge:
                        with onloaded(layer):
                            layer.merge(adapter_names=adapter_names)
                    layer.remove()
            return super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)
        finally:
            for layer, exact in kept:
                layer.exact_unmerge = exact

    def set_exact_unmerge(self, exact: ExactUnmerge | str) -> None:
        """Say for which weights unmerging gives back the original bit for bit: "half" (default), "always" or "never".

        "half" keeps at most one byte an element of bfloat16 and float16 weights while they are merged (0.2 to 0.4 for
        usual adapters); "always" does so for float32 too, at up to one byte an element; "never" keeps nothing.
        """
        for layer in self._layers():
            layer.exact_unmerge = ExactUnmerge(exact)

    def set_kept_for_backward(self, kept: KeptForBackward | str) -> None:
        """Say which tensor adapted layers keep for backward: "input", "output" or "auto" (default); see `KeptForBackward`.

        "input" is for models whose road_1 adapters may reach alpha = 0. "output" saves the memory for road_2 and road_4 too, at a
        loss of accuracy that grows with the condition number of the rotations; a model that changes a layer's output in place
        is refused then, by `InPlaceError` in backward. A rotation of a layer's input keeps what it is given, which "output"
        alone changes.
        """
        for layer in self._layers():
            layer.kept_for_backward = wanted = KeptForBackward(kept)
            if isinstance(layer, Linear) and layer.road_input is not None:
                is_auto = wanted is KeptForBackward.AUTO
                layer.road_input.kept_for_backward = KeptForBackward.INPUT if is_auto else wanted

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: CombinationType | str = CombinationType.BLEND,
    ) -> None:
        """Combine adapters of the model into a new one, `adapter_name`: an adapter like any other, not active yet.

        adapters: names, one or more; weights: a finite number for each, negative ones take an effect away;
        combination_type: "blend" (default), "mean", "compose" or "linear"; see `roadie.tuner.weighted`. Layers that only
        some adapters have are the identity to the others; group sizes must agree. The others stay as they are.
        Raises `ConfigError` or `AdapterError` (ValueErrors), with nothing changed: for a name that exists or is not valid,
        unknown adapters, weights and types; adapters that train more than rotations; blocks without the logarithm or
        inverse that their weight needs.
        """
        result = weighted_adapter(self, adapters, weights, adapter_name, combination_type)
        add_adapter(self, adapter_name, result)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As PEFT does, but without what LoRA around the layers holds."""
        found = super()._get_adapter_state_dict(model, *args, **kwargs)
        return {key: tensor for key, tensor in found.items() if ".lora_" not in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As PEFT does; that LoRA lies around a layer is no part of the file."""
        return str(super()._remove_adapter_name_from_key(key.replace(".base_layer.road_", ".road_"), adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remap = partial(super()._remap_adapter_state_dict_for_load, model, config, adapter_name)
        tuner: Any = getattr(model, "base_model", None)
        awaited: Any = tuner._awaited if isinstance(tuner, RoadModel) else None
        is_awaited = awaited is not None and awaited[0] == adapter_name
        with undone_if_raised(awaited[1]) if is_awaited else nullcontext():
            remapped = placed(model, adapter_name, state_dict, remap)
            check_new_values(model, adapter_name, remapped)
        if is_awaited and len(tuner.peft_config) > 1:
            warn_of_missing(model, adapter_name, remapped)
        return remapped


class Configs(dict[str, Any]):
    """Configs by adapter name, in which PEFT may look for what a row of `adapter_names` asks for, also where it is a mapping.

    PEFT's models for causal language modelling look whether a row's config has invocation tokens of aLoRA.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        """As `dict.get`; what cannot be hashed has no config."""
        return default if isinstance(key, Mapping) else super().get(key, default)
