"""Layers that cannot be adapted, with the reason: refused where they are named, left out where all linear layers are meant."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import nn

from roadie.errors import UnsupportedLayer
from roadie.linear.kinds import out_features
from roadie.linear.names import stacked_experts, without_numbers
from roadie.linear.outputs import wrong_output
from roadie.linear.reads import weight_reads

logger = logging.getLogger("roadie")


def refusals(model: nn.Module) -> dict[str, str]:
    """Path in `model` -> why a rotation of what the layer there gives has no effect, or no meaning. Changes nothing."""
    found = {
        path: f"{where} reads its weight where it could call it, so that a rotation of its output would have no effect there"
        for path, where in weight_reads(model).items()
    }
    for path, module in model.named_modules(remove_duplicate=False):
        wrong = wrong_output(module)
        if wrong is not None:
            found[path] = wrong
    return found


def unpaired(model: nn.Module) -> dict[str, str]:
    """Path in `model` -> what to say of a linear layer with an odd number of outputs, where all linear layers are meant.

    Such are the gates of shared experts. Naming one is refused with the group size.
    """
    widths = {path: out_features(module) or 0 for path, module in model.named_modules(remove_duplicate=False)}
    return {path: f"an odd number of outputs ({width}) cannot be paired" for path, width in widths.items() if width % 2}


def check_named(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise `UnsupportedLayer`, naming the layer and the reason, where one of `paths` cannot be adapted."""
    reasons = refusals(model)
    for path in paths:
        if path in reasons:
            raise UnsupportedLayer(
                f"got target {path!r}: {reasons[path]}; wanted layers that are called; leave it out of the targets"
            )


def without_refused(
    model: nn.Module,
    paths: Iterable[str],
    reasons: Mapping[str, str] | None = None,
    *,
    outside: Mapping[str, str] | None = None,
    are_experts_meant: bool = False,
) -> list[str]:
    """Those of `paths`, all linear layers of `model`, that can be adapted; one log line names what is left out.

    reasons: by path; None: what `refusals` and `unpaired` say of the model. outside: whole parts of the model that are not
    meant, with the reason. are_experts_meant: whether stacked experts are adapted.
    """
    reasons = {**unpaired(model), **refusals(model)} if reasons is None else reasons
    outside = outside or {}
    inside = tuple(f"{part}." for part in outside)
    wanted = [path for path in paths if path not in outside and not path.startswith(inside)]
    stacked = [] if are_experts_meant else stacked_experts(model)
    experts = dict.fromkeys(
        stacked, "a parameter that holds the weights of many experts is no layer (target_experts adapts it)"
    )
    _say_left_out({**{path: reasons[path] for path in wanted if path in reasons}, **experts, **outside})
    return [path for path in wanted if path not in reasons]


def _say_left_out(reasons: Mapping[str, str]) -> None:
    """Log what was left out: for each reason the paths, those that differ by numbers alone as one."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for path, reason in reasons.items():
        kinds.setdefault(reason, {}).setdefault(without_numbers(path), []).append(path)
    if kinds:
        parts = [f"{', '.join(_counted(paths))}: {reason}" for reason, paths in kinds.items()]
        logger.warning("'all-linear' leaves out: %s", "; ".join(parts))


def _counted(alike: Mapping[str, list[str]]) -> list[str]:
    return [f"{kind} ({len(paths)})" if len(paths) > 1 else paths[0] for kind, paths in alike.items()]
