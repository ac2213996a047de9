"""jobs.yaml: a base model, settings of the run, defaults for all jobs, and the jobs.

    model: meta-llama/Llama-3.2-1B      # left out: the embedded model
    max_tokens_per_step: 8192           # and the other settings of `RunSettings`
    defaults: {steps: 200, variant: road_1, output: "adapters/{name}"}
    jobs:
      - {name: french, data: french.jsonl}
      - {name: polite, data: polite.jsonl, learning_rate: 0.01}

Read with YAML's safe loader, which makes plain values only. Paths are relative to the current folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from roadie.errors import ConfigError
from roadie.training.many.job import Job, RunSettings, check_jobs
from roadie.training.recipe import check_known
from roadie.training.settings_file import read_yaml

_OWN_KEYS = ("model", "revision", "defaults", "jobs")


@dataclass(frozen=True)
class Plan:
    """Everything a run is told: the jobs, the settings they share, and the base model (None: the embedded one)."""

    jobs: tuple[Job, ...]
    settings: RunSettings = field(default_factory=RunSettings)
    model: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        check_jobs(self.jobs, self.settings)

    @classmethod
    def from_mapping(cls, content: Any) -> Plan:
        """The plan that a jobs file holds; raises `ConfigError` for unknown keys and values that are not valid."""
        _check_content(content)
        defaults = content.get("defaults") or {}
        shared = {key: value for key, value in content.items() if key not in _OWN_KEYS}
        return cls(
            tuple(Job.from_mapping(_with_defaults(job, defaults)) for job in content["jobs"]),
            RunSettings.from_mapping(shared),
            content.get("model"),
            content.get("revision"),
        )


def read_jobs(path: str | Path) -> Plan:
    """The plan in a jobs file; raises `ConfigError`, naming the file, where it cannot be used."""
    path = Path(path)
    content = read_yaml(path)
    try:
        return Plan.from_mapping(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _check_content(content: Any) -> None:
    known = [*_OWN_KEYS, *(f.name for f in fields(RunSettings))]
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"got {type(content).__name__}; wanted a mapping with the key jobs; see roadie train-many --help"
        )
    check_known(content, known, advice="remove or rename it, or put it under defaults, if it is one of a job")
    if not isinstance(content.get("jobs"), list):
        raise ConfigError(f"got jobs={content.get('jobs')!r}; wanted a list of jobs, each with name, data and output")
    for key in ("model", "revision"):
        if not isinstance(content.get(key), (str, type(None))):
            raise ConfigError(f"got {key}={content[key]!r}; wanted a name; quote it")
    if not isinstance(content.get("defaults", {}), (Mapping, type(None))):
        raise ConfigError(f"got defaults={content['defaults']!r}; wanted a mapping of settings of jobs")


def _with_defaults(job: Any, defaults: Mapping[str, Any]) -> Any:
    return {**defaults, **job} if isinstance(job, Mapping) else job
