"""From activations: what each layer of the base gives and what the wanted model gives there, on a text.

The least squares are those of weights, with the outputs over all tokens in place of the rows of the weight, so that what
counts is what the text makes of a weight. A layer's output depends on what reaches it, and three things can be taken for it:

    wanted     what reaches the layer in the wanted model: each layer is fitted by itself; one pass of that model
    base       what reaches it in the base model: every layer also learns to make up for what was before it; a pass of both
    adapted    what reaches it in the base model with all earlier layers fitted already: each layer makes up for what the
               earlier ones could not do; a pass of both models for each group of layers that share an input
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from roadie.errors import AdapterError, ConfigError
from roadie.fit.assembly import FittedLayer, OnLayer, assemble, fit_layer
from roadie.fit.closed_form import Moments, moments
from roadie.fit.observation import (
    Batch,
    Enough,
    Watch,
    check_alike,
    linear_layers,
    on_one_device,
    outputs_of,
    rows_that_count,
    run,
    watched,
)
from roadie.fit.report import Fit
from roadie.fit.settings import Settings
from roadie.rotation import Rotation, rotate


class Inputs(str, Enum):
    """What is taken for the input of each layer; see the module."""

    WANTED = "wanted"
    BASE = "base"
    ADAPTED = "adapted"

    @classmethod
    def parse(cls, value: str | Inputs) -> Inputs:
        """The member named `value`; raises `ConfigError` for any other name."""
        try:
            return cls(value)
        except ValueError:
            raise ConfigError(f"got inputs={value!r}; wanted 'wanted', 'base' or 'adapted'") from None


@dataclass(frozen=True, eq=False)
class _Study:
    """Two models, the layers of the base that are fitted, and the text."""

    base: nn.Module
    wanted: nn.Module
    layers: Mapping[str, nn.Module]
    batches: Sequence[Batch]
    settings: Settings

    def no_moments(self, path: str) -> Moments:
        outputs = outputs_of(self.layers[path])
        gram = torch.zeros(outputs // 2, 4, 4, dtype=torch.float64)
        return Moments(gram, 0, self.settings.of_layer(path, outputs)[1])

    def moments(self, path: str, before: Tensor, after: Tensor, batch: Batch) -> Moments:
        """Of one call of a layer."""
        check_alike(path, before, after)
        rows = on_one_device(*(rows_that_count(each, batch) for each in (before, after)))
        found = moments(*rows, self.settings.of_layer(path, before.shape[-1])[1])
        if not found.is_finite:
            raise AdapterError(
                f"layer {path}: got outputs that are not finite; wanted finite numbers; check both models, or run them in float32"
            )
        return Moments(found.gram.cpu(), found.columns, found.group_size)

    def fitted(self, path: str, moments: Moments) -> FittedLayer:
        weight = self.layers[path].weight
        wide = isinstance(weight, Tensor) and weight.dtype == torch.float64
        return fit_layer(path, moments, self.settings, torch.float64 if wide else torch.float32)


def from_activations(
    base: nn.Module,
    wanted: nn.Module,
    batches: Iterable[Batch],
    *,
    inputs: str | Inputs = Inputs.ADAPTED,
    base_model_name: str | None = None,
    on_layer: OnLayer | None = None,
    **settings: Any,
) -> Fit:
    """The RoAd adapter that makes the outputs of each linear layer of `base` most like those of `wanted`, on `batches`.

    base, wanted: two models with modules of the same names (one may have LoRA layers there; not the same object), in
    evaluation mode, on any devices; their layers are hooked while they run, and left as they were. batches: what the models
    are called with, token ids ``[B, T]`` or keyword arguments; tokens that attention_mask marks with 0 do not count.
    inputs: see `Inputs`; settings: see `Settings`. Parameters are float32, or float64 where the layer is.
    Raises `ConfigError` where no layer is targeted or the wanted model lacks one, `AdapterError` where outputs are not
    finite or do not fit, or there is nothing to fit.
    """
    chosen, how, text = Settings(**settings), Inputs.parse(inputs), list(batches)
    if not text:
        raise ConfigError("got no batches; wanted one at least: token ids, or keyword arguments of the models")
    study = _Study(base, _plain(wanted), linear_layers(base, chosen), text, chosen)
    fit = {Inputs.WANTED: _each_by_itself, Inputs.BASE: _all_at_once, Inputs.ADAPTED: _one_after_the_other}[how]
    name = base_model_name or getattr(base, "name_or_path", None) or None
    about = {"base_model_name_or_path": name, "task_type": _task_of(base)}
    with torch.no_grad():
        return assemble(fit(study), [path for path, _ in base.named_modules()], chosen, about, on_layer=on_layer)


def _plain(model: Any) -> nn.Module:
    """The model inside a PEFT model, with its adapter in it."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def _task_of(model: nn.Module) -> str | None:
    return "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None


