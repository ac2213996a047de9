"""From a plan to jobs that can be trained: data read, layers found, everything checked.

What is wrong with a setting raises and stops the run before it starts; data that cannot be read fail their job alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from roadie.adapter import is_input
from roadie.engine.targets import adapted_layers, targeted
from roadie.errors import ConfigError, UnsupportedLayer
from roadie.training.group_sizes import tell_of_smaller_groups
from roadie.training.many.data import JobData, load_data, steps_of
from roadie.training.many.job import Job
from roadie.training.many.jobs_file import Plan
from roadie.training.many.outputs import adapter_config
from roadie.training.many.state import PreparedJob
from roadie.training.models import (
    ModelSource,
    best_device,
    context_length,
    hidden_size,
    load_model,
    load_tokenizer,
    training_dtype,
)
from roadie.training.rows import DataError

logger = logging.getLogger("roadie")


@dataclass
class Prepared:
    """The plan, every job with its learning rate; the frozen base model, what can be trained and why the rest cannot, by name."""

    plan: Plan
    base: Any
    jobs: dict[str, PreparedJob] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


def prepare(plan: Plan, source: ModelSource, former: Mapping[str, float]) -> Prepared:
    """Load the model and the data of every job; raises `ConfigError`, naming the job, for settings that do not fit.

    former: learning rates of the run that goes on, by job.
    """
    data, unread = _read_data(plan, source)
    plan = _with_rates(plan, former, hidden_size(source), data)
    base = load_model(source, training_dtype(plan.settings.precision)).requires_grad_(False).to(best_device())
    targets: dict[Any, Any] = {}
    jobs = {job.name: _prepare(job, data[job.name], base, source, targets) for job in plan.jobs if job.name in data}
    return Prepared(plan, base, jobs, unread)


def _with_rates(plan: Plan, former: Mapping[str, float], width: int | None, data: Mapping[str, JobData]) -> Plan:
    """Every job with a learning rate: its own, that of the run that goes on, or that of the model's width and of the data."""

    def rated(job: Job) -> Job:
        recipe, rows = job.recipe, len(data[job.name].train) if job.name in data else None
        if recipe.learning_rate is None and job.name in former:
            return replace(job, recipe=replace(recipe, learning_rate=former[job.name]))
        return replace(job, recipe=recipe.for_width(width, rows))

    return replace(plan, jobs=tuple(map(rated, plan.jobs)))


def _read_data(plan: Plan, source: ModelSource) -> tuple[dict[str, JobData], dict[str, str]]:
    tokenizer, length = load_tokenizer(source), context_length(source)
    data, unread = {}, {}
    for job in plan.jobs:
        try:
            data[job.name] = load_data(job, tokenizer, length)
        except (DataError, OSError) as error:
            unread[job.name] = str(error)
            logger.warning("job %s failed: %s", job.name, error)
        except ConfigError as error:
            raise ConfigError(f"job {job.name!r}: {error}") from None
    return data, unread


def _prepare(job: Job, data: JobData, base: Any, source: ModelSource, targets: dict[Any, Any]) -> PreparedJob:
    """targets: what was found for those of earlier jobs, so that it is found, and what is passed over said, once."""
    wanted = job.recipe.target_modules, job.recipe.exclude_modules
    try:
        if wanted not in targets:
            targets[wanted] = targeted(base, *wanted)
        layers = adapted_layers(base, job.recipe.to_mapping(), targets[wanted])
    except (ConfigError, UnsupportedLayer) as error:
        raise type(error)(f"job {job.name!r}: {error}") from None
    sizes = ((layer.path, layer.stages) for layer in layers if not is_input(layer.path))
    tell_of_smaller_groups(sizes, job.recipe.stages or (job.recipe.group_size,), f"job {job.name}: ")
    config = adapter_config(job.recipe, layers, base, source)
    return PreparedJob(job, data, layers, config, steps_of(job, data))


def run_settings(plan: Plan, source: ModelSource, prepared: Prepared) -> dict[str, Any]:
    """What must be equal for two runs to be the same run; plain JSON values."""
    prints = {name: one.data.fingerprint for name, one in prepared.jobs.items()}
    return {
        "model": source.place,
        "revision": source.revision,
        **asdict(plan.settings),
        "jobs": [{**job.to_mapping(), "data_sha256": prints.get(job.name)} for job in plan.jobs],
    }
