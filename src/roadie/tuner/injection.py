"""Adding an adapter to a model: planned and checked first, taken back whole if anything raises."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from roadie.adapter import INPUT_SUFFIX, experts_kind, resolve_layer, rotates_input
from roadie.errors import ConfigError, UnsupportedLayer
from roadie.experts import ExpertSite, check_group_sizes, refusal
from roadie.linear import refusals, unpaired
from roadie.tuner.layer import check_sizes, linear_features
from roadie.tuner.rotating import RoadLayer, check_variant, group_sizes_of
from roadie.tuner.snapshot import Snapshot, undone_if_raised
from roadie.tuner.targeting import (
    PATTERNS,
    experts_meant,
    warn_of_layers_beyond,
    warn_of_what_matches_nothing,
    with_names_of_all_linear,
)

logger = logging.getLogger("roadie")

TakesBack = Callable[[], None]


@dataclass(frozen=True)
class Target:
    """One site that will be adapted: its path, the module (or projection of experts) there, and the config that holds there."""

    path: str
    module: object
    config: Any
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Plan:
    """What an injection will do, found without changing the model; target_modules: those of the config, resolved.

    experts: the paths of stacked experts that the config may mean.
    """

    model: nn.Module
    target_modules: Any
    targets: tuple[Target, ...]
    experts: frozenset[str] = frozenset()

    @classmethod
    def make(
        cls,
        tuner: BaseTuner,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor] | None = None,
    ) -> Plan:
        """Find the modules that `config` targets in `model` and how each will be adapted; raises where one cannot be."""
        trial = tuner._prepare_adapter_config(copy.deepcopy(config), tuner.get_model_config(model))
        if getattr(trial, "target_modules", None) == DUMMY_TARGET_MODULES:
            return cls(model, trial.target_modules, ())
        reasons = refusals(model)
        trial._experts = experts_meant(trial, model)
        trial = with_names_of_all_linear(trial, model, {**unpaired(model), **reasons})
        paths = _paths_in(state_dict, tuner.prefix) if state_dict is not None else None
        targets: list[Target] = []
        for path, module in _candidates(model):
            if not (path in paths if paths is not None else _matches(tuner, trial, path)):
                continue
            if path in trial._experts:
                targets += _targets_of_experts(model, path, module, trial)
            else:
                targets.append(_target(model, path, module, trial, reasons.get(path)))
        return cls(model, trial.target_modules, tuple(targets), trial._experts)

    def warn(self, config: Any, *, was_read: bool) -> None:
        """Warn of names, layers and patterns of `config` that the model does not have, and of modules of several names.

        was_read: the config names the layers of a model that was adapted before; then of layers that it knows nothing of.
        """
        paths = [target.path for target in self.targets]
        self._warn_of_aliases()
        self._warn_of_inputs(config)
        warn_of_what_matches_nothing(config, self.model, paths)
        if was_read:
            warn_of_layers_beyond(config, self.model, paths)

    def _warn_of_inputs(self, config: Any) -> None:
        """Say that the inputs of stacked experts are left alone where those of all layers are to be rotated."""
        experts = [target.path for target in self.targets if experts_kind(target.path) is not None]
        if experts and getattr(config, "input_stages", None):
            logger.warning(
                "input_stages leaves the inputs of stacked experts alone, such as that of %s (%d in all)",
                experts[0],
                len(experts),
            )

    def _warn_of_aliases(self) -> None:
        """Say where one module has several targeted names: PEFT replaces it under the first alone."""
        first_names: dict[int, str] = {}
        for target in self.targets:
            first = first_names.setdefault(id(target.module), target.path)
            if first != target.path:
                logger.warning(
                    "%r and %r are one module; only the first name is adapted, calls through the second are not rotated",
                    first,
                    target.path,
                )


def mark_shared_weights(model: nn.Module) -> None:
    """Tell each adapted layer whether another module of the model uses the same weight (tied embeddings)."""
    users: dict[int, set[int]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), set()).add(id(module))
    for module in model.modules():
        if isinstance(module, RoadLayer):
            base = module.get_base_layer()
            base._roadie_weight_is_shared = len(users.get(id(base._parameters.get("weight")), ())) > 1


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that may be adapted: all but the root and what lies inside a tuner layer."""
    inside = "."  # what lies inside a layer comes right after it
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = path + "."
        yield path, module


