"""The part of docs/quality.md on real language models: finished rows of the committed records, and nothing else.

A row is finished when its search for a rate has ended and it has all the seeds that the grid gives it; what is not finished
is named, without its figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.quality import records, report
from benchmarks.quality.hub.settings import TaskSettings, read
from benchmarks.quality.methods import LORA, METHODS, ROAD, rate
from benchmarks.quality.real import GRID
from benchmarks.quality.report import COLOURS, EQUAL, Comparison, Record, Result, paragraph, spread
from benchmarks.quality.search import HIGHEST, LOWEST, next_run
from benchmarks.quality.tasks import LANGUAGE
from benchmarks.quality.tenants import BASE, SERVED_AS, TENANTS
from benchmarks.statistics import wilson
from benchmarks.tables import markdown

SAME_STEP = 0.02  # steps of decoding that differ by less, as a share of ours, count as equal
IMAGE = report.IMAGES / "quality-real.png"
METRICS = {"exact_match": "exact match", "choice": "right choice"}
Tasks = Mapping[str, Sequence[Record]]


def committed() -> dict[str, list[Record]]:
    """The records of runs by "task.model", in the order of the grid, model after model."""
    found: dict[str, list[Record]] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/quality-real/*.jsonl")):
        found.setdefault(path.stem, []).extend(records.read(path))
    order = list(read(GRID))
    return {
        name: found[name]
        for name in sorted(
            found, key=lambda name: (_model(name), order.index(_task(name)) if _task(name) in order else -1)
        )
    }


def text() -> Iterator[str]:
    """The section, a paragraph at a time; equal for equal records, nothing where there are none."""
    everything = committed()
    models = dict.fromkeys(_model(name) for name in everything if _task(name) != TENANTS)
    if not models:
        return
    yield _HEAD
    for model in models:
        tasks = {_task(name): found for name, found in everything.items() if _model(name) == model}
        tasks.pop(TENANTS, None)
        yield from _of_model(model, tasks, steps_of(everything, model))
        if model == pictured(everything):
            yield f"![Loss over parameters, bytes and the time of a step](images/{IMAGE.name})\n"
    yield _took(everything)


def steps_of(everything: Tasks, model: str) -> Mapping[str, Any]:
    """What a step of decoding costs, by what is served; empty where it was not measured."""
    found = everything.get(f"{TENANTS}.{model}")
    steps: Mapping[str, Any] = found[-1]["steps"] if found else {}
    return steps


_HEAD = """## Real language models

Short trainings (50 steps of 16 rows; of 8 for GSM8K) of pretrained language models, on the paper's data where nothing else is
said ([real.yaml](../benchmarks/quality/real.yaml) has every setting). Loss is in nats a token of the answer and its end.

- **mawps**: the equation of a word problem; exact match of what is generated greedily. 25 of the 238 test problems stand in the
  training file too, as the data set has them.
- **openbookqa, arc-easy, boolq**: the words of the right answer are learnt after the question, and the likeliest of all
  answers counts as chosen, by the mean over its tokens without the end. In the paper's form, in which the number of the answer
  is asked for, a model of this size stays at chance. BoolQ comes without its passages, as in the paper's data.
- **style**: chat data of our own making ([style.py](../benchmarks/quality/hub/style.py)), whose loss alone is measured.
- **gsm8k**: the solutions, whose loss alone is measured; rows of at most 440 characters.

