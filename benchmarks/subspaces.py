"""Two kinds of text in the halves of one adapter: ``python -m benchmarks.subspaces``, about 30 minutes on two cores.

The experiment of the paper's section 4.3 (Liao & Monz 2024, arXiv 2409.00119) on the embedded model, with losses instead of
samples: the first half of the pairs of every layer is trained on text A and the second half on text B, in one run in which
each row of a batch updates its own half only. Measured on held-out text of both kinds: each half, both halves joined, full
adapters of A and of B alone and one after the other, and a full adapter of the mixture. Everything else is equal: rows a
step, steps, learning rate, and the order of a text's rows for one seed.

Writes benchmarks/results/<machine>/subspaces-<commit>.json; ``--report`` makes docs/subspaces.md from the newest of these.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import roadie
from benchmarks import machine, record, subspaces_report
from roadie import checkpoint, embedded
from roadie.adapter import Adapter
from roadie.adapter_algebra import blend_adapters, compose, power
from roadie.embedded import corpus
from roadie.subspaces import join
from roadie.training.encoding import Example, collate, encode
from roadie.training.many import RunSettings, train_many
from roadie.training.text import read

LAYOUTS = ("contiguous", "interleaved")


@dataclass(frozen=True)
class Settings:
    """What is trained and measured; rows: of one text, a step (the mixture sees so many of each); lengths in tokens."""

    kinds: tuple[str, str] = ("topics", "asyncio")
    variants: tuple[str, ...] = ("road_1", "road_2")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    rows: int = 4
    row_tokens: int = 128
    learning_rate: float = 2e-2
    measured_rows: int = 48


QUICK = Settings(variants=("road_1",), seeds=(0,), steps=3, rows=2, row_tokens=64, measured_rows=2)


def experiment(settings: Settings, folder: Path) -> list[dict[str, Any]]:
    """An entry for each variant and seed: its losses by adapter and text, nats a token."""
    texts = _write_texts(settings, folder)
    held_out = {name: _held_out(name, settings, folder) for name in "AB"}
    base = _losses(None, held_out)
    entries = []
    for variant in settings.variants:
        for seed in settings.seeds:
            started = time.perf_counter()
            place = folder / f"{variant}-{seed}"
            adapters = _combined(_train(variant, seed, settings, texts, place))
            losses = {"base": base, **{name: _losses(adapter, held_out) for name, adapter in adapters.items()}}
            entries.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "seconds": time.perf_counter() - started,
                    "parameters": _parameters(adapters),
                    "losses": losses,
                }
            )
            print(variant, seed, f"{entries[-1]['seconds']:.0f} s", json.dumps(record.rounded(losses)), flush=True)
    return entries


def _write_texts(settings: Settings, folder: Path) -> dict[str, Path]:
    """A.txt and B.txt to learn from, as long as each other, and the held-out A.held.txt and B.held.txt."""
    splits = {name: corpus.split(kind) for name, kind in zip("AB", settings.kinds, strict=True)}
    texts = {name: "\n".join(document.text for document in split.train) for name, split in splits.items()}
    shortest = min(map(len, texts.values()))
    for name, split in splits.items():
        (folder / f"{name}.txt").write_text(texts[name][:shortest], encoding="utf-8")
        held_out = "\n".join(document.text for document in split.held_out)
        (folder / f"{name}.held.txt").write_text(held_out, encoding="utf-8")
    return {name: folder / f"{name}.txt" for name in texts}


def _held_out(name: str, settings: Settings, folder: Path) -> list[Example]:
    """Rows spread evenly over the held-out text."""
    rows = encode(read([str(folder / f"{name}.held.txt")]), embedded.load_tokenizer(), settings.row_tokens)
    count = min(settings.measured_rows, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _train(variant: str, seed: int, settings: Settings, texts: Mapping[str, Path], place: Path) -> dict[str, Adapter]:
    """Everything that is trained, in one run: both halves in both layouts, both full adapters, and the mixture."""
    common = {
        "variant": variant,
        "seed": seed,
        "steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "max_length": settings.row_tokens,
    }
    jobs = []
    for number, name in enumerate("AB", start=1):
        own = {**common, "data": str(texts[name]), "batch_size": settings.rows}
        jobs += [{**own, "name": f"half-{name}-{layout}", "share": f"{number}/2 {layout}"} for layout in LAYOUTS]
        jobs.append({**own, "name": f"full-{name}"})
    jobs.append({**common, "name": "mixture", "data": [*map(str, texts.values())], "batch_size": 2 * settings.rows})
    jobs = [{**job, "output": str(place / job["name"])} for job in jobs]
    result = train_many(jobs, settings=RunSettings(max_tokens_per_step=4096))
    assert not result.failed, result.failed
    return {str(job["name"]): checkpoint.load(str(job["output"])) for job in jobs}


def _combined(trained: dict[str, Adapter]) -> dict[str, Adapter]:
    """What was trained, and what is made of it without training."""
    joined = {f"both-{layout}": join([trained[f"half-{name}-{layout}"] for name in "AB"]) for layout in LAYOUTS}
    full = [trained["full-A"], trained["full-B"]]
    return {
        **trained,
        **joined,
        "both-halved": power(joined["both-contiguous"], 0.5),
        "full-A-then-B": compose(outer=full[1], inner=full[0]),
        "full-blended": blend_adapters(full, [0.5, 0.5]),
    }


def _parameters(adapters: Mapping[str, Adapter]) -> dict[str, int]:
    """How many parameters differ from the identity's."""
    return {
        name: sum(int((one.theta != 0).sum() + (one.alpha != 1).sum()) for one in adapter.layers.values())
        for name, adapter in adapters.items()
    }


@torch.no_grad()
def _losses(adapter: Adapter | None, held_out: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    """The mean loss a token on each held-out text."""
    bank = roadie.AdapterBank(embedded.load_model().eval(), slots=1)
    if adapter is not None:
        bank.admit("one", adapter)
    return {name: _mean_loss(bank, rows, None if adapter is None else "one") for name, rows in held_out.items()}


def _mean_loss(bank: roadie.AdapterBank, rows: Sequence[Example], wish: str | None) -> float:
    total, count = 0.0, 0
    for begin in range(0, len(rows), 8):
        some = list(rows[begin : begin + 8])
        with bank.rows([wish] * len(some)):
            loss = bank.model(**collate(some)).loss.item()
        tokens = sum(len(row.labels) - 1 for row in some)
        total, count = total + loss * tokens, count + tokens
    return total / count


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.subspaces", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a moment of it, to see that it runs; nothing is kept")
    parser.add_argument("--report", action="store_true", help="only docs/subspaces.md, from the newest record")
    options = parser.parse_args(arguments)
    if not options.report:
        settings = QUICK if options.quick else Settings()
        started, head = time.perf_counter(), {"date": machine.now(), **machine.commit(), "machine": machine.describe()}
        with tempfile.TemporaryDirectory() as folder:
            entries = experiment(settings, Path(folder))
        made = {**head, "settings": asdict(settings), "seconds": time.perf_counter() - started, "entries": entries}
        if options.quick:
            return
        record.write(made, subspaces_report.path_of(made))
    subspaces_report.write(subspaces_report.newest())


if __name__ == "__main__":
    main()
