"""What a configuration holds: frozen values, checked whole before anything is loaded.

    defaults: {...}                 what the tasks of the file share
    tasks:
      NAME: {...}                   what differs; mappings are merged, everything else is replaced

Read with YAML's safe loader, which makes plain values only; unknown keys are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from benchmarks.quality.hub.methods import METHODS
from benchmarks.quality.hub.style import PARTS
from roadie.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SEARCH: Literal["search"] = "search"
CLASS_METRICS = ("accuracy", "f1", "matthews")
NUMBER_METRICS = ("pearson", "spearman")


def _is_pattern(text: str) -> str:
    try:
        compiled = re.compile(text)
    except re.error as error:
        raise ValueError(f"wanted a regular expression; it does not compile: {error}") from None
    if compiled.groups > 1:
        raise ValueError(f"wanted at most one group, the answer; this has {compiled.groups}; write (?:...) for others")
    return text


def _is_template(text: str) -> str:
    names_in(text)
    return text


def names_in(template: str) -> tuple[str, ...]:
    """The columns a template asks for: "Question: {question}" wants one; braces of the text are doubled."""
    found = list(Formatter().parse(template))
    names = tuple(name for _, name, _, _ in found if name is not None)
    if any(not name or set(".[") & set(name) for name in names) or any(spec or how for _, _, spec, how in found):
        raise ValueError("wanted plain names of columns in braces, as {question}; double the braces of the text")
    return names


Pattern = Annotated[str, AfterValidator(_is_pattern)]
Template = Annotated[str, AfterValidator(_is_template)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Settings):
    """The base model: name, a hub name or a folder; head: modules that every method trains whole; targets: as PEFT's.

    products: of float32 weights, in bfloat16 where the device has instructions for it (torch calls that "medium"), or not.
    attention: as transformers' `attn_implementation`; None: the model's own choice.
    """

    name: str
    revision: str | None = None
    kind: Literal["causal-language-model", "sequence-classification"]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    products: Literal["float32", "bfloat16"] = "float32"
    attention: str | None = None
    targets: str | tuple[str, ...] = "all-linear"
    head: tuple[str, ...] = ()


class Source(Settings):
    """A data set: of the hub (hub, config, revision), files (format, files) or made here; columns: our names, by the data set's.

    form: rows as they are, or "multiple-choice" (`choices.py`), which gives the columns question, right and choices.
    """

    hub: str | None = None
    made: Literal["style"] | None = None
    form: Literal["multiple-choice"] | None = None
    config: str | None = None
    revision: str | None = None
    format: Literal["json", "csv", "parquet"] | None = None
    files: Mapping[str, str | tuple[str, ...]] = Field(default_factory=dict)
    columns: Mapping[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Source:
        if sum(map(bool, (self.hub, self.files, self.made))) != 1:
            raise ValueError("wanted either hub or files, or made; give one of them")
        if self.files and (self.format is None or self.config or self.revision):
            raise ValueError("wanted files with a format (json, csv or parquet), without config and revision")
        if self.format and not self.files:
            raise ValueError("wanted hub without format; remove format")
        return self


class Metric(Settings):
    """What is reported and, on validation, what chooses the learning rate; the answers of `exact_match` are generated.

    choice: the share of rows whose right answer is the likeliest of the choices, by the mean over its words' tokens.

    pattern: finds the answer (its group, if it has one) in what was generated, take: which match; wanted: the same for
    the reference; compare: as text, or as numbers that differ by `tolerance` at most.
    """

    kind: Literal["loss", "accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "choice"]
    pattern: Pattern | None = None
    take: Literal["first", "last"] = "last"
    wanted: Pattern | None = None
    compare: Literal["text", "number"] = "text"
    tolerance: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _has_a_pattern(self) -> Metric:
        if (self.kind == "exact_match") != (self.pattern is not None):
            raise ValueError("wanted a pattern for exact_match, and for nothing else")
        return self


class Part(Settings):
    """Rows of a source: of a split, `rows` of them (all) picked from one end or at random, without those of other parts."""

    source: str = "data"
    split: str
    rows: PositiveInt | None = None
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    pick: Literal["first", "last", "random"] = "first"
    pick_seed: int = 0
    without: tuple[Literal["train", "validation"], ...] = ()
    longest_characters: PositiveInt | None = None
    metric: Metric | None = None

    @model_validator(mode="after")
    def _says_how_many_once(self) -> Part:
        if self.rows is not None and self.share is not None:
            raise ValueError("wanted rows or share, not both; remove one")
        return self


class Rows(Settings):
    """What a row is made of, by the kind of model.

    Language: prompt and answer, templates; reference: the answer alone, where it is not all of `answer`; learn: the tokens
    the loss is taken on; choices: a column with the list of what may stand in the answer's only column; chat: the prompt is
    a user's turn and the answer the assistant's, by the model's chat template. Classification: text and second_text,
    columns; label, a column; labels: the names or values of the classes in order, or "number".
    """

    prompt: Template | None = None
    answer: Template | None = None
    reference: Template | None = None
    learn: Literal["answer", "all"] = "answer"
    choices: str | None = None
    chat: bool = False
    text: str | None = None
    second_text: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | Literal["number"] | None = None
    longest_tokens: Annotated[int, Field(ge=2)] = 512

    @property
    def names(self) -> tuple[str, ...]:
        """The columns a row needs."""
        templates = [name for one in (self.prompt, self.answer, self.reference) for name in names_in(one or "")]
        plain = [name for name in (self.choices, self.text, self.second_text, self.label) if name]
        return tuple(dict.fromkeys([*templates, *plain]))


class Training(Settings):
    """A run: steps or epochs of batch_rows * accumulation rows; AdamW; warm_up: a share of the steps; clip: 0 is not at all.

    head_rate: of the head where it differs from the method's.
    """

    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    batch_rows: PositiveInt
    accumulation: PositiveInt = 1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warm_up: Share = 0.1
    weight_decay: NonNegativeFloat = 0.0
    clip: NonNegativeFloat = 1.0
    head_rate: PositiveFloat | None = None
    checkpointing: bool = False

    @model_validator(mode="after")
    def _ends_in_one_way(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("wanted steps or epochs; give one of them")
        return self


class Evaluation(Settings):
    """batch_rows: of forward passes; generated_tokens, generation_rows: of the answers; base: measure the model as it comes.

    beaten: test runs too that validation has ruled out already, because another rate of the same seed is better.
    """

    batch_rows: PositiveInt = 8
    generation_rows: PositiveInt = 8
    generated_tokens: PositiveInt = 32
    base: bool = False
    beaten: bool = True


class Search(Settings):
    """The open-ended search, from the rate of its grid that is nearest to `start`."""

    start: PositiveFloat


Rates = tuple[PositiveFloat, ...] | Literal["search"] | Search


class TaskSettings(Settings):
    """One task: everything a run is told but the method, its rate and the seed.

    methods: learning rates to try by method, or "search" for the open-ended search of docs/quality.md, or where it begins;
    recipe: methods that are run at the rate of roadie's own rule too, with the first seed, after the others; once: methods that
    get the first seed alone, after those; directions: the same, at the end; published: what others report, in words.
    """

    title: str
    published: str
    model: Model
    sources: Mapping[str, Source]
    train: Part
    validation: Part
    tests: Mapping[str, Part]
    rows: Rows
    metric: Metric
    training: Training
    evaluation: Evaluation = Evaluation()
    methods: Mapping[str, Rates]
    recipe: tuple[str, ...] = ()
    once: Mapping[str, Rates] = Field(default_factory=dict)
    directions: Mapping[str, Rates] = Field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)

    @model_validator(mode="after")
    def _fits_together(self) -> TaskSettings:
        for complaint in (*self._of_methods(), *self._of_sources(), *self._of_rows(), *self._of_metrics()):
            raise ValueError(complaint)
        return self

    @property
    def parts(self) -> dict[str, Part]:
        """All parts by name; "tests.NAME" for tests."""
        return {
            "train": self.train,
            "validation": self.validation,
            **{f"tests.{name}": part for name, part in self.tests.items()},
        }

    def metric_of(self, part: Part) -> Metric:
        """The metric of a part: its own, or the task's."""
        return part.metric or self.metric

    def _of_methods(self) -> Iterator[str]:
        told = {**self.methods, **self.once, **self.directions}
        unknown = [name for name in (*told, *self.recipe) if name not in METHODS]
        if unknown:
            yield f"got methods {', '.join(unknown)}; wanted some of {', '.join(METHODS)}; rename or remove"
        if not self.methods or any(rates == () for rates in told.values()):
            yield 'wanted at least one method, each with rates or "search"; add them'
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            yield f"got seeds {list(self.seeds)}; wanted one or more, no seed twice"
        if not self.tests:
            yield "wanted at least one test under tests; add one"

    def _of_sources(self) -> Iterator[str]:
        for name, part in self.parts.items():
            source = self.sources.get(part.source)
            if source is None:
                yield f"{name}: got source {part.source!r}; wanted one of {', '.join(self.sources)}"
            elif source.files and part.split not in source.files:
                yield f"{name}: got split {part.split!r}; wanted one of the files of {part.source}: {', '.join(source.files)}"
            elif source.made and part.split not in PARTS:
                yield f"{name}: got split {part.split!r}; wanted one of {', '.join(PARTS)}"
            if (name == "train" and "train" in part.without) or (name == "validation" and part.without):
                yield f"{name}: got without {list(part.without)}; wanted validation chosen first; put without into others"

    def _of_rows(self) -> Iterator[str]:
        rows = self.rows
        language = {"prompt": rows.prompt, "answer": rows.answer}
        classes = {"text": rows.text, "label": rows.label, "labels": rows.labels}
        here, other = (language, classes) if self.model.kind == "causal-language-model" else (classes, language)
        lacking = [name for name, value in here.items() if not value]
        strange = [name for name, value in other.items() if value is not None]
        if lacking or strange:
            yield f"rows: wanted {', '.join(here)} for a {self.model.kind}; add {lacking}, remove {strange}"
        if rows.choices and len(set(names_in(rows.answer or ""))) != 1:
            yield f"rows.choices: got the answer {rows.answer!r}; wanted one with one column, which choices replace"
        if self.model.kind != "causal-language-model" and not self.model.head:
            yield "model.head: wanted the modules of the fresh head, as [classifier]; name them"

    def _of_metrics(self) -> Iterator[str]:
        allowed: tuple[str, ...] = ("loss", "exact_match", *(["choice"] if self.rows.choices else []))
        if self.model.kind != "causal-language-model":
            allowed = ("loss", *(NUMBER_METRICS if self.rows.labels == "number" else CLASS_METRICS))
        for name, part in self.parts.items():
            if self.metric_of(part).kind not in allowed:
                yield f"{name}: got metric {self.metric_of(part).kind}; wanted one of {', '.join(allowed)} for these rows"
        if self.metric.kind == "f1" and len(self.rows.labels or ()) != 2:
            yield "metric: got f1; wanted it with two labels only; use accuracy"


