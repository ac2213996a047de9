"""What is done on a GPU, the most important first, and how long it should take; without torch.

The kernels against float64 come first, since nothing else counts where they are wrong; the project's own tests of a GPU; then
times: layers, decoding, a training step, and the paper's figure, in which the slowest rival is last.

Seconds are what one H200 with 16 processors should need, with room; a test adds them up (`budget`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# How a batch says which adapters its rows use; the last is by names too, and by itself because it takes longest.
ONE, MIXED, NAMED, NAMED_PEFT = "one adapter", "rows() once", "adapter_names", "adapter_names, PEFT RoAd"
LIMIT_S = 450.0
START_S = 12.0  # a process that imports torch, transformers and PEFT from a cold disk, and makes a CUDA context
ASSEMBLING_S = 3.0  # the record out of the journal
MAKING_S = {NAMED: 10.0, NAMED_PEFT: 3.0}  # 64 adapters of 28 layers are added to PEFT's models
ROOM = 1.6  # a step is ended after so many times its share of the time

Narrow = tuple[int, int, int]  # width, group size, and elements between the rows


@dataclass(frozen=True)
class Case:
    """One thing that is done by itself; kind: a key of `worker.kinds`, which is called with the arguments."""

    title: str
    kind: str
    arguments: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Step:
    """Cases of one kind of work, dealt to `shards` processes side by side."""

    name: str
    cases: tuple[Case, ...]
    shards: int = 1

    def shard(self, index: int) -> tuple[Case, ...]:
        """The cases of one process."""
        return self.cases[index :: self.shards]

    @property
    def expected_s(self) -> float:
        """How long the step should take: as long as its longest process."""
        return START_S + max(sum(case.seconds for case in self.shard(index)) for index in range(self.shards))


@dataclass(frozen=True)
class Scale:
    """How large everything is. sizes: of models, by name (`workloads.model.ModelSize`); figure: the one of the paper's figure."""

    sizes: dict[str, dict[str, int]]
    figure: str
    layers: tuple[tuple[int, int], ...]
    eager_layers: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    rows: int
    context: int
    training: tuple[int, int]
    adapters: tuple[int, ...]
    seconds: float
    shards: int
    kernels: Callable[[], Iterator[Case]]
    tests: tuple[str, ...]


def steps(tiny: bool) -> tuple[Step, ...]:
    """Everything, in order."""
    scale = TOY if tiny else REAL
    return (
        Step("machine", (Case("machine", "machine", {}, 3), Case("copying", "copying", {}, 2))),
        Step("kernels", tuple(scale.kernels()), scale.shards),
        Step("tests", tuple(_tests(scale)), scale.shards),
        Step("layers", tuple(_layers(scale))),
        Step("decoding", tuple(_decoding(scale))),
        Step("training", tuple(_training(scale))),
        Step("figure", tuple(_figure(scale))),
    )


def budget(tiny: bool) -> dict[str, float]:
    """Seconds by step, and what comes after the last one."""
    return {**{step.name: step.expected_s for step in steps(tiny)}, "assembling": ASSEMBLING_S}


def most_s(step: Step, planned: Sequence[Step], seconds: float) -> float:
    """When a step is ended, whatever it is doing, of all that is planned and the seconds for it."""
    return max(60.0, ROOM * seconds * step.expected_s / sum(each.expected_s for each in planned))


def _kernels(width: int, rows: tuple[int, ...], narrow: tuple[Narrow, ...], large: tuple[int, ...]) -> Iterator[Case]:
    """Each kernel in each dtype: routes and rows at a real width; group sizes at narrow ones, where no tile is whole."""
    dtypes = ("bfloat16", "float32", "float16")
    for dtype in dtypes:
        for route in ("one", "rows", "repeat"):
            yield _rotation(width, 64, dtype, route, rows)
        yield _rotation(width, 64, dtype, "sizes", rows[-1:])
    for dtype in dtypes[::2]:
        yield _rotation(width, 64, dtype, "rows", rows[-1:], table_dtype=dtype)
    for of_width, group_size, padding in narrow:
        for route in ("one", "rows"):
            yield _rotation(of_width, group_size, "bfloat16", route, rows[:2], padding=padding)
    for dtype in dtypes:
        yield Case(f"product, {dtype}", "product", {"dtype": dtype, "width": width}, 8)
        yield Case(f"prepared, {dtype}", "prepared", {"dtype": dtype, "width": width}, 4)
        for keep in ("input", "output"):
            title = f"gradients, {dtype}, keeping the {keep}"
            yield Case(title, "gradients", {"dtype": dtype, "keep": keep, "width": width}, 8)
    for count in large:
        yield _rotation(width, 64, "bfloat16", "rows", (count,))


def _rotation(width: int, group_size: int, dtype: str, route: str, rows: tuple[int, ...], **more: Any) -> Case:
    arguments = {"width": width, "group_size": group_size, "dtype": dtype, "route": route, "rows": rows, **more}
    said = ", ".join(f"{key} {value}" for key, value in more.items())
    title = f"rotation, {dtype}, {route}, {' and '.join(map(str, rows))} rows x {width}, groups of {group_size}"
    return Case(f"{title}, {said}" if said else title, "rotation", arguments, 6)


