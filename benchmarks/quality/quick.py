"""`make quality-quick`: two rows of the committed records trained again, and their losses compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.quality import plan, records, report
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


def agrees(again: Mapping[str, Any], recorded: float) -> bool:
    """Whether a repeated run has the recorded test loss; says so."""
    difference = abs(again["test"]["loss"] - recorded)
    print(f"recorded {recorded:.4f}, now {again['test']['loss']:.4f}: {difference:.1e}, at most {TOLERANCE:g} wanted")
    return bool(difference <= TOLERANCE)
