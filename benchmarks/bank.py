"""Many adapters in one batch: what a bank costs. ``python -m benchmarks.bank layer growth model memory stress``

    layer    one layer of 4096 outputs, 128 rows, 1000 adapters: the rotation's time over the base layer's, against PEFT
    growth   the same rotation with 1 to 10,000 adapters resident, and the bytes that it moves
    model    a Llama of 160M parameters: decoding 64 rows with 64 adapters, and prefill of 64 x 64, against PEFT
    memory   10,000 adapters of that model resident: bytes an adapter, admissions a second from memory and from disk
    stress   rows that must be right while another thread admits and replaces

Prints tables and writes benchmarks/results/<machine>/bank-<commit>.json, of which `--only` parts may be left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import roadie
from benchmarks import machine
from benchmarks.harness import Budget, Run, measure, threads
from benchmarks.statistics import median_ratio, summarise
from benchmarks.workloads.decoding import static_step
from benchmarks.workloads.model import TARGETS, ModelSize, llama
from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.kernels import RotationTable, prepare_rotation, rotate_
from roadie.testing import stock_peft
from roadie.testing.rival import is_stock

WIDTH, ROWS, RESIDENT, GROUP_SIZE = 4096, 128, 1000, 64
SIZE = ModelSize()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_table(slots: int, dtype: torch.dtype = torch.float32) -> RotationTable:
    """Rotations of 4096 outputs, near the identity."""
    direct = 1 + 0.1 * torch.randn(slots, WIDTH, dtype=dtype)
    return RotationTable(direct, 0.1 * torch.randn(slots, WIDTH, dtype=dtype), GROUP_SIZE)


def spread_slots(adapters: int) -> Tensor:
    """A slot for each of 128 rows, as different as `adapters` allow, in no order."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randperm(max(adapters, ROWS), generator=generator)[:ROWS]) % adapters


def layer(budget_s: float = 4.0) -> list[dict[str, Any]]:
    """Adapter time over base layer time: ours on the layer's own output, right after it; PEFT's whole layer less the base's."""
    entries = []
    for name, dtype in DTYPES.items():
        base = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype).requires_grad_(False)
        slots = spread_slots(RESIDENT)
        tables = {"roadie": random_table(RESIDENT, dtype), "roadie, float32 tables": random_table(RESIDENT)}
        rivals = {kind: _peft_layer(kind, base, slots) for kind in ("PEFT RoAd", "PEFT LoRA r=8")}
        for tokens in (1, 128):
            x = torch.randn(ROWS, tokens, WIDTH, dtype=dtype)
            few = tokens == 128
            with torch.no_grad():
                runs: dict[str, Run] = {"base layer": partial(base, x)}
                runs |= {kind: partial(rival, x) for kind, rival in rivals.items()}
                budget = Budget(budget_s, 3 if few else 20, warm_up_calls=0 if few else 1, shortest_sample_s=0)
                summary = summarise(measure(runs, budget), "base layer", None)
                shares = {kind: summary[kind]["ratio"]["value"] - 1 for kind in rivals}
                ours = {
                    kind: _rotation_share(base, x, table, slots, 7 if few else 60) for kind, table in tables.items()
                }
            case = {"dtype": name, "tokens_a_row": tokens, "rows": ROWS, "resident": RESIDENT}
            entries.append({"what": "layer", "case": case, "adapter_over_base": {**ours, **shares}, "rivals": summary})
            print(case, entries[-1]["adapter_over_base"], flush=True)
    return entries


def _rotation_share(base: nn.Linear, x: Tensor, table: RotationTable, slots: Tensor, rounds: int) -> dict[str, float]:
    """The rotation's time over that of the layer before it, as a bank rotates: prepared by the call before."""
    prepared = prepare_rotation(base(x), table, slots)
    layers, rotations = [], []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        y = base(x)
        between = time.perf_counter()
        if prepared is None or not prepared(y):
            rotate_(y, table, slots)
        layers.append(between - start)
        rotations.append(time.perf_counter() - between)
    return median_ratio(rotations[2:], layers[2:])


