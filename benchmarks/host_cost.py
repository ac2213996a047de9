"""What an adapted layer costs the processor that calls it, whatever the device computes: narrow layers and one token.

    python -m benchmarks.host_cost                    a layer and a small Llama on the CPU, a minute
    python -m benchmarks.host_cost --device cuda      the same on a GPU: the time to issue the work, without waiting for it
    python -m benchmarks.host_cost --device stand-in  without one, by the ways of a GPU, and nothing launched (`stand_in`)
    python -m benchmarks.host_cost --quick            a few calls of each, to see that everything runs

Prints, for a layer of each rival: the time of a call, how many Python functions run and how many of them are the adapter
library's, how many operations of torch that call no others, and on a GPU how many kernels. Then the same in a small Llama, a
layer of it, where what is done once for all layers counts once; and what a step of decoding takes with rows of several
adapters. Then roadie's parts: the functions and operations that take most time.
Times of parts are those under a profiler, which makes short functions look longer than they are: compare them with
each other.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import peft
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import roadie
from benchmarks import stand_in
from benchmarks.harness import Budget, Run, measure, threads
from benchmarks.rivals import (
    FROZEN,
    PRECISIONS,
    RIVALS,
    ROADIE,
    adapt,
    adapted_layers,
    layer_of,
    random_weight,
    sharing_copy,
    trained,
)
from benchmarks.statistics import summarise
from benchmarks.tables import markdown
from benchmarks.workloads import adapters, layer
from benchmarks.workloads.model import DECODE, TARGETS, ModelSize, llama
from benchmarks.workloads.real_model import WholeCase, once

LIBRARIES = tuple(str(Path(library.__file__).parent) for library in (roadie, peft))
_OPERATIONS = ("aten::", "roadie::")
_VIEWS = ("view", "as_strided", "t", "transpose", "detach", "alias", "slice", "select", "expand", "unsqueeze", "split")
_MEMORY = ("empty", "empty_strided", "empty_like", "new_empty", "resize_", "_local_scalar_dense")
_WITHOUT_KERNEL = {
    f"aten::{name}" for name in (*_VIEWS, *_MEMORY, "_unsafe_view", "_reshape_alias", "result_type", "set_")
}
READS = ("cpu", "item", "nonzero", "numpy", "tolist", "unique")  # what asks a tensor for its values
FORWARD_FROZEN, FORWARD_TRAINED, TRAINING = "forward, adapter frozen", "forward, adapter trainable", layer.TRAINING
MODES = (FORWARD_FROZEN, FORWARD_TRAINED, TRAINING)
ROWS_ONCE = "roadie, rows() around all steps"
BANK_ROWS_ONCE = "roadie, a bank's rows() around all steps"


@dataclass(frozen=True)
class Setting:
    """Where and how large; a model has `layers` decoder layers of `width`, and `rows` rows of as many adapters.

    device: "cpu", "cuda", or "stand-in" for tensors of the CPU that go the ways of a GPU's.
    """

    device: str
    precision: str
    width: int
    layers: int
    rows: int
    budget: Budget
    profiled_calls: int = 50

    @property
    def tensors_on(self) -> str:
        """Where tensors are."""
        return "cuda" if self.device == "cuda" else "cpu"


@dataclass(frozen=True)
class Counts:
    """What one call runs: Python functions, those of roadie or PEFT among them, operations that call no others, kernels."""

    functions: int
    of_library: int
    operations: int
    kernels: int


@dataclass(frozen=True)
class Part:
    """A function or an operation of a call: its time under a profiler, and how often it runs."""

    self_us: float
    calls: float
    what: str


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = _parse(arguments)
    sizes = (options.device, options.precision, options.width, options.layers, options.rows)
    if options.quick:
        setting = Setting(*sizes, Budget(0.05, min_rounds=2, warm_up_calls=1), profiled_calls=2)
    else:
        setting = Setting(*sizes, Budget(options.seconds, min_rounds=20))
    with threads(1), stand_in.gpu() if setting.device == "stand-in" else nullcontext():
        for text in told(setting, options.parts):
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
    return 0


def told(setting: Setting, parts: int) -> Iterator[str]:
    """The tables, as they are measured."""
    yield f"## One layer, {setting.width} wide, one token, {setting.precision}, {setting.device}\n"
    of_layer = {mode: layer_runs(mode, setting) for mode in MODES}
    yield markdown(_LAYER_HEADER, [row for mode, runs in of_layer.items() for row in layer_rows(mode, runs, setting)])
    yield f"## A call of a model of {setting.layers} decoder layers, 4 tokens, a layer of it\n"
    for mode in MODES:
        yield markdown(["what", "rival", "us (quartiles)", "us a layer above frozen"], list(whole_rows(mode, setting)))
    yield f"## A step of decoding, {setting.rows} rows of as many adapters, {setting.layers} decoder layers\n"
    with model_steps(setting) as (steps, layers):
        yield markdown(_MODEL_HEADER, list(model_rows(steps, layers, setting)))
        watched = {f"one layer, {mode}": runs[ROADIE] for mode, runs in of_layer.items()}
        for what, run in {**watched, "a step of decoding by adapter_names": steps[ROADIE]}.items():
            yield f"## roadie's parts: {what}\n"
            for kind, by_time in (("function", functions_by_time), ("operation", operations_by_time)):
                yield markdown(["self, us", "calls", kind], _formatted(by_time(run, setting.profiled_calls)[:parts]))


_LAYER_HEADER = ["what", "rival", "us (quartiles)", "above frozen", "functions", "library's", "operations", "kernels"]
_MODEL_HEADER = ["model", "us (quartiles)", "us a layer above frozen", "functions", "library's", "values read"]


def layer_runs(mode: str, setting: Setting) -> dict[str, Run]:
    """What each rival does once."""
    precision = PRECISIONS[setting.precision]
    weight = random_weight(setting.width, setting.width, precision.base, setting.tensors_on)
    x_TI, grad_TO = torch.randn(2, 1, setting.width, generator=torch.Generator().manual_seed(0)).to(weight).unbind()
    runs: dict[str, Run] = {}
    for name in RIVALS:
        module, parameters = layer_of(weight, name, precision)
        if mode == TRAINING:
            runs[name] = layer.training(module, parameters, x_TI[None], grad_TO[None])
            continue
        for parameter in parameters:
            parameter.requires_grad_(mode == FORWARD_TRAINED)
        runs[name] = layer.forward(module, parameters, x_TI[None])
    return runs


def layer_rows(mode: str, runs: Mapping[str, Run], setting: Setting) -> Iterator[list[str]]:
    """The lines of one mode."""
    # Without waiting for the device: kernels of this size are done before the next is issued.
    times = summarise(measure(runs, setting.budget), FROZEN, None)
    for name, run in runs.items():
        counts = counts_of(run, setting.device)
        above = times[name]["median_ms"] - times[FROZEN]["median_ms"]
        cells = [str(counts.functions), str(counts.of_library), str(counts.operations)]
        kernels = "" if setting.device == "cpu" else str(counts.kernels)
        yield [mode, name, _us(times[name]), f"{1e3 * above:+.1f}", *cells, kernels]


def whole_runs(mode: str, setting: Setting) -> dict[str, Run]:
    """As `layer_runs`, of a small Llama: what an adapter does once for all layers counts once."""
    base = _small_llama(setting)
    runs: dict[str, Run] = {}
    for name in RIVALS:
        model = adapt(sharing_copy(base), name, TARGETS, PRECISIONS[setting.precision])
        parameters = trained(model)
        embedded = torch.randn(1, 4, setting.width, generator=torch.Generator().manual_seed(0)).to(
            next(base.parameters())
        )
        for parameter in parameters:
            parameter.requires_grad_(mode != FORWARD_FROZEN)
        runs[name] = _trained_once(model, embedded, parameters) if mode == TRAINING else _run_once(model, embedded)
    return runs


def _trained_once(model: Any, embedded: Tensor, parameters: Sequence[Tensor]) -> Run:
    wanted = [embedded.requires_grad_(), *parameters]
    return lambda: torch.autograd.grad(model(inputs_embeds=embedded).logits.float().sum(), wanted)


def _run_once(model: Any, embedded: Tensor) -> Run:
    def once() -> Any:
        with torch.no_grad():
            return model(inputs_embeds=embedded).logits

    return once


def _small_llama(setting: Setting) -> Any:
    size = ModelSize(setting.width, setting.layers, max(1, setting.width // 32), 2 * setting.width, vocabulary=256)
    return llama(size, PRECISIONS[setting.precision].base, setting.tensors_on)


@contextmanager
def model_steps(setting: Setting) -> Iterator[tuple[dict[str, Run], int]]:
    """A step of decoding of each rival, each row in an adapter of its own, and how many adapted layers it goes through."""
    base = _small_llama(setting)
    models = adapters.models(base, setting.rows)
    adapters.assign(models[adapters.BMM_LORA], torch.arange(setting.rows, device=setting.tensors_on))
    case = WholeCase(DECODE, setting.precision, setting.rows, 16, 1, setting.rows)
    steps = {name: once(FROZEN if name == adapters.BMM_LORA else name, model, case) for name, model in models.items()}
    in_force = adapters.with_adapters(base, ROADIE, TARGETS, setting.rows)
    names = [f"a{row}" for row in range(setting.rows)]
    plain = sharing_copy(base)
    with roadie.AdapterBank(plain, slots=setting.rows) as bank:
        for name in names:
            bank.admit(name, (in_force, name))
        with roadie.rows(in_force, names), roadie.rows(plain, names):
            steps[ROWS_ONCE] = once(FROZEN, in_force, case)
            steps[BANK_ROWS_ONCE] = once(FROZEN, plain, case)
            yield steps, len(adapted_layers(in_force))


def whole_rows(mode: str, setting: Setting) -> Iterator[list[str]]:
    """The lines of one mode, of a model."""
    times = summarise(measure(whole_runs(mode, setting), setting.budget), FROZEN, None)
    for name in RIVALS:
        above = 1e3 * (times[name]["median_ms"] - times[FROZEN]["median_ms"]) / (7 * setting.layers)
        yield [mode, name, _us(times[name]), f"{above:+.1f}"]


def model_rows(steps: Mapping[str, Run], layers: int, setting: Setting) -> Iterator[list[str]]:
    """The lines of a step."""
    times = summarise(measure(steps, setting.budget), FROZEN, None)
    for name, step in steps.items():
        counts, reads = counts_of(step, setting.device), values_read(step, setting.device)
        above = 1e3 * (times[name]["median_ms"] - times[FROZEN]["median_ms"]) / layers
        said = ", ".join(f"{count} x {where}" for where, count in reads.items()) or "none"
        yield [name, _us(times[name]), f"{above:+.1f}", str(counts.functions), str(counts.of_library), said]


def counts_of(run: Run, device: str) -> Counts:
    """What one call runs, after others have been made."""
    run()
    files = [code.co_filename for code in functions_run_by(run)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as found, stand_in.recorded() as launches:
        run()
        _wait(device)
    events = found.events()
    operations = [event for event in events if event.name.startswith(_OPERATIONS) and not event.cpu_children]
    kernels = sum(event.device_type == DeviceType.CUDA for event in events)
    if device == "stand-in":
        kernels = sum(event.name not in _WITHOUT_KERNEL for event in operations) + len(launches)
    return Counts(len(files), sum(file.startswith(LIBRARIES) for file in files), len(operations), kernels)


def functions_run_by(run: Run) -> list[CodeType]:
    """The code of each Python function that is called in this thread, in order; a GPU's backward runs in another."""
    codes: list[CodeType] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            codes.append(frame.f_code)

    _profiled(run, note)
    return codes[1:]  # without `run` itself


