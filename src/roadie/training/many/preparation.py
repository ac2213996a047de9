"""From a plan to jobs that can be trained: data read, layers found, everything checked.

What is wrong with a setting raises and stops the run before it starts; data that cannot be read fail their job alone.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
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
from roadie.training.models import ModelSource, best_device, context_length, load_model, load_tokenizer, training_dtype
from roadie.training.rows import DataError

logger = logging.getLogger("roadie")


@dataclass
class Prepared:
    """The frozen base model, the jobs that can be trained, and why the others cannot, both by name."""

    base: Any
    jobs: dict[str, PreparedJob] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


def prepare(plan: Plan, source: ModelSource) -> Prepared:
    """Load the model and the data of every job; raises `ConfigError`, naming the job, for settings that do not fit."""
    data, unread = _read_data(plan, source)
    base = load_model(source, training_dtype(plan.settings.precision)).requires_grad_(False).to(best_device())
    targets: dict[Any, Any] = {}
    jobs = {job.name: _prepare(job, data[job.name], base, source, targets) for job in plan.jobs if job.name in data}
    return Prepared(base, jobs, unread)


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
