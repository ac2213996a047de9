"""What a fitted adapter is worth, and what fitting costs: losses against LoRA extraction, and memory on a model of 4 GB.

python -m benchmarks.fit                    both parts, a record, and docs/fit.md; about ten minutes, 9 GB of disk for a while
python -m benchmarks.fit losses streaming   some parts; what is not measured is taken from the newest record
python -m benchmarks.fit --report           the document alone, from the newest record

losses      the embedded model, fully fine-tuned on one held-out kind of text (every parameter, or the linear layers alone);
            RoAd fitted to its weights and to its outputs, LoRA extracted by SVD, and a RoAd adapter that is trained
streaming   a synthetic model of 4 GB in shards of 200 MB and a turned copy in other shards: private memory, time, recovery
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import roadie
from benchmarks import fit_report, fit_streaming, machine
from roadie import embedded, fit
from roadie.bank.live import live_adapter
from roadie.training import demo

SCHEMA = 1
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Settings:
    """The fine-tuning, the text for fits to outputs, and the text the losses are measured on."""

    kind: str = "asyncio"
    steps: int = 200
    rows: int = 8
    row_tokens: int = 128
    learning_rate: float = 1e-3
    fitted_rows: int = 64
    measured_rows: int = 32
    seed: int = 0

    @property
    def demo(self) -> demo.DemoSettings:
        """As the demo says it."""
        return demo.DemoSettings(row_tokens=self.row_tokens, measured_rows=self.measured_rows, seed=self.seed)


def tune(settings: Settings, linear_only: bool) -> Any:
    """The embedded model, fully fine-tuned: AdamW without decay, a tenth of the steps warm-up, then linear to 0."""
    torch.manual_seed(settings.seed)
    model, tokenizer = embedded.load_model().train(), embedded.load_tokenizer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not linear_only or name.split(".")[-2] in LINEAR)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rule = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    warm_up, steps = settings.steps / 10, settings.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: min((step + 1) / warm_up, 1) * (1 - step / steps))
    tokens = demo.encode(tokenizer, embedded.corpus.split(settings.kind).train)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - settings.row_tokens, (settings.rows,), generator=generator)
        batch = demo.rows_at(tokens, starts, settings.row_tokens, tokenizer.bos_token_id)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        rule.step()
        schedule.step()
        rule.zero_grad()
    return model.eval().requires_grad_(True)


def fitted_text(settings: Settings) -> list[Tensor]:
    """Rows spread evenly over the text that the model was tuned on, in batches of eight."""
    tokenizer = embedded.load_tokenizer()
    tokens = demo.encode(tokenizer, embedded.corpus.split(settings.kind).train)
    starts = torch.linspace(0, len(tokens) - settings.row_tokens, settings.fitted_rows).long()
    return list(demo.rows_at(tokens, starts, settings.row_tokens, tokenizer.bos_token_id).split(8))


def with_adapter(adapter: roadie.Adapter) -> Any:
    """The embedded model with the adapter in its weights."""
    model = embedded.load_model()
    for path, layer in adapter.layers.items():
        weight = model.get_submodule(path).weight
        weight.copy_(roadie.rotate_weight(weight, layer.rotation))
    return model


def with_linear_of(tuned: nn.Module) -> Any:
    """The embedded model with the linear layers of the tuned one, but its own embeddings, norms and output head."""
    model = embedded.load_model()
    for path in linear_paths(model):
        model.get_submodule(path).weight.copy_(tuned.get_submodule(path).weight)
    return model


def linear_paths(model: nn.Module) -> list[str]:
    """The linear layers, without the output head."""
    return [path for path, _ in model.named_modules() if path.rpartition(".")[2] in LINEAR]


@dataclass(frozen=True)
class Extraction:
    """The singular values and vectors of every layer's change, float64."""

    parts: Mapping[str, tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, tuned: nn.Module) -> Extraction:
        """Of the embedded model's linear layers."""
        base = embedded.load_model()
        changes = {p: tuned.get_submodule(p).weight - base.get_submodule(p).weight for p in linear_paths(base)}
        return cls({p: torch.linalg.svd(each.detach().double(), full_matrices=False) for p, each in changes.items()})

    def size(self, path: str) -> int:
        """Parameters of one rank of a layer."""
        left, _, right = self.parts[path]
        return left.shape[0] + right.shape[1]

    def uniform(self, rank: int) -> dict[str, int]:
        """The same rank everywhere."""
        return dict.fromkeys(self.parts, rank)

    def within(self, parameters: int) -> dict[str, int]:
        """Ranks of each layer: the singular values that explain most for their parameters, as long as there is room."""
        worth = [
            (float(value**2) / self.size(path), path) for path, (_, values, _) in self.parts.items() for value in values
        ]
        ranks = dict.fromkeys(self.parts, 0)
        for _, path in sorted(worth, reverse=True):
            if parameters < self.size(path):
                break
            ranks[path] += 1
            parameters -= self.size(path)
        return ranks

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Of all layers."""
        return sum(rank * self.size(path) for path, rank in ranks.items())

    def share_explained(self, ranks: Mapping[str, int]) -> float:
        """Of the squared change of all layers."""
        kept = sum(float((self.parts[path][1][:rank] ** 2).sum()) for path, rank in ranks.items())
        return kept / sum(float((values**2).sum()) for _, values, _ in self.parts.values())

    def model(self, ranks: Mapping[str, int]) -> Any:
        """The embedded model with the extracted LoRA in its weights."""
        model = embedded.load_model()
        for path, rank in ranks.items():
            left, values, right = self.parts[path]
            model.get_submodule(path).weight.add_(((left[:, :rank] * values[:rank]) @ right[:rank]).float())
        return model


Row = dict[str, Any]


@torch.no_grad()
def losses_of(tuned: nn.Module, settings: Settings) -> Iterator[Row]:
    """What each way to say the tuned model in few numbers explains, and the held-out loss it buys."""
    rows = demo.held_out_rows(embedded.load_tokenizer(), settings.kind, settings.demo)

    def row(name: str, model: Any, parameters: int, share: float | None = None, seconds: float = 0.0) -> Row:
        entry = {"name": name, "parameters": parameters, "share_explained": share, "seconds": seconds}
        entry["loss"] = demo.mean_loss(model, rows)
        print(entry, file=sys.stderr, flush=True)
        return entry

    base = embedded.load_model()
    everything = sum(parameter.numel() for parameter in tuned.parameters())
    yield row("base model", base, 0)
    yield row("tuned model", tuned, everything)
    linear = sum(base.get_submodule(path).weight.numel() for path in linear_paths(base))
    yield row("its linear layers alone", with_linear_of(tuned), linear, 1.0)
    for name, make in fits(base, tuned, settings):
        start = time.perf_counter()
        found = make()
        seconds = time.perf_counter() - start
        yield row(name, with_adapter(found.adapter), found.adapter.num_parameters, found.share_explained, seconds)
    extraction = Extraction.of(tuned)
    budget = found.adapter.num_parameters
    for times in (1, 10):
        rank = round(times * budget / extraction.parameters(extraction.uniform(1)))
        for name, ranks in (
            (f"LoRA by SVD, rank {rank}", extraction.uniform(rank)),
            (f"LoRA by SVD, ranks by layer, {times} x road_2", extraction.within(times * budget)),
        ):
            yield row(name, extraction.model(ranks), extraction.parameters(ranks), extraction.share_explained(ranks))


def fits(base: Any, tuned: Any, settings: Settings) -> Iterator[tuple[str, Callable[[], fit.Fit]]]:
    """Names and makers of all fits; the last ones are road_2."""
    text = fitted_text(settings)
    with TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        for variant in ("road_1", "road_2"):
            yield (
                f"{variant}, weights",
                lambda v=variant: fit.from_checkpoints(embedded.model_path(), folder, variant=v),
            )
    for inputs in ("wanted", "base", "adapted"):
        for variant in ("road_1", "road_2"):
            how = {"inputs": inputs, "variant": variant}
            yield f"{variant}, outputs, {inputs}", lambda how=how: fit.from_activations(base, tuned, text, **how)


def trained(settings: Settings) -> Row:
    """A road_2 adapter trained as the demo does, on the same text."""
    chosen = replace(settings.demo, variant="road_2")
    torch.manual_seed(settings.seed)
    start = time.perf_counter()
    tokenizer, kind = embedded.load_tokenizer(), settings.kind
    model = demo.attach_adapters(embedded.load_model(), [kind], chosen)
    demo.train_adapter(model, kind, tokenizer, chosen, lambda *_: None)
    adapter, seconds = live_adapter(model, kind), time.perf_counter() - start
    with torch.no_grad():
        loss = demo.mean_loss(with_adapter(adapter), demo.held_out_rows(tokenizer, kind, chosen))
    name = f"road_2, trained, {chosen.steps} steps"
    return {
        "name": name,
        "parameters": adapter.num_parameters,
        "share_explained": None,
        "seconds": seconds,
        "loss": loss,
    }


def losses(settings: Settings = Settings()) -> dict[str, Any]:
    """Both fine-tunings, and the trained adapter beside them."""
    tunings = {}
    for name, linear_only in (("all parameters", False), ("linear layers", True)):
        tuned = tune(settings, linear_only)
        tunings[name] = list(losses_of(tuned, settings))
    return {"settings": asdict(settings), "tunings": tunings, "trained": trained(settings)}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"losses": losses, "streaming": fit_streaming.measure}


def make_record(parts: Sequence[str]) -> dict[str, Any]:
    """Everything measured, and where; parts that are not asked for are those of the newest record."""
    old = fit_report.newest() or {"parts": {}}
    head = {"suite": "roadie fit", "schema": SCHEMA, "date": machine.now(), **machine.commit()}
    here = {"name": machine.machine_name(), "processor": machine.processor(), "cores": machine.cores()}
    here |= {"versions": machine.describe()["versions"], "threads": torch.get_num_threads()}
    measured = {part: {"date": head["date"], **PARTS[part]()} for part in parts}
    return {**head, "machine": here, "parts": {**old["parts"], **measured}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write, or only write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which parts: {', '.join(PARTS)} (all)")
    parser.add_argument("--report", action="store_true", help="only make the document, from the newest record")
    options = parser.parse_args(arguments)
    parts = options.parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"got {unknown[0]!r}; wanted some of {', '.join(PARTS)}")
    if not options.report:
        record = make_record(parts)
        path = fit_report.path_of(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    newest = fit_report.newest()
    if newest is None:
        raise SystemExit("no record: run without --report")
    Path(fit_report.DOCUMENT).write_text(fit_report.text_of(newest), encoding="utf-8")


if __name__ == "__main__":
    main()