def _each_by_itself(study: _Study) -> Iterator[FittedLayer]:
    total = {path: study.no_moments(path) for path in study.layers}
    for batch in study.batches:

        def watch(path: str, x: Tensor, z: Tensor, batch: Batch = batch) -> None:
            total[path] += study.moments(path, _called(study.layers[path], x), z, batch)

        with watched(study.wanted, study.layers, watch):
            run(study.wanted, batch)
    yield from (study.fitted(path, found) for path, found in total.items())


def _called(layer: nn.Module, x: Tensor) -> Tensor:
    """The base's layer on an input of the wanted model."""
    weight = layer.weight
    y: Tensor = layer(x.to(weight.device, weight.dtype))  # type: ignore[arg-type]
    return y


def _all_at_once(study: _Study) -> Iterator[FittedLayer]:
    total = {path: study.no_moments(path) for path in study.layers}
    _add_moments(study, total, {}, Counter())
    yield from (study.fitted(path, found) for path, found in total.items())


def _one_after_the_other(study: _Study) -> Iterator[FittedLayer]:
    rotations: dict[str, Rotation] = {}
    groups, calls = _groups_by_input(study)
    for group in groups:
        total = {path: study.no_moments(path) for path in group}
        _add_moments(study, total, rotations, calls)
        for path, found in total.items():
            layer = study.fitted(path, found)
            if layer.report.kept:
                rotations[path] = layer.parameters.rotation
            yield layer


def _groups_by_input(study: _Study) -> tuple[list[list[str]], Counter[str]]:
    """The layers in the order in which they run, those that share an input together, then those that never run; and how often
    each is called in a forward.
    """
    groups: list[list[str]] = []
    calls: Counter[str] = Counter()
    last: list[Tensor] = []  # kept, so that no other tensor is in its place

    def watch(path: str, x: Tensor, y: Tensor) -> None:
        if not calls[path]:
            if last and last[0] is x:
                groups[-1].append(path)
            else:
                groups.append([path])
            last[:] = [x]
        calls[path] += 1

    with watched(study.base, study.layers, watch):
        run(study.base, study.batches[0])
    return groups + [[path] for path in study.layers if not calls[path]], calls


def _add_moments(
    study: _Study, total: dict[str, Moments], rotations: Mapping[str, Rotation], calls: Counter[str]
) -> None:
    """Add to `total` the moments of its layers on the text, with `rotations` in the base.

    calls: how often each layer runs in a forward: a forward ends when all of `total` have run as often.
    """
    for batch in study.batches:
        outputs: dict[str, list[Tensor]] = defaultdict(list)
        before = _remembering(outputs, rotations, {path: calls[path] for path in total})
        with watched(study.base, {**total, **rotations}, before):
            run(study.base, batch)
        left = {path: len(there) for path, there in outputs.items()}

        def after(
            path: str, x: Tensor, z: Tensor, batch: Batch = batch, outputs: Any = outputs, left: Any = left
        ) -> None:
            if outputs[path]:
                total[path] += study.moments(path, outputs[path].pop(0), z, batch)
            _stop_if_done(left, path)

        with watched(study.wanted, total, after):
            run(study.wanted, batch)


def _remembering(outputs: dict[str, list[Tensor]], rotations: Mapping[str, Rotation], left: dict[str, int]) -> Watch:
    """Rotates the layers that have a rotation, and keeps what the others give."""

    def watch(path: str, x: Tensor, y: Tensor) -> Tensor | None:
        if path in rotations:
            return rotate(y, _on(rotations[path], y))
        outputs[path].append(y)
        _stop_if_done(left, path)
        return None

    return watch


def _stop_if_done(left: dict[str, int], path: str) -> None:
    if path in left:
        left[path] -= 1
        if not any(left.values()):
            raise Enough


def _on(rotation: Rotation, y: Tensor) -> Rotation:
    return Rotation(rotation.direct.to(y.device), rotation.cross.to(y.device), rotation.group_size)