def values_read(run: Run, device: str) -> Counter[str]:
    """How often a call asks for the values of tensors, by what and where; on a GPU each makes the host wait."""
    reads: Counter[str] = Counter()

    def note(frame: FrameType, event: str, function: Any) -> None:
        is_read = event == "c_call" and function.__name__ in READS
        if is_read and isinstance(function.__self__, torch.Tensor):
            reads[f"{function.__name__} in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1

    run()
    _profiled(run, note)
    if device == "cuda":
        reads["waiting for the device"] = _synchronisations(run)
    return +reads


def _profiled(run: Run, note: Any) -> None:
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)


def _synchronisations(run: Run) -> int:
    """How often torch says that an operation waits for the device, values that are branched upon included."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing" in str(warning.message) for warning in caught)


def functions_by_time(run: Run, calls: int) -> list[Part]:
    """The functions of Python and C in which a call spends its time, without what they call; the longest first."""
    run()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        run()
    profiler.disable()
    found = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    parts = [Part(1e6 * own_s / calls, count / calls, _named(place)) for place, (_, count, own_s, *_) in found]
    return sorted(parts, key=lambda part: -part.self_us)


def operations_by_time(run: Run, calls: int) -> list[Part]:
    """The operations of torch in which a call spends its time, without what they call; the longest first."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            run()
    averages = [average for average in found.key_averages() if average.key.startswith(_OPERATIONS)]
    parts = [Part(each.self_cpu_time_total / calls, each.count / calls, each.key) for each in averages]
    return sorted(parts, key=lambda part: -part.self_us)