def _tests(scale: Scale) -> Iterator[Case]:
    for index in range(scale.shards):
        arguments = {"paths": scale.tests, "index": index, "count": scale.shards}
        yield Case(f"tests, part {index + 1} of {scale.shards}", "tests", arguments, 75)


def _layers(scale: Scale) -> Iterator[Case]:
    """Layers that fill the device, eager and as a graph, which is the device's own time; small ones eager alone."""
    of_shape = [(shape, graph) for shape in scale.layers for graph in (False, True)]
    of_shape += [(shape, False) for shape in scale.eager_layers]
    for (in_features, out_features), graph in of_shape:
        for training in (False, True):
            for tokens in scale.tokens:
                mode = "forward+backward" if training else "forward"
                title = f"{mode}, {in_features} to {out_features}, {tokens} tokens{', graph' * graph}"
                arguments = {"in_features": in_features, "out_features": out_features, "tokens": tokens}
                arguments |= {"training": training, "graph": graph, "seconds": scale.seconds}
                yield Case(title, "layer", arguments, scale.seconds + 0.6)


def _decoding(scale: Scale) -> Iterator[Case]:
    for name in scale.sizes:
        for rows in (1, scale.rows):
            for graph in (False, True):
                yield _decoded(scale, name, rows, 1, ONE, graph)
        for graph in (False, True):
            yield _decoded(scale, name, scale.rows, scale.rows, MIXED, graph)


def _figure(scale: Scale) -> Iterator[Case]:
    """The number of rows stays; the fast ones first, and of these the ends of the line. The last point is among `_decoding`."""
    counts = [count for count in scale.adapters if count < scale.rows]
    ends_first = sorted(counts, key=lambda count: count not in (counts[0], counts[-1]))
    for count in ends_first:
        for graph in (False, True):
            yield _decoded(scale, scale.figure, scale.rows, count, MIXED, graph)
    for how in (NAMED, NAMED_PEFT):
        for count in (*ends_first, scale.rows):
            yield _decoded(scale, scale.figure, scale.rows, count, how, graph=False)


def _decoded(scale: Scale, name: str, rows: int, adapters: int, how: str, graph: bool) -> Case:
    arguments = {"size": name, "rows": rows, "context": scale.context, "adapters": adapters, "how": how, "graph": graph}
    title = f"decoding, {name}, {rows} rows, {adapters} adapters, {how}{', graph' * graph}"
    making_s = MAKING_S.get(how, 0.0) if adapters == scale.adapters[0] else 0.0  # which the first case of a model pays
    return Case(title, "decoding", {**arguments, "seconds": scale.seconds}, scale.seconds + 1.8 + making_s)


def _training(scale: Scale) -> Iterator[Case]:
    rows, tokens = scale.training
    for name in scale.sizes:
        arguments = {"size": name, "rows": rows, "tokens": tokens, "seconds": 2 * scale.seconds}
        yield Case(f"training step, {name}, {rows} x {tokens} tokens", "training", arguments, 2 * scale.seconds + 6)


_NARROW: tuple[Narrow, ...] = ((96, 2, 0), (96, 4, 0), (96, 8, 1), (140, 10, 0), (210, 6, 3), (210, 210, 0))
# The vocabulary of the large one is small, so that four of its layers are not measured through the head of all 32.
LLAMA, SMOLLM2 = "Llama-3.1-8B, 4 layers", "SmolLM2-135M"
REAL = Scale(
    sizes={
        LLAMA: {"hidden": 4096, "layers": 4, "heads": 32, "intermediate": 14336, "vocabulary": 4096, "kv_heads": 8},
        SMOLLM2: {"hidden": 576, "layers": 30, "heads": 9, "intermediate": 1536, "vocabulary": 49152, "kv_heads": 3},
    },
    figure=LLAMA,
    layers=((4096, 4096), (4096, 14336)),
    eager_layers=((576, 576), (576, 1536)),
    tokens=(1, 16, 256, 4096),
    rows=64,
    context=512,
    training=(4, 512),
    adapters=(1, 2, 4, 8, 16, 32, 64),
    seconds=1.0,
    shards=12,
    kernels=lambda: _kernels(4096, (1, 17, 513), _NARROW, (9000,)),
    tests=("tests/gpu",),
)
TOY = Scale(
    sizes={
        "a toy": {"hidden": 128, "layers": 1, "heads": 4, "intermediate": 128, "vocabulary": 128, "kv_heads": 2},
        "a narrow toy": {"hidden": 64, "layers": 1, "heads": 1, "intermediate": 64, "vocabulary": 128, "kv_heads": 1},
    },
    figure="a toy",
    layers=((64, 128),),
    eager_layers=((64, 64),),
    tokens=(1, 4),
    rows=4,
    context=4,
    training=(1, 8),
    adapters=(1, 2, 4),
    seconds=0.02,
    shards=2,
    kernels=lambda: _kernels(64, (3,), _NARROW[::4], ()),
    tests=("tests/kernels/test_choice.py",),
)
