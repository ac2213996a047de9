"""What combinations of adapters are worth: held-out loss of the demo's adapters, multiplied, interpolated, averaged, converted.

    python -m benchmarks.combining              train, measure, write a record, and docs/combining-results.md; about ten minutes
    python -m benchmarks.combining --report     the document alone, from the newest record

For road_2, which the demo trains, and for road_1: one adapter for each of three kinds of text, trained as in `roadie demo`, and
the loss of every combination on the held-out text of every kind. All rows of one measurement go through one adapter of a bank.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch

import roadie
from benchmarks.combining_report import write
from benchmarks.machine import ROOT, cores, machine_name, processor
from benchmarks.record import RESULTS
from roadie import embedded
from roadie.adapter import Adapter
from roadie.bank.live import live_adapter
from roadie.training import demo

STEPS = (0.25, 0.5, 0.75)
EXPONENTS = tuple(n / 8 for n in range(17))
RANKS = (4, 16, 64)
VARIANTS = ("road_2", "road_1")
SUITE = "roadie combining"
Named = Iterator[tuple[str, str, Callable[[], Adapter]]]


def train(settings: demo.DemoSettings) -> dict[str, Adapter]:
    """The demo's adapters, by kind of text."""
    torch.manual_seed(settings.seed)
    kinds, tokenizer = demo.installed_kinds(), embedded.load_tokenizer()
    model = demo.attach_adapters(embedded.load_model(), kinds, settings)
    for kind in kinds:
        demo.train_adapter(model, kind, tokenizer, settings, lambda *_: None)
    return {kind: live_adapter(model, kind) for kind in kinds}


def combined(adapters: dict[str, Adapter]) -> Named:
    """Section, name and maker of everything that is measured, in the order of the document."""
    for name, adapter in adapters.items():
        yield "alone", name, lambda adapter=adapter: adapter
    for inner, outer in permutations(adapters, 2):
        yield "composed", f"{inner}, then {outer}", lambda o=outer, i=inner: roadie.compose(adapters[o], adapters[i])
    for first, second in combinations(adapters, 2):
        for t in STEPS:
            name = f"{first} to {second}, {t}"
            yield "interpolated", name, lambda a=first, b=second, t=t: roadie.interpolate(adapters[a], adapters[b], t)
    everyone = list(adapters.values())
    yield "averaged", "mean of three", lambda: roadie.mean(everyone)
    yield "averaged", "mean of three, magnitude corrected", lambda: roadie.mean(everyone, magnitude_corrected=True)
    for name, adapter in adapters.items():
        yield "undone", name, lambda adapter=adapter: roadie.compose(roadie.inverse(adapter), adapter)
    for name, adapter in adapters.items():
        for exponent in EXPONENTS:
            yield "power", f"{name} {exponent}", lambda adapter=adapter, s=exponent: roadie.power(adapter, s)


def measure(adapters: dict[str, Adapter], settings: demo.DemoSettings) -> dict[str, Any]:
    """Losses by section, name and kind; base is the model without adapters. What is refused has its reason instead."""
    tokenizer = embedded.load_tokenizer()
    bank = roadie.AdapterBank(embedded.load_model(), slots=1)
    rows = {kind: demo.held_out_rows(tokenizer, kind, settings) for kind in adapters}
    found: dict[str, Any] = {"base": losses(bank, None, rows)}
    for section, name, make in combined(adapters):
        print(f"{section}: {name}", file=sys.stderr)
        try:
            adapter = make()
        except roadie.RoadieError as error:
            found.setdefault(section, {})[name] = {"refused": str(error)}
            continue
        store = bank.replace if "measured" in bank else bank.admit
        store("measured", adapter)
        found.setdefault(section, {})[name] = losses(bank, "measured", rows)
    return found


