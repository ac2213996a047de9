"""Names of adapters in a model: which of them PEFT's files could not tell from parts of a module path.

When PEFT saves adapter A of a model, it drops every tensor whose key has the name of another adapter between two dots or at
its end: with an adapter named "mlp" beside A, all that A has below a module "mlp" would be left out. From the keys that stay it
takes A's own name off, as the last part or the last but one, also where that is the name of a module that was trained whole. A
name by which no adapter of the model loses anything is allowed, whatever the modules are called.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from roadie.adapter import check_adapter_name
from roadie.errors import ConfigError
from roadie.tuner.rotating import RoadLayer


class _Tensors(NamedTuple):
    """Tensors that lie at one place, and the adapters that have such: keys in the model, and those in the file that differ."""

    path: str
    parts: frozenset[str]
    adapters: Collection[str]
    saved_as: Collection[str] = ()


def check_name(adapter_name: str, module_paths: Iterable[str] = (), holder: type[nn.Module] = nn.ParameterDict) -> None:
    """Raise `ConfigError` unless the name is one that adapters of a model with modules at `module_paths` may have.

    holder: torch's class that holds an adapter's parameters, which must have no attribute of that name.
    """
    check_adapter_name(adapter_name, module_paths)
    if hasattr(holder(), adapter_name):
        raise ConfigError(
            f"got adapter name {adapter_name!r}, which torch.nn.{holder.__name__} uses for itself; wanted another name; try "
            f"'my_{adapter_name}'"
        )


def check_names_in(model: nn.Module, configs: Mapping[str, Any], new_name: str) -> None:
    """Raise `ConfigError` where saving an adapter of the model would lose tensors because of an adapter's name.

    model: with all of its adapters in it, `new_name` the last one; configs: theirs, by name.
    """
    names = frozenset(configs)
    for tensors in _tensors(model, configs):
        for name in sorted(names & tensors.parts):
            losers = [adapter for adapter in tensors.adapters if adapter != name]
            if losers:
                raise _clash(name, tensors.path, losers[0], new_name)
        for key in tensors.saved_as:
            own = names.intersection(tensors.adapters, key.split(".")[-2:])
            if own:
                raise _clash(min(own), tensors.path, min(own), new_name)


def _clash(name: str, path: str, loser: str, new_name: str) -> ConfigError:
    todo = f"try 'my_{name}'"
    if name != new_name:
        todo = f"save {name!r}, delete it and load it again under another name, such as 'my_{name}', and then add {new_name!r}"
    return ConfigError(
        f"got adapter name {name!r}, which is a part of the module path {path}; wanted a name that no module with tensors of "
        f"{loser!r} has, because PEFT's save_pretrained takes such parts for names and would lose tensors of {loser!r}; {todo}. "
        "The model was not changed."
    )


def _tensors(model: nn.Module, configs: Mapping[str, Any]) -> Iterator[_Tensors]:
    for path, module in model.named_modules():
        if isinstance(module, RoadLayer):
            yield _Tensors(path, frozenset([*path.split("."), *module.adapter_layer_names]), set(module.road_theta))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            for name in sorted(module._adapters):
                keys = module.adapter_state_dict_load_map(name)  # in the file -> in the model
                yield _trained_whole(path, name, keys.values(), [f"{path}.{key}" for key in keys])
    for name, config in configs.items():
        for key in _biases(model, getattr(config, "bias", "none")):
            yield _trained_whole(key, name, (), [key])


def _trained_whole(path: str, adapter: str, below: Collection[str], saved_as: Collection[str]) -> _Tensors:
    parts = [part for key in (path, *below) for part in key.split(".")]
    return _Tensors(path, frozenset(parts), [adapter], saved_as)


def _biases(model: nn.Module, trained: str) -> list[str]:
    """The keys of the biases that an adapter of this `bias` is saved with."""
    if trained == "none":
        return []
    if trained == "all":
        return [key for key, _ in model.named_parameters() if key.rpartition(".")[2] == "bias"]
    layers = [path for path, module in model.named_modules() if isinstance(module, RoadLayer)]
    return [f"{path}.base_layer.bias" for path in layers]
