"""Which modules a config targets: matched as PEFT matches them, and what of a config matches nothing said."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from roadie.adapter import experts_kind, matches_end
from roadie.errors import ConfigError
from roadie.experts import experts_in
from roadie.linear import has_name, ignored_names, outside_language, without_numbers, without_refused

PATTERNS = ("variant_pattern", "group_size_pattern", "stages_pattern", "input_stages_pattern")

# Heads that PEFT adds to modules_to_save, there or not; of SEQ_CLS before it adapts a model, of the others afterwards.
_HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_HEADS = frozenset(head for heads in _HEADS_OF_TASKS.values() for head in heads)


def add_head_of_task(config: Any) -> None:
    """Put the head of the config's task into its modules_to_save, so that the head is trained whole and is no target."""
    heads = _HEADS_OF_TASKS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))


def with_names_of_all_linear(config: Any, model: nn.Module, reasons: Mapping[str, str]) -> Any:
    """`config`, whose "all-linear" becomes the paths of the linear layers that can be adapted; those left out are logged.

    Of a model that reads more than text those of its language model, unless `config` targets towers too. reasons: why layers
    cannot be adapted, by path.
    Changes `config`. Raises `ConfigError` where none is left.
    """
    before = config.target_modules
    config = _maybe_include_all_linear_layers(config, model)
    if config.target_modules is before or not config.target_modules:
        return config
    wanted = [path for path, _ in model.named_modules() if path in config.target_modules]
    are_meant = getattr(config, "target_experts", None) is not None
    outside = {} if getattr(config, "target_towers", False) else outside_language(model)
    found = without_refused(model, wanted, reasons, outside=outside, are_experts_meant=are_meant)
    config.target_modules = set(found)
    if not config.target_modules:
        raise ConfigError(
            f"got target_modules='all-linear' for {type(model).__name__}, none of whose linear layers can be adapted (see "
            "the log); wanted layers that are called and give tensors"
        )
    return config


def experts_meant(config: Any, model: nn.Module) -> frozenset[str]:
    """The paths of all stacked experts of `model`, where `config` targets experts.

    Raises `ConfigError` where there are none.
    """
    if getattr(config, "target_experts", None) is None:
        return frozenset()
    found = frozenset(experts_in(model))
    if not found:
        raise ConfigError(
            f"got target_experts={config.target_experts!r} for {type(model).__name__}, which has no stacked experts (parameters "
            "of three dimensions); wanted a mixture of experts; leave target_experts out: experts that are linear layers are "
            "targets like others"
        )
    return found


def is_target(config: Any, key: str) -> Any:
    """As PEFT matches, but the layers of `layers_to_transform` are looked for in whole paths and in bare models too.

    "all-linear" becomes whole paths, and the paths of a bare model begin with the list of layers; PEFT passes over the layers
    of the former, and finds none in the latter. Stacked experts that the config may mean are targets, whatever it names.
    """
    if experts_kind(key) is not None:
        return False  # part of an adapted experts module
    if key in getattr(config, "_experts", ()):
        config = copy.copy(config)
        config.target_modules = {key}
    layers = _layers(config)
    if layers is None or isinstance(config.target_modules, str):
        return check_target_module_exists(config, key)
    everywhere = copy.copy(config)
    everywhere.layers_to_transform = everywhere.layers_pattern = None
    found = check_target_module_exists(everywhere, key)
    return layer_index(key, config.layers_pattern) in layers if found is True else found


def layer_index(path: str, layers_pattern: Any) -> int | None:
    """The index of the layer that a module lies in: the first number in its path, or that after a list of this name."""
    names = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or ())
    for name in names or [r"[^.]+"]:
        found = re.match(rf"(?:.*?\.)??{name}\.(\d+)\.", path)
        if found is not None:
            return int(found.group(1))
    return None


def _layers(config: Any) -> Collection[int] | None:
    layers = getattr(config, "layers_to_transform", None)
    if layers is None or layers == []:
        return None
    return [layers] if isinstance(layers, int) else layers


def warn_of_what_matches_nothing(config: Any, model: nn.Module, targeted: Collection[str]) -> None:
    """Warn, by name, of everything in a config that no module of `model` has, where `targeted` are the paths that some have.

    Where nothing is targeted at all PEFT raises.
    """
    if targeted:
        for said in (*_unmatched_names(config, model), *_unmatched_layers(config, model), *_patterns(config, targeted)):
            warnings.warn(said, RuntimeWarning, stacklevel=2)


def warn_of_layers_beyond(config: Any, model: nn.Module, targeted: Collection[str]) -> None:
    """Warn of linear layers that differ from targeted ones in numbers of their paths alone, unless `config` chooses layers."""
    if isinstance(config.target_modules, str) or _layers(config) is not None:
        return
    kinds = {without_numbers(path) for path in targeted}
    beyond = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path not in targeted and without_numbers(path) in kinds
    ]
    if beyond:
        warnings.warn(
            f"The config names the layers of another model: {len(targeted)} layers are adapted, and {len(beyond)} of the same "
            f"kinds are not, such as {beyond[0]!r}. For all of them set its target_modules to ends of paths, or 'all-linear'.",
            RuntimeWarning,
            stacklevel=2,
        )


def _unmatched_names(config: Any, model: nn.Module) -> Iterator[str]:
    for key, matches in (
        ("target_modules", has_name),
        ("exclude_modules", has_name),
        ("modules_to_save", str.endswith),
    ):
        names = getattr(config, key, None)
        if names is None or isinstance(names, str):
            continue
        own = set(names) - (_HEADS if key == "modules_to_save" else set())
        said = ignored_names(key, sorted(own), model, matches)
        if said is not None:
            yield said


def _unmatched_layers(config: Any, model: nn.Module) -> Iterator[str]:
    layers, pattern = _layers(config), getattr(config, "layers_pattern", None)
    if layers is None or isinstance(config.target_modules, str):
        return
    paths = [path for path, _ in model.named_modules()]
    for name in [] if not pattern or isinstance(pattern, str) else pattern:
        if not any(layer_index(path, name) is not None for path in paths):
            yield f"The following layers_pattern matches nothing and was ignored: {name!r}."
    there = sorted({index for path in paths if (index := layer_index(path, pattern)) is not None})
    missing = sorted(set(layers).difference(there))
    if missing:
        span = f"layers {there[0]} to {there[-1]}" if there else "no numbered layers"
        yield f"The following layers_to_transform do not exist and were ignored: {missing}. There are {span}."


def _patterns(config: Any, targeted: Collection[str]) -> Iterator[str]:
    """As PEFT says it of LoRA's patterns."""
    layers = [path for path in targeted if experts_kind(path) is None]
    for key in PATTERNS:
        paths = layers if key == "input_stages_pattern" else targeted  # the inputs of experts are never rotated
        unused = [p for p in getattr(config, key, None) or {} if not any(matches_end(p, path, key) for path in paths)]
        if unused:
            yield (
                f"The following {key} keys did not match any targeted module and were ignored: {unused}. A pattern must "
                "match the end of a module's path, from a dot on."
            )