@torch.no_grad()
def losses(bank: roadie.AdapterBank, name: str | None, rows: dict[str, torch.Tensor]) -> dict[str, float]:
    """Kind of text -> mean loss, nats per token, of the model with the adapter `name` (None: without one)."""
    found = {}
    for kind, tokens in rows.items():
        parts = []
        for part in tokens.split(8):
            with bank.rows([name] * len(part)):
                parts.append(bank.model(input_ids=part, labels=part).loss.item() * len(part))
        found[kind] = sum(parts) / len(tokens)
    return found


def converted(adapters: dict[str, Adapter], settings: demo.DemoSettings) -> dict[str, Any]:
    """By name of the conversion: what it lost, its size, and the losses of each adapter on its own kind."""
    found: dict[str, Any] = {}
    tokenizer, base = embedded.load_tokenizer(), embedded.load_model()
    for kind, adapter in adapters.items():
        rows = {kind: demo.held_out_rows(tokenizer, kind, settings)}
        if adapter.variants != (roadie.Variant.ROAD_1,):
            conversion = roadie.convert(adapter, "road_1")
            bank = roadie.AdapterBank(embedded.load_model(), slots=1)
            bank.admit(kind, conversion.adapter)
            loss = losses(bank, kind, rows)[kind]
            found.setdefault("road_1", {})[kind] = facts(conversion.share_lost, conversion.adapter.num_parameters, loss)
        for rank in RANKS:
            lora = roadie.to_lora(adapter, base, rank)
            loss = demo.mean_loss(with_lora(lora), rows[kind])
            found.setdefault(f"LoRA of rank {rank}", {})[kind] = facts(
                lora.relative_error**2, lora.num_parameters, loss
            )
    return found


def facts(share_lost: float, parameters: int, loss: float) -> dict[str, float]:
    """An entry of the table of conversions."""
    return {"share_lost": share_lost, "parameters": parameters, "loss": loss}


@torch.no_grad()
def with_lora(lora: roadie.lora.LoraAdapter) -> Any:
    """A copy of the embedded model with the LoRA adapter in its weights: W + B A."""
    model = embedded.load_model()
    for path in lora.fits:
        up, down = (lora.tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "BA")
        model.get_submodule(path).weight += up @ down
    return model


def make_record(settings: Sequence[demo.DemoSettings]) -> dict[str, Any]:
    """Everything measured, and where."""
    started = datetime.now(timezone.utc)
    variants = {}
    for each in settings:
        adapters = train(each)
        variants[each.variant] = {
            "distances": {
                f"{one} and {two}": roadie.distance(adapters[one], adapters[two])
                for one, two in combinations(adapters, 2)
            },
            "losses": measure(adapters, each),
            "conversions": converted(adapters, each),
            "road_parameters": next(iter(adapters.values())).num_parameters,
        }
    first = settings[0]
    return {
        "suite": SUITE,
        "date": started.isoformat(timespec="seconds"),
        "duration_s": (datetime.now(timezone.utc) - started).total_seconds(),
        "machine": {"name": machine_name(), "processor": processor(), "cores": cores()},
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": sys.version.split()[0]},
        "settings": {"steps": first.steps, "rows": first.rows, "row_tokens": first.row_tokens, "seed": first.seed}
        | {"learning_rate": first.learning_rate, "measured_rows": first.measured_rows},
        "variants": variants,
    }


def newest(results: Path = RESULTS) -> dict[str, Any] | None:
    """The committed record of the latest date, None where there is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*/combining-*.json"))]
    return max(found, key=lambda record: record["date"], default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write, or only write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only make the document, from the newest record")
    if not parser.parse_args(arguments).report:
        record = make_record([demo.DemoSettings(variant=variant) for variant in VARIANTS])
        path = RESULTS / record["machine"]["name"] / f"combining-{record['date'][:10]}.json"
        # Losses keep all their digits: what an inverse leaves of a loss shows in the seventh.
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record = newest()
    if record is None:
        raise SystemExit("no record: run without --report")
    write(record, ROOT / "docs")


if __name__ == "__main__":
    main()
