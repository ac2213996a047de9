"""Which layers of a model a job adapts, found as PEFT finds them, but without PEFT.

"all-linear" is every linear layer but the output embeddings; a list holds names or ends of module paths; any other text is
a regular expression for whole paths. Linear layers are torch.nn.Linear (subclasses too) and transformers' Conv1D.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from roadie.adapter import INPUT_SUFFIX, is_input, resolve_layer, rotates_input
from roadie.bank.families import AdaptedLayer
from roadie.errors import ConfigError, UnsupportedLayer
from roadie.share import Share
from roadie.training.recipe import ALL_LINEAR, Recipe

_SETTINGS = ("variant", "group_size", "adapt_group_size", "stages", "input_stages")


def adapted_layers(model: Any, recipe: Recipe) -> tuple[AdaptedLayer, ...]:
    """The layers that `recipe` adapts, in the order of the model, each followed by its input where that is rotated too.

    Raises `ConfigError` where nothing is targeted, a group size does not divide a layer, or the share has no pair;
    `UnsupportedLayer` where something other than a linear layer is targeted.
    """
    config = {key: getattr(recipe, key) for key in _SETTINGS}
    share = None if recipe.share is None else Share.parse(recipe.share)
    modules = _targeted(model, recipe.target_modules)
    if not modules:
        raise ConfigError(
            f"got targets={_shown(recipe.target_modules)}, which no module of the model has; wanted names of linear layers, "
            f"such as {_shown(_some_names(model))}"
        )
    found = []
    for path, module in modules.items():
        widths = {path: _out_features(path, module)}
        if rotates_input(config, path):
            widths[f"{path}{INPUT_SUFFIX}"] = _in_features(module)
        found += [
            AdaptedLayer(site, width, *resolve_layer(config, site, width), share) for site, width in widths.items()
        ]
    _check_share(share, found)
    return tuple(found)


def _check_share(share: Share | None, layers: Sequence[AdaptedLayer]) -> None:
    if share is not None and not any(share.pairs(layer.out_features // 2) for layer in layers):
        raise ConfigError(
            f"got share={str(share)!r}, which has no pair in any layer; wanted at most as many shares as the largest layer has "
            f"pairs ({max(layer.out_features for layer in layers) // 2})"
        )


def target_names(model: nn.Module, layers: Sequence[AdaptedLayer]) -> list[str]:
    """The shortest list of names that PEFT takes for exactly these layers: last parts of their paths, or whole paths."""
    paths = {layer.path for layer in layers if not is_input(layer.path)}
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if set(_named(model, names)) == paths else sorted(paths)


def _targeted(model: Any, targets: str | tuple[str, ...]) -> dict[str, nn.Module]:
    if targets == ALL_LINEAR:
        output = model.get_output_embeddings()
        return {path: m for path, m in model.named_modules() if _is_linear(m) and m is not output}
    if isinstance(targets, str):
        return {path: module for path, module in model.named_modules() if re.fullmatch(targets, path)}
    return _named(model, targets)


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    ends = tuple(f".{name}" for name in names)
    return {path: module for path, module in model.named_modules() if path in names or path.endswith(ends)}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _out_features(path: str, module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return int(module.nf)
    raise UnsupportedLayer(
        f"got target {path}, a {type(module).__name__}; wanted torch.nn.Linear or transformers' Conv1D; leave it out of targets"
    )


def _in_features(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else int(module.nx)  # type: ignore[arg-type]


def _some_names(model: nn.Module) -> list[str]:
    return sorted({path.rpartition(".")[2] for path, module in model.named_modules() if _is_linear(module)})[:8]


def _shown(names: str | Sequence[str]) -> str:
    return repr(names if isinstance(names, str) else list(names))
