"""What tenants in one engine cost: a step of many over a step of one, fresh weights, and requests beside training.

    python -m benchmarks.tenants                     all parts, on the embedded model
    python -m benchmarks.tenants --model FOLDER      on a checkpoint that transformers loads, in float32
    python -m benchmarks.tenants steps fresh         some parts

    steps    a step of many tenants of different variants, targets, group sizes and rates, and of many alike, over a step of
             one tenant with the same rows
    fresh    from the end of an optimiser's step to a first token: by older weights, and by those of the step
    agree    the logprob of a sampled token, and of the same token in a training forward
    shares   first tokens and tokens a second of requests: alone, and beside training at two shares

Rivals are interleaved in one process; times are of the processor, by medians, where another process may disturb: a busy machine
shows in the spread beside them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from roadie import RoadConfig, embedded
from roadie.engine import AdamSettings, TrainingEngine, TrainingRow, TrainingSettings
from roadie.engine.turns import TurnSettings
from roadie.serving import (
    ContinuousBatchingEngine,
    EngineSettings,
    GenerationRequest,
    Output,
    Registry,
    Sampling,
)

VARIANTS, SIZES = ("road_1", "road_2", "road_4"), (2, 16, 64)
TARGETS: tuple[str | list[str], ...] = (
    "all-linear",
    ["q_proj", "v_proj"],
    ["gate_proj", "up_proj", "down_proj"],
    ["o_proj", "down_proj"],
)
ALIKE = {"variant": "road_1", "group_size": 64, "target_modules": "all-linear"}
STEP = AdamSettings(1e-3)


def kind(number: int) -> dict[str, Any]:
    """The settings of a tenant that differs from its neighbours."""
    return {
        "variant": VARIANTS[number % 3],
        "group_size": SIZES[number // 3 % 3],
        "target_modules": TARGETS[number % 4],
    }


def rows(model: Any, count: int, num_tokens: int, seed: int = 0) -> list[TrainingRow]:
    """Random tokens, each of which predicts the next."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, model.config.vocab_size, (count, num_tokens + 1), generator=generator)
    return [TrainingRow(row[:-1], row[1:]) for row in ids]


