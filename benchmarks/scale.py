"""docs/scale.md: what adapters cost in memory and in a step, by arithmetic: ``python -m benchmarks.scale``.

The formulas are functions of this module and the document is made from them; beside them it sets what was measured on
models that are small enough for it, from the records in ``benchmarks/results``. Nothing here has run on a GPU.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bank_report, machine, record
from benchmarks.tables import markdown

DOCUMENT = machine.ROOT / "docs" / "scale.md"
RESULTS = machine.ROOT / "benchmarks" / "results"
ADAPTERS = (1, 10, 100, 1_000, 10_000, 100_000)
ROWS = (1, 16, 64, 256)
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """A decoder like Llama: widths of its layers; parameters are those of the matrices, embeddings counted once where tied."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    key_value: int
    vocabulary: int
    tied: bool = False

    @property
    def linear(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the adapted layers of one block: q, k, v, o, gate, up, down."""
        h, i, k = self.hidden, self.intermediate, self.key_value
        return (h, h), (h, k), (h, k), (h, h), (h, i), (h, i), (i, h)

    @property
    def outputs(self) -> int:
        """Outputs of all adapted layers together: what everything about an adapter is proportional to."""
        return self.layers * sum(outputs for _, outputs in self.linear)

    @property
    def parameters(self) -> int:
        """Parameters of the base model."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * sum(inputs * outputs for inputs, outputs in self.linear)

    @property
    def read_a_step(self) -> int:
        """Parameters that a decode step reads: all but the table of embeddings, of which it reads a row a token."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)


@dataclass(frozen=True)
class Accelerator:
    """Memory and its bandwidth, from the data sheet; bytes, bytes a second."""

    name: str
    memory: float
    bandwidth: float


MEASURED = Shape("160M (measured)", 768, 3072, 12, 768, 32_000)
SHAPES = (
    Shape("1B", 2048, 8192, 16, 512, 128_256, tied=True),
    Shape("8B", 4096, 14_336, 32, 1024, 128_256),
    Shape("32B", 5120, 27_648, 64, 1024, 152_064),
    Shape("70B", 8192, 28_672, 80, 1024, 128_256),
)
L4, H100, H200 = (
    Accelerator("L4, 24 GB", 24e9, 0.3e12),
    Accelerator("H100, 80 GB", 80e9, 3.35e12),
    Accelerator("H200, 141 GB", 141e9, 4.8e12),
)
PLACES = (  # model, card, how many, tokens in its cache
    (SHAPES[0], L4, 1, 100_000),
    (SHAPES[1], L4, 1, 20_000),
    (SHAPES[1], H100, 1, 100_000),
    (SHAPES[2], H100, 1, 20_000),
    (SHAPES[2], H200, 1, 100_000),
    (SHAPES[3], H200, 2, 100_000),
    (SHAPES[3], H100, 4, 100_000),
)
PASSES = (512, 4_096)  # tokens in a pass of training
TOKENS_A_ROW = 256
CALLS = 7 * MEASURED.layers
DISK, NETWORK = 3e9, 1e9  # bytes a second: one NVMe disk, ten-gigabit Ethernet


def file_bytes(shape: Shape, variant: str, dtype: str) -> int:
    """An adapter's file: theta and alpha, [D/2] each for road_1, [D] for road_2, [2D] for road_4."""
    numbers = {"road_1": 1, "road_2": 2, "road_4": 4}[variant] * shape.outputs
    return numbers * BYTES[dtype]


def table_bytes(shape: Shape, dtype: str) -> int:
    """An adapter that is resident: direct and cross, [D] each, of whatever variant."""
    return 2 * shape.outputs * BYTES[dtype]


def lora_bytes(shape: Shape, rank: int, dtype: str = "bfloat16") -> int:
    """A LoRA adapter of the same layers."""
    return shape.layers * sum(rank * (inputs + outputs) for inputs, outputs in shape.linear) * BYTES[dtype]


def training_bytes(shape: Shape, variant: str) -> int:
    """An adapter that is trained in float32: the parameters, their gradients, and Adam's two moments."""
    return 4 * file_bytes(shape, variant, "float32")


def training_table_bytes(shape: Shape) -> int:
    """What a trained adapter takes more while its rows are in a pass: direct, cross, and their gradients, in float32."""
    return 2 * table_bytes(shape, "float32")


def activation_bytes(shape: Shape, tokens: int, variant: str = "road_1", dtype: str = "bfloat16") -> int:
    """What a pass keeps of so many tokens for its backward through the blocks; frozen matrices keep no input.

    In the model's dtype: q, k, v, what attention is given (q and k turned by their places) and gives, o, gate, silu(gate),
    up, down; in float32: what the two norms are given. road_2 and road_4 keep what they rotate, and where what they give is
    kept by others (v, gate, up), both.
    """
    h, i, k = shape.hidden, shape.intermediate, shape.key_value
    both = 0 if variant == "road_1" else k + 2 * i
    return shape.layers * tokens * (BYTES[dtype] * (5 * h + 3 * k + 3 * i + both) + 2 * 4 * h)


def tenants_that_fit(shape: Shape, memory: float, bytes_a_tenant: int, bytes_of_pass: int) -> int:
    """Adapters in training that fit beside bfloat16 weights and a pass, a tenth of the memory left free."""
    return max(0, int((0.9 * memory - 2 * shape.parameters - bytes_of_pass) // bytes_a_tenant))


def pass_bytes(shape: Shape, tokens: int, variant: str) -> int:
    """Activations of a pass, and the tables of those who take part: a tenant for each row of `TOKENS_A_ROW`."""
    return activation_bytes(shape, tokens, variant) + tokens // TOKENS_A_ROW * training_table_bytes(shape)


def key_value_bytes(shape: Shape, tokens: int) -> int:
    """What the attention remembers of so many tokens, in bfloat16."""
    return tokens * 2 * shape.key_value * shape.layers * 2


def slots_that_fit(shape: Shape, memory: float, bytes_a_slot: int, cached_tokens: int) -> int:
    """Adapters that fit beside bfloat16 weights and a cache of so many tokens, a tenth of the memory left free."""
    rest = 0.9 * memory - 2 * shape.parameters - key_value_bytes(shape, cached_tokens)
    return max(0, int(rest // bytes_a_slot))


def added_traffic(shape: Shape, adapters_of_step: int, bytes_an_adapter: int, context: int, rows: int) -> float:
    """Bytes that a decode step reads for its adapters, over what it reads anyway: weights and cache, in bfloat16."""
    return adapters_of_step * bytes_an_adapter / (2 * shape.read_a_step + rows * key_value_bytes(shape, context))


def main() -> None:
    """Write the document."""
    DOCUMENT.write_text(text_of(measured(RESULTS)), encoding="utf-8")
    print(DOCUMENT.relative_to(machine.ROOT))


@dataclass(frozen=True)
class Measured:
    """Records that the arithmetic is compared with, the newest of each."""

    memory: Mapping[str, Any]
    decode: Mapping[str, Any]
    prefill: Mapping[str, Any]
    vllm: Mapping[str, Any]
    copied_a_second: float


def measured(results: Path) -> Measured:
    """The newest records of `benchmarks.run`, `benchmarks.bank` and `benchmarks.vllm_throughput`."""
    entries = bank_report.newest(sorted(results.glob("*/bank-*.json")))
    of_mode = {entry["case"]["mode"]: entry for entry in entries if entry["what"] == "model"}
    memory = next(entry for entry in entries if entry["what"] == "memory")
    throughputs = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*/vllm-*.json")]
    vllm = max(throughputs, key=lambda found: found["date"])
    copied = record.newest(record.CPU, results)
    assert copied is not None
    rate = copied["machine"]["copy_bytes_per_s"]["2"]
    return Measured(memory, of_mode["decode"], of_mode["prefill"], vllm, rate)


def text_of(found: Measured) -> str:
    """The document; equal for equal records."""
    computed = (_sizes(), _memory(), _fits(), _steps(), _calls(found), _loading(found), _training())
    sections = ("\n".join(section) for section in (*computed, iter([_ENGINES]), _checks(found)))
    return "\n".join((_HEAD, *sections))


_HEAD = """# Sizing: from 1 to 100,000 adapters, from 1B to 70B

This file is made by `python -m benchmarks.scale`, which holds the formulas. It is arithmetic on the shapes of models and on data
sheets; the last section says how far it agrees with what was measured on a model of 160 million parameters. No figure here was
measured on a GPU. MB and GB are 10^6 and 10^9 bytes.

Everything about an adapter is proportional to one number: **D, the outputs of all adapted layers together.** It grows with the
width of a model, not with its square, so adapters become smaller beside their model as models grow.
"""


def _sizes() -> Iterator[str]:
    yield "## One adapter\n"
    yield _paragraph(
        "All linear layers but the output layer. On disk an adapter is theta and alpha (road_1: D numbers together, "
        "road_2: 2 D, road_4: 4 D). In a bank it is direct and cross, 2 D numbers of whatever variant. LoRA beside it, "
        "of the same layers."
    )
    rows = [
        [
            shape.name,
            f"{shape.parameters / 1e9:.2f}",
            f"{shape.outputs / 1e6:.2f}",
            _size(file_bytes(shape, "road_1", "bfloat16")),
            _size(file_bytes(shape, "road_1", "float32")),
            _size(table_bytes(shape, "bfloat16")),
            _size(table_bytes(shape, "float32")),
            _size(lora_bytes(shape, 8)),
            f"{lora_bytes(shape, 8) / table_bytes(shape, 'bfloat16'):.1f}",
        ]
        for shape in (MEASURED, *SHAPES)
    ]
    header = ["model", "parameters, 10^9", "D, 10^6", "file, bf16", "file, fp32", "resident, bf16", "resident, fp32"]
    yield markdown([*header, "LoRA r=8, bf16", "times ours"], rows)


def _memory() -> Iterator[str]:
    yield "## Many adapters\n"
    yield _paragraph(
        "Resident in bfloat16, and (in brackets) files of road_1 in bfloat16. A server keeps the most used resident and "
        "reads the others from disk: what is rare may stay there."
    )
    rows = [
        [f"{count:,}"]
        + [
            f"{_size(count * table_bytes(shape, 'bfloat16'))} ({_size(count * file_bytes(shape, 'road_1', 'bfloat16'))})"
            for shape in SHAPES
        ]
        for count in ADAPTERS
    ]
    yield markdown(["adapters", *(shape.name for shape in SHAPES)], rows)


def _fits() -> Iterator[str]:
    yield "## How many fit beside the model\n"
    yield _paragraph(
        "Weights in bfloat16, a cache of keys and values, a tenth of the memory left free, the rest for adapters. vLLM's "
        "slots are float32 (8 bytes an output). With several cards every card holds its part of each adapter, so their "
        "memory adds up."
    )
    rows = []
    for shape, card, cards, cached in PLACES:
        fits = [
            slots_that_fit(shape, card.memory * cards, size, cached)
            for size in (table_bytes(shape, "bfloat16"), table_bytes(shape, "float32"), lora_bytes(shape, 8))
        ]
        where = card.name if cards == 1 else f"{cards} x {card.name}"
        rows.append([shape.name, where, f"{cached:,} tokens", *(f"{number:,}" for number in fits)])
    yield markdown(["model", "on", "cache", "bank, bf16", "vLLM's slots", "LoRA r=8, bf16"], rows)


def _steps() -> Iterator[str]:
    yield "## What a decode step costs: memory traffic\n"
    yield _paragraph(
        "A decode step reads the weights once, and for each row its cache (here 1,000 tokens) and its adapter; the "
        "activations that are rotated stay in the chip's caches. The table says how much more is read when every row has "
        "an adapter of its own; rows that share an adapter share its bytes as well. Where memory bounds the step, as on "
        "GPUs with few rows, it takes at least so much longer."
    )
    rows = [
        [shape.name, name, *(f"{100 * added_traffic(shape, count, size, 1000, count):.2f} %" for count in ROWS)]
        for shape in SHAPES
        for name, size in (
            ("RoAd, bf16 tables", table_bytes(shape, "bfloat16")),
            ("RoAd, fp32 tables", table_bytes(shape, "float32")),
            ("LoRA r=8", lora_bytes(shape, 8)),
            ("LoRA r=16", lora_bytes(shape, 16)),
        )
    ]
    yield markdown(["model", "adapters", *(f"{count} row{'s' * (count > 1)}" for count in ROWS)], rows)
    yield _paragraph(
        "How many adapters are resident does not appear: a row reads its own slot. A prefill moves the same bytes for "
        "hundreds of times the work, so their share is smaller by as much."
    )


def _calls(found: Measured) -> Iterator[str]:
    yield "## What a decode step costs: calls\n"
    yield _paragraph(
        "Each adapted layer is one more operation: 7 a block, 4 where q, k, v and gate, up are packed (vLLM). On two CPU "
        f"cores the {CALLS} calls of the 160M model took {_extra_ms(found.decode):.1f} ms of a step together, "
        f"{_microseconds_a_call(found):.0f} us each. That does not depend on the number of adapters, and wider layers "
        "have more work a call to set against it. On a GPU a call is a launch (some microseconds, less in a CUDA graph), "
        f"which has not been measured; the 8B model has {SHAPES[1].layers * 7}, {SHAPES[1].layers * 4} in vLLM."
    )


def _loading(found: Measured) -> Iterator[str]:
    each = 1000 / found.memory["admissions_a_second"]["disk, page cache warm"]
    yield "## Loading\n"
    yield _paragraph(
        "Bytes of road_1 in bfloat16, from a disk of 3 GB/s and over a network of 1 GB/s. The rest of an admission "
        f"(parsing, checking, computing rotations) took {each:.0f} ms an adapter of the 160M model on a busy CPU core."
    )
    rows = [
        [
            shape.name,
            *(f"{1000 * file_bytes(shape, 'road_1', 'bfloat16') / rate:.1f} ms" for rate in (DISK, NETWORK)),
            *(_duration(100_000 * file_bytes(shape, "road_1", "bfloat16") / rate) for rate in (DISK, NETWORK)),
        ]
        for shape in SHAPES
    ]
    yield markdown(["model", "one, disk", "one, network", "100,000, disk", "100,000, network"], rows)


def _training() -> Iterator[str]:
    yield "## Training many at once\n"
    yield _paragraph(
        "In float32 with Adam an adapter takes four times its parameters; the activations are those of the batch, whoever's "
        "rows it has. What processes exchange each step is a quarter of this."
    )
    rows = [
        [
            shape.name,
            *(_size(count * training_bytes(shape, "road_1")) for count in (1, 64, 1000)),
            _size(training_bytes(shape, "road_2")),
            _size(16 * shape.parameters),
        ]
        for shape in SHAPES
    ]
    yield markdown(["model", "1 road_1", "64 road_1", "1,000 road_1", "1 road_2", "the whole model"], rows)
    yield from _tenants()


def _tenants() -> Iterator[str]:
    yield "## How many tenants train beside the model\n"
    yield _paragraph(
        "Of the training engine ([engine.md](engine.md)): weights in bfloat16, what a pass of so many tokens keeps for its "
        "backward, a tenth of the memory left free (of which logits take 256 MiB at a time), and the rest for tenants who are "
        "all resident: parameters, two moments and gradients in float32. Who takes part in a pass, here with one row of "
        f"{TOKENS_A_ROW} tokens, has direct, cross and their gradients beside that while it lasts. Who does not fit into a pass "
        "is in the next, so that tenants cost time and not activations. LoRA, for comparison, has four numbers a parameter and "
        "the activations of road_1, though it keeps more. The engine trains on one device: rows with several cards say what "
        "their memory would hold together."
    )
    rows = [
        [
            shape.name,
            card.name if cards == 1 else f"{cards} x {card.name}",
            *(_size(activation_bytes(shape, 1, variant)) for variant in ("road_1", "road_2")),
            *(f"{count:,}" for count in _tenants_beside(shape, card.memory * cards)),
        ]
        for shape, card, cards, _ in PLACES
    ]
    header = [f"{name}, {tokens:,}" for name in ("road_1", "road_2", "LoRA r=8") for tokens in PASSES]
    yield markdown(["model", "on", "a token, road_1", "a token, road_2", *header], rows)


def _tenants_beside(shape: Shape, memory: float) -> Iterator[int]:
    """Of road_1, road_2 and LoRA, each with passes of `PASSES`."""
    for variant in ("road_1", "road_2"):
        for tokens in PASSES:
            yield tenants_that_fit(shape, memory, training_bytes(shape, variant), pass_bytes(shape, tokens, variant))
    for tokens in PASSES:
        yield tenants_that_fit(shape, memory, 4 * lora_bytes(shape, 8, "float32"), activation_bytes(shape, tokens))


_ENGINES = """## Which engine when

| what you have | what to use |
| --- | --- |
| one adapter that does not change | merge it (`roadie merge`): no cost at all, any engine |
| a CPU, or one machine and transformers' models | `roadie serve`: every row its own adapter or blend ([serving.md](serving.md)) |
| GPUs, long contexts, high load | vLLM with the plug-in ([vllm.md](vllm.md)): its scheduler, graphs and parallelism |
| a model larger than one card | vLLM with tensor or pipeline parallelism |
| more load than one machine | replicas, each with every adapter it is asked for: balance by load, not by adapter |
| 100,000 adapters, few of them busy | files on a shared disk; the server loads what is asked for into as many slots as fit |
| hundreds of small training jobs | `roadie train-many`: one base model and one step for all ([train-many.md](train-many.md)) |

An adapter is small enough that sending requests where their adapter already is wins little: missing it costs one load (above),
while an unbalanced replica costs every request that waits there.
"""


def _checks(found: Measured) -> Iterator[str]:
    yield "## Checked against what was measured\n"
    yield _paragraph(
        "A Llama of 160M random parameters in float32 on two CPU cores, every row an adapter of its own, from the records in "
        "`benchmarks/results` ([many-adapters-results.md](many-adapters-results.md), [vllm.md](vllm.md)). There a step is "
        "bound by arithmetic, "
        "not by memory, so the table of memory traffic cannot be checked; what can be is what the bytes and calls add."
    )
    yield markdown(["what", "arithmetic", "measured", "remark"], [*_memory_check(found), *_time_checks(found)])


def _memory_check(found: Measured) -> Iterator[list[str]]:
    count, resident = found.memory["case"]["adapters"], found.memory["bytes_an_adapter"]["resident"]
    computed = table_bytes(MEASURED, "bfloat16")
    ratio = f"{resident / computed:.3f} of the arithmetic"
    yield [f"{count:,} resident adapters, bf16", _size(computed * count), _size(resident * count), ratio]


def _time_checks(found: Measured) -> Iterator[list[str]]:
    bytes_read = found.decode["case"]["rows"] * table_bytes(MEASURED, "float32")
    by_bytes = 1000 * bytes_read / found.copied_a_second
    yield [
        "decode step, 64 rows",
        f"{_size(bytes_read)}: {by_bytes:.1f} ms to copy",
        f"{_extra_ms(found.decode):.1f} ms of {found.decode['rivals']['base']['median_ms']:.0f}",
        f"{CALLS} calls, {_microseconds_a_call(found):.0f} us each",
    ]
    yield [
        "prefill, 64 rows",
        "a smaller share",
        f"{100 * (_ratio(found.prefill) - 1):.1f} % of the time, after {100 * (_ratio(found.decode) - 1):.1f} %",
        "{low:.3f} to {high:.3f} of the base".format_map(found.prefill["rivals"]["roadie"]["ratio"]),
    ]
    entries, rows = found.vllm["entries"], found.vllm["load"]["requests"]
    steps = found.vllm["load"]["new_tokens"]
    base, ours = (rows * steps / entries[name]["tokens_per_s"] for name in ("base", "roadie, 64 adapters"))
    calls = 4 * MEASURED.layers
    yield [
        "vLLM, 64 requests",
        f"{calls} calls a step",
        f"{1000 * (ours - base) / steps:.1f} ms a step of {1000 * base / steps:.0f}",
        "throughput {:.3f} of the base's; LoRA r=8: {:.3f}".format(
            *(entries[f"{kind}, 64 adapters"]["of_base"]["value"] for kind in ("roadie", "LoRA r=8"))
        ),
    ]


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 130, break_on_hyphens=False, break_long_words=False) + "\n"


def _ratio(entry: Mapping[str, Any]) -> float:
    return float(entry["rivals"]["roadie"]["ratio"]["value"])


def _extra_ms(entry: Mapping[str, Any]) -> float:
    return (_ratio(entry) - 1) * float(entry["rivals"]["base"]["median_ms"])


def _microseconds_a_call(found: Measured) -> float:
    return 1000 * _extra_ms(found.decode) / CALLS


def _size(number: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}" if number < 999.5 * unit else f"{number / unit:,.0f} {name}"
    return f"{number / 1e3:.3g} kB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
