"""docs/recipe.md, made from the committed records and nothing else: ``python -m benchmarks.quality recipe --minutes 0``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks import machine
from benchmarks.quality import recipe, records, report
from benchmarks.quality.methods import rate
from benchmarks.quality.plan import FIRST_TASKS
from benchmarks.quality.search import searched
from benchmarks.record import RESULTS
from benchmarks.tables import markdown
from roadie.learning_rate import PAPER_RATE, PAPER_WIDTH, default_learning_rate

Record = Mapping[str, Any]
DOCUMENT = machine.ROOT / "docs" / "recipe.md"
VARIANTS = ("road_1", "road_2", "road_4")
Cell = tuple[str, str]
CELLS = tuple((task, variant) for task in recipe.TASKS for variant in recipe.VARIANTS)
NEAR = 0.1  # of a step of the grid, a factor of 1.12
RULE = "1/2"
CANDIDATES: Mapping[str, Callable[[int], float]] = {
    "0 (constant)": lambda width: PAPER_RATE,
    "1/4": lambda width: PAPER_RATE * (PAPER_WIDTH / width) ** 0.25,
    RULE: default_learning_rate,
    "3/4": lambda width: PAPER_RATE * (PAPER_WIDTH / width) ** 0.75,
    "1": lambda width: PAPER_RATE * (PAPER_WIDTH / width),
}
"""Learning rate by width, named by the exponent p of 3e-3 (4096 / width)^p."""


def loss_at(scores: Mapping[int, float], learning_rate: float) -> tuple[float, bool]:
    """Loss at a rate, interpolated between exponents of the grid; whether it is only a lower bound.

    Beyond the rates that were tried it is at least that of the last one, since losses rise towards the ends; a rate that
    is less than `NEAR` beyond counts as the last one.
    """
    place = 2 * math.log10(learning_rate)
    first, last = min(scores), max(scores)
    if not first <= place <= last:
        end = first if place < first else last
        return scores[end], abs(place - end) > NEAR
    low = min(math.floor(place), last - 1)
    return scores[low] + (place - low) * (scores[low + 1] - scores[low]), False


def excesses(found: Sequence[Record], task: str, variant: str) -> dict[str, tuple[float, bool]]:
    """By candidate: validation loss above that of the best rate of the grid (nats), and whether it is a lower bound."""
    scores = {exponent: loss for exponent, loss in searched(found, variant).items() if math.isfinite(loss)}
    width = recipe.WIDTHS[recipe.kind(task)]
    best = min(scores.values())
    found_at = {name: loss_at(scores, of(width)) for name, of in CANDIDATES.items()}
    return {name: (loss - best, bound) for name, (loss, bound) in found_at.items()}


def differences(found: Sequence[Record], choice: str) -> dict[Cell, list[float]]:
    """Validation loss of a choice less that of the default, by task and variant: one number a seed that both have."""
    tried, default = _losses(found, choice), _losses(found, recipe.DEFAULT.name)
    both = [key for key in sorted(tried) if key in default]
    return {cell: [tried[key] - default[key] for key in both if key[:2] == cell] for cell in CELLS}


def _losses(found: Sequence[Record], choice: str) -> dict[tuple[str, str, int], float]:
    """Validation loss by task, variant and seed; infinite where the run was stopped."""
    return {
        (one["task"], one["method"], one["seed"]): one["validation"]["loss"] if one["validation"] else math.inf
        for one in found
        if one["choice"] == choice
    }


def text_of(by_task: Mapping[str, Sequence[Record]], found: Sequence[Record]) -> str:
    """The document; equal for equal records."""
    return "\n".join([_HEAD, *_rates(by_task), *_measured(by_task, found), *_choices(found), *_rest(found)])


_HEAD = """# The default recipe, and what it rests on

This file is made by `python -m benchmarks.quality recipe` from records in `benchmarks/results`, and never written by hand.

`roadie train`, `roadie train-many` and `roadie find-lr` start from the recipe of the paper (arXiv 2409.00119): all linear layers,
AdamW without weight decay, a linear schedule with a warm-up of a tenth. Where no rate is given, the peak learning rate is

    3e-3 * sqrt(4096 / hidden width), between 1e-3 and 1.2e-2, to two digits

