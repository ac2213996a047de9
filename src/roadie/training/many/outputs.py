"""The output of a job: an adapter in PEFT's format and training.json, in a folder that appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from roadie import checkpoint
from roadie.adapter import Adapter, is_input
from roadie.bank.families import AdaptedLayer, Family
from roadie.engine.targets import target_names
from roadie.training.folders import whole_folder
from roadie.training.many.job import Job
from roadie.training.many.result import JobResult, JobStatus
from roadie.training.many.state import PreparedJob
from roadie.training.models import ModelSource
from roadie.training.recipe import Recipe
from roadie.training.record import RECORD_NAME
from roadie.version import __version__

_NOT_RECORDED = ("name", "output", "status", "reason")


def adapter_config(
    recipe: Recipe, layers: Sequence[AdaptedLayer], model: nn.Module, source: ModelSource
) -> dict[str, Any]:
    """adapter_config.json of an adapter of these layers, as PEFT writes it."""
    stages = recipe.stages or (recipe.group_size,)
    asked = [recipe.input_stages if is_input(layer.path) else stages for layer in layers]
    settings = recipe.of_adapter
    del settings["exclude_modules"]  # what they leave out is not among the layers
    return {
        **settings,
        "adapt_group_size": any(layer.stages != wanted for layer, wanted in zip(layers, asked, strict=True)),
        "auto_mapping": None,
        "base_model_name_or_path": source.place,
        "inference_mode": True,
        "init_weights": True,
        "modules_to_save": None,
        "peft_type": "ROAD",
        "revision": source.revision,
        "target_modules": target_names(model, layers),
        "task_type": "CAUSAL_LM",
    }


def write_output(
    prepared: PreparedJob,
    adapter: Adapter,
    result: JobResult,
    history: Sequence[dict[str, float]],
    *,
    mark: str,
    overwrite: bool,
) -> None:
    """Write the folder of a finished job; `mark` says which run it is of."""
    record = {
        "run": mark,
        "settings": {**prepared.job.to_mapping(), "data_sha256": prepared.data.fingerprint},
        "result": {key: value for key, value in asdict(result).items() if key not in _NOT_RECORDED},
        "versions": {"roadie": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "history": list(history),
    }
    with whole_folder(Path(prepared.job.output), overwrite=overwrite) as folder:
        checkpoint.save(adapter, folder)
        text = json.dumps(record, indent=2, sort_keys=True)
        (folder / RECORD_NAME).write_text(f"{text}\n", encoding="utf-8")


def adapter_of(family: Family, row: Sequence[Tensor], config: Mapping[str, Any]) -> Adapter:
    """The adapter with the parameters `row` (`Family.row`)."""
    return Adapter(family.adapter_layers(row), config)


def finished_result(job: Job, mark: str) -> JobResult | None:
    """What became of `job` earlier in the run with this mark, as its output says; None where it has none of this run."""
    output = Path(job.output)
    try:
        record = json.loads((output / RECORD_NAME).read_text(encoding="utf-8"))
        if record["run"] != mark:
            return None
        return JobResult(job.name, output, JobStatus.BEFORE, **record["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
