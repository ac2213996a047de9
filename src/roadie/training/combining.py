"""Adapters in folders combined, compared and converted, into folders that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from roadie import checkpoint
from roadie.adapter import Adapter
from roadie.adapter_algebra import check_one_base, compose, convert, distance, interpolate, inverse, power, subtract
from roadie.adapter_algebra.operations import mean_adapters
from roadie.errors import ConfigError
from roadie.lora import save_lora, to_lora
from roadie.training.adapters import adapter_folder
from roadie.training.folders import check_free, whole_folder
from roadie.training.models import ModelSource, as_source, load_model

Combine = Callable[[Sequence[Adapter]], Adapter]


@dataclass(frozen=True)
class Combined:
    """What was written: an adapter and what it was made of."""

    output: str
    adapters: tuple[str, ...]
    base_model: str | None
    variant: str
    group_sizes: tuple[int, ...]
    layers: int
    parameters: int


@dataclass(frozen=True)
class Converted(Combined):
    """What was written, and what it lost: its chordal distance to what it was, the share of the change, pairs that mirrored."""

    is_exact: bool
    distance: float
    share_lost: float
    mirrored_pairs: int
    share_lost_by_layer: dict[str, float]


@dataclass(frozen=True)
class LoraWritten:
    """A LoRA adapter that was written: ranks and relative errors by layer, and the error over all of them."""

    output: str
    adapter: str
    base_model: str
    parameters: int
    relative_error: float
    ranks: dict[str, int]
    errors: dict[str, float]


@dataclass(frozen=True)
class Distances:
    """How far each adapter is from each other and from the base model, which changes nothing."""

    metric: str
    names: tuple[str, ...]
    distances: tuple[tuple[float, ...], ...]


def compose_to_disk(paths: Sequence[str], output: Path, **how: Any) -> Combined:
    """The adapters in `paths`, applied in this order, as one adapter; raises `RoadieError` where one does not fit.

    how, here and below: `overwrite` and `allow_pickle`, both off.
    """
    return _to_disk(lambda adapters: reduce(lambda inner, outer: compose(outer, inner), adapters), paths, output, **how)


def inverse_to_disk(path: str, output: Path, **how: Any) -> Combined:
    """The adapter that undoes the one in `path`."""
    return _to_disk(lambda adapters: inverse(adapters[0]), [path], output, **how)


def power_to_disk(path: str, exponent: float, output: Path, **how: Any) -> Combined:
    """The adapter in `path` at the strength `exponent`."""
    return _to_disk(lambda adapters: power(adapters[0], exponent), [path], output, **how)


def interpolate_to_disk(start: str, end: str, t: float, output: Path, **how: Any) -> Combined:
    """The adapter at `t` on the way from the one in `start` (0) to the one in `end` (1)."""
    return _to_disk(lambda adapters: interpolate(adapters[0], adapters[1], t), [start, end], output, **how)


def mean_to_disk(
    paths: Sequence[str],
    weights: Sequence[float] | None,
    output: Path,
    *,
    magnitude_corrected: bool = False,
    **how: Any,
) -> Combined:
    """The mean of the adapters in `paths`."""

    def average(adapters: Sequence[Adapter]) -> Adapter:
        check_one_base(adapters)
        return mean_adapters(adapters, weights, magnitude_corrected=magnitude_corrected, names=_names(paths))

    return _to_disk(average, paths, output, **how)


def subtract_to_disk(path: str, removed: str, output: Path, **how: Any) -> Combined:
    """What the adapter in `path` does that the one in `removed` does not."""
    return _to_disk(lambda adapters: subtract(adapters[0], adapters[1]), [path, removed], output, **how)


def convert_to_disk(
    path: str, output: Path, *, variant: str | None = None, group_size: int | None = None, **how: Any
) -> Converted:
    """The adapter in `path` as another variant, or in another group size, and what it lost."""
    if variant is None and group_size is None:
        raise ConfigError("got neither a variant nor a group size; wanted one of them, or both")
    check_free(output, overwrite=how.get("overwrite", False))
    (adapter,) = load_all([path], allow_pickle=how.get("allow_pickle", False))
    conversion = convert(adapter, variant, group_size=group_size)
    written = _to_disk(lambda _: conversion.adapter, [path], output, **how)
    return Converted(
        **vars(written),
        is_exact=conversion.is_exact,
        distance=conversion.distance,
        share_lost=conversion.share_lost,
        mirrored_pairs=sum(loss.mirrored for loss in conversion.losses.values()),
        share_lost_by_layer={path: loss.share for path, loss in conversion.losses.items()},
    )


def lora_to_disk(
    path: str,
    output: Path,
    rank: int | float,
    *,
    model: str | ModelSource | None = None,
    overwrite: bool = False,
) -> LoraWritten:
    """The adapter in `path` as a LoRA adapter that stock PEFT loads, of this rank or with this share of the change.

    model: None takes the base model that the adapter names.
    """
    asked = as_source(model)
    check_free(output, overwrite=overwrite)
    (adapter,) = load_all([path], allow_pickle=asked.allow_pickle)
    source = asked.for_adapters([adapter.base_model_name])
    lora = to_lora(adapter, load_model(source), rank)
    with whole_folder(output, overwrite=overwrite) as folder:
        save_lora(lora, folder)
    return LoraWritten(
        str(output),
        path,
        source.place,
        lora.num_parameters,
        lora.relative_error,
        {path: fit.rank for path, fit in lora.fits.items()},
        {path: fit.relative_error for path, fit in lora.fits.items()},
    )


def distances(paths: Sequence[str], metric: str, *, allow_pickle: bool = False) -> Distances:
    """Each adapter in `paths` against each, and against the base model."""
    adapters = load_all(paths, allow_pickle=allow_pickle)
    check_one_base(adapters)
    everything = [power(adapters[0], 0), *adapters]
    rows = tuple(tuple(distance(one, two, metric) for two in everything) for one in everything)
    return Distances(metric, ("base model", *_names(paths)), rows)


def load_all(paths: Sequence[str], *, allow_pickle: bool = False) -> list[Adapter]:
    """The adapters in `paths`, folders or repositories of the hub; raises `CheckpointError` where one cannot be read."""
    found = []
    for path in paths:
        with adapter_folder(path, allow_pickle=allow_pickle) as folder:
            found.append(checkpoint.load(folder))
    return found


def _to_disk(
    combine: Combine, paths: Sequence[str], output: Path, *, overwrite: bool = False, allow_pickle: bool = False
) -> Combined:
    check_free(output, overwrite=overwrite)
    adapter = combine(load_all(paths, allow_pickle=allow_pickle))
    with whole_folder(output, overwrite=overwrite) as folder:
        checkpoint.save(adapter, folder)
    return Combined(
        str(output),
        tuple(paths),
        adapter.base_model_name,
        ", ".join(variant.value for variant in adapter.variants),
        adapter.group_sizes,
        len(adapter.layers),
        adapter.num_parameters,
    )


def _names(paths: Sequence[str]) -> list[str]:
    """What tables and errors call the adapters: the last part of the path, the whole path where that is not enough."""
    short = [Path(path).name or path for path in paths]
    return short if len(set(short)) == len(short) else list(paths)
