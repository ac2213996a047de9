"""docs/quality.md and its pictures, made from the committed records and nothing else: ``python -m benchmarks.quality report``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import machine
from benchmarks.quality import records
from benchmarks.quality.methods import LORA, METHODS, OTHER, ROAD, TRIED, rate
from benchmarks.quality.plan import FIRST_TASKS, TASKS
from benchmarks.quality.search import SEEDS, best_exponent, searched
from benchmarks.quality.tasks import CLASSIFICATION, LANGUAGE
from benchmarks.tables import markdown

Record = Mapping[str, Any]
DOCUMENT = machine.ROOT / "docs" / "quality.md"
IMAGES = machine.ROOT / "docs" / "images"
EQUAL = 0.1  # parameters that differ by less, as a share of LoRA's, count as equal
COLOURS = {ROAD: "#0072B2", LORA: "#D55E00", OTHER: "#777777", TRIED: "#CC79A7"}


@dataclass(frozen=True)
class Result:
    """A method on a task, at the rate that the first seed's validation chose; losses and accuracies by seed."""

    task: str
    method: str
    rate: float
    validation: float
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    parameters: int
    stored_bytes: int
    kept_bytes: int
    processor_s: float
    peak_bytes: int

    @property
    def is_whole(self) -> bool:
        """Whether all seeds are there."""
        return len(self.losses) == len(SEEDS)


@dataclass(frozen=True)
class Comparison:
    """One of ours against LoRA of as many parameters: the difference of test losses, seed by seed (below 0: ours is better)."""

    ours: Result
    lora: Result

    @property
    def differences(self) -> tuple[float, ...]:
        """Ours less LoRA's, by seed."""
        return tuple(a - b for a, b in zip(self.ours.losses, self.lora.losses, strict=True))

    @property
    def verdict(self) -> str:
        """Beyond one standard deviation of the differences between seeds, or a tie."""
        middle, spread = mean(self.differences), stdev(self.differences)
        return "tie" if abs(middle) <= spread else "win" if middle < 0 else "LOSS"


def results_of(found: Sequence[Record]) -> list[Result]:
    """The methods of a task's records that have a best rate, in the order of METHODS."""
    return [result for name in METHODS if (result := _result(found, name)) is not None]


def _result(found: Sequence[Record], name: str) -> Result | None:
    exponent = best_exponent(found, name)
    if exponent is None:
        return None
    chosen = {
        record["seed"]: record
        for record in found
        if record["method"] == name and record["learning_rate"] == rate(exponent) and record["test"]
    }
    runs = [chosen[seed] for seed in SEEDS if seed in chosen]
    parameters = runs[0]["parameters"]
    return Result(
        task=runs[0]["task"],
        method=name,
        rate=rate(exponent),
        validation=searched(found, name)[exponent],
        losses=tuple(run["test"]["loss"] for run in runs),
        accuracies=tuple(accuracy for run in runs if (accuracy := _accuracy(run["test"])) is not None),
        parameters=parameters,
        stored_bytes=runs[0]["stored_bytes"],
        kept_bytes=round(4 * parameters * METHODS[name].kept_per_parameter),
        processor_s=mean(run["processor_s"] for run in runs),
        peak_bytes=max(run["peak_bytes"] for run in runs),
    )


def _accuracy(scores: Mapping[str, Any]) -> float | None:
    """The share of what was right, under the name that the task has for it; None where loss is all there is."""
    return next((scores[name] for name in ("accuracy", "exact_match", "choice") if name in scores), None)


def comparisons(results: Sequence[Result], what: str = "parameters") -> list[Comparison]:
    """Each LoRA of a task with each of ours that has as many parameters (or as much of `what`); all with every seed."""
    whole = [result for result in results if result.is_whole]
    return [
        Comparison(ours, lora)
        for lora in whole
        if METHODS[lora.method].family == LORA
        for ours in whole
        if METHODS[ours.method].family == ROAD and abs(getattr(ours, what) / getattr(lora, what) - 1) < EQUAL
    ]


def best(found: Sequence[Comparison]) -> Comparison:
    """The one of ours with the lowest validation loss of the first seed: chosen without a look at the test."""
    return min(found, key=lambda one: one.ours.validation)


