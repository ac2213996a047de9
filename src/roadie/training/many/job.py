"""One adapter to be trained among many, and what holds for all of them: frozen values, checked when they are made.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from roadie.errors import ConfigError
from roadie.training.recipe import PRECISIONS, Recipe, check_known

_OWN_WORDS = {"steps": "max_steps", "targets": "target_modules", "exclude": "exclude_modules"}
_IN_OWN_WORDS = {theirs: ours for ours, theirs in _OWN_WORDS.items()}
_OF_THE_RUN = ("precision", "micro_batch_size", "checkpoint_steps", "gradient_checkpointing")
_OF_ONE_TRAINING = ("method", "beta", "patience", "packing", "load_in_4bit")
_NOT_OF_A_JOB = (*_OF_THE_RUN, *_OF_ONE_TRAINING)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DEFAULTS = Recipe()


@dataclass(frozen=True)
class Job:
    """One adapter to train: its data, its recipe and its folder; raises `ConfigError` where a value is not valid.

    name: names its logs: 1 to 128 characters A-Z a-z 0-9 _ . -; data, eval_data: as in `roadie.training.text`;
    output: the folder that appears when the job is done; recipe: everything a training is told, but for
    precision, micro_batch_size, checkpoint_steps and gradient_checkpointing, which hold for all jobs (`RunSettings`), and
    method, beta, patience, packing and load_in_4bit, which jobs that are trained together cannot have;
    eval_steps: steps between evaluations on held-out data (eval_data, or the recipe's eval_share); None: at the start and
    at the end.
    """

    name: str
    data: str | Path | Sequence[str | Path]
    output: str | Path
    recipe: Recipe = field(default_factory=Recipe)
    eval_data: str | Path | Sequence[str | Path] | None = None
    eval_steps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"got job name {self.name!r}; wanted 1 to 128 characters A-Z a-z 0-9 _ . -, which name its logs"
            )
        object.__setattr__(self, "data", _sources(self.name, "data", self.data))
        if self.eval_data is not None:
            object.__setattr__(self, "eval_data", _sources(self.name, "eval_data", self.eval_data))
        if not isinstance(self.output, (str, Path)) or not str(self.output):
            raise ConfigError(f"job {self.name!r}: got output={self.output!r}; wanted a folder; name one")
        object.__setattr__(self, "output", Path(self.output))
        self._check_recipe()

    def _check_recipe(self) -> None:
        for key in _NOT_OF_A_JOB:
            if getattr(self.recipe, key) != getattr(_DEFAULTS, key):
                why = "it holds for all jobs; see RunSettings"
                if key in _OF_ONE_TRAINING:
                    why = "jobs that are trained together cannot have it; train this one with roadie train"
                raise ConfigError(
                    f"job {self.name!r}: got {key}={getattr(self.recipe, key)!r}; wanted it left out, since {why}"
                )
        if self.eval_data is not None and self.recipe.eval_share:
            raise ConfigError(f"job {self.name!r}: got eval_data and eval_share; wanted one of them; leave one out")
        if self.eval_steps is not None:
            _check_whole(f"job {self.name!r}: got eval_steps", self.eval_steps)
            if self.eval_data is None and not self.recipe.eval_share:
                raise ConfigError(
                    f"job {self.name!r}: got eval_steps={self.eval_steps} and nothing held out; wanted eval_data or eval_share"
                )

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Job:
        """The job with these settings, in the words of a jobs file; unknown keys raise `ConfigError`.

        Keys: name, data, output, eval_data, eval_steps, and those of `Recipe`, with steps for max_steps and targets for
        target_modules. ``{name}`` in data, eval_data and output stands for the name of the job.
        """
        if not isinstance(settings, Mapping):
            raise ConfigError(f"got job {settings!r}; wanted a mapping with name, data and output")
        label = f"job {settings.get('name', '')!r}"
        _check_keys(label, settings, job_keys(), required=("name", "data", "output"))
        own = {f.name: settings[f.name] for f in fields(cls) if f.name in settings}
        recipe = {_OWN_WORDS.get(key, key): value for key, value in settings.items() if key not in own}
        try:
            return cls(**_named(own), recipe=Recipe(**recipe))
        except ConfigError as error:
            raise ConfigError(_in_own_words(label, str(error))) from None

    def to_mapping(self) -> dict[str, Any]:
        """All settings as JSON can hold them; `from_mapping` gives the same job back."""
        recipe = {key: value for key, value in self.recipe.to_mapping().items() if key not in _NOT_OF_A_JOB}
        return {
            "name": self.name,
            "data": _plain(self.data),
            "output": str(self.output),
            "eval_data": None if self.eval_data is None else _plain(self.eval_data),
            "eval_steps": self.eval_steps,
            **{_IN_OWN_WORDS.get(key, key): value for key, value in recipe.items()},
        }


def job_keys() -> list[str]:
    """The keys of a job in a jobs file."""
    recipe = [_IN_OWN_WORDS.get(f.name, f.name) for f in fields(Recipe) if f.name not in _NOT_OF_A_JOB]
    return [*(f.name for f in fields(Job) if f.name != "recipe"), *recipe]


@dataclass(frozen=True)
class RunSettings:
    """What holds for all jobs of a run; raises `ConfigError` where a value is not valid.

    precision: of the base model, as in `Recipe`; adapters are always trained in float32.
    max_tokens_per_step: tokens (padding counted) of one forward; a step with more rows takes several, and is the same
        step; None: everything at once.
    max_active_jobs: jobs in a step; further ones wait and join in the order given when others end; None: all.
    checkpoint_steps: steps between checkpoints, of which an interruption loses at most one interval.
    keep: what adapted layers keep for backward: "auto" (the output where all adapters of a layer are road_1, which mostly
        costs nothing), or "input", for adapters that may reach alpha = 0.
    """

    precision: str = "auto"
    max_tokens_per_step: int | None = 16384
    max_active_jobs: int | None = None
    checkpoint_steps: int = 100
    keep: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (("precision", PRECISIONS), ("keep", ("auto", "input"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"got {name}={getattr(self, name)!r}; wanted one of {', '.join(choices)}")
        _check_whole("got checkpoint_steps", self.checkpoint_steps)
        for name in ("max_tokens_per_step", "max_active_jobs"):
            if getattr(self, name) is not None:
                _check_whole(f"got {name}", getattr(self, name))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> RunSettings:
        """The settings given and defaults for the rest; unknown keys raise `ConfigError`."""
        _check_keys("settings", settings, [f.name for f in fields(cls)])
        return cls(**settings)


def check_jobs(jobs: Sequence[Job], settings: RunSettings) -> None:
    """Raise `ConfigError` unless the jobs can run together: at least one, names and outputs their own."""
    if not jobs:
        raise ConfigError("got no jobs; wanted at least one")
    for what in ("name", "output"):
        values = [str(getattr(job, what)) for job in jobs]
        double = (
            sorted({value for value in values if values.count(value) > 1}) if len(set(values)) < len(values) else []
        )
        if double:
            raise ConfigError(f"got two jobs with {what} {double[0]!r}; wanted different ones; rename one")
    budget = settings.max_tokens_per_step
    for job in jobs:
        if budget is not None and job.recipe.max_length > budget:
            raise ConfigError(
                f"job {job.name!r}: got max_length={job.recipe.max_length} for max_tokens_per_step={budget}; wanted rows "
                "that fit into a step; lower one or raise the other"
            )


def _check_keys(label: str, settings: Mapping[str, Any], known: Sequence[str], required: Sequence[str] = ()) -> None:
    check_known(settings, known, of=f"{label}: ")
    missing = [key for key in required if key not in settings]
    if missing:
        raise ConfigError(f"{label}: got no {', '.join(missing)}; wanted {', '.join(required)}; add what is missing")


def _check_whole(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{what}={value!r}; wanted a whole number of at least 1")


def _sources(name: str, key: str, value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, (str, Path)) else value
    if not isinstance(values, Sequence) or not values or not all(isinstance(v, (str, Path)) and str(v) for v in values):
        raise ConfigError(
            f"job {name!r}: got {key}={value!r}; wanted a file, folder or hub data set, or a list of them"
        )
    return tuple(str(v) for v in values)


def _plain(sources: Any) -> list[str]:
    return [str(source) for source in sources]


def _named(own: Mapping[str, Any]) -> dict[str, Any]:
    """``{name}`` replaced in texts."""

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{name}", str(own["name"]))
        return [replaced(one) for one in value] if isinstance(value, list) else value

    return {key: replaced(value) if key in ("data", "eval_data", "output") else value for key, value in own.items()}


def _in_own_words(label: str, message: str) -> str:
    for ours, theirs in _OWN_WORDS.items():
        message = message.replace(theirs, ours)
    return message if message.startswith(label) else f"{label}: {message}"
