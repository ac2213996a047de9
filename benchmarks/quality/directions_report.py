"""The part of docs/quality.md on ways to a better RoAd, judged by validation: searches that have ended, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality import real_report
from benchmarks.quality.hub.directions import DIRECTIONS
from benchmarks.quality.hub.methods import METHODS
from benchmarks.quality.hub.settings import read
from benchmarks.quality.methods import rate
from benchmarks.quality.real import GRID
from benchmarks.quality.report import Record, paragraph
from benchmarks.quality.search import SEEDS, next_run, searched
from benchmarks.quality.tasks import LANGUAGE
from benchmarks.quality.tenants import TENANTS
from benchmarks.tables import markdown

BESIDE = ("road_1", "road_2", "road_1_input", "road_1_stages_2", "lora_r1")
WORDS = {
    "road_1": "on all linear layers",
    "road_2": "two parameters an output",
    "road_1_input": "inputs are rotated too",
    "road_1_stages_2": "two rotations in a row",
    "lora_r1": "",
    "road_1_scales_faster": "road_1, scales at 3.2 times the rate of angles",
    "road_1_scales_slower": "road_1, scales at a 3.2th of it",
    "road_2_first_half": "road_2 on the first half of the blocks",
    "road_2_last_half": "road_2 on the last half",
    "road_attention": "attention alone: road_4 on q and o, road_2 on k and v",
    "road_mlp": "MLP alone: road_4 on down, road_1 on gate and up",
    "road_1_from_lora": "road_1 from the closed-form fit to a short LoRA training",
    "road_2_from_lora": "road_2 from there",
}


@dataclass(frozen=True)
class Found:
    """The lowest validation loss of a method on a task, the rate that gave it, and what was trained."""

    loss: float
    rate: float
    parameters: int


def text() -> Iterator[str]:
    """The section, a paragraph at a time; equal for equal records, nothing where no direction's search has ended."""
    everything = real_report.committed()
    for name, records in everything.items():
        if name.startswith(f"{TENANTS}."):
            continue
        found = searched_to_the_end(records)
        if "road_1" in found and any(one in found for one in DIRECTIONS):
            yield f"### Directions: {name}\n"
            yield paragraph(_words(name.partition(".")[0], found))
            yield _table(found)


def searched_to_the_end(records: Sequence[Record]) -> dict[str, Found]:
    """The methods whose search has ended, the grid's own before the directions."""
    found = {}
    for name in (*BESIDE, *DIRECTIONS):
        scores = searched(records, name)
        if not scores or next_run(records, METHODS[name], LANGUAGE, SEEDS[:1]) is not None:
            continue
        best = min(scores, key=lambda one: scores[one])
        parameters = next(record["parameters"] for record in records if record["method"] == name)
        found[name] = Found(scores[best], rate(best), parameters)
    return found


def _words(task: str, found: Mapping[str, Found]) -> str:
    lacking = [name for name in read(GRID)[task].directions if name not in found]
    words = (
        "Ways to a better RoAd ([directions.py](../benchmarks/quality/hub/directions.py)): loss on validation at the best rate "
        "of each, with one seed, and less that of road_1: below 0 is better. The short LoRA training before a fit learns from a "
        "fifth as many rows as the training itself."
    )
    return words + (f" Not finished, so without figures: {', '.join(lacking)}." if lacking else "")


def _table(found: Mapping[str, Found]) -> str:
    road = found["road_1"]
    rows = [
        [
            name,
            WORDS[name],
            f"{one.parameters:,}",
            f"{one.parameters / road.parameters:.2f}",
            f"{one.rate:g}",
            f"{one.loss:.4f}",
            f"{one.loss - road.loss:+.4f}",
        ]
        for name, one in found.items()
    ]
    heads = ["method", "what it is", "parameters", "times road_1's", "rate", "validation loss", "less road_1's"]
    return markdown(heads, rows)