def text_of(by_task: Mapping[str, Sequence[Record]]) -> str:
    """The document; equal for equal records."""
    from benchmarks.quality import directions_report, real_report, reward_report  # which are made with what is here

    results = {task: results_of(found) for task, found in by_task.items()}
    sections = [_HEAD, *real_report.text(), *directions_report.text(), *reward_report.text(), _TOYS]
    sections += [*_verdicts(results), *_losing(results), *_directions(results)]
    for task, found in results.items():
        sections += _task(task, by_task[task], found)
    return "\n".join([*sections, *_rates(by_task), *_rest(by_task, results)])


_HEAD = """# How well adapters learn

This file is made by `python -m benchmarks.quality report` from the records in `benchmarks/results/*/quality*`, a line a run, and
never written by hand. `make quality-real` and `make quality` train what the records lack; `make quality-real-quick` repeats a row
of a real model and `make quality-quick` two of the others, and they compare.
"""

_TOYS = """## Small models that every machine can train

Small models and short trainings (60 steps), on text that is on every machine: leads for a choice, not a ranking for large models.
The paper (arXiv 2409.00119) finds RoAd ahead of LoRA on large pretrained models, except where a task needs much capacity (GSM8K).

- **language-...**: the embedded language model (4 million parameters) goes on with one kind of the standard library's text; loss
  in nats a token on files that nobody trained on.
- **docstring-package**: all-MiniLM-L6-v2 says which package a docstring comes from; no module is in two splits.
- **summary-body**: the same encoder finds which body of a batch belongs to a summary line.

Every method has its own learning rate: a search in factors of about 3 with the first seed, on validation data, until the best
rate has a worse one on both sides; then three seeds at that rate. Seeds are paired: all methods see the same batches. Time is
processor time of one core, on a machine that others used too.
"""


