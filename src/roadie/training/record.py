"""What a training run did: as a value, and as the file ``training.json`` beside the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roadie.version import __version__

if TYPE_CHECKING:
    from transformers import Trainer

Sources = str | Path | Sequence[str | Path]

RECORD_NAME = "training.json"
_REWARDS = ("accuracies", "margins")


@dataclass(frozen=True)
class TrainingResult:
    """What a run did. Losses are nats a token, by Trainer's evaluation, on `loss_on`; sizes in bytes, time in seconds.

    learning_rate: at its peak; steps: optimizer steps in all; seconds and tokens (without padding): of this session, from
    resumed_from_step on;
    best_step: the step whose adapter was kept, None where that is simply the last one.
    """

    output: Path
    model: str
    learning_rate: float
    loss_on: str
    loss_before: float
    loss_after: float
    steps: int
    resumed_from_step: int
    best_step: int | None
    train_examples: int
    evaluation_examples: int
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    seconds: float
    tokens: int

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters."""
        return self.trainable_parameters / self.total_parameters

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on in this session over its time."""
        return self.tokens / self.seconds


def history_of(trainer: Trainer) -> list[dict[str, float]]:
    """Loss and learning rate of every step and the losses of evaluations, resumed sessions included.

    Of preferences also the share of pairs that are told apart, and by how much.
    """
    wanted = (
        "step",
        "loss",
        "eval_loss",
        "learning_rate",
        *(f"{of}rewards/{what}" for of in ("", "eval_") for what in _REWARDS),
    )
    return [
        {key: entry[key] for key in wanted if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def write_record(
    path: Path,
    result: TrainingResult,
    settings: dict[str, Any],
    history: list[dict[str, float]],
    data: Sources,
    eval_data: Sources | None,
    places: Mapping[str, Any],
) -> None:
    """Write training.json: the data, the settings, the result, the versions and the losses of all steps.

    places: where losses and adapter went, beside the output.
    """
    record = {
        "data": _names(data),
        "evaluation_data": _names(eval_data),
        "settings": settings,
        **places,
        "result": {key: value for key, value in asdict(result).items() if key != "output"},
        "versions": {"roadie": __version__, **{name: version(name) for name in _libraries(settings)}},
        "history": history,
    }
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _libraries(settings: Mapping[str, Any]) -> list[str]:
    """The libraries that took part in a training with these settings."""
    more = {"trl": settings["method"] == "dpo", "bitsandbytes": settings["load_in_4bit"]}
    return ["torch", "transformers", "peft", *(name for name, used in more.items() if used)]


def _names(sources: Sources | None) -> list[str]:
    if sources is None:
        return []
    return [str(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
