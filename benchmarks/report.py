"""docs/performance.md, made from a record and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.gpu import report as gpu_report
from benchmarks.losses import losses
from benchmarks.machine import ROOT
from benchmarks.rivals import PEFT_LORA, ROADIE
from benchmarks.verdicts import Verdict, of_workload, verdicts, whole_models
from benchmarks.workloads.model import TRAINING
from benchmarks.workloads.real_model import CHECKPOINT

DOCS = ROOT / "docs"
Record = dict[str, Any]

_HEAD = """# Performance

This file is made by `python -m benchmarks.run --report` from the newest record in `benchmarks/results`; it is never
written by hand. `make bench` measures anew, writes a record and makes this file from it.
"""

_HOW = """## How it was measured

The rivals run in one process and take turns, in an order that changes every round; a number is the median over rounds,
and a ratio is the median of the ratios within rounds, with its 95 % bootstrap interval in brackets. Layers and the
rotation alone run on one thread, the steps of a whole model on as many as their line says, and the Llama of random weights
below on torch's default number. All rivals work on the same base weights, and adapt the same layers. The
frozen model computes the gradient of its input in backward. "frozen again" is the frozen layer a second time: how far
its ratio is from 1 is how far any ratio in that row can be trusted. "limit" is what the ratio would be if the rotation
were a pass of its own over memory (2 reads or writes an element forward, 5 with backward) at the speed of copying 64 MiB;
below it is possible only where the tensor is still in a cache.
"""


_WHOLE = """What a user pays: models are run, not layers. A decoding step is a forward over one token a row, with `tokens` in the
cache; a training step is a forward with a loss and a backward, without an optimizer. roadie's bounds hold on one thread; that
of a training step is the larger of a fixed share and 1.3 times what the rotation as a pass of its own over memory would add.
Where there are several adapters, each row names its own (`adapter_names`; `roadie.rows` in training, where PEFT refuses names).
"""
_NO_CHECKPOINT = """No real model was measured for this record: none was given. `make bench ARGS="--model FOLDER"` takes a folder
that transformers loads; `python -m benchmarks.real_model --model FOLDER` measures the steps of a whole model alone.
"""


def write(record: Record, gpu: Record | None, folder: Path) -> Path:
    """Write performance.md and images/performance-*.png into `folder`; needs matplotlib."""
    from benchmarks import plots

    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / "performance.md"
    path.write_text(text_of(record, gpu), encoding="utf-8")
    plots.draw(record, gpu, folder / "images")
    return path


def text_of(record: Record, gpu: Record | None) -> str:
    """The document; equal for equal records."""
    sections = [
        _HEAD,
        _provenance(record),
        _losses(verdicts(record), record),
        _loss_table(record),
        whole_models_section(record),
        verdict_table(verdicts(record)),
        _HOW,
        *_measurements(record["entries"]),
        _gpu(gpu),
    ]
    return "\n".join(section.rstrip() + "\n" for section in sections)


def _provenance(record: Record) -> str:
    machine = record["machine"]
    speeds = ", ".join(f"{speed / 1e9:.1f} GB/s ({n} threads)" for n, speed in machine["copy_bytes_per_s"].items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    dirty = " with uncommitted changes" if record["dirty"] else ""
    start, end = (" ".join(map(str, load)) for load in (machine["load_average"], record["load_average_end"]))
    duration = f"{record['duration_s'] / 60:.1f} minutes"
    if "whole_models_s" in record:
        duration += f", and {record['whole_models_s'] / 60:.1f} for whole models"
    rows = [
        ["processor", f"{machine['processor']}, {machine['cores']} cores, {machine['capability']}"],
        ["commit", f"{record['commit']}{dirty}"],
        ["date", record["date"]],
        ["versions", f"Python {machine['python']}, {versions}"],
        ["threads", f"1 for layers and the rotation alone, {machine['default_threads']} for the random Llama"],
        ["copying 64 MiB, read + written", speeds],
        ["load average, start and end", f"{start}; {end}"],
        ["duration", duration],
    ]
    return tables.markdown(["", ""], rows)


def _losses(found: list[Verdict], record: Record) -> str:
    """Where it falls short, first."""
    missed = [verdict for verdict in found if not verdict.met]
    lines = [f"- {v.about}: {v.bound}, measured {v.measured} ({v.interval})" for v in missed]
    lines += [f"- {failure['task']} failed: {failure['error']}" for failure in record["failures"]]
    lines += [f"- {title}: left out, the time was over" for title in record["left_out"]]
    said = "\n".join(lines) if lines else "Every bound below is met."
    return f"## What falls short\n\n{len(found) - len(missed)} of {len(found)} bounds are met.\n\n{said}"


def _loss_table(record: Record) -> str:
    found = losses(record)
    if not found:
        return "No rival is faster than roadie outside its interval, and none needs fewer bytes."
    rows = [[loss.what, loss.rival, loss.share] for loss in found]
    about = "Where a rival is faster than roadie outside the interval, or needs fewer bytes (its share of roadie's):"
    return f"{about}\n\n{tables.markdown(['what', 'rival', 'share'], rows)}"


def verdict_table(found: list[Verdict]) -> str:
    rows = [[str(v.line), v.about, v.bound, v.measured, v.interval, "met" if v.met else "**NOT MET**"] for v in found]
    about = (
        "The lines number what roadie is held to. A bound is met when the end of the interval nearer to it meets it."
    )
    header = ["line", "what", "bound", "measured", "interval", "verdict"]
    return f"## Bounds\n\n{about}\n\n{tables.markdown(header, rows)}"


def whole_models_section(record: Record) -> str:
    """What the user of a model pays: a sentence, and a table of every step."""
    found = whole_models(record["entries"])
    parts = ["## A whole model, time over the frozen model\n", _WHOLE]
    is_measured = bool(of_workload(found, CHECKPOINT))
    parts.append(_image("checkpoint", "Time over the frozen model, by step") if is_measured else _NO_CHECKPOINT)
    for title in dict.fromkeys(entry["model"] for entry in found):
        of_model = [entry for entry in found if entry["model"] == title]
        size = (
            f"{of_model[0]['parameters'] / 1e6:.3g} million parameters, {of_model[0]['adapted_layers']} adapted layers"
        )
        parts.append(f"### {title}: {size}\n\n{_paid(of_model)}\n\n{tables.whole_models(of_model)}")
    return "\n".join(parts)


def _paid(entries: list[dict[str, Any]]) -> str:
    """In words what roadie and LoRA add on one thread: a line for each kind of step."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["case"]["threads"] == 1:
            kinds.setdefault(_kind(entry["case"]), []).append(entry)
    lines = []
    for kind, of_kind in kinds.items():
        counts = ", ".join(str(_count(entry["case"])) for entry in of_kind)
        added = {name: _added(of_kind, name) for name in (ROADIE, PEFT_LORA) if name in of_kind[0]["rivals"]}
        lines.append(f"- {kind.format(counts)}: " + "; ".join(f"{name} {costs}" for name, costs in added.items()))
    return "What adapters add to the frozen model's time, on one thread:\n\n" + "\n".join(lines)