def _verdicts(results: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    yield "## Against LoRA of as many parameters\n"
    yield paragraph(
        f"Parameters within {EQUAL:.0%}, three seeds each. The difference is ours less LoRA's test loss, so below 0 ours is "
        "better; its spread is the standard deviation over seeds. Within one spread it counts as a tie."
    )
    yield compared(results, "parameters")
    yield "## Against LoRA of as many bytes that a server keeps\n"
    yield paragraph(
        "A server keeps direct and cross, two numbers an output and rotation, whatever the variant: twice the parameters of "
        "road_1, as many as those of road_2, half of those of road_4. A file has as many numbers as there are parameters."
    )
    yield compared(results, "kept_bytes")


def compared(results: Mapping[str, Sequence[Result]], what: str) -> str:
    """The table of all `comparisons` by `what`."""
    rows = [
        [
            task,
            one.ours.method,
            one.lora.method,
            f"{getattr(one.ours, what):,} / {getattr(one.lora, what):,}",
            f"{mean(one.ours.losses):.4f} / {mean(one.lora.losses):.4f}",
            f"{mean(one.differences):+.4f} ± {stdev(one.differences):.4f}",
            one.verdict,
        ]
        for task, found in results.items()
        for one in comparisons(found, what)
    ]
    return markdown(["task", "ours", "LoRA", what.replace("_", " "), "test loss", "difference", "ours"], rows)


def _losing(results: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    yield "## Where RoAd loses\n"
    for what, words in (("parameters", "parameters"), ("kept_bytes", "bytes that a server keeps")):
        chosen = {}
        for task, found in results.items():
            pairs = comparisons(found, what)
            for lora in dict.fromkeys(one.lora.method for one in pairs):
                chosen[task, lora] = best([one for one in pairs if one.lora.method == lora])
        of = {
            verdict: [key for key, one in chosen.items() if one.verdict == verdict]
            for verdict in ("win", "tie", "LOSS")
        }
        yield paragraph(
            f"At equal {words}, the best of ours for each task and rank: {len(of['win'])} of {len(chosen)} won "
            f"({_named(of['win'])}), {len(of['tie'])} tied ({_named(of['tie'])}), {len(of['LOSS'])} lost ({_named(of['LOSS'])})."
        )
    yield paragraph(
        "Where there are several of ours, the first seed's validation chose. Adapters that adapt the last layer too (last) are "
        "compared with LoRA that does so. What RoAd offers beside quality is that a row's own adapter costs nearly nothing to "
        "serve ([many-adapters-results.md](many-adapters-results.md)), and more rotations little more "
        "([capacity-results.md](capacity-results.md))."
    )


def _directions(results: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    """Every option beside road_1, task by task."""
    yield "## Which directions gain\n"
    yield paragraph(
        "Test loss less that of road_1, over the seeds that both have (below 0: better; in brackets: one seed), and how many "
        "times as many parameters are trained, on the language model. input: the layers' inputs are rotated too; last: the "
        "layer that gives the logits is adapted too, in road_2_last as road_1 and with its input; stages_N: N rotations in a "
        "row; group_N: pairs inside groups of N instead of 64. Shifts (a vector that is added to the output of all layers, or "
        "of the last one) and norms (whose weights are trained) are no part of roadie: [log.md](log.md)."
    )
    names = [name for name, method in METHODS.items() if method.family in (ROAD, TRIED) or name.startswith("lora_r1_")]
    rows = []
    for name in ["lora_r1", *names]:
        cells = [_beside_road_1(found, name) for found in results.values()]
        if any(cells) and name != "road_1":
            rows.append([name, _times_road_1(results, name), *(cell or "-" for cell in cells)])
    yield markdown(["option", "parameters", *results], rows)


def _beside_road_1(found: Sequence[Result], name: str) -> str | None:
    by_name = {result.method: result for result in found}
    if name not in by_name or "road_1" not in by_name:
        return None
    differences = [a - b for a, b in zip(by_name[name].losses, by_name["road_1"].losses, strict=False)]
    return f"{mean(differences):+.3f}" if len(differences) > 1 else f"({differences[0]:+.3f})"


def _times_road_1(results: Mapping[str, Sequence[Result]], name: str) -> str:
    for found in results.values():
        counts = {result.method: result.parameters for result in found}
        if name in counts and "road_1" in counts:
            return f"{counts[name] / counts['road_1']:.2f}"
    return "-"


def _named(keys: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{task} against {lora}" for task, lora in keys) or "none"


def _task(task: str, found: Sequence[Record], results: Sequence[Result]) -> Iterator[str]:
    yield f"## {task}\n"
    base = next(record for record in found if record["method"] == "base")
    if base["test"]:
        yield f"Without an adapter: {base['test']['loss']:.4f}.\n"
    rows = [
        [
            result.method,
            f"{result.parameters:,}",
            "-" if METHODS[result.method].family == TRIED else f"{result.stored_bytes / 1000:.0f}",
            f"{result.kept_bytes / 1000:.0f}",
            f"{result.rate:g}",
            spread(result.losses, 4),
            spread(result.accuracies, 3),
            str(len(result.losses)),
            f"{result.processor_s:.0f}",
            f"{result.peak_bytes / 1e6:.0f}",
        ]
        for result in results
    ]
    head = ["method", "parameters", "file, kB", "served, kB", "rate", "test loss", "accuracy", "seeds", "s", "peak, MB"]
    yield markdown(head, rows)


def _rates(by_task: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    yield "## Learning rates\n"
    yield "Validation loss of the first seed at each rate; a dash: not tried, or stopped because it was hopeless.\n"
    for task, found in by_task.items():
        scores = {name: scored for name in METHODS if (scored := searched(found, name))}
        exponents = sorted({exponent for scored in scores.values() for exponent in scored})
        rows = [
            [name, *(f"{scored[e]:.3f}" if scored.get(e, float("inf")) < 1e9 else "-" for e in exponents)]
            for name, scored in scores.items()
        ]
        yield markdown([task, *(f"{rate(exponent):g}" for exponent in exponents)], rows)
    yield "![Quality over parameters](images/quality-parameters.png)\n"
    yield "![Quality over bytes that a server keeps](images/quality-bytes.png)\n"
    yield "![Loss over learning rate](images/quality-rates.png)\n"


def _rest(by_task: Mapping[str, Sequence[Record]], results: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    runs = [record for found in by_task.values() for record in found if record["method"] != "base"]
    hours = sum(record["processor_s"] for record in runs) / 3600
    lacking = {
        task: [
            name for name in METHODS if _suits(name, task) and not any(r.method == name and r.is_whole for r in found)
        ]
        for task, found in results.items()
    }
    untouched = [task for task in TASKS if task not in results]
    commits = sorted({record["commit"] for record in runs})
    yield "## What it took, and what is lacking\n"
    yield paragraph(
        f"{len(runs)} runs, {hours:.2f} hours of processor time, at the commits {', '.join(commits)}. Without three seeds: "
        + "; ".join(f"{task}: {', '.join(names)}" for task, names in lacking.items())
        + (f". Tasks that were not begun: {', '.join(untouched)}." if untouched else ".")
    )


def _suits(name: str, task: str) -> bool:
    """Whether the method can be trained on the task; docstring-package is the one with a head."""
    kind = LANGUAGE if task.startswith("language-") else CLASSIFICATION
    return kind in METHODS[name].kinds and (task == "docstring-package" or not METHODS[name].needs_head)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, or the one value."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def paragraph(text: str) -> str:
    """The text in lines of 130 characters."""
    return textwrap.fill(text, 130, break_on_hyphens=False, break_long_words=False) + "\n"


def read_all(folders: Sequence[Path]) -> dict[str, list[Record]]:
    """The records by task, in the order of the plan."""
    found: dict[str, list[Record]] = {}
    for task in TASKS:
        lines = [record for folder in folders for record in records.read(folder / f"{task}.jsonl")]
        if lines:
            found[task] = lines
    return found


def committed() -> dict[str, list[Record]]:
    """The records of the repository."""
    return read_all(sorted((machine.ROOT / "benchmarks" / "results").glob("*/quality")))


def draw(by_task: Mapping[str, Sequence[Record]]) -> None:
    """The pictures; needs matplotlib."""
    results = {task: results_of(by_task[task]) for task in FIRST_TASKS if task in by_task}
    _scatter(results, "parameters", "trainable parameters", IMAGES / "quality-parameters.png")
    _scatter(results, "kept_bytes", "bytes a server keeps for one adapter (float32)", IMAGES / "quality-bytes.png")
    _curves({task: by_task[task] for task in results}, IMAGES / "quality-rates.png")


def panels(tasks: Sequence[str]) -> tuple[Any, list[Any]]:
    """A figure, and its axes side by side, one a task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(tasks), 3.4), layout="constrained")
    found = list(figure.subplots(1, len(tasks), squeeze=False)[0])
    for axes, task in zip(found, tasks, strict=True):
        axes.set(title=task, xscale="log")
        axes.grid(alpha=0.3)
    found[0].set_ylabel("loss")
    return figure, found


def _scatter(results: Mapping[str, Sequence[Result]], what: str, label: str, path: Path) -> None:
    figure, axes_of = panels(tuple(results))
    for axes, found in zip(axes_of, results.values(), strict=True):
        axes.set_xlabel(label, fontsize=8)
        for result in (one for one in found if one.is_whole):
            place, colour = getattr(result, what), COLOURS[METHODS[result.method].family]
            axes.errorbar(place, mean(result.losses), stdev(result.losses), fmt="o", color=colour)
            axes.annotate(
                result.method, (place, mean(result.losses)), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
    figure.savefig(path, dpi=100)


def _curves(by_task: Mapping[str, Sequence[Record]], path: Path) -> None:
    figure, axes_of = panels(tuple(by_task))
    for axes, found in zip(axes_of, by_task.values(), strict=True):
        axes.set_xlabel("learning rate", fontsize=8)
        for name in METHODS:
            scored = {e: loss for e, loss in sorted(searched(found, name).items()) if loss < 1e9}
            if len(scored) > 2:
                axes.plot([rate(e) for e in scored], list(scored.values()), "o-", markersize=3, label=name)
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=100)


def main() -> int:
    """Write the document and its pictures."""
    from benchmarks.quality import real_report, reward_report

    by_task = committed()
    DOCUMENT.write_text(text_of(by_task), encoding="utf-8")
    draw(by_task)
    real_report.draw()
    reward_report.draw()
    print(DOCUMENT.relative_to(machine.ROOT))
    return 0