Weights are dequantised from 4-bit files, as the names of the models say: neither is the model as it was published. They are in
bfloat16, for the style, ARC-Easy and BoolQ in float32, and adapters in float32. Adapters are on all linear layers of the blocks;
the layer that gives the logits is tied to the embeddings and left alone. The learning rate is chosen as for the other models
below, by the loss on validation. Rows without ± have one seed.
"""


def _of_model(model: str, tasks: Tasks, steps: Mapping[str, Any]) -> Iterator[str]:
    results = {task: finished_of(f"{task}.{model}", found) for task, found in tasks.items()}
    yield f"### {model}\n"
    if any(results.values()):
        yield _losses(tasks, results, steps)
        yield _accuracies(tasks, results)
    yield from _verdicts(results, steps)
    yield from _recipe(tasks, results)
    unfinished = {
        task: [name for name in planned(task) if name not in {one.method for one in results[task]}] for task in tasks
    }
    lacking = "; ".join(f"{task}: {', '.join(names)}" for task, names in unfinished.items() if names)
    if lacking:
        yield paragraph(f"Not finished, so without figures: {lacking}.")


def finished_of(name: str, found: Sequence[Record]) -> list[Result]:
    """The methods of a task ("task.model") whose search has ended and whose seeds are all there."""
    if _task(name) == TENANTS:
        return []
    seeds = planned(_task(name))
    return [
        result
        for result in report.results_of(found)
        if result.method in seeds and next_run(found, METHODS[result.method], LANGUAGE, seeds[result.method]) is None
    ]


def planned(task: str) -> dict[str, tuple[int, ...]]:
    """The seeds of each method that the grid has for a task."""
    settings: TaskSettings = read(GRID)[task]
    return {**dict.fromkeys(settings.methods, settings.seeds), **dict.fromkeys(settings.once, settings.seeds[:1])}


def _losses(tasks: Tasks, results: Mapping[str, Sequence[Result]], steps: Mapping[str, Any]) -> str:
    shown = [task for task, found in results.items() if found]
    timed = shown[0]
    rows = [
        ["no adapter", "-", "-", _step(steps, BASE), "-", "-", *(f"{_base(tasks[task])['loss']:.4f}" for task in shown)]
    ]
    for name in _methods(results):
        one = next(result for found in results.values() for result in found if result.method == name)
        losses = {task: _of(results[task], name) for task in shown}
        cells = [spread(result.losses, 4) if result else "-" for result in losses.values()]
        training = _of(results[timed], name)
        took = [f"{training.processor_s:.0f}", f"{training.peak_bytes / 1e6:.0f}"] if training else ["-", "-"]
        costs = [f"{one.parameters:,}", f"{one.kept_bytes / 1000:,.0f}", _step(steps, SERVED_AS.get(name)), *took]
        rows.append([name, *costs, *cells])
    words = (
        "Test loss; what is trained, what a server keeps of it for a tenant (float32), and the time of a step of decoding 32 "
        "rows with 32 different adapters, in times of the base model's own on one thread (LoRA by batched products; a dash: no "
        f"batch of many adapters was measured). Training on {timed}: seconds of one core that others used too, and how far the "
        "process rose above the model."
    )
    heads = ["method", "parameters", "kB a tenant", "step, 32 tenants", "s", "peak, MB"]
    return paragraph(words) + "\n" + markdown([*heads, *shown], rows)


def _accuracies(tasks: Tasks, results: Mapping[str, Sequence[Result]]) -> str:
    shown = {task: metric for task, found in results.items() if found and (metric := _metric(tasks[task]))}
    if not shown:
        return ""
    counts = {
        task: next(r for r in tasks[task] if r["method"] == BASE)["facts"]["rows"]["tests.test"] for task in shown
    }
    rows = [["no adapter", *(_interval(_base(tasks[task])[metric], counts[task]) for task, metric in shown.items())]]
    for name in _methods(results):
        found = {task: _of(results[task], name) for task in shown}
        cells = [_interval(mean(one.accuracies), counts[task]) if one else "-" for task, one in found.items()]
        rows.append([name, *cells])
    words = (
        "Accuracy in per cent, the mean over seeds, and its 95 % interval (Wilson's) for so many test rows; they are the same "
        "for all seeds and methods, so that seeds add none to them."
    )
    heads = [f"{task}, {METRICS[metric]}, {counts[task]} rows" for task, metric in shown.items()]
    return paragraph(words) + "\n" + markdown(["method", *heads], rows)


def _verdicts(results: Mapping[str, Sequence[Result]], steps: Mapping[str, Any]) -> Iterator[str]:
    for what, words in (("parameters", "parameters"), ("kept_bytes", "bytes a tenant")):
        compared = {task: report.comparisons(found, what) for task, found in results.items()}
        if any(compared.values()):
            yield paragraph(f"Against LoRA of as many {words} (within {EQUAL:.0%}), seed by seed. {_counted(compared)}")
            yield report.compared(results, what)
    if steps:
        compared = {task: at_equal_step(found, steps) for task, found in results.items()}
        yield paragraph(_of_steps(steps) + (" " + _counted(compared) if any(compared.values()) else ""))


def _recipe(tasks: Tasks, results: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    """What the rule for the learning rate costs beside the best rate of the search, on validation."""
    rows = [
        [
            task,
            one.method,
            f"{by_rule['learning_rate']:g}",
            f"{loss:.4f}",
            f"{one.rate:g}",
            f"{one.validation:.4f}",
            f"{loss - one.validation:+.4f}",
        ]
        for task, found in results.items()
        for one in found
        for by_rule in off_the_grid(tasks[task], one.method)[-1:]  # those before it are of earlier rules
        for loss in (by_rule["validation"]["loss"],)
    ]
    if rows:
        words = (
            "The default recipe: the rate that roadie's rule gives for the model's width and the data, beside the best rate of "
            "the search, by the loss on validation, with one seed."
        )
        heads = ["task", "method", "rate by the rule", "loss", "best rate", "loss", "difference"]
        yield paragraph(words) + "\n" + markdown(heads, rows)


def off_the_grid(found: Sequence[Record], method: str) -> list[Record]:
    """The runs of a method, finished, at a rate that its search does not try."""
    grid = {rate(exponent) for exponent in range(LOWEST, HIGHEST + 1)}
    return [
        run
        for run in found
        if run["method"] == method and run["learning_rate"] not in grid and run["validation"] is not None
    ]


def at_equal_step(results: Sequence[Result], steps: Mapping[str, Any]) -> list[Comparison]:
    """Each of ours with each LoRA whose step of decoding costs no more (within SAME_STEP); all with every seed."""
    whole = [result for result in results if result.is_whole and SERVED_AS.get(result.method) in steps]
    cost = {result.method: steps[SERVED_AS[result.method]]["over_base"]["value"] for result in whole}
    return [
        Comparison(ours, lora)
        for lora in whole
        if METHODS[lora.method].family == LORA
        for ours in whole
        if METHODS[ours.method].family == ROAD and cost[lora.method] <= (1 + SAME_STEP) * cost[ours.method]
    ]


def _of_steps(steps: Mapping[str, Any]) -> str:
    times = {name: one["over_base"]["value"] for name, one in steps.items() if name != BASE}
    road = {name: value for name, value in times.items() if name not in METHODS}
    cheapest = min((value, name) for name, value in times.items() if name in METHODS)
    above = [name for name, value in road.items() if cheapest[0] <= (1 + SAME_STEP) * value]
    costs = ", ".join(f"{name} {value:.2f}" for name, value in times.items())
    words = (
        f"At equal cost of a step of decoding with 32 tenants, within {SAME_STEP:.0%} "
        f"(times of the base model's own step: {costs}): "
    )
    if not above:
        return f"{words}the cheapest LoRA, {cheapest[1]}, costs more than any of ours, so LoRA has no entry there."
    return f"{words}LoRA has an entry at the cost of {', '.join(above)} alone."


def _counted(compared: Mapping[str, Sequence[Comparison]]) -> str:
    verdicts = [one.verdict for found in compared.values() for one in found]
    return f"{verdicts.count('win')} won, {verdicts.count('tie')} tied, {verdicts.count('LOSS')} lost."


def _took(everything: Tasks) -> str:
    runs = [
        run for name, found in everything.items() if _task(name) != TENANTS for run in found if run["method"] != BASE
    ]
    hours = sum(run["processor_s"] for run in runs) / 3600
    commits = sorted({run["commit"] for run in runs})
    return paragraph(
        f"{len(runs)} runs so far, {hours:.1f} hours of processor time for their trainings, without measuring, at the commits "
        f"{', '.join(commits)}; products of float32 matrices may be in bfloat16 where the processor has instructions for it."
    )


def _methods(results: Mapping[str, Sequence[Result]]) -> list[str]:
    there = {result.method for found in results.values() for result in found}
    return [name for name in METHODS if name in there]


def _of(found: Sequence[Result], name: str) -> Result | None:
    return next((result for result in found if result.method == name), None)


def _base(found: Sequence[Record]) -> Mapping[str, Any]:
    test: Mapping[str, Any] = next(record for record in found if record["method"] == BASE)["test"]
    return test


def _metric(found: Sequence[Record]) -> str | None:
    return next((metric for metric in METRICS if metric in _base(found)), None)


def _step(steps: Mapping[str, Any], name: str | None) -> str:
    return f"{steps[name]['over_base']['value']:.2f}" if name in steps else "-"


def _interval(share: float, count: int) -> str:
    low, high = wilson(share, count)
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _task(name: str) -> str:
    return name.partition(".")[0]


def _model(name: str) -> str:
    return name.partition(".")[2]


def pictured(everything: Tasks) -> str | None:
    """The first model with a task that has finished rows to compare."""
    return next((_model(name) for name, found in everything.items() if len(finished_of(name, found)) > 1), None)


def draw() -> None:
    """The picture: loss over what is trained, what is kept and what a step costs, for the first model with rows to compare."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    everything = committed()
    model = pictured(everything)
    if model is None:
        return
    results = {
        _task(name): done
        for name, found in everything.items()
        if _model(name) == model
        if len(done := finished_of(name, found)) > 1
    }
    steps = steps_of(everything, model)
    figure = Figure(figsize=(10.5, 2.6 * len(results)), layout="constrained")
    for row, (task, found) in zip(figure.subplots(len(results), 3, squeeze=False), results.items(), strict=True):
        for axes, (label, place) in zip(row, _places(steps).items(), strict=True):
            axes.set(xlabel=label, title=f"{task}, test loss" if axes is row[0] else "")
            axes.grid(alpha=0.3)
            for result in found:
                _point(axes, place(result), result)
            if axes is not row[-1]:  # a step differs by parts, the others by times
                there = [value for result in found if (value := place(result)) is not None]
                axes.set(xscale="log", xlim=(min(there) / 2, 2 * max(there)))
                axes.xaxis.set_minor_formatter(NullFormatter())  # of a decade or less they would lie on each other
            else:
                axes.margins(x=0.2)
    figure.savefig(IMAGE, dpi=100)


def _places(steps: Mapping[str, Any]) -> dict[str, Callable[[Result], float | None]]:
    def step(result: Result) -> float | None:
        served = SERVED_AS.get(result.method)
        return steps[served]["over_base"]["value"] if served in steps else None

    return {
        "trainable parameters": lambda result: result.parameters,
        "bytes a tenant (float32)": lambda result: result.kept_bytes,
        "step with 32 tenants, times of the base's": step,
    }


def _point(axes: Any, place: float | None, result: Result) -> None:
    if place is None:
        return
    middle, colour = mean(result.losses), COLOURS[METHODS[result.method].family]
    height = stdev(result.losses) if result.is_whole else None
    axes.errorbar(place, middle, height, fmt="o" if result.is_whole else ".", color=colour)
    axes.annotate(result.method, (place, middle), fontsize=7, xytext=(4, 4), textcoords="offset points")
