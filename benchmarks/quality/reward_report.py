"""The part of docs/quality.md on learning by reward: finished methods of the committed records, and a curve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.quality import records, report
from benchmarks.quality.methods import LORA, METHODS, ROAD
from benchmarks.quality.report import Comparison, Record, paragraph, spread
from benchmarks.quality.reward import BASE, FIRST_RATES, next_in
from benchmarks.tables import markdown

IMAGE = report.IMAGES / "quality-reward.png"
COLOURS = {"road_1": "#0072B2", "lora_r1": "#D55E00", "lora_r8": "#CC79A7"}
SHOWN = ("reward", "right", "line", "alone")


def committed() -> dict[str, list[Record]]:
    """The records by the name of the model."""
    found: dict[str, list[Record]] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/quality-reward/*.jsonl")):
        found.setdefault(path.stem, []).extend(records.read(path))
    return found


def finished(found: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs at the best rate, by seed, of the methods whose search has ended and whose seeds are all there."""
    done = [result for result in report.results_of(found) if result.method in FIRST_RATES]
    return {
        result.method: sorted(
            (run for run in found if (run["method"], run["learning_rate"]) == (result.method, result.rate)),
            key=lambda run: run["seed"],
        )
        for result in done
        if next_in(list(found), result.method) is None
    }


def text() -> Iterator[str]:
    """The section, a paragraph at a time; equal for equal records, nothing where no method is finished."""
    everything = {model: found for model, found in committed().items() if finished(found)}
    if not everything:
        return
    yield _head(everything)
    for model, found in everything.items():
        yield from _of_model(model, found)
    yield f"![Mean reward by step]({IMAGE.parent.name}/{IMAGE.name})\n"


def _head(everything: Mapping[str, Sequence[Record]]) -> str:
    size = next(iter(everything.values()))[0]["facts"]["size"]
    return "## Learning by reward\n\n" + paragraph(
        f"GRPO, by TRL's trainer: {size['steps']} steps of {size['prompts']} sums of one digit with {size['replies']} "
        f"sampled replies of at most {size['tokens']} tokens to each, and no other teacher than the reward: a half for the right "
        "number, a quarter where it has a line of its own, a quarter where nothing comes after it "
        "([sums.py](../benchmarks/quality/sums.py)). Measured on sums that nobody trained on, with "
        f"{size['samples']} sampled replies to each; rates are searched by the reward on others. Mean and standard deviation of "
        "three seeds; kB a tenant: what a server keeps (float32); s: of one core that others used too, for all steps, and for "
        "generating alone."
    )


def _of_model(model: str, found: Sequence[Record]) -> Iterator[str]:
    yield f"### {model}\n"
    before = next(record for record in found if record["method"] == BASE)["test"]
    rows = [["no adapter", "-", "-", "-", *(f"{before[name]:.3f}" for name in SHOWN), "-", "-"]]
    done = finished(found)
    for method, runs in done.items():
        kept = 4 * runs[0]["parameters"] * METHODS[method].kept_per_parameter / 1000
        scores = [spread([run["test"][name] for run in runs], 3) for name in SHOWN]
        took = [f"{mean(run[name] for run in runs):.0f}" for name in ("processor_s", "generation_s")]
        rows.append(
            [method, f"{runs[0]['parameters']:,}", f"{kept:,.0f}", f"{runs[0]['learning_rate']:g}", *scores, *took]
        )
    yield markdown(["method", "parameters", "kB a tenant", "rate", *SHOWN, "s", "s, generating"], rows)
    yield from _compared(found, done)
    lacking = [name for name in FIRST_RATES if name not in done]
    if lacking:
        yield paragraph(f"Not finished, so without figures: {', '.join(lacking)}.")


def _compared(found: Sequence[Record], done: Mapping[str, Any]) -> Iterator[str]:
    results = [result for result in report.results_of(found) if result.method in done]
    for lora in (one for one in results if METHODS[one.method].family == LORA):
        for ours in (one for one in results if METHODS[one.method].family == ROAD):
            one = Comparison(ours, lora)
            gains = [-difference for difference in one.differences]  # a loss is what is lacking to the whole reward
            yield paragraph(
                f"{ours.method} less {lora.method}, seed by seed: {mean(gains):+.3f} ± {stdev(gains):.3f} of the reward "
                f"({one.verdict}), with {ours.parameters / lora.parameters:.2f} times as many trained parameters."
            )


def draw() -> None:
    """The picture: mean reward by step of finished methods, between the lowest and the highest seed."""
    from matplotlib.figure import Figure

    everything = {model: done for model, found in committed().items() if (done := finished(found))}
    if not everything:
        return
    figure = Figure(figsize=(6.4 * len(everything), 3.6), layout="constrained")
    for axes, (model, done) in zip(
        figure.subplots(1, len(everything), squeeze=False)[0], everything.items(), strict=True
    ):
        axes.set(title=model, xlabel="step", ylabel="mean reward of the step's replies")
        axes.grid(alpha=0.3)
        for method, runs in done.items():
            curves = [smoothed(run["curve"]) for run in runs]
            steps, by_step = range(1, len(curves[0]) + 1), list(zip(*curves, strict=True))
            axes.plot(steps, [mean(one) for one in by_step], color=COLOURS[method], label=method)
            axes.fill_between(
                steps, [min(one) for one in by_step], [max(one) for one in by_step], color=COLOURS[method], alpha=0.15
            )
        axes.legend()
    figure.savefig(IMAGE, dpi=100)


def smoothed(curve: Sequence[float], window: int = 5) -> list[float]:
    """The mean of each step and those before it, `window` in all, or as many as there are."""
    return [mean(curve[max(0, end - window) : end]) for end in range(1, len(curve) + 1)]
