"""Looking at adapters from the disk, and at what they do to a model's hidden states on a text.

A place to look at is one of three, told apart by the files in its folder:

    a RoAd adapter          adapter_config.json with peft_type ROAD: rotations, and hidden states where there is a text
    another PEFT adapter    adapter_config.json of another peft_type, such as LoRA: hidden states
    a whole model           config.json: hidden states, beside those of the base model
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roadie import checkpoint
from roadie.adapter import Adapter
from roadie.errors import CheckpointError, ConfigError, UnsafeCheckpointError
from roadie.inspect import Report, StateChange, change_of_states, check_page, summarise_states, to_pngs, write_html
from roadie.training.adapters import NamedAdapter, adapter_folder, attach, base_model_of, parse_adapters
from roadie.training.corpus import TextSettings
from roadie.training.folders import check_file, check_free, whole_folder
from roadie.training.models import ModelSource, as_source, best_device, load_model
from roadie.training.places import check_model_place
from roadie.training.text import check_there

States = Callable[[Tensor], Tensor]


class Kind(str, Enum):
    """What a folder holds."""

    ROAD = "RoAd adapter"
    PEFT = "PEFT adapter"
    MODEL = "whole model"


@dataclass(frozen=True)
class Subject:
    """Something to look at: its name, where it is, and what it is."""

    name: str
    path: str
    kind: Kind


def find_subjects(texts: Sequence[str]) -> tuple[Subject, ...]:
    """``NAME=PATH`` or ``PATH`` each, with what is there; a path that is no folder here is taken for a RoAd adapter of the hub.

    Raises `ConfigError` for bad or double names, `CheckpointError` for a folder with neither an adapter nor a model.
    """
    return tuple(Subject(each.name, each.path, _kind(each)) for each in parse_adapters(texts))


def _kind(named: NamedAdapter) -> Kind:
    folder = Path(named.path)
    if not folder.is_dir():
        return Kind.ROAD
    if (folder / checkpoint.CONFIG_NAME).is_file():
        return Kind.ROAD if _setting(folder, "peft_type") in (None, "ROAD") else Kind.PEFT
    if (folder / "config.json").is_file():
        return Kind.MODEL
    raise CheckpointError(
        f"{folder}: got a folder with neither {checkpoint.CONFIG_NAME} nor config.json; wanted an adapter or a model; check "
        "the path"
    )


def _setting(folder: Path, key: str) -> str | None:
    """A setting of any PEFT adapter; None where it is not there, or the file cannot be read: whoever loads it says why."""
    try:
        value = json.loads((folder / checkpoint.CONFIG_NAME).read_bytes())[key]
    except (ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) and value else None


@dataclass(frozen=True)
class Gathered:
    """What there is to look at: RoAd adapters by name, and how far hidden states move, where there is a text."""

    adapters: Mapping[str, Adapter]
    states: tuple[StateChange, ...]


def gather(
    subjects: Sequence[Subject], *, text: TextSettings | None = None, model: str | ModelSource | None = None
) -> Gathered:
    """Everything at these places, read and, with a text, measured; for `roadie.inspect.examine` and `report`.

    model: without a name it is the base model that the adapters name, else the embedded one.
    Raises `RoadieError` where something cannot be found or read, where adapters name different base models while a model
    is to be run, and for anything but a RoAd adapter without a text.
    """
    others = [subject for subject in subjects if subject.kind is not Kind.ROAD]
    if others and text is None:
        raise ConfigError(
            f"got {others[0].path}, a {others[0].kind.value}, and no text; wanted a RoAd adapter, or a text whose hidden states "
            "show what it does; name one (--text FILE)"
        )
    source = as_source(model)
    check_model_place(source.place)
    check_there(text.sources if text is not None else ())
    with ExitStack() as stack:
        folders = {
            each.name: stack.enter_context(adapter_folder(each.path, allow_pickle=source.allow_pickle))
            for each in subjects
            if each.kind is Kind.ROAD
        }
        adapters = {name: checkpoint.load(folder) for name, folder in folders.items()}
        return Gathered(adapters, measure_states(subjects, folders, text, source) if text else ())


def check_outputs(page: str | Path | None, pngs: str | Path | None, *, overwrite: bool = False) -> None:
    """Raise what `write` raises for places that cannot be written, before there is anything to write."""
    if page is not None:
        check_page(page)
        check_file(Path(page))
    if pngs is not None:
        check_free(Path(pngs), overwrite=overwrite)


def write(
    report: Report, *, page: str | Path | None = None, pngs: str | Path | None = None, overwrite: bool = False
) -> None:
    """Write `report` as an HTML page, as a folder of PNGs in both themes, or both; everything appears, or nothing.

    A page of that name is replaced; a folder that is not empty only with `overwrite`, as a whole.
    Raises `ConfigError` for a page whose name does not end in .html or that is no plain file, and where matplotlib is
    missing; `OutputExists` for the folder; `OSError` where the disk refuses.
    """
    check_outputs(page, pngs, overwrite=overwrite)
    if pngs is None:
        if page is not None:
            write_html(report, page)
        return
    with whole_folder(Path(pngs), overwrite=overwrite) as folder:
        for name, content in to_pngs(report).items():
            (folder / name).write_bytes(content)
        if page is not None:
            write_html(report, page)


def measure_states(
    subjects: Sequence[Subject], folders: Mapping[str, Path], text: TextSettings, model: ModelSource
) -> tuple[StateChange, ...]:
    """How far each subject moves the hidden states of the base model on `text`; see `roadie.inspect.change_of_states`.

    folders: of the RoAd adapters, by name. RoAd adapters share one copy of the base model; the others have one each.
    """
    source = _base(subjects, folders, model)
    rows = [torch.tensor([example.input_ids]) for example in text.examples(source)]
    measured: dict[str, StateChange] = {}
    if folders:
        measured |= _measured(*_adapted(source, folders), rows)
    for subject in subjects:
        if subject.kind is not Kind.ROAD:
            measured |= _measured(*_other(source, subject), rows)
    return tuple(measured[subject.name] for subject in subjects)


def _base(subjects: Sequence[Subject], folders: Mapping[str, Path], model: ModelSource) -> ModelSource:
    """The base model that was asked for, or that adapters name; whole models do not say what they were made of."""
    recorded = list(_recorded(subjects, folders))
    whole = next((subject for subject in subjects if subject.kind is Kind.MODEL), None)
    if whole is not None and model.name is None and not any(recorded):
        raise ConfigError(
            f"got {whole.path}, a whole model, and nothing that names its base; wanted the model it was made of; name it "
            "(--model NAME)"
        )
    return model.for_adapters(recorded)


def _recorded(subjects: Sequence[Subject], folders: Mapping[str, Path]) -> Iterator[str | None]:
    yield from (base_model_of(folder) for folder in folders.values())
    yield from (
        _setting(Path(subject.path), "base_model_name_or_path") for subject in subjects if subject.kind is Kind.PEFT
    )


def _adapted(source: ModelSource, folders: Mapping[str, Path]) -> tuple[States, dict[str, States]]:
    """The states of a base model, and of the same model in each of its adapters."""
    adapted: Any = attach(load_model(source), folders).to(best_device())

    def before(row: Tensor) -> Tensor:
        with adapted.disable_adapter():
            return _states(adapted, row)

    def within(name: str) -> States:
        def after(row: Tensor) -> Tensor:
            adapted.set_adapter(name)
            return _states(adapted, row)

        return after

    return before, {name: within(name) for name in folders}


def _other(source: ModelSource, subject: Subject) -> tuple[States, dict[str, States]]:
    if subject.kind is Kind.PEFT:
        _check_safe(Path(subject.path), source)
        return _adapted(source, {subject.name: Path(subject.path)})
    base, tuned = load_model(source), load_model(replace(source, name=subject.path, revision=None))
    _check_alike(base, tuned, subject)
    return _states_of(base.to(best_device())), {subject.name: _states_of(tuned.to(best_device()))}


def _check_alike(base: Any, tuned: Any, subject: Subject) -> None:
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        values = [getattr(model.config.get_text_config(), key, None) for model in (base, tuned)]
        if values[0] != values[1]:
            raise ConfigError(
                f"{subject.path}: got a model with {key}={values[1]} beside a base with {values[0]}; wanted a model made of that "
                "base; name its own base (--model NAME)"
            )


def _check_safe(folder: Path, source: ModelSource) -> None:
    if not source.allow_pickle and not (folder / checkpoint.WEIGHTS_NAME).is_file():
        raise UnsafeCheckpointError(
            f"{folder}: got no {checkpoint.WEIGHTS_NAME}; wanted safetensors; pickles are read only with allow_pickle "
            "(--allow-pickle)"
        )


def _states_of(model: Any) -> States:
    return lambda row: _states(model, row)


@torch.no_grad()
def _states(model: Any, row: Tensor) -> Tensor:
    """Hidden states ``[S, T, H]`` of one row ``[1, T]``."""
    output = model(input_ids=row.to(model.device), output_hidden_states=True, use_cache=False)
    return torch.stack([state[0].cpu() for state in output.hidden_states])


def _measured(before: States, after: Mapping[str, States], rows: Sequence[Tensor]) -> dict[str, StateChange]:
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in after}
    for row in rows:
        reference = before(row)
        for name, states in after.items():
            parts[name].append(change_of_states(reference, states(row)))
    return {name: summarise_states(name, each) for name, each in parts.items()}
