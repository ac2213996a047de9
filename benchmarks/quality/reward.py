"""Learning by reward: TRL's GRPO on a real language model and `sums`, RoAd beside LoRA; one record a run.

    python -m benchmarks.quality reward --model FOLDER        trains what the records lack; may be stopped at any time

The reward alone teaches. Seeds are paired: all methods see the same sums in the same order. The learning rate is searched as
everywhere, by the first seed's reward on validation sums. A run that was stopped begins anew.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from benchmarks.machine import machine_name
from benchmarks.quality import records, sums
from benchmarks.quality.hub.evaluation import moved, padded_left
from benchmarks.quality.hub.settings import Model
from benchmarks.quality.hub.task import base_model, tokenizer_of
from benchmarks.quality.hub.training import peak_of
from benchmarks.quality.methods import METHODS, Method, nearest_exponent, rate
from benchmarks.quality.search import SEEDS, next_run
from benchmarks.quality.tasks import LANGUAGE, Splits, Task
from benchmarks.quality.training import count_parameters, stored_bytes
from benchmarks.record import RESULTS, rounded
from roadie.errors import ConfigError

BASE = "base"
FIRST_RATES = {"road_1": 3.2e-3, "lora_r1": 1e-3, "lora_r8": 3.2e-4}
"""The methods in their order, and where the search for a rate begins."""


@dataclass(frozen=True)
class Size:
    """A run: steps of `prompts` sums with `replies` to each, of at most `tokens` tokens.

    samples: replies to each sum when a model is measured.
    """

    steps: int = 40
    prompts: int = 8
    replies: int = 4
    tokens: int = 8
    samples: int = 8


@dataclass(frozen=True)
class Learner:
    """A base model, its tokenizer, where it computes, and the size of the runs."""

    told: Model
    tokenizer: Any
    device: str
    size: Size

    @property
    def task(self) -> Task:
        """What methods and counts ask for; it has no rows, because they are sampled."""
        return Task(
            name=f"reward.{Path(self.told.name).name}",
            kind=LANGUAGE,
            title="sums of one digit, by reward",
            model=self.model,
            splits=Splits((), (), ()),
            pad_id=self.tokenizer.pad_token_id,
            targets=self.told.targets if isinstance(self.told.targets, str) else list(self.told.targets),
            steps=self.size.steps,
            batch_rows=self.size.prompts * self.size.replies,
        )

    def model(self) -> nn.Module:
        """A fresh copy of the base model."""
        return base_model(self.told, self.tokenizer, self.device).requires_grad_(False)


def records_folder(results: Path = RESULTS, device: str = "cpu") -> Path:
    """Where this machine's records are."""
    return results / machine_name(device.partition(":")[0]) / "quality-reward"


def sweep(model: Path, folder: Path, device: str, stop: Callable[[], bool], size: Size | None = None) -> int:
    """Train what the records of a checkpoint lack, until `stop()`; gives the number of runs.

    Raises `ConfigError` where the checkpoint cannot be loaded, and where the records are of runs of another size.
    """
    learner = learner_of(model, device, size or Size())
    path, facts, count = folder / f"{model.resolve().name}.jsonl", records.provenance(), 0
    before = _begin(learner, path, facts)
    while not stop() and (following := next_of(records.read(path))) is not None:
        name, exponent, seed = following
        head = {"task": learner.task.name, "method": name, "learning_rate": rate(exponent), "seed": seed}
        done = run(learner, METHODS[name], rate(exponent), seed)
        records.add(path, {**head, "steps": learner.size.steps, "before": before, **done, **facts})
        print(*head.values(), done["validation"], f"{done['processor_s']:.0f} s", flush=True)
        count += 1
    return count


def learner_of(model: Path, device: str, size: Size) -> Learner:
    """Of a checkpoint in a folder; products are in bfloat16 where the device has instructions for it."""
    told = Model(name=str(model.resolve()), kind="causal-language-model", products="bfloat16")
    return Learner(told, tokenizer_of(told), device, size)


def next_of(found: Sequence[records.Record]) -> tuple[str, int, int] | None:
    """Method, exponent of the rate and seed of the next run: all searches before other seeds, the methods in turn."""
    for seeds in (SEEDS[:1], SEEDS):
        missing = {name: chosen for name in FIRST_RATES if (chosen := next_in(found, name, seeds)) is not None}
        if missing:
            name = min(missing, key=lambda one: sum(record["method"] == one for record in found))
            return (name, *missing[name])
    return None


def next_in(found: Sequence[records.Record], name: str, seeds: Sequence[int] = SEEDS) -> tuple[int, int] | None:
    """Exponent and seed of the next run of a method; None: it is done."""
    method = replace(METHODS[name], first={LANGUAGE: nearest_exponent(FIRST_RATES[name])})
    return next_run(found, method, LANGUAGE, seeds)