def interleaved(rivals: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each, in turn, in both orders."""
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()
    for number in range(rounds):
        for name in list(rivals)[:: 1 if number % 2 else -1]:
            begin = time.process_time()
            rivals[name]()
            found[name].append(time.process_time() - begin)
    return found


def told(name: str, values: Sequence[float], unit: str, over: Sequence[float] | None = None) -> None:
    """A line: median, the least and the most, and the ratio of medians."""
    ratio = "" if over is None else f", {statistics.median(values) / statistics.median(over):.3f} of the first"
    spread = f"{min(values):.3g} to {max(values):.3g}"
    print(f"  {name}: {statistics.median(values):.3g} {unit} ({spread}, {len(values)} times){ratio}", flush=True)


def steps(model: Any, tenants: int, num_tokens: int, rounds: int) -> None:
    """Part `steps`."""

    def made(settings: Sequence[dict[str, Any]]) -> TrainingEngine:
        engine = TrainingEngine(model, TrainingSettings(max_tokens_per_pass=None))
        for number, each in enumerate(settings):
            engine.create(str(number), RoadConfig(task_type="CAUSAL_LM", **each))
        engine.run()
        return engine

    def step(engine: TrainingEngine, of_tenants: Sequence[Sequence[TrainingRow]]) -> None:
        for number, each in enumerate(of_tenants):
            engine.forward_backward(str(number), each, "cross_entropy")
            engine.optim_step(str(number), AdamSettings(1e-4 * (1 + number)))
        engine.run()

    each = rows(model, tenants, num_tokens)
    one, alike, kinds = made([ALIKE]), made([ALIKE] * tenants), made([kind(number) for number in range(tenants)])
    apart = [[row] for row in each]
    print(f"steps: {tenants} rows of {num_tokens} tokens")
    found = interleaved(
        {
            "one tenant": lambda: step(one, [each]),
            f"{tenants} tenants alike": lambda: step(alike, apart),
            f"{tenants} tenants of {len(kinds.bank.families)} kinds": lambda: step(kinds, apart),
        },
        rounds,
    )
    for name, values in found.items():
        told(name, values, "s", found["one tenant"])


@contextmanager
def serving(model: Any, turns: TurnSettings, num_slots: int = 8, **sizes: Any) -> Iterator[ContinuousBatchingEngine]:
    """A server's engine that trains; sizes: of training."""
    settings = EngineSettings(
        num_slots=num_slots, num_blocks=256, max_batch_tokens=128, max_running=8, share_prefixes=False, turns=turns
    )
    with tempfile.TemporaryDirectory() as folder:
        engine = ContinuousBatchingEngine(
            model, None, Registry.open(folder), settings, training=TrainingSettings(**sizes)
        )
        engine.start()
        try:
            yield engine
        finally:
            engine.stop()


class Asked:
    """A request, and when its tokens came: by the clock, and by the processor time of the engine's thread."""

    def __init__(
        self, engine: ContinuousBatchingEngine, name: str, prompt: Sequence[int], adapter: str, tokens: int
    ) -> None:
        self.clock_s, self.processor_s = [time.perf_counter()], [0.0]
        self.outputs: list[Output] = []
        self._is_done = threading.Event()
        rules = Sampling(max_tokens=tokens, temperature=1.0, seed=1, ignore_eos=True, logprobs=0)
        engine.submit(GenerationRequest(name, tuple(prompt), adapter, rules), self._take)

    def _take(self, output: Output) -> None:
        self.outputs.append(output)
        if output.token_ids:
            self.clock_s.append(time.perf_counter())
            self.processor_s.append(time.thread_time())
        if output.finish is not None:
            self._is_done.set()

    def wait(self) -> Asked:
        """Until it has ended."""
        self._is_done.wait()
        return self


def fresh(model: Any, rounds: int) -> None:
    """Part `fresh`: milliseconds of the engine's thread, so that other processes do not count."""
    (row,) = rows(model, 1, 4)
    found: dict[str, list[float]] = {"older weights": [], "those of the step": [], "of that, publish": []}
    with serving(model, TurnSettings()) as engine:
        names = [str(number) for number in range(3)]
        for number, name in enumerate(names):
            settings = {**ALIKE, "variant": VARIANTS[number], "group_size": SIZES[number]}
            engine.training.create(name, RoadConfig(task_type="CAUSAL_LM", **settings))
            engine.publish(name).result()
        for number in range(rounds + 2):
            if number == 2:  # warm
                found = {key: [] for key in found}
            for name in names:
                for is_new in (True, False) if number % 2 else (False, True):
                    _first_token(engine, name, row, f"{name} {number} {is_new}", found, is_new=is_new)
    print("fresh: from the end of a step to a first token")
    for key, values in found.items():
        told(key, values, "ms")


def _first_token(
    engine: ContinuousBatchingEngine,
    name: str,
    row: TrainingRow,
    request: str,
    found: dict[str, list[float]],
    *,
    is_new: bool,
) -> None:
    tenants = engine.training

    def now() -> float:
        return float(tenants.when_its_turn(name, time.thread_time).result())

    tenants.forward_backward(name, [row], "cross_entropy")
    tenants.optim_step(name, STEP).result()
    begin = now()
    if is_new:
        engine.publish(name).result()
        found["of that, publish"].append(1e3 * (now() - begin))
    asked = Asked(engine, request, torch.as_tensor(row.tokens).tolist(), name, 1).wait()
    found["those of the step" if is_new else "older weights"].append(1e3 * (asked.processor_s[1] - begin))


def agree(model: Any, num_tokens: int) -> None:
    """Part `agree`."""
    errors: list[float] = []
    with serving(model, TurnSettings()) as engine:
        asked = {}
        for number, prompt in enumerate(rows(model, 6, 24)):
            name = str(number)
            engine.training.create(name, RoadConfig(task_type="CAUSAL_LM", **kind(number)))
            for _ in range(2):
                engine.training.forward_backward(name, [prompt], "cross_entropy")
                engine.training.optim_step(name, AdamSettings(1e-2))
            engine.publish(name).result()
            asked[name] = prompt.tokens.tolist()[: 8 + 3 * number]
        requests = {name: Asked(engine, name, ids, name, num_tokens) for name, ids in asked.items()}
        futures = {}
        for name, request in requests.items():
            ids = [*asked[name], *(token for output in request.wait().outputs for token in output.token_ids)]
            futures[name] = engine.training.forward(name, [TrainingRow(ids[:-1], ids[1:])], "cross_entropy")
        for name, request in requests.items():
            sampled = [token.logprob for output in request.outputs for token in output.logprobs]
            trained = futures[name].result().logprobs[0][-num_tokens:].tolist()
            errors += [abs(one - other) for one, other in zip(sampled, trained, strict=True)]
    print(f"agree: {len(errors)} tokens of 6 adapters in one batch, {model.dtype}")
    print(f"  median {statistics.median(errors):.2g}, largest {max(errors):.2g}")


def shares(model: Any, seconds: float) -> None:
    """Part `shares`: five requests at a time, ten tokens each, beside a tenant who always trains."""
    prompt, train = rows(model, 1, 16)[0].tokens.tolist(), rows(model, 4, 16)
    print("shares: requests of 16 tokens and 10 more, five at a time")
    for share in (0.0, 0.25, 0.5):
        with serving(model, TurnSettings(share), max_tokens_per_pass=64) as engine:
            engine.training.create("t", RoadConfig(task_type="CAUSAL_LM", **ALIKE)).result()
            engine.publish("t").result()
            calls = [engine.training.forward_backward("t", train, "cross_entropy") for _ in range(200 if share else 0)]
            begin, firsts, tokens, number = time.perf_counter(), [], 0, 0
            while time.perf_counter() - begin < seconds:
                asked = [Asked(engine, f"{number} {each}", prompt, "t", 10) for each in range(5)]
                firsts += [one.wait().clock_s[1] - one.clock_s[0] for one in asked]
                tokens, number = tokens + 50, number + 1
            done, took = engine.statistics(), time.perf_counter() - begin
            for call in calls:
                call.cancel()
        had = done.seconds_training / (done.seconds_training + done.seconds_computing)
        print(f"  share {share}: {tokens / took:.1f} tokens/s, training had {had:.2f} of the time")
        told("first token", [1e3 * first for first in firsts], "ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tenants", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["steps", "fresh", "agree", "shares"])
    parser.add_argument("--model", default=str(embedded.model_path()))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tenants", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    run = {
        "steps": lambda: steps(model, options.tenants, options.tokens, options.rounds),
        "fresh": lambda: fresh(model, options.rounds),
        "agree": lambda: agree(model, 12),
        "shares": lambda: shares(model, options.seconds),
    }
    for part in options.parts:
        run[part]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