def _named(place: tuple[str, int, str]) -> str:
    file, line, name = place
    parts = Path(file).parts
    found = [
        index for index, part in enumerate(parts) if part in ("roadie", "peft", "torch", "transformers", "benchmarks")
    ]
    return f"{'/'.join(parts[found[0] :])}:{line} {name}" if found else name


def _formatted(parts: Sequence[Part]) -> list[list[str]]:
    return [[f"{part.self_us:.1f}", f"{part.calls:g}", part.what] for part in parts]


def _us(summary: dict[str, Any]) -> str:
    low, middle, high = (1e3 * summary[key] for key in ("q1_ms", "median_ms", "q3_ms"))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description="What calls cost the host.")
    parser.add_argument("--device", choices=("cpu", "cuda", "stand-in"), default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--width", type=int, default=128, help="of the layer and the model; a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the model")
    parser.add_argument("--rows", type=int, default=8, help="rows of the model's batch, each in an adapter of its own")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each table's rivals together")
    parser.add_argument("--parts", type=int, default=12, help="how many functions and operations are shown")
    parser.add_argument("--quick", action="store_true", help="a few calls of each, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("got --device cuda; torch sees no CUDA device here; leave it out")
    if options.width % 64:
        parser.error(f"got --width {options.width}; wanted a multiple of 64, the size of a rotation's groups")
    return options


if __name__ == "__main__":
    sys.exit(main())