def _begin(learner: Learner, path: Path, facts: records.Record) -> dict[str, float]:
    """The first line of a file: the size of the runs, and what the model earns as it comes, of which the test is given."""
    found, told = records.read(path), {"size": asdict(learner.size)}
    if not found:
        model = learner.model()
        head = {"task": learner.task.name, "method": BASE, "learning_rate": 0.0, "seed": 0, "steps": 0, "facts": told}
        records.add(path, rounded({**head, **measured(learner, model), **facts}))
        return _begin(learner, path, facts)
    if found[0]["facts"] != told:
        raise ConfigError(
            f"{path}: got records of runs with {found[0]['facts']}; wanted {told}; give another folder with --records"
        )
    before: dict[str, float] = found[0]["test"]
    return before


def run(learner: Learner, method: Method, learning_rate: float, seed: int) -> dict[str, Any]:
    """Adapt, train and measure; gives the part of the record that the run itself knows."""
    gc.collect()  # the model of the run before is in cycles
    torch.manual_seed(seed)
    task = learner.task
    model: Any = method.adapt(learner.model(), task)
    spent = _timed(model)
    trainer = _trainer(learner, model, learning_rate, seed)
    started = time.process_time()
    peak = peak_of(model, trainer.train)
    processor_s, generation_s = time.process_time() - started, sum(spent)
    curve = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {
        **count_parameters(model, task),
        "stored_bytes": stored_bytes(model),
        "processor_s": processor_s,
        "generation_s": generation_s,
        "peak_bytes": peak,
        "curve": curve,
        **measured(learner, model),
    }


def _timed(model: Any) -> list[float]:
    """The processor seconds of each call of the model's `generate` from now on, in a list that grows."""
    spent: list[float] = []
    generate = model.generate

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.process_time()
        try:
            return generate(*arguments, **named)
        finally:
            spent.append(time.process_time() - started)

    model.generate = timed
    return spent


def _trainer(learner: Learner, model: Any, learning_rate: float, seed: int) -> Any:
    from datasets import Dataset  # the report is made without them
    from trl import GRPOConfig, GRPOTrainer

    size = learner.size
    rows = [{"prompt": one.prompt, "result": one.result} for one in sums.parts().train]
    with tempfile.TemporaryDirectory() as nowhere:  # nothing is saved
        told = GRPOConfig(
            output_dir=nowhere,
            seed=seed,
            max_steps=size.steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=size.steps // 10,
            per_device_train_batch_size=size.prompts * size.replies,
            num_generations=size.replies,
            max_completion_length=size.tokens,
            gradient_checkpointing=False,
            use_cpu=learner.device == "cpu",
            bf16=False,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
    return GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=told,
        train_dataset=Dataset.from_list(rows),
        processing_class=learner.tokenizer,
    )


def rewards(completions: Sequence[str], result: Sequence[int], **columns: Any) -> list[float]:
    """What TRL asks for: the reward of each reply."""
    return [sums.reward(reply, wanted) for reply, wanted in zip(completions, result, strict=True)]


def measured(learner: Learner, model: nn.Module) -> dict[str, dict[str, float]]:
    """The scores of "validation" and "test"."""
    parts = sums.parts()
    return {name: _scores(learner, model, getattr(parts, name)) for name in ("validation", "test")}


def _scores(learner: Learner, model: nn.Module, asked: Sequence[sums.Sum]) -> dict[str, float]:
    """Means over sampled replies, for the same seed every time; loss: what is lacking to the whole reward."""
    wanted = [one.result for one in asked for _ in range(learner.size.samples)]
    pairs = list(zip(replies(learner, model, [one.prompt for one in asked]), wanted, strict=True))
    earned = mean(sums.reward(*pair) for pair in pairs)
    return {
        "loss": 1 - earned,
        "reward": earned,
        "right": mean(sums.is_right(*pair) for pair in pairs),
        "line": mean(sums.is_line(reply) for reply, _ in pairs),
        "alone": mean(sums.is_alone(reply) for reply, _ in pairs),
    }


def replies(learner: Learner, model: Any, prompts: Sequence[str]) -> list[str]:
    """`samples` sampled replies to each prompt, as GRPO samples them."""
    size, tokenizer = learner.size, learner.tokenizer
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=size.tokens,
        num_return_sequences=size.samples,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.eval()
    texts: list[str] = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        for start in range(0, len(prompts), size.prompts):
            tokens = tokenizer(prompts[start : start + size.prompts])["input_ids"]
            batch = moved(padded_left(tokens, tokenizer.pad_token_id), model)
            added = model.generate(**batch, generation_config=sampling)[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(added, skip_special_tokens=True)
    return texts