def _peft_layer(kind: str, base: nn.Linear, slots: Tensor) -> Callable[[Tensor], Tensor]:
    """PEFT's mixed batch over the adapters that the rows ask for (those that nobody asks for cost it nothing)."""
    copy = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
    copy.weight = base.weight
    names = [f"a{slot}" for slot in slots.tolist()]
    if kind == "PEFT RoAd":
        with stock_peft() as config:
            model = with_adapters(
                nn.Sequential(copy), config(target_modules=["0"], group_size=GROUP_SIZE, init_weights=False), names
            )
        assert is_stock(model)
    else:
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
        model = with_adapters(nn.Sequential(copy), lora, names)
    return lambda x: model(x, adapter_names=names)


def with_adapters(model: nn.Module, config: Any, names: list[str]) -> Any:
    first, *others = dict.fromkeys(names)
    adapted = peft.get_peft_model(model, config, adapter_name=first, autocast_adapter_dtype=False)
    for name in others:
        adapted.add_adapter(name, config, autocast_adapter_dtype=False)
    return adapted.requires_grad_(False).eval()


def growth() -> list[dict[str, Any]]:
    """The rotation of 128 rows of one token, and of 16, as more adapters are resident."""
    entries = []
    for tokens in (1, 16):
        tables = {count: random_table(count) for count in (1, 10, 100, 1000, 10_000)}
        y = torch.randn(ROWS, tokens, WIDTH)
        runs = {f"{count}": partial(rotate_, y, table, spread_slots(count)) for count, table in tables.items()}
        with torch.no_grad():
            rounds = measure(runs, Budget(4.0, 20))
        summary = summarise(rounds, "1000", None)
        for count in tables:
            rows_read = min(count, ROWS)
            summary[f"{count}"]["bytes_moved"] = 2 * y.nbytes + 2 * 4 * WIDTH * rows_read
        entries.append({"what": "growth", "case": {"tokens_a_row": tokens, "rows": ROWS}, "rivals": summary})
        print(
            tokens,
            {
                k: (round(s["median_ms"], 4), round(s["ratio"]["value"], 3), s["bytes_moved"])
                for k, s in summary.items()
            },
            flush=True,
        )
    return entries