def _kind(case: dict[str, Any]) -> str:
    what = "training step, {} tokens" if case["mode"] == TRAINING else f"{case['mode']}, {{}} rows"
    return what if case["adapters"] == 1 else f"{what} (each row one of {case['adapters']} adapters)"


def _count(case: dict[str, Any]) -> int:
    return case["rows"] * (case["tokens"] if case["mode"] == TRAINING else 1)


def _added(entries: list[dict[str, Any]], name: str) -> str:
    return ", ".join(f"{entry['rivals'][name]['ratio']['value'] - 1:+.1%}" for entry in entries)


def _measurements(entries: list[dict[str, Any]]) -> Iterator[str]:
    yield "## One layer, time over the frozen layer\n"
    yield _image("layer", "Ratio to the frozen layer against tokens")
    yield from tables.layers(entries)
    yield "## The rotation alone, in place\n"
    yield _image("roofline", "Bytes a second against the size of the tensor, and copying as the roofline")
    yield tables.rotations(entries)
    yield "## Bytes kept for backward beyond the frozen modules', for each element of the adapted outputs\n"
    yield tables.kept(entries)
    yield _fixed(entries)
    yield f"## A Llama of {_millions(entries)} million parameters, all linear layers adapted\n"
    yield _image("model", "Time over the frozen model, and activations kept")
    yield from tables.models(entries)
    yield "## Peak memory of a training step, a process for each rival\n"
    yield tables.peaks(entries)


def _fixed(entries: list[dict[str, Any]]) -> str:
    """What the table of kept bytes leaves out."""
    amounts = [
        amount["fixed"]
        for entry in of_workload(entries, "kept")
        for name, amount in entry["bytes"].items()
        if name.startswith(ROADIE)
    ]
    largest = max(amounts, default=0) / 1024
    return (
        "Counted are whole storages, each once, without parameters, at two numbers of tokens; the table has what grows with "
        f"the tokens. What does not (tables made of the parameters) is at most {largest:.0f} KiB for roadie here."
    )


def _millions(entries: list[dict[str, Any]]) -> str:
    counts = {entry["parameters"] for entry in of_workload(entries, "model")}
    return f"{max(counts, default=0) / 1e6:.3g}"


def _image(name: str, text: str) -> str:
    return f"![{text}](images/performance-{name}.png)\n"


def _gpu(gpu: Record | None) -> str:
    if gpu is None:
        return (
            "## On a GPU\n\nNot measured yet: no record of a GPU is committed. `make gpu` checks the kernels there, and measures "
            "layers, decoding, a training step and the paper's figure (throughput against the number of different adapters in a "
            "batch), at the shapes of Llama-3.1-8B and SmolLM2-135M, on a CUDA machine, in eight minutes."
        )
    return "\n".join(["## On a GPU\n", *gpu_report.section(gpu)])
