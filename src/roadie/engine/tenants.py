"""Tenants: who trains an adapter, from which config or checkpoint; and what is kept of one to go on later.

    folder/
    ├── adapter_config.json, adapter_model.safetensors      the adapter, in PEFT's format
    └── optimiser.safetensors                               AdamW's moments "LAYER" [2, 2, n], and the number of steps

Legend: n parameters of theta (and of alpha) of a layer; along the first dimension of moments 0 is exp_avg, 1 exp_avg_sq, along
the second 0 is theta, 1 alpha.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from roadie import checkpoint
from roadie.adapter import Adapter, experts_kind, is_input, layer_of
from roadie.bank.attachment import Site
from roadie.bank.families import AdaptedLayer, Family
from roadie.checkpoint.layout import without_prefix
from roadie.checkpoint.replacement import replaced_folder
from roadie.engine.targets import adapted_layers, target_names
from roadie.errors import AdapterError, CheckpointError, ConfigError
from roadie.experts import ExpertSite
from roadie.linear import in_features, out_features, refusals
from roadie.share import Share

OPTIMISER_NAME = "optimiser.safetensors"
_NOT_TRAINED = ("modules_to_save", "layers_to_transform", "layers_pattern", "trainable_token_indices")


@dataclass(frozen=True, eq=False)
class TenantState:
    """Everything of a tenant but its gradients.

    step: of the optimiser; moments: by layer, ``[2, 2, n]``, None for zeros; share: of the pairs that are trained, None for all.
    """

    adapter: Adapter
    step: int = 0
    moments: Mapping[str, Tensor] | None = None
    share: str | None = None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder, whole or not at all; one that is there is replaced."""
        with replaced_folder(Path(folder)) as new:
            checkpoint.save(self.adapter, new)
            moments = {path: tensor.contiguous() for path, tensor in (self.moments or {}).items()}
            metadata = {"step": str(self.step), "share": self.share or ""}
            save_file(moments, new / OPTIMISER_NAME, metadata=metadata)
            with (new / OPTIMISER_NAME).open("rb+") as stream:
                os.fsync(stream.fileno())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TenantState:
        """What `save` has written; an adapter without `OPTIMISER_NAME` begins anew. Raises `CheckpointError`."""
        adapter, file = checkpoint.load(folder), Path(folder) / OPTIMISER_NAME
        if not file.exists():
            return cls(adapter)
        try:
            with safe_open(file, framework="pt", device="cpu") as stream:
                metadata = stream.metadata()
                moments = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
            return cls(adapter, int(metadata["step"]), moments or None, metadata["share"] or None)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: got a damaged file ({error}); wanted a whole one; leave it out") from error

    @classmethod
    def of(
        cls, family: Family, stacks: Sequence[Mapping[str, Tensor]], config: Mapping[str, Any], step: int
    ) -> TenantState:
        """What `Family.state` gave of an adapter of this family, or of another of the same layers; on the CPU."""
        adapter = Adapter(family.adapter_layers([stack["parameters"] for stack in stacks]), dict(config))
        moments = {
            path: torch.stack((saved["exp_avg"][index], saved["exp_avg_sq"][index])).cpu()
            for stack, saved in zip(family.stacks, stacks, strict=True)
            for index, path in enumerate(stack.paths)
        }
        share = family.layers[0].share
        return cls(adapter, step, moments, None if share is None else str(share))

    def stacks(self, family: Family) -> list[dict[str, Tensor]]:
        """As `Family.put` takes it; raises `AdapterError` where moments are missing, or do not fit."""
        return [self._stack(stack.paths) for stack in family.stacks]

    def _stack(self, paths: Sequence[str]) -> dict[str, Tensor]:
        layers = [self.adapter.layers[path] for path in paths]
        parameters = torch.stack([torch.stack((layer.theta.float(), layer.alpha.float())) for layer in layers])
        if self.moments is None:
            return {"parameters": parameters}
        try:
            moments = torch.stack([self.moments[path] for path in paths], dim=1)
        except (KeyError, RuntimeError) as error:
            raise AdapterError(f"got moments that are not those of the adapter ({error}); leave them out") from None
        return {"parameters": parameters, "exp_avg": moments[0], "exp_avg_sq": moments[1]}


