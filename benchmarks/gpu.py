"""The benchmarks of a GPU, at the shapes of Llama-3.1-8B with random bfloat16 weights: one command on a CUDA machine.

    python -m benchmarks.gpu                        layers, four decoder layers, the paper's figure, CUDA graphs
    python -m benchmarks.gpu --layers 32            the whole depth of the model (needs 40 GB)
    python -m benchmarks.gpu --device cpu --tiny    the same code at toy sizes on a CPU, to see that it runs

Writes a record beside those of `make bench`, ``benchmarks/results/<gpu>/<date>-<commit>-gpu.json``, and the paper's figure
next to it; ``python -m benchmarks.run --report`` then takes both into docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.harness import Budget, Run, measure
from benchmarks.machine import commit, describe, now
from benchmarks.rivals import FROZEN, RIVALS, ROADIE
from benchmarks.statistics import summarise
from benchmarks.workloads import adapters, entry, layer, model, with_limit
from benchmarks.workloads.adapters import AdaptersCase
from benchmarks.workloads.decoding import captured, static_step
from benchmarks.workloads.layer import FORWARD, LayerCase
from benchmarks.workloads.layer import TRAINING as LAYER_TRAINING
from benchmarks.workloads.model import DECODE, PREFILL, TRAINING, ModelCase, ModelSize

PRECISION = "bf16"


@dataclass(frozen=True)
class Scale:
    """How large everything is. shapes: (in, out) of the layers; the model's vocabulary is small, so that its head is too."""

    size: ModelSize
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    rows: int
    context: int
    training_tokens: int
    seconds: float
    shortest_sample_s: float

    @property
    def budget(self) -> Budget:
        """The time of each case."""
        return Budget(self.seconds, min_rounds=5, warm_up_calls=3, shortest_sample_s=self.shortest_sample_s)


def llama_8b(layers: int) -> Scale:
    """The shapes of Llama-3.1-8B."""
    size = ModelSize(hidden=4096, layers=layers, heads=32, intermediate=14336, vocabulary=4096, kv_heads=8)
    shapes = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
    return Scale(size, shapes, (1, 8, 64, 512, 4096), 32, 512, 2048, 3.0, 5e-3)


