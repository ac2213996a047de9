"""Names of layers: ends of module paths, at a dot; and what to say of those that no module has.

Mixtures of experts may hold the weights of all experts in one parameter of three dimensions, which has the name that a layer
had elsewhere. It is no layer, and is not adapted.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from torch import nn

_SHOWN = 5
_OFFERED = 8


def has_name(path: str, name: str) -> bool:
    """Whether `name` is the path, or the end of it from a dot on."""
    return path == name or path.endswith(f".{name}")


def unmatched_names(
    names: Iterable[str], model: nn.Module, matches: Callable[[str, str], bool] = has_name
) -> dict[str, str]:
    """Those of `names` that no module of `model` has, or that parameters of experts have too, with what is there instead."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    stacked = stacked_experts(model)
    found = {}
    for name in names:
        is_module = any(matches(path, name) for path in paths)
        of_experts = [path for path in stacked if has_name(path, name)]
        if of_experts:
            also = "also names" if is_module else "is no module, but"
            found[name] = f"{also} a parameter of many experts ({of_experts[0]}), which is not adapted"
        elif not is_module:
            near = nearest(name, paths)
            found[name] = f"matches no module (nearest: {', '.join(near)})" if near else "matches no module"
    return found


def by_likeness(name: str, paths: Iterable[str]) -> list[str]:
    """Some of the last parts of `paths`, those first that are spelled most like the last part of `name`."""
    end, ends = name.rpartition(".")[2], {path.rpartition(".")[2] for path in paths}
    likeness = {one: difflib.SequenceMatcher(None, end, one).ratio() for one in ends}
    return sorted(ends, key=lambda one: (-likeness[one], one))[:_OFFERED]


def stacked_experts(model: nn.Module) -> list[str]:
    """The parameters of `model` that hold the weights of many experts each."""
    return [path for path, p in model.named_parameters() if p.dim() == 3 and "expert" in path.rpartition(".")[0]]


def nearest(name: str, paths: Iterable[str]) -> list[str]:
    """The ends of `paths`, of as many parts as `name` has, that look most like it."""
    parts = name.count(".") + 1
    ends = {".".join(path.split(".")[-parts:]) for path in paths if path}
    return difflib.get_close_matches(name, sorted(ends), n=_SHOWN, cutoff=0.5)
