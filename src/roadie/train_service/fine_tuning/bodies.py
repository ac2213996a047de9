"""What callers send about jobs, and what they are told: OpenAI's requests and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, Tag

from roadie.serving.http.answers import Answer
from roadie.serving.http.bodies import INT64
from roadie.serving.http.failures import ApiError
from roadie.serving.http.fields import TEXT, Body, Lacks, NoItems, Text, is_text, one_of
from roadie.train_service.fine_tuning.limits import MAX_BATCH, MAX_BETA, MAX_EPOCHS, MAX_MULTIPLIER

Auto: TypeAlias = Literal["auto"]
_NUMBER = Tag("(number)")
_OR_AUTO = one_of("a number, or 'auto'", text=is_text, number=lambda value: not is_text(value))
BatchSize: TypeAlias = Annotated[Annotated[int, Field(ge=1, le=MAX_BATCH), _NUMBER] | Annotated[Auto, TEXT], _OR_AUTO]
Multiplier: TypeAlias = Annotated[
    Annotated[float, Field(gt=0, le=MAX_MULTIPLIER), _NUMBER] | Annotated[Auto, TEXT], _OR_AUTO
]
Epochs: TypeAlias = Annotated[Annotated[int, Field(ge=1, le=MAX_EPOCHS), _NUMBER] | Annotated[Auto, TEXT], _OR_AUTO]
Beta: TypeAlias = Annotated[Annotated[float, Field(gt=0, le=MAX_BETA), _NUMBER] | Annotated[Auto, TEXT], _OR_AUTO]
_REINFORCEMENT = Lacks("reinforcement fine-tuning: its clients are Tinker's")
_KEY = Annotated[Text, Field(max_length=64)]


class SupervisedHyperparameters(Body):
    """What is left out is "auto": roadie's recipe."""

    batch_size: BatchSize | None = None
    learning_rate_multiplier: Multiplier | None = None
    """Of the learning rate that the model's width and the data ask for."""
    n_epochs: Epochs | None = None


class DpoHyperparameters(SupervisedHyperparameters):
    """The same, and beta."""

    beta: Beta | None = None
    """How much a change of an answer's likelihood counts."""


class Supervised(Body):
    """Learn what rows say."""

    hyperparameters: SupervisedHyperparameters | None = None


class Dpo(Body):
    """Learn which of two answers is preferred."""

    hyperparameters: DpoHyperparameters | None = None


class Method(Body):
    """How to learn."""

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Annotated[None, _REINFORCEMENT] = None


class JobBody(Body):
    """`POST /v1/fine_tuning/jobs`."""

    model: Annotated[Text, Field(min_length=1, max_length=4096)]
    """The base model, or a model that was made here, from which training goes on."""
    training_file: Annotated[Text, Field(min_length=1, max_length=128)]
    validation_file: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    method: Method | None = None
    """Supervised where it is left out."""
    hyperparameters: SupervisedHyperparameters | None = None
    """Where `method` is left out; the older way."""
    seed: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    """Of the order of the rows; drawn where it is left out."""
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """A part of the model's name."""
    metadata: Annotated[dict[_KEY, Annotated[Text, Field(max_length=512)]], Field(max_length=16)] | None = None
    """`road_variant`, `road_group_size` and `road_targets` say how the adapter is made; what else there is is kept."""
    integrations: Annotated[NoItems, Lacks("integrations")] = None

    @property
    def kind(self) -> str:
        """The method's name."""
        return "supervised" if self.method is None else self.method.type

    def asked(self) -> dict[str, Any]:
        """Each hyperparameter of the method, "auto" where nothing is said. Raises `ApiError` for those of another method."""
        method = self.method or Method(type="supervised")
        other = "dpo" if self.kind == "supervised" else "supervised"
        if getattr(method, other) is not None:
            message = f"got {other} beside type {self.kind!r}; wanted {self.kind}; leave it out"
            raise ApiError(400, message, "invalid_value", param=f"method.{other}")
        of_method = getattr(method, self.kind)
        given: SupervisedHyperparameters | None = None if of_method is None else of_method.hyperparameters
        if self.hyperparameters is not None:
            if given is not None or self.kind != "supervised":
                message = "got hyperparameters in two places, or beside a method; wanted them in method alone"
                raise ApiError(400, message, "invalid_value", param="hyperparameters")
            given = self.hyperparameters
        given = given or (DpoHyperparameters() if self.kind == "dpo" else SupervisedHyperparameters())
        names = type(given).model_fields
        return {name: "auto" if getattr(given, name) is None else getattr(given, name) for name in names}


class FileObject(Answer):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["processed"]
    status_details: None


class Page(Answer):
    """Some of a list; `after` with the last id gives the next ones."""

    object: Literal["list"]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FilePage(Page):
    """Files."""

    data: list[FileObject]


class FileDeleted(Answer):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class ModelDeleted(Answer):
    """A model that is gone."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]


class JobError(Answer):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobMethod(Answer):
    """How a job learns."""

    type: Literal["supervised", "dpo"]
    supervised: dict[str, dict[str, float | Auto]] | None = None
    dpo: dict[str, dict[str, float | Auto]] | None = None


class JobObject(Answer):
    """A job."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    error: JobError | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    hyperparameters: dict[str, int | float | Auto]
    method: JobMethod
    seed: int
    estimated_finish: int | None
    integrations: list[str]
    metadata: dict[str, str] | None


class JobPage(Page):
    """Jobs, the newest first."""

    data: list[JobObject]


class EventObject(Answer):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, int | float] | None


class EventPage(Page):
    """Events, the newest first."""

    data: list[EventObject]


class CheckpointObject(Answer):
    """A model that a job made at a step; the last is that of the job."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, int | float]
    step_number: int


class CheckpointPage(Page):
    """Checkpoints, the last first."""

    data: list[CheckpointObject]


def page(found: list[Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """A page of a list that has one more than the limit where there are more."""
    data = found[:limit]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": len(found) > limit, **ends}