def toy(layers: int) -> Scale:
    """Sizes for a CPU: seconds for all."""
    size = ModelSize(hidden=128, layers=layers, heads=4, intermediate=256, vocabulary=256, kv_heads=2)
    return Scale(size, ((64, 64), (64, 128)), (1, 8), 4, 8, 16, 0.02, 50e-6)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a case failed."""
    options = _parse(arguments)
    scale = (toy if options.tiny else llama_8b)(options.layers)
    made = measure_all(scale, options.device, quick=options.tiny)
    path = record.write(made, options.output)
    sys.stdout.write(f"record: {path}\n")
    if any(one["workload"] == "adapters" for one in made["entries"]):
        sys.stdout.write(f"figure: {_figure(made, path.with_name(f'{path.stem}-adapters.png'))}\n")
    return 1 if made["failures"] else 0


def _figure(made: dict[str, Any], path: Path) -> Path:
    from benchmarks import plots

    return plots.adapters_plot(made, path)


def measure_all(scale: Scale, device: str, quick: bool) -> dict[str, Any]:
    """The record; a case that raises is in "failures", and the others go on."""
    made = record.start(record.GPU, describe(device), now(), commit(), quick)
    speed = bandwidth(device)
    made["machine"]["device_copy_bytes_per_s"] = speed
    speeds = dict.fromkeys(("1", str(torch.get_num_threads())), speed)
    failures: list[dict[str, str]] = []
    for title, run in tasks(scale, device):
        sys.stdout.write(f"{title}\n")
        sys.stdout.flush()
        try:
            made["entries"] += [with_limit(one, speeds) for one in run()]
        except Exception as error:  # the record says so, the exit code too
            traceback.print_exc()
            failures.append({"task": title, "error": f"{type(error).__name__}: {error}"})
    return {**made, "failures": failures}


def tasks(scale: Scale, device: str) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """What is measured, in words, and how."""
    for in_features, out_features in scale.shapes:
        for mode in (FORWARD, LAYER_TRAINING):
            cases = [LayerCase(mode, PRECISION, out_features, tokens, in_features) for tokens in scale.tokens]
            yield f"layer {mode}, {in_features} to {out_features}", lambda cases=cases: _layers(cases, scale, device)
    yield f"{scale.size.layers} decoder layers: prefill, decoding, training step", lambda: _stack(scale, device)
    yield "decoding against the number of different adapters", lambda: _adapters(scale, device)
    yield "decoding, eager and as a CUDA graph", lambda: _graphs(scale, device)


def _layers(cases: list[LayerCase], scale: Scale, device: str) -> list[dict[str, Any]]:
    return [layer.run(case, scale.budget, RIVALS, device, synchronise(device)) for case in cases]


def _stack(scale: Scale, device: str) -> list[dict[str, Any]]:
    cases = [
        ModelCase(PREFILL, PRECISION, 1, scale.training_tokens, size=scale.size),
        ModelCase(DECODE, PRECISION, scale.rows, scale.context, size=scale.size),
        ModelCase(TRAINING, PRECISION, 1, scale.training_tokens, size=scale.size),
    ]
    models = model.rivals_of(cases[0], device=device)
    made = [model.run(case, scale.budget, models, synchronise(device)) for case in cases]
    if device == "cuda":
        made[-1]["peak_bytes"] = {name: _cuda_peak(model.once(one, cases[-1])) for name, one in models.items()}
    return made


def _cuda_peak(run: Run) -> int:
    """How far the allocated memory rises above where it was."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _adapters(scale: Scale, device: str) -> list[dict[str, Any]]:
    base = model.llama(scale.size, torch.bfloat16, device)
    rivals = adapters.models(base, scale.rows)
    cases = [AdaptersCase(n, scale.rows, scale.context, scale.size.layers) for n in adapters.counts(scale.rows)]
    return [adapters.run(case, scale.budget, rivals, synchronise(device)) for case in cases]


def _graphs(scale: Scale, device: str) -> list[dict[str, Any]]:
    """Base and roadie, as they are and captured; where there is no CUDA only as they are."""
    case = ModelCase(DECODE, PRECISION, scale.rows, scale.context, size=scale.size)
    models = model.rivals_of(case, (FROZEN, ROADIE), device)
    steps = {name: static_step(one.eval(), case.rows, case.tokens) for name, one in models.items()}
    made = [_decoding(case, steps, scale.budget, device, graph=False)]
    if device == "cuda":
        replays = {name: captured(step) for name, step in steps.items()}
        made.append(_decoding(case, replays, scale.budget, device, graph=True))
    return made


def _decoding(case: ModelCase, runs: dict[str, Run], budget: Budget, device: str, graph: bool) -> dict[str, Any]:
    rounds = measure(runs, budget, synchronise(device))
    named = {**asdict(case), "graph": graph}
    return entry("graphs", named, rounds, base=FROZEN, ours=ROADIE, bytes_moved=0)


def synchronise(device: str) -> Run | None:
    """What waits for the device."""
    return torch.cuda.synchronize if device == "cuda" else None


def bandwidth(device: str) -> float:
    """Bytes read plus bytes written a second by copying on the device: 1 GiB on a GPU."""
    nbytes = 2**30 if device == "cuda" else 2**20
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    rounds = measure({"copy": lambda: target.copy_(source)}, Budget(0.5), synchronise(device))
    return 2 * nbytes / (summarise(rounds, "copy", None)["copy"]["median_ms"] * 1e-3)


def _parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the stack; Llama-3.1-8B has 32")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; the record goes to .cache/benchmarks")
    parser.add_argument("--output", type=Path, help="where the record goes instead")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("got --device cuda; torch sees no CUDA device here; try --device cpu --tiny")
    if options.device == "cpu" and not options.tiny:
        parser.error("got --device cpu without --tiny; these shapes take hours on a CPU; add --tiny")
    return options


if __name__ == "__main__":
    sys.exit(main())
