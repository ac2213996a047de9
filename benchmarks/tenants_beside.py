"""The training engine beside SkyRL's JaxBackend, on one tiny random Llama: ``python -m benchmarks.tenants_beside PYTHON``.

PYTHON is that of an environment with ``pip install "skyrl[jax]"``, which cannot be roadie's own. The same rows are split over
1, 8 and 32 tenants of each; SkyRL has 33 slots, one of which is the base model's. Whole processes take turns, in both orders, on
one core at a time; times are processor seconds of all threads, and what is timed has run once before.

    forward and backward   all rows in one pass, tokens a second
    steps                  an optimiser's step of each tenant
    state                  parameters, gradients and moments of all tenants
    fresh                  from a tenant's step to a token by its new weights, and a token by weights that are there already

The first logprobs of both, before anything is trained, must agree. The record is benchmarks/results/<machine>/tenants-skyrl.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import machine, record
from benchmarks.tenants import ALIKE, STEP, Asked, rows, serving
from benchmarks.tenants_skyrl import resident_bytes, shares, timed
from roadie import RoadConfig, embedded
from roadie.engine import TrainingEngine, TrainingRow, TrainingSettings
from roadie.engine.turns import TurnSettings

TENANTS, NUM_ROWS, NUM_TOKENS = (1, 8, 32), 32, 64
AGREE = (
    1e-4  # logprobs of two libraries in float32, of a model without training: far below what other weights would make
)


def make_model(folder: Path) -> None:
    """A random Llama with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_path())
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Ours:
    """The engine with some tenants, all road_1 on all linear layers."""

    def __init__(self, model: Any, given: Sequence[Sequence[int]], tenants: int) -> None:
        owners = shares(len(given), tenants)
        self.names = [str(number) for number in range(tenants)]
        self.rows: dict[str, list[TrainingRow]] = {name: [] for name in self.names}
        for owner, row in zip(owners, given, strict=True):
            self.rows[str(owner)].append(TrainingRow(row[:-1], row[1:]))
        self.engine = TrainingEngine(model, TrainingSettings(max_tokens_per_pass=None))
        for name in self.names:
            self.engine.create(name, RoadConfig(task_type="CAUSAL_LM", **ALIKE))
        self.engine.run()

    def forward_backward(self) -> list[list[float]]:
        """All rows in one pass; their logprobs."""
        calls = [self.engine.forward_backward(name, each, "cross_entropy") for name, each in self.rows.items()]
        self.engine.run()
        return [logprobs.flatten().tolist() for call in calls for logprobs in call.result().logprobs]

    def step(self) -> None:
        """An optimiser's step of every tenant."""
        for name in self.names:
            self.engine.optim_step(name, STEP)
        self.engine.run()

    def state_bytes(self) -> int:
        """Parameters, gradients and moments."""
        stacks = [stack for family in self.engine.bank.families for stack in family.stacks]
        return sum(each.nbytes for stack in stacks for each in (*stack.tensors.values(), stack.gradients))