def read(path: Path) -> dict[str, TaskSettings]:
    """The tasks of a configuration by name; raises `ConfigError`, naming file and place, where it cannot be used."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: got no file that can be read ({error.strerror}); wanted YAML; check the name"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: got no YAML: {error}; wanted a mapping with tasks; correct it") from None
    return {name: _task(path, name, merged) for name, merged in _merged(path, content).items()}


def _merged(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping) or set(content) - {"defaults", "tasks"} or not content.get("tasks"):
        keys = list(content) if isinstance(content, Mapping) else type(content).__name__
        raise ConfigError(f"{path}: got {keys}; wanted the keys tasks (not empty) and, if you like, defaults")
    tasks, defaults = content["tasks"], content.get("defaults") or {}
    for where, value in {"tasks": tasks, "defaults": defaults, **(tasks if isinstance(tasks, Mapping) else {})}.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: {where}: got {type(value).__name__}; wanted a mapping; see {__name__}")
    for name in tasks:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: got the task name {name!r}; wanted letters, digits, '.', '_' and '-'; rename it"
            )
    return {name: deep_merge(defaults, own) for name, own in tasks.items()}


def deep_merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings key by key, everything else replaced."""
    both = {
        key: deep_merge(below[key], value)
        if isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        else value
        for key, value in above.items()
    }
    return {**below, **both}


def _task(path: Path, name: str, merged: Mapping[str, Any]) -> TaskSettings:
    try:
        return TaskSettings.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"{path}, task {name}: " + "; ".join(_complaints(error))) from None


def _complaints(error: ValidationError) -> Iterator[str]:
    for one in error.errors(include_url=False):
        place = ".".join(str(part) for part in one["loc"])
        if one["type"] == "extra_forbidden":
            yield f"{place}: got an unknown key; wanted one that is documented; remove or rename it"
        elif one["type"] == "missing":
            yield f"{place}: got nothing; wanted a value; add it"
        elif one["type"] == "value_error":
            yield f"{place}: ".removeprefix(": ") + str(one["ctx"]["error"])
        else:
            yield f"{place}: got {one['input']!r}; wanted: {one['msg']}; correct it"
