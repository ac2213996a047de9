"""From the moments of layers to an adapter and its report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from roadie.adapter import Adapter, LayerParameters
from roadie.errors import AdapterError, ConfigError
from roadie.fit.closed_form import Moments, best_rotation
from roadie.fit.report import Fit, LayerReport, NotFitted
from roadie.fit.settings import Settings
from roadie.linear import by_likeness
from roadie.rotation import to_parameters

OnLayer = Callable[[LayerReport], None]
"""Is told of every layer when it is fitted."""


@dataclass(frozen=True, eq=False)
class FittedLayer:
    """A layer's best rotation, as its parameters are stored, and how good it is."""

    parameters: LayerParameters
    report: LayerReport


def fit_layer(path: str, moments: Moments, settings: Settings, dtype: torch.dtype = torch.float32) -> FittedLayer:
    """The best rotation for these moments; its error is measured with the parameters rounded to `dtype`."""
    outputs = 2 * len(moments.gram)
    variant, group_size = settings.of_layer(path, outputs)
    assert group_size == moments.group_size
    rotation = best_rotation(moments, variant, settings.ridge)
    # A block of road_1 is its own mean, and equal to it bit for bit: x I + y J has equal rows.
    theta, alpha = (vector.cpu().to(dtype) for vector in to_parameters(rotation, variant))
    parameters = LayerParameters(theta, alpha, variant, group_size)
    report = _report(path, moments, parameters, settings)
    return FittedLayer(parameters, report)


def _report(path: str, moments: Moments, parameters: LayerParameters, settings: Settings) -> LayerReport:
    exact = LayerParameters(
        parameters.theta.to(moments.gram.device).double(),
        parameters.alpha.to(moments.gram.device).double(),
        parameters.variant,
        parameters.group_size,
    )
    change = math.sqrt(moments.squared_change)
    report = LayerReport(
        path=path,
        outputs=parameters.out_features,
        variant=parameters.variant.value,
        group_size=parameters.group_size,
        parameters=parameters.num_parameters,
        norm=math.sqrt(moments.squared_norm),
        change=change,
        error=math.sqrt(moments.squared_error(exact.rotation)),
        kept=False,
    )
    return replace(report, kept=change > 0 and report.share_explained >= settings.minimum_share)


def assemble(
    layers: Iterable[FittedLayer],
    modules: Iterable[str],
    settings: Settings,
    about: Mapping[str, Any],
    not_fitted: Iterable[NotFitted] = (),
    on_layer: OnLayer | None = None,
) -> Fit:
    """The adapter of the layers that are kept, in the order of their numbers; raises `AdapterError` where there is none.

    layers: may be fitted one by one as they are asked for; on_layer: is told of each then; modules: the paths of all modules
    that might be taken for a target by the end of their path; about: more keys for the adapter's config.
    """
    fitted = []
    for layer in layers:
        fitted.append(layer)
        if on_layer is not None:
            on_layer(layer.report)
    in_order = sorted(fitted, key=lambda layer: _natural(layer.report.path))
    reports = {layer.report.path: layer.report for layer in in_order}
    kept = {layer.report.path: layer.parameters for layer in in_order if layer.report.kept}
    if not kept:
        _refuse_nothing_kept(reports, settings)
    config = {
        "peft_type": "ROAD",
        "inference_mode": True,
        "target_modules": target_names(kept, modules),
        **settings.config,
        **about,
    }
    return Fit(Adapter(kept, config), reports, tuple(sorted(not_fitted, key=lambda each: _natural(each.name))))


def _refuse_nothing_kept(reports: Mapping[str, LayerReport], settings: Settings) -> None:
    best = max(reports.values(), key=lambda report: report.share_explained)
    if not any(report.change for report in reports.values()):
        raise AdapterError(
            f"got {len(reports)} targeted layers that do not differ from the base; wanted a change to fit; check that these are "
            "the tuned weights, and the targets"
        )
    raise AdapterError(
        f"got at most {best.share_explained:.2%} of a layer's change explained ({best.path}); wanted minimum_share="
        f"{settings.minimum_share:.2%} in one layer at least; lower it"
    )


def target_names(paths: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The names that PEFT takes for exactly `paths` among `modules`: last parts of their paths, or whole paths."""
    wanted = set(paths)
    names = {path.rpartition(".")[2] for path in wanted}
    named = {path for path in {*modules, *wanted} if path.rpartition(".")[2] in names}
    return sorted(names) if named == wanted else sorted(wanted)


def check_any(found: Mapping[str, object], settings: Settings, candidates: Iterable[str]) -> None:
    """Raise `ConfigError` where no layer is targeted; candidates: the linear layers there are."""
    if not found:
        targets = settings.target_modules
        names = by_likeness(targets if isinstance(targets, str) else targets[0], candidates)
        left_out = f" with exclude_modules={settings.exclude_modules!r}" if settings.exclude_modules else ""
        raise ConfigError(
            f"got target_modules={targets!r}{left_out}, which no linear layer is; wanted names of linear layers, such as "
            f"{names}"
        )


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"\.", path)]
