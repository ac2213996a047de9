"""64 jobs trained together against 64 runs of their own: the losses of every step.

    python -m benchmarks.many_losses                64 jobs of 50 steps on the embedded model; about five minutes

The separate runs know nothing of roadie.training.many but the batches: an adapted model of roadie.tuner, its own loss over
padded rows with an attention mask, torch's clipping and AdamW, in float32. Jobs differ in variant, targets, group size,
schedule, learning rate, decay, clipping and rows a step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import roadie
from roadie import embedded
from roadie.embedded import corpus
from roadie.training.encoding import collate
from roadie.training.many import Job, Observer, train_many
from roadie.training.many.data import load_data
from roadie.training.many.observer import StepReport
from roadie.training.many.schedule import learning_rate

BOUND = 1e-4
KINDS: tuple[dict[str, Any], ...] = (
    {"variant": "road_1", "targets": "all-linear"},
    {"variant": "road_2", "targets": ["q_proj", "v_proj"], "schedule": "cosine"},
    {"variant": "road_4", "targets": "all-linear", "weight_decay": 0.1},
    {"variant": "road_1", "group_size": 32, "targets": ["down_proj"], "schedule": "constant", "max_grad_norm": 0.05},
    {"variant": "road_1", "targets": "all-linear", "batch_size": 3, "warmup_ratio": 0.5, "max_grad_norm": 0.0},
)


class Losses(Observer):
    """Remembers the loss of every step."""

    def __init__(self) -> None:
        self.by_job: dict[str, list[float]] = {}

    def on_step(self, reports: Sequence[StepReport], seconds: float) -> None:
        """Note them."""
        for report in reports:
            self.by_job.setdefault(report.name, []).append(report.loss)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a loss differs by more than the bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_losses", description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        jobs = _jobs(Path(folder), options.jobs, options.steps)
        together = Losses()
        result = train_many(jobs, observers=[together])
    assert not result.failed, result.failed
    worst = {job.name: _worst(together.by_job[job.name], _alone(job)) for job in jobs}
    name = max(worst, key=worst.__getitem__)
    print(f"{len(jobs)} jobs, {options.steps} steps: largest relative difference of a loss {worst[name]:.1e} ({name})")
    print(f"median over jobs of the largest: {sorted(worst.values())[len(worst) // 2]:.1e}; bound {BOUND:.0e}")
    return int(worst[name] > BOUND)


def _jobs(folder: Path, count: int, steps: int) -> list[Job]:
    modules = sorted(corpus.standard_library().glob("[a-z]*.py"), key=lambda path: path.stat().st_size)[-count:]
    return [
        Job.from_mapping(
            {
                "name": path.stem,
                "data": str(path),
                "output": str(folder / path.stem),
                "steps": steps,
                "learning_rate": 0.005 * (1 + number % 4),
                "batch_size": 1,
                "max_length": 64,
                "seed": number,
                **KINDS[number % len(KINDS)],
            }
        )
        for number, path in enumerate(modules)
    ]


def _alone(job: Job) -> list[float]:
    """The losses of a run of `job` by itself."""
    recipe, data = job.recipe, load_data(job, embedded.load_tokenizer(), None)
    targets = recipe.target_modules
    config = roadie.RoadConfig(
        variant=recipe.variant,
        group_size=recipe.group_size,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    model = roadie.get_peft_model(embedded.load_model(), config).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rule = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    losses = []
    assert recipe.max_steps is not None
    for step in range(recipe.max_steps):
        rule.param_groups[0]["lr"] = learning_rate(recipe, step, recipe.max_steps)
        loss = model(**collate(data.rows(step))).loss
        loss.backward()
        if recipe.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        rule.step()
        rule.zero_grad()
        losses.append(loss.item())
    return losses


def _worst(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    sys.exit(main())
