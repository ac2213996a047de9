"""docs/performance.md, made from a record and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.losses import losses
from benchmarks.machine import ROOT
from benchmarks.rivals import ROADIE
from benchmarks.verdicts import Verdict, of_workload, verdicts

DOCS = ROOT / "docs"
Record = dict[str, Any]

_HEAD = """# Performance

This file is made by `python -m benchmarks.run --report` from the newest record in `benchmarks/results`; it is never
written by hand. `make bench` measures anew, writes a record and makes this file from it.
"""

_HOW = """## How it was measured

The rivals run in one process and take turns, in an order that changes every round; a number is the median over rounds,
and a ratio is the median of the ratios within rounds, with its 95 % bootstrap interval in brackets. Layers and the
rotation alone run on one thread, whole models on torch's default number. All rivals work on the same base weights. The
frozen model computes the gradient of its input in backward. "frozen again" is the frozen layer a second time: how far
its ratio is from 1 is how far any ratio in that row can be trusted. "limit" is what the ratio would be if the rotation
were a pass of its own over memory (2 reads or writes an element forward, 5 with backward) at the speed of copying 64 MiB;
below it is possible only where the tensor is still in a cache.
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
        _verdict_table(verdicts(record)),
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
    rows = [
        ["processor", f"{machine['processor']}, {machine['cores']} cores, {machine['capability']}"],
        ["commit", f"{record['commit']}{dirty}"],
        ["date", record["date"]],
        ["versions", f"Python {machine['python']}, {versions}"],
        ["threads", f"1 for layers and the rotation alone, {machine['default_threads']} for models"],
        ["copying 64 MiB, read + written", speeds],
        ["load average, start and end", f"{start}; {end}"],
        ["duration", f"{record['duration_s'] / 60:.1f} minutes"],
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


def _verdict_table(found: list[Verdict]) -> str:
    rows = [[str(v.line), v.about, v.bound, v.measured, v.interval, "met" if v.met else "**NOT MET**"] for v in found]
    about = (
        "The lines number what the kernels are held to. A bound is met when the end of the interval nearer "
        "to it meets it."
    )
    header = ["line", "what", "bound", "measured", "interval", "verdict"]
    return f"## Bounds\n\n{about}\n\n{tables.markdown(header, rows)}"


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
            "## On a GPU\n\nNot measured yet: no record of a GPU is committed. `python -m benchmarks.gpu` measures "
            "layers and decoder blocks at the shapes of Llama-3.1-8B, and the paper's figure (throughput against the "
            "number of different adapters in a batch), on a CUDA machine."
        )
    return "\n".join(["## On a GPU\n", *tables.gpu(gpu)])
