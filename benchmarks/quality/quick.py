"""`make quality-quick`: two rows of the committed records trained again, and their losses compared; or one of a real model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.quality import plan, real_report, records, report
from benchmarks.quality.hub.sweep import Choice, chosen_tasks, trained
from benchmarks.quality.hub.task import prepare
from benchmarks.quality.methods import METHODS
from benchmarks.quality.sweep import one_run

TASK, NAMES = "language-topics", ("road_2", "lora_r1")
# Another processor sums in another order, and 60 steps of training make that larger; seeds differ by ten times as much.
TOLERANCE = 2e-3


def repeat() -> int:
    """Train both rows again; 0 where their test losses are those of the records, to `TOLERANCE` nats."""
    found, facts, failures = report.committed()[TASK], records.provenance(), 0
    for result in (one for one in report.results_of(found) if one.method in NAMES):
        again = one_run(plan.task(TASK), METHODS[result.method], result.rate, seed=0, facts=facts)
        failures += not agrees(again, result.losses[0])
    return int(failures > 0)


REAL_TASK, REAL_METHOD = "style", "road_1"
"""What needs no data but our own."""
# Products of bfloat16 where a processor has them, and none elsewhere: more than another order of sums. A guess until a second
# processor has repeated the row.
REAL_TOLERANCE = 2e-2


def repeat_real() -> int:
    """Train one committed row of SmolLM2 again (fetched where it is not there); 0 where it has the recorded test loss."""
    model = models.fetched("smollm2")
    name = f"{REAL_TASK}.{model.name}"
    found = real_report.committed().get(name, [])
    recorded = [one for one in report.results_of(found) if one.method == REAL_METHOD]
    if not recorded:
        print(f"got no record of {REAL_METHOD} in {name}; wanted one to compare with; see docs/quality.md")
        return 2
    (settings,) = chosen_tasks(real_report.GRID, Choice(tasks=[REAL_TASK], model=str(model))).values()
    again = trained(prepare(name, settings, Path(), "cpu"), METHODS[REAL_METHOD], recorded[0].rate, seed=0)
    return int(not agrees(again, recorded[0].losses[0], REAL_TOLERANCE))


def agrees(again: Mapping[str, Any], recorded: float, tolerance: float = TOLERANCE) -> bool:
    """Whether a repeated run has the recorded test loss; says so."""
    difference = abs(again["test"]["loss"] - recorded)
    print(f"recorded {recorded:.4f}, now {again['test']['loss']:.4f}: {difference:.1e}, at most {tolerance:g} wanted")
    return bool(difference <= tolerance)