Source: TypeAlias = "Mapping[str, Any] | TenantState | Adapter | str | os.PathLike[str] | Any"
"""A RoadConfig, or its words as a mapping (and ``share``); an adapter or its folder, from which training begins anew; a state."""


@dataclass(frozen=True, eq=False)
class Beginning:
    """What a tenant begins with. config: adapter_config.json, as it will be written; state: None for the identity."""

    layers: tuple[AdaptedLayer, ...]
    config: Mapping[str, Any]
    state: TenantState | None

    @classmethod
    def of(cls, model: Any, source: Source, layers: Sequence[AdaptedLayer] | None = None) -> Beginning:
        """Raises `ConfigError`, `UnsupportedLayer`, `AdapterError` or `CheckpointError` for what does not fit the model.

        layers: those of a config that is written already.
        """
        if isinstance(source, (str, os.PathLike)):
            source = checkpoint.load(source)
        if isinstance(source, Adapter):
            source = TenantState(source)
        if isinstance(source, TenantState):
            return cls(_layers_of(model, source), source.adapter.config, source)
        config = _plain(dict(source) if isinstance(source, Mapping) else source.to_dict())
        _check_config(config)
        if layers is not None:
            return cls(tuple(layers), config, None)
        found = adapted_layers(model, config)
        return cls(found, _written(model, config, found), None)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a file: no sets, no enums, no prefix of the variant."""
    variant = {"variant": without_prefix(config["variant"])} if "variant" in config else {}
    sets = {key: sorted(value) for key, value in config.items() if isinstance(value, (set, frozenset))}
    task = {"task_type": str(getattr(config.get("task_type"), "value", config.get("task_type") or "CAUSAL_LM"))}
    return {**config, **variant, **sets, **task}


def _check_config(config: Mapping[str, Any]) -> None:
    wrong = [key for key in _NOT_TRAINED if config.get(key)]
    wrong += ["bias"] if config.get("bias", "none") != "none" else []
    wrong += ["init_weights"] if config.get("init_weights") is False else []
    if wrong:
        raise ConfigError(
            f"got {', '.join(f'{key}={config[key]!r}' for key in wrong)}; wanted rotations alone, which start as the identity; "
            "leave it out"
        )


def _written(model: Any, config: Mapping[str, Any], layers: Sequence[AdaptedLayer]) -> dict[str, Any]:
    plain = {key: value for key, value in config.items() if key != "share"}
    return {
        "auto_mapping": None,
        "init_weights": True,
        "modules_to_save": None,
        **plain,
        "base_model_name_or_path": config.get("base_model_name_or_path") or getattr(model, "name_or_path", None),
        "inference_mode": True,
        "peft_type": "ROAD",
        "target_modules": target_names(model, layers),
    }


def _layers_of(model: nn.Module, state: TenantState) -> tuple[AdaptedLayer, ...]:
    """The layers of an adapter, in the order of the model, each followed by its input; then stacked experts."""
    adapter = state.adapter
    if adapter.other:
        raise AdapterError(f"got an adapter with {min(adapter.other)!r} beside its rotations; wanted rotations alone")
    modules, refused = dict(model.named_modules()), refusals(model)
    sites = ExpertSite.in_model(model) if any(map(experts_kind, adapter.layers)) else {}
    for path, layer in adapter.layers.items():
        if path in sites:
            Site.of_experts(sites[path]).check("to train", path, layer)
            continue
        module = modules.get(layer_of(path))
        width = out_features(module)
        if width is not None and is_input(path):
            width = in_features(module)
        if width != layer.out_features or layer_of(path) in refused:
            why = refused.get(layer_of(path), f"the model has {width or 'no such layer'}")
            raise AdapterError(f"got {layer.out_features} values for {path!r}: {why}; use the adapter's own base model")
    order = {path: place for place, path in enumerate([*modules, *sites])}
    share = None if state.share is None else Share.parse(state.share)
    paths = sorted(adapter.layers, key=lambda path: (order[layer_of(path)], is_input(path)))
    return tuple(
        AdaptedLayer(path, layer.out_features, layer.variant, layer.stages, share)
        for path in paths
        for layer in (adapter.layers[path],)
    )
