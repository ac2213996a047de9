"""Which layers of a model an adapter adapts, found as PEFT finds them, but without PEFT.

"all-linear" is every linear layer of the language model but the output embeddings and those that cannot be adapted
(`roadie.linear`), with `target_towers` also those of towers of pictures and sounds; a list holds names or ends of module paths;
any other text is a regular expression for whole paths. Linear layers are torch.nn.Linear (subclasses too) and transformers'
Conv1D. With `target_experts` all stacked experts are adapted too, but those that are excluded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from roadie.adapter import INPUT_SUFFIX, experts_kind, is_input, resolve_layer, rotates_input
from roadie.bank.families import AdaptedLayer
from roadie.errors import ConfigError, UnsupportedLayer
from roadie.experts import ExpertSite, check_group_sizes, experts_in, refusal
from roadie.linear import (
    by_likeness,
    check_named,
    has_name,
    ignored_names,
    in_features,
    is_linear,
    out_features,
    outside_language,
    without_refused,
)
from roadie.share import Share

ALL_LINEAR = "all-linear"


def adapted_layers(
    model: Any, config: Mapping[str, Any], modules: Mapping[str, nn.Module] | None = None
) -> tuple[AdaptedLayer, ...]:
    """The layers that `config` adapts, in the order of the model, each followed by its input where that is rotated too.

    config: in the words of adapter_config.json, and ``share``; modules: what `targeted` gave for what it targets and excludes;
    None: it is asked.
    Raises what `targeted` raises, and `ConfigError` where a group size does not divide a layer, or the share has no pair;
    `UnsupportedLayer` where something other than a linear layer is targeted.
    """
    share = None if config.get("share") is None else Share.parse(config["share"])
    if modules is None:
        wanted, excluded = config.get("target_modules") or ALL_LINEAR, config.get("exclude_modules") or None
        modules = targeted(model, wanted, excluded, with_towers=config.get("target_towers", False))
    found = []
    for path, module in modules.items():
        widths = {path: _out_features(path, module)}
        if rotates_input(config, path):
            widths[f"{path}{INPUT_SUFFIX}"] = in_features(module)
        found += [
            AdaptedLayer(site, width, *resolve_layer(config, site, width), share) for site, width in widths.items()
        ]
    found += _of_experts(model, config)
    _check_share(share, found)
    return tuple(found)


def _of_experts(model: nn.Module, config: Mapping[str, Any]) -> Iterator[AdaptedLayer]:
    """The sites of stacked experts that `config` adapts."""
    kind = config.get("target_experts")
    if kind is None:
        return
    if config.get("share") is not None:
        raise ConfigError(
            f"got share={config['share']!r} and target_experts={kind!r}; wanted one: experts have no shares"
        )
    excluded = _chosen(model, config["exclude_modules"]) if config.get("exclude_modules") else {}
    found = {path: experts for path, experts in experts_in(model).items() if path not in excluded}
    if not found:
        raise ConfigError(f"got target_experts={kind!r} for a model without stacked experts; leave it out")
    for path, experts in found.items():
        refused = refusal(experts, model)
        if refused is not None:
            raise UnsupportedLayer(f"Experts at {path!r} are not supported: {refused}.")
        for site in ExpertSite.of(experts, kind):
            where = f"{path}.{site.name}"
            variant, stages = resolve_layer(config, where, site.out_features)
            check_group_sizes(site, stages)
            yield AdaptedLayer(where, site.out_features, variant, stages)


def _check_share(share: Share | None, layers: Sequence[AdaptedLayer]) -> None:
    if share is not None and not any(share.pairs(layer.out_features // 2) for layer in layers):
        raise ConfigError(
            f"got share={str(share)!r}, which has no pair in any layer; wanted at most as many shares as the largest layer has "
            f"pairs ({max(layer.out_features for layer in layers) // 2})"
        )


def target_names(model: nn.Module, layers: Sequence[AdaptedLayer]) -> list[str]:
    """The shortest list of names that PEFT takes for exactly these layers: last parts of their paths, or whole paths."""
    paths = {layer.path for layer in layers if not is_input(layer.path) and experts_kind(layer.path) is None}
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if set(_named(model, names)) == paths else sorted(paths)


def targeted(
    model: Any,
    targets: str | Collection[str],
    excluded: str | Collection[str] | None = None,
    *,
    with_towers: bool = False,
) -> dict[str, nn.Module]:
    """The modules of `model` that `targets` mean and `excluded` does not, by path; names that match nothing are warned of.

    Raises `ConfigError` where they mean none, `UnsupportedLayer` where they name a layer that cannot be adapted.
    """
    check_any(model, targets, "targets")
    left_out = {} if excluded is None else _chosen(model, excluded)
    found = _targeted(model, targets, left_out, with_towers=with_towers)
    if not found:
        raise ConfigError(f"got exclude={_shown(excluded or ())}, which leaves no target; wanted one at least")
    for setting, names in (("targets", targets), ("names to exclude", excluded)):
        said = None if names is None or isinstance(names, str) else ignored_names(setting, names, model)
        if said is not None:
            warnings.warn(said, RuntimeWarning, stacklevel=2)
    return found


def check_any(model: nn.Module, targets: str | Collection[str], setting: str) -> None:
    """Raise `ConfigError` where `targets` mean no module at all; setting: what they are called where they were given."""
    if targets != ALL_LINEAR and not _chosen(model, targets):
        raise ConfigError(
            f"got {setting}={_shown(targets)}, which no module of the model has; wanted names of linear layers, such as "
            f"{_shown(_some_names(model, targets if isinstance(targets, str) else next(iter(targets))))}"
        )


def _targeted(
    model: Any, targets: str | Collection[str], left_out: Collection[str], *, with_towers: bool
) -> dict[str, nn.Module]:
    if targets == ALL_LINEAR:
        output = model.get_output_embeddings()
        linear = {path: m for path, m in model.named_modules() if is_linear(m) and m is not output}
        paths = without_refused(model, linear, outside={} if with_towers else outside_language(model))
        return {path: linear[path] for path in paths if path not in left_out}
    found = {path: module for path, module in _chosen(model, targets).items() if path not in left_out}
    check_named(model, found)
    return found


def _chosen(model: nn.Module, names: str | Collection[str]) -> dict[str, nn.Module]:
    """The modules that an expression matches, or that have one of the names."""
    if isinstance(names, str):
        return {path: module for path, module in model.named_modules() if re.fullmatch(names, path)}
    return _named(model, names)


def _named(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if any(has_name(path, name) for name in names)}


def _out_features(path: str, module: nn.Module) -> int:
    width = out_features(module)
    if width is None:
        raise UnsupportedLayer(
            f"got target {path}, a {type(module).__name__}; wanted torch.nn.Linear or transformers' Conv1D; leave it out of "
            "targets"
        )
    return width


def _some_names(model: nn.Module, meant: str) -> list[str]:
    return by_likeness(meant, (path for path, module in model.named_modules() if is_linear(module)))


def _shown(names: str | Collection[str]) -> str:
    return repr(names if isinstance(names, str) else list(names))