which is the paper's 3e-3 at the width of LLaMA-7B. Fewer than 1,000 rows that are seen more than once, in more than 20 steps,
would be learnt by heart at that rate. For them it is lower: times sqrt(rows / 1000), or times sqrt(20 / steps) where that is
more; 0.63 of it for 306 rows and 50 steps of 16. In Python:
`roadie.learning_rate.default_learning_rate(hidden_size, rows, passes, batch_size)`. The rate that was used is printed and in
`training.json`; a resumed run keeps its rate. What the rule costs beside the best rate on a real model of width 576 is in
[quality.md](quality.md#real-language-models), task by task.

Learning by reward wants far less: on that model GRPO was best at 3.2e-4, a 25th of the rule's
([quality.md](quality.md#learning-by-reward)). With TRL, set `learning_rate` yourself: the rule's for `SFTTrainer`, that 25th
for `GRPOTrainer`; TRL's own defaults are for whole models.
"""


def _rates(by_task: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    cells = {(task, v): excesses(by_task[task], task, v) for task in FIRST_TASKS if task in by_task for v in VARIANTS}
    yield "## The learning rate\n"
    yield report.paragraph(
        "Validation loss above that of the best rate, in nats, for learning rates 3e-3 (4096 / width)^p, from the searches of "
        "[quality.md](quality.md) (first seed, 60 steps): interpolated between rates that are a factor of 3.2 apart. With > : "
        "the rate lies beyond those that were tried, at whose end the loss is as given."
    )
    rows = [
        [task, variant, str(recipe.WIDTHS[recipe.kind(task)]), *(_excess(*cell[name]) for name in CANDIDATES)]
        for (task, variant), cell in cells.items()
    ]
    of = {name: [cell[name] for cell in cells.values()] for name in CANDIDATES}
    rows.append(["mean", "", "", *(_excess(mean(e for e, _ in of[n]), any(b for _, b in of[n])) for n in CANDIDATES)])
    rows.append(["worst", "", "", *(_excess(*max(of[name])) for name in CANDIDATES)])
    yield markdown(["task", "variant", "width", *(f"p = {name}" for name in CANDIDATES)], rows)
    worst = {name: max(of[name])[0] for name in CANDIDATES}
    least = min(worst, key=lambda name: worst[name])
    yield report.paragraph(
        f"The smallest worst case is that of p = {least}. The best rates of the three variants lie within one step of the grid "
        "everywhere, so the rule has no variant in it. The language model alone (width 256) would like more, up to 3.2e-2; the "
        "encoder (384) likes it on one task and a third of it on the other."
    )


def _excess(value: float, is_bound: bool) -> str:
    return f"{'>' if is_bound else ''}{value:.4f}"


def _measured(by_task: Mapping[str, Sequence[Record]], found: Sequence[Record]) -> Iterator[str]:
    """What runs at the default rate gave, where the table above interpolates."""
    rows = []
    for one in found:
        if one["choice"] != recipe.DEFAULT.name or one["seed"] != 0 or one["task"] not in by_task:
            continue
        scores = searched(by_task[one["task"]], one["method"])
        best = min(scores, key=lambda exponent: scores[exponent])
        excess = excesses(by_task[one["task"]], one["task"], one["method"])[RULE][0]
        measured = one["validation"]["loss"]
        default = [f"{one['learning_rate']:g}", f"{measured:.4f}"]
        of_grid = [f"{rate(best):g}", f"{scores[best]:.4f}"]
        above = [f"{measured - scores[best]:+.4f}", f"{excess:+.4f}"]
        rows.append([one["task"], one["method"], *default, *of_grid, *above])
    yield "Trained at the default rate, with the same seed:\n"
    head = ["task", "variant", "default", "its loss", "best of the grid", "its loss", "above", "interpolated"]
    yield markdown(head, rows)


def _choices(found: Sequence[Record]) -> Iterator[str]:
    table = {choice.name: differences(found, choice.name) for choice in recipe.CHOICES if choice != recipe.DEFAULT}
    schedules = [name for name in table if name not in recipe.TARGETS]
    yield "## Schedule and targets\n"
    yield report.paragraph(
        "One thing changed at a time, all else as by default, and all at the same learning rate. Validation loss less that of "
        "the default with the same seed and batches, in nats (above 0: worse), mean ± standard deviation over seeds."
    )
    yield _compared(table, schedules, [name.replace("warm-up ", "") for name in schedules])
    yield _compared(table, list(recipe.TARGETS), [f"only {name}" for name in recipe.TARGETS])
    yield report.paragraph(_verdict(table))


def _compared(table: Mapping[str, Mapping[Cell, Sequence[float]]], names: Sequence[str], titles: Sequence[str]) -> str:
    """A line for each task and variant, a column for each choice."""
    rows = []
    for task, variant in CELLS:
        of_names = [table[name][task, variant] for name in names]
        seeds = "/".join(sorted({str(len(of)) for of in of_names}))
        rows.append([task, variant, seeds, *(_difference(of) for of in of_names)])
    means = [[mean(of) for of in table[name].values() if of] for name in names]
    rows.append(["mean", "", "", *(f"{mean(of):+.4f}" if of else "-" for of in means)])
    return markdown(["task", "variant", "seeds", *titles], rows)


def _difference(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:+.4f}" if values else "-"
    return f"{mean(values):+.4f} ± {stdev(values):.4f}"


def better_in(of: Mapping[Cell, Sequence[float]]) -> int:
    """In how many lines a choice beats the default with every seed, and by more than their spread where there are several."""
    return sum(bool(d) and max(d) < 0 and (len(d) < 2 or -mean(d) > stdev(d)) for d in of.values())


def supported(of: Mapping[Cell, Sequence[float]]) -> bool:
    """Whether the evidence is enough to change a default: better in every line, each with at least two seeds."""
    return better_in(of) == len(of) and all(len(d) > 1 for d in of.values())


def _verdict(table: Mapping[str, Mapping[Cell, Sequence[float]]]) -> str:
    said = "; ".join(f"{name}: {better_in(of)} of {len(CELLS)}" for name, of in table.items())
    enough = [name for name, of in table.items() if supported(of)]
    conclusion = (
        f"Better everywhere, with at least two seeds: {', '.join(enough)}."
        if enough
        else "No choice is better everywhere, so the schedule, the warm-up and the targets of the paper stay the default."
    )
    return (
        f"Better than the default with every seed and by more than the spread, in so many lines: {said}. {conclusion}"
    )


def _rest(found: Sequence[Record]) -> Iterator[str]:
    hours = sum(one["processor_s"] for one in found) / 3600
    commits = ", ".join(sorted({one["commit"] for one in found}))
    yield "## What this does not say\n"
    yield report.paragraph(
        "Two models, of widths 256 and 384, and trainings of 60 steps: short trainings like high rates, and constant schedules "
        "lose less in them than in long ones. Targets were compared at the default rate, not each at its own best; fewer targets "
        "are fewer parameters too. What holds at width 4096 and above rests on the paper (3e-3 for LLaMA-7B and 13B; the rule "
        "gives 2.7e-3 at 13B's 5120). For RoBERTa (768 and 1024) the paper searched 1e-3 to 3e-3 on GLUE, below the 6.9e-3 and "
        "6e-3 of the rule: between 384 and 4096 only SmolLM2-135M (576) was measured ([quality.md](quality.md)). "
        "Rates that are far off are told during the training, from the loss; `roadie find-lr` searches one for the model and the "
        "texts at hand."
    )
    yield f"{len(found)} runs, {hours:.2f} hours of processor time on a machine that others used too, at {commits}.\n"


def committed() -> list[Record]:
    """The records of the repository."""
    return [record for path in sorted(RESULTS.glob(f"*/{recipe.RECORDS_NAME}")) for record in records.read(path)]


def main() -> int:
    """Write the document."""
    DOCUMENT.write_text(text_of(report.committed(), committed()), encoding="utf-8")
    print(DOCUMENT.relative_to(machine.ROOT))
    return 0