def fresh(
    model: Any, given: Sequence[Sequence[int]], prompt: Sequence[int], tenants: int, repeats: int
) -> list[list[float]]:
    """Seconds from a step to a token by its weights, and to one by weights that are published already."""
    with serving(model, TurnSettings(), num_slots=tenants + 1) as engine:
        names = [str(number) for number in range(tenants)]
        for name in names:
            engine.training.create(name, RoadConfig(task_type="CAUSAL_LM", **ALIKE)).result()
            engine.publish(name).result()
        row, numbers = TrainingRow(given[0][:-1], given[0][1:]), iter(range(1 << 20))

        def step() -> None:
            engine.training.forward_backward("0", [row], "cross_entropy")
            engine.training.optim_step("0", STEP).result()

        def sample(*, is_new: bool) -> None:
            if is_new:
                engine.publish("0").result()
            Asked(engine, str(next(numbers)), prompt, "0", 1).wait()

        return timed(repeats, step, lambda: sample(is_new=True), lambda: sample(is_new=False))[1:]


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """What the job asks for, as `benchmarks.tenants_skyrl` measures it."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    begin, logprobs, cases = resident_bytes(), [], {}
    for tenants in job["tenants"]:
        case = Ours(model, job["rows"], tenants)
        logprobs = logprobs or case.forward_backward()
        passes, steps = timed(job["repeats"], case.forward_backward, case.step)
        state, resident = case.state_bytes(), resident_bytes() - begin
        del case
        new, old = fresh(model, job["rows"], job["prompt"], tenants, job["repeats"])
        cases[tenants] = {"forward_backward_s": passes, "steps_s": steps, "new_s": new, "old_s": old}
        cases[tenants] |= {"state_bytes": state, "resident_bytes": resident}
    return {"logprobs": logprobs, "cases": cases}


def run(command: Sequence[str], job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A process; its last line. Raises CalledProcessError, its stderr on this one's."""
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [*command, str(path)],
        cwd=machine.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**cache, **os.environ},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(python: str, processes: int, repeats: int, rank: int) -> dict[str, Any]:
    """Alternate processes of both; what each found, by library and number of tenants, and how far logprobs are apart."""
    commands = {
        "roadie": [sys.executable, "-m", "benchmarks.tenants_beside", "--job"],
        "skyrl": [python, "-P", "benchmarks/tenants_skyrl.py"],
    }
    found: dict[str, Any] = {name: {} for name in commands}
    apart, versions = [], {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model")
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        given = [[*one.tokens.tolist(), int(one.targets[-1])] for one in rows(model, NUM_ROWS, NUM_TOKENS)]
        job = {"model": str(folder / "model"), "rows": given, "prompt": given[0][:32], "tenants": TENANTS}
        job |= {"repeats": repeats, "slots": max(TENANTS) + 1, "rank": rank}
        cores = sorted(os.sched_getaffinity(0))
        for number in range(processes):
            logprobs = {}
            for name in list(commands)[:: 1 if number % 2 else -1]:
                place_of = {"core": cores[number % len(cores)], "folder": str(folder / f"{name}-{number}")}
                result = run(commands[name], {**job, **place_of}, folder)
                logprobs[name], versions = torch.tensor(result["logprobs"]), versions | result.get("versions", {})
                _take(found[name], result["cases"])
                print(f"process {number + 1} of {processes}: {name}", flush=True)
            apart.append((logprobs["roadie"] - logprobs["skyrl"]).abs().max().item())
            assert apart[-1] < AGREE, f"logprobs are {apart[-1]} apart: these are not the same model or rows"
    head = {
        "rows": NUM_ROWS,
        "tokens_a_row": NUM_TOKENS,
        "rank": rank,
        "slots": max(TENANTS) + 1,
        "processes": processes,
    }
    return {**head, "repeats": repeats, "logprobs_apart": max(apart), "rival_versions": versions, "found": found}


def _take(found: dict[str, Any], cases: dict[str, Any]) -> None:
    for tenants, case in cases.items():
        for key, value in case.items():
            found.setdefault(tenants, {}).setdefault(key, []).extend(value if isinstance(value, list) else [value])


def told(found: dict[str, Any]) -> str:
    """A table in Markdown: medians, with the least and the most."""
    lines = ["| | tenants | roadie, road_1 | SkyRL, LoRA |", "|---|---|---|---|"]
    tokens = NUM_ROWS * NUM_TOKENS
    kinds = (
        (
            "forward and backward, tokens a second",
            lambda case, _: [tokens / each for each in case["forward_backward_s"]],
        ),
        ("the tenants' steps, ms", lambda case, _: [1e3 * each for each in case["steps_s"]]),
        ("state, MiB a tenant", lambda case, count: [each / count / 2**20 for each in case["state_bytes"]]),
        ("from a step to a token by its weights, ms", lambda case, _: [1e3 * each for each in case["new_s"]]),
        ("a token by weights that are there, ms", lambda case, _: [1e3 * each for each in case["old_s"]]),
    )
    for name, values in kinds:
        for count in found["roadie"]:
            cells = (_cell(values(found[library][count], int(count))) for library in ("roadie", "skyrl"))
            lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    median, least, most = map(_figures, (statistics.median(values), min(values), max(values)))
    return median if least == most else f"{median} ({least} to {most})"


def _figures(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tenants_beside", description=__doc__.partition("\n")[0])
    parser.add_argument("python", help="of an environment with skyrl[jax]")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args(arguments)
    if options.job:
        job = json.loads(Path(options.python).read_text(encoding="utf-8"))
        os.sched_setaffinity(0, {job["core"]})
        print(json.dumps(ours(job)))
        return 0
    head = {"date": machine.now(), **machine.commit(), "machine": machine.describe()}
    result = {**head, **compared(options.python, options.processes, options.repeats, options.rank)}
    print(told(result["found"]))
    print(record.write(result, record.RESULTS / machine.machine_name() / "tenants-skyrl.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
