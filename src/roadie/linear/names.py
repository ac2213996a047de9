"""Names of layers: ends of module paths, at a dot; and what to say of those that no module has.

Mixtures of experts may hold the weights of all experts in one parameter of three dimensions, which has the name that a layer
had elsewhere. It is no layer; `roadie.experts` adapts it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

from torch import nn

_SHOWN = 5
_OFFERED = 8


def without_numbers(path: str) -> str:
    """What layers that differ by numbers alone have in common: the path with ``*`` for each number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def has_name(path: str, name: str) -> bool:
    """Whether `name` is the path, or the end of it from a dot on."""
    return path == name or path.endswith(f".{name}")


def ignored_names(
    setting: str, names: Iterable[str], model: nn.Module, matches: Callable[[str, str], bool] = has_name
) -> str | None:
    """What to say of those of `names`, given for `setting`, that mean nothing in `model`; None where all mean something.

    Named are those that no module has, with the nearest names there are, and those that parameters of experts have.
    """
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    stacked = stacked_experts(model)
    found = [_said_of(name, any(matches(path, name) for path in paths), paths, stacked) for name in names]
    said = "; ".join(part for part in found if part)
    if not said:
        return None
    experts = (
        f" The experts of this model are parameters ({stacked[0]}): target_experts is about them." if stacked else ""
    )
    return f"The following {setting} were ignored: {said}.{experts}"


def _said_of(name: str, is_module: bool, paths: Iterable[str], stacked: Iterable[str]) -> str | None:
    of_experts = next((path for path in stacked if has_name(path, name)), None)
    if of_experts is not None:
        return (
            f"{name!r} {'also names' if is_module else 'is no module, but'} a parameter of many experts ({of_experts})"
        )
    if is_module:
        return None
    near = nearest(name, paths)
    return f"{name!r} matches no module" + (f" (nearest: {', '.join(near)})" if near else "")


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
    ends = {".".join(path.split(".")[-parts:]) for path in paths if not path.rpartition(".")[2].isdigit()} - {""}
    return difflib.get_close_matches(name, sorted(ends), n=_SHOWN, cutoff=0.5)