def model_adapter(base: nn.Module, seed: int) -> Adapter:
    """A road_1 adapter of all linear layers, with values of its own."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in TARGETS:
            theta, alpha = (0.1 * torch.randn(module.out_features // 2, generator=generator) for _ in range(2))
            layers[path] = LayerParameters(theta, 1 + alpha, "road_1", GROUP_SIZE)  # type: ignore[arg-type]
    config = {"peft_type": "ROAD", "variant": "road_1", "group_size": GROUP_SIZE, "target_modules": TARGETS}
    return Adapter(layers, config)


def model(rows: int = 64, size: ModelSize = SIZE, budget_s: float = 60.0) -> list[dict[str, Any]]:
    """Whole model, float32: decoding and prefill of rows that all use different adapters."""
    base = llama(size, torch.float32).requires_grad_(False)
    banked = sharing(base, size)
    bank = roadie.AdapterBank(banked, slots=rows)
    for index in range(rows):
        bank.admit(f"a{index}", model_adapter(base, index))
    names = [f"a{index}" for index in range(rows)]
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    rivals = {"PEFT LoRA r=8": with_adapters(sharing(base, size), lora, names)}
    with stock_peft() as config:
        road = config(target_modules=TARGETS, group_size=GROUP_SIZE, init_weights=False)
        rivals["PEFT RoAd"] = with_adapters(sharing(base, size), road, names)
    slots = bank.slots(names)
    tokens = torch.randint(0, size.vocabulary, (rows, 64))
    entries = []
    for mode in ("decode", "prefill"):
        steps = {
            "base": step(mode, base, rows, tokens),
            "roadie": in_bank(bank, slots, lambda mode=mode: step(mode, banked, rows, tokens)),
            **{kind: step(mode, rival, rows, tokens, adapter_names=names) for kind, rival in rivals.items()},
        }
        rounds = measure(steps, Budget(budget_s / 2, 5, warm_up_calls=1, shortest_sample_s=0))
        summary = summarise(rounds, "base", "roadie")
        entries.append(
            {"what": "model", "case": {"mode": mode, "rows": rows}, "rounds": rounds.count, "rivals": summary}
        )
        print(mode, rounds.count, {k: (round(s["median_ms"], 1), s["ratio"]) for k, s in summary.items()}, flush=True)
    return entries


def sharing(base: nn.Module, size: ModelSize) -> Any:
    copy = llama(size, torch.float32, device="meta")
    copy.load_state_dict(base.state_dict(), assign=True)
    for (_, buffer), (name, mine) in zip(base.named_buffers(), list(copy.named_buffers()), strict=True):
        owner, _, leaf = name.rpartition(".")
        copy.get_submodule(owner).register_buffer(leaf, buffer.clone() if mine.is_meta else mine, persistent=False)
    return copy.requires_grad_(False)


def step(mode: str, model: Any, rows: int, tokens: Tensor, **arguments: Any) -> Run:
    if mode == "decode":
        return static_step(model, rows, 64, **arguments)

    def once() -> None:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False, logits_to_keep=1, **arguments)

    return once


def in_bank(bank: Any, slots: Tensor, make: Callable[[], Run]) -> Run:
    with bank.rows(slots):
        step = make()

    def once() -> None:
        with bank.rows(slots):
            step()

    return once


def memory(count: int = 10_000, size: ModelSize = SIZE) -> list[dict[str, Any]]:
    """Many adapters of one model resident: bytes of each, measured and computed, and how fast they come in."""
    base = llama(size, torch.float32).requires_grad_(False)
    adapter = model_adapter(base, 0)
    computed = sum(2 * 2 * layer.out_features for layer in adapter.layers.values())  # direct and cross in bfloat16
    before = _resident_bytes()
    bank = roadie.AdapterBank(base, slots=count, dtype=torch.bfloat16)
    start = time.perf_counter()
    for index in range(count):
        bank.admit(f"a{index}", adapter)
    from_memory = count / (time.perf_counter() - start)
    measured = (_resident_bytes() - before) / bank.num_slots
    from_disk = _admission_rate_from_disk(bank, base)
    entry = {
        "what": "memory",
        "case": {"adapters": count, "dtype": "bfloat16"},
        "bytes_an_adapter": {"computed": computed, "tables": bank.bytes_per_adapter, "resident": measured},
        "admissions_a_second": {"memory": from_memory, "disk, page cache warm": from_disk},
    }
    print(entry, flush=True)
    bank.close()
    return [entry]


def _admission_rate_from_disk(bank: Any, base: nn.Module, count: int = 64) -> float:
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            checkpoint.save(model_adapter(base, index), Path(folder, f"{index}"))
            checkpoint.load(Path(folder, f"{index}"))
        start = time.perf_counter()
        for index in range(count):
            bank.replace(f"a{index}", Path(folder, f"{index}"))
        return count / (time.perf_counter() - start)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def stress(seconds: float = 60.0, admissions: int = 100_000) -> list[dict[str, Any]]:
    """Rows of named adapters, checked against scalings that they must be, while a thread admits and replaces all the time."""
    net = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)).requires_grad_(False)
    bank, stop, done = roadie.AdapterBank(net, slots=40), threading.Event(), {"admissions": 0}
    scalings = [_scaling(1 + index / 16) for index in range(64)]
    history: dict[str, list[int]] = {f"a{index}": [index] for index in range(8)}
    for name, (index,) in history.items():
        bank.admit(name, scalings[index])
        bank.pin(name)

    def write() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            name, index = f"a{step % 8}", step * 7 % 64
            history[name].append(index)
            bank.replace(name, scalings[index])
            bank.admit(f"c{step}", scalings[step % 64])
            done["admissions"] += 2

    writer = threading.Thread(target=write)
    writer.start()
    x = torch.randn(1, 16)
    with torch.no_grad():
        plain = net(x)
    checked = wrong = 0
    start = time.monotonic()
    while time.monotonic() - start < seconds or done["admissions"] < admissions:
        names = [f"a{index}" for index in range(8)]
        first = {name: len(history[name]) - 2 for name in names}
        with torch.no_grad(), bank.rows(names):
            y = net(x.expand(8, -1))
        for row, name in enumerate(names):
            factors = {1 + index / 16 for index in history[name][max(0, first[name]) :]}
            # The scalings differ by 1 % or more, and float32 rounds by 1e-6.
            errors = [float((y[row] - plain[0] * factor**2).norm() / y[row].norm()) for factor in factors]
            wrong += not min(errors) < 1e-5
            checked += 1
        if time.monotonic() - start > 10 * seconds:
            break
    stop.set()
    writer.join()
    entry = {"what": "stress", "seconds": time.monotonic() - start, "rows_checked": checked, "wrong": wrong, **done}
    print(entry, flush=True)
    return [entry]


def _scaling(factor: float) -> Adapter:
    """R = factor * I on both layers: a wrong half of it shows in the result."""
    kind = ("road_2", 8)
    layers = {
        path: LayerParameters(torch.zeros(width), torch.full((width,), factor), *kind)  # type: ignore[arg-type]
        for path, width in (("0", 32), ("1", 16))
    }
    return Adapter(layers)


def blends(rounds: int = 60) -> list[dict[str, Any]]:
    """A layer of a bank: 128 rows of one token, each an adapter, or each a blend of two that was asked for before."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).requires_grad_(False)
    bank = roadie.AdapterBank(net, slots=2 * ROWS)
    generator = torch.Generator().manual_seed(0)
    for index in range(ROWS):
        theta, alpha = (0.1 * torch.randn(WIDTH // 2, generator=generator) for _ in range(2))
        layers = {"0": LayerParameters(theta, 1 + alpha, "road_1", GROUP_SIZE)}  # type: ignore[arg-type]
        bank.admit(f"a{index}", Adapter(layers))
    names: list[Any] = [f"a{index}" for index in range(ROWS)]
    mixtures: list[Any] = [{f"a{index}": 0.7, f"a{(index + 1) % ROWS}": 0.3} for index in range(ROWS)]
    start = time.perf_counter()
    bank.slots(mixtures)
    first_ms = 1e3 * (time.perf_counter() - start)
    x = torch.randn(ROWS, WIDTH)

    def run(wishes: list[Any]) -> None:
        with torch.no_grad(), bank.rows(wishes):
            net(x)

    summary = summarise(
        measure({"names": partial(run, names), "blends": partial(run, mixtures)}, Budget(8.0, rounds)), "names", None
    )
    entry = {"what": "blends", "case": {"rows": ROWS}, "making_them_all_ms": first_ms, "rivals": summary}
    print(entry, flush=True)
    bank.close()
    return [entry]


PARTS: dict[str, tuple[Callable[[], list[dict[str, Any]]], int | None]] = {
    "layer": (layer, 1),
    "growth": (growth, 1),
    "model": (model, None),
    "memory": (memory, 1),
    "stress": (stress, 1),
    "blends": (blends, 1),
}


def main() -> None:
    """Run the parts that are named and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS), help="which parts (all)")
    entries = []
    for name in parser.parse_args().parts:
        run, count = PARTS[name]
        with threads(count or torch.get_num_threads()):
            entries += run()
    made = machine.commit()
    record = {
        "machine": machine.machine_name(),
        **made,
        "date": machine.now()[:10],
        "torch": torch.__version__,
        "peft": peft.__version__,
        "entries": entries,
    }
    path = machine.ROOT / "benchmarks" / "results" / machine.machine_name() / f"bank-{made['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # parts that were run before stay
        ran = {entry["what"] for entry in entries}
        before = [entry for entry in json.loads(path.read_text())["entries"] if entry["what"] not in ran]
        record["entries"] = [*before, *entries]
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {path.relative_to(machine.ROOT)}")


if __name__ == "__main__":
    main()