def _matches(tuner: BaseTuner, config: Any, path: str) -> bool:
    result = tuner._check_target_module_exists(config, path)
    return bool(result) and not isinstance(result, _ExcludedModule)


def _paths_in(state_dict: dict[str, Tensor], prefix: str) -> set[str]:
    return {key.rsplit("." + prefix, 1)[0].removeprefix("_orig_mod.") for key in with_modules_alone(state_dict)}


def with_modules_alone(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of the parameters of adapters, those of experts as if they belonged to the experts module itself."""
    named = {key: key.rpartition(".road_")[0] for key in state_dict}
    return {
        f"{path.rpartition('.')[0]}{key.removeprefix(path)}" if experts_kind(path) else key: state_dict[key]
        for key, path in named.items()
    }


def _target(model: nn.Module, path: str, module: nn.Module, config: Any, refused: str | None) -> Target:
    base = base_of(module)
    try:
        if refused is not None:
            raise UnsupportedLayer(f"{refused}; put it into exclude_modules")
        in_features, out_features = linear_features(base, quantization_backend(base, model))
        resolved = layer_config(config, path, in_features, out_features)
        check_sizes(resolved, in_features, out_features)
    except UnsupportedLayer as error:
        raise UnsupportedLayer(f"Target module {base} is not supported. At {path!r}: {error}") from None
    except ConfigError as error:
        adapting = "" if out_features % 2 or in_features % 2 else ", or set adapt_group_size=True"
        raise ConfigError(f"{error} Module: {path!r}; or leave it out with exclude_modules{adapting}.") from None
    return Target(path, module, resolved, in_features, out_features)


def _targets_of_experts(model: nn.Module, path: str, experts: nn.Module, config: Any) -> Iterator[Target]:
    refused = refusal(experts, model)
    if refused is not None:
        raise UnsupportedLayer(f"Experts at {path!r} are not supported: {refused}.")
    for site in ExpertSite.of(experts, config.target_experts):
        where = f"{path}.{site.name}"
        resolved = layer_config(config, where, 0, site.out_features)
        check_variant(resolved.variant)
        check_group_sizes(site, group_sizes_of(resolved))
        yield Target(where, site, resolved, 0, site.out_features)


def layer_config(config: Any, path: str, in_features: int, out_features: int) -> Any:
    """`config` with the variant and the group sizes that hold for one module."""
    rules = (*PATTERNS, "adapt_group_size")
    if not any(getattr(config, name, None) for name in rules):
        return config
    names = ("variant", "group_size", "stages", "input_stages", *rules)
    settings = {name: getattr(config, name, None) for name in names}
    variant, stages = resolve_layer(settings, path, out_features)
    resolved = copy.copy(config)
    resolved.variant, resolved.stages = variant.value, list(stages) if len(stages) > 1 else None
    resolved.group_size, resolved.input_stages = stages[0], None
    if rotates_input(settings, path):
        resolved.input_stages = list(resolve_layer(settings, path + INPUT_SUFFIX, in_features)[1])
    return resolved


def base_of(module: nn.Module) -> nn.Module:
    """The layer that a tuner layer wraps; the module itself where it is none."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def quantization_backend(module: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """PEFT's backend for a quantised layer; None for a plain one."""
    try:
        return resolve_quantization_backend(base_of(module), **get_quantization_kwargs(model))
    except ValueError:  # torchao, quantised by hand: the settings that merging needs are not known
        return ForwardOnlyQuantizationBackend("torchao (quantised without a transformers quantization config)")


@contextmanager
def all_or_nothing(tuner: BaseTuner, model: nn.Module, adapter_name: str) -> Iterator[TakesBack]:
    """If the block raises, put the model, its parameters' requires_grad and the tuner's books back as they were.

    If not, parameters of a model that had adapters before stay trainable or frozen, whatever their names. Gives what would still
    take the adapter back.
    """
    before = Snapshot.of(model, tuner.peft_config[adapter_name].__dict__, tuner.__dict__)
    had_adapters = any(isinstance(module, BaseTunerLayer) for module in model.modules())

    def take_back() -> None:
        before.restore()
        tuner.peft_config.pop(adapter_name, None)
        if not hasattr(model, "peft_config"):
            model.__dict__.pop("_hf_peft_config_loaded", None)  # transformers' add_adapter sets it before it adds one

    with undone_if_raised(take_back):
        yield take_back
        if had_adapters:
            before.restore_trainable()
