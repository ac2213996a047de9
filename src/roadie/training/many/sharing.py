"""How processes share a run of many jobs: each trains some of the jobs, or each takes some of the rows of every job.

    jobs    process r of n trains the jobs r, r + n, ...; they say nothing to each other until the end
    rows    all train all jobs; each step's rows are dealt out, and the gradients are summed

Jobs need no communication; rows are for fewer jobs than processes, or a few long jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from roadie.distributed.processes import Processes
from roadie.errors import ConfigError
from roadie.training.many.jobs_file import Plan


class Spread(str, Enum):
    """What is spread over the processes."""

    JOBS = "jobs"
    ROWS = "rows"


@dataclass(frozen=True)
class Sharing:
    """The processes of a run, and what each of them does."""

    together: Processes
    spread: Spread

    @classmethod
    def of(cls, together: Processes, spread: str | Spread, plan: Plan) -> Sharing:
        """Checked against the plan: raises `ConfigError` for an unknown spread and for more processes than jobs."""
        if spread not in set(Spread):
            raise ConfigError(f"got spread={spread!r}; wanted one of {', '.join(Spread)}")
        if spread == Spread.JOBS and together.count > len(plan.jobs):
            raise ConfigError(
                f"got {together.count} processes for {len(plan.jobs)} job(s); wanted a job for each; start fewer, or spread "
                "the rows (--spread rows)"
            )
        return cls(together, Spread(spread))

    @property
    def has_own_jobs(self) -> bool:
        """Whether this process's jobs are not those of the others."""
        return self.spread is Spread.JOBS and self.together.count > 1

    @property
    def of_rows(self) -> Processes:
        """The processes that share the rows of a step with this one."""
        return Processes() if self.has_own_jobs else self.together

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of its jobs."""
        return self.has_own_jobs or self.together.is_first

    def own(self, plan: Plan) -> Plan:
        """The plan of this process."""
        if not self.has_own_jobs:
            return plan
        return replace(plan, jobs=plan.jobs[self.together.rank :: self.together.count])

    def described(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What must be equal for two runs to be the same run, of all processes; raises where these do not agree."""
        of_all = self.together.gather(dict(settings))
        if not self.has_own_jobs:
            if any(other != of_all[0] for other in of_all):
                raise ConfigError(
                    "got processes with different settings or data; wanted the same in all; give every machine the same files"
                )
            return of_all[0]
        parts = [list(other["jobs"]) for other in of_all]
        count = self.together.count
        jobs = [parts[number % count][number // count] for number in range(sum(map(len, parts)))]
        return {**of_all[0], "jobs": jobs, "processes": count}

    def snapshots(self, work: Path) -> Path:
        """The folder for the checkpoints of this process."""
        return work / f"process-{self.together.rank}" if self.has_own_jobs else work
