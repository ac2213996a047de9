"""A warning once, and only where the losses of real trainings say that the rate is far off."""

from __future__ import annotations

import json
import logging
import math
import random
import subprocess
import sys

import pytest
from tests.patience import HANG_S
from transformers import Trainer, TrainerCallback, TrainingArguments

import roadie
from roadie import embedded
from roadie.training.encoding import Example, collate
from roadie.training.many import RunSettings, train_many
from roadie.training.many.observer import Observer
from roadie.training.rate_watch import CERTAIN, FEWEST_STEPS, WINDOW, LossWatch, RateWatch
from roadie.training.recipe import Recipe
from roadie.training.run import train

STEPS = 32
TOO_LOW, TOO_HIGH = "has not moved", "rose from"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Two kinds of text that the embedded model never saw, as files."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind in ("asyncio", "topics"):
        text = "\n\n".join(document.text for document in embedded.corpus.split(kind).train)[:20_000]
        (folder / f"{kind}.txt").write_text(text, encoding="utf-8")
    return folder


def warned(caplog):
    return [record.message for record in caplog.records if "learning rate" in record.message]


def recipe(rate, seed=0, steps=STEPS):
    return Recipe(batch_size=4, learning_rate=rate, max_length=32, max_steps=steps, seed=seed)


@pytest.mark.parametrize(
    ("kind", "rate", "said"),
    [
        ("topics", 1e-4, TOO_LOW),
        ("asyncio", 0.9, TOO_HIGH),
        pytest.param("asyncio", 1e-7, TOO_LOW, marks=pytest.mark.long),
        pytest.param("topics", 0.9, TOO_HIGH, marks=pytest.mark.long),
    ],
)
def test_a_rate_that_is_far_off_is_told_once(kinds, kind, rate, said, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "roadie")
    train(kinds / f"{kind}.txt", tmp_path / "adapter", recipe=recipe(rate))
    (message,) = warned(caplog)
    assert said in message
    assert message.startswith(f"got a learning rate of {rate:g}")
    assert "wanted" in message
    assert "roadie find-lr" in message


@pytest.mark.parametrize(
    ("kind", "rate", "seed"),
    [
        ("asyncio", 3e-3, 0),
        ("topics", 3e-2, 2),
        ("topics", None, 3),
        pytest.param("topics", 3e-3, 1, marks=pytest.mark.long),
        pytest.param("topics", 1e-2, 0, marks=pytest.mark.long),
        pytest.param("asyncio", 3e-2, 1, marks=pytest.mark.long),
    ],
)
def test_nothing_is_said_of_a_good_rate(kinds, kind, rate, seed, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "roadie")
    train(kinds / f"{kind}.txt", tmp_path / "adapter", recipe=recipe(rate, seed))
    assert warned(caplog) == []


def test_each_of_many_jobs_is_told_of_its_own_rate(kinds, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "roadie")
    rates = {"low": 1e-7, "good": 1e-2, "high": 0.9}
    shared = {"data": str(kinds / "asyncio.txt"), "steps": STEPS, "batch_size": 4, "max_length": 32}
    jobs = [{"name": n, "output": str(tmp_path / n), "learning_rate": rate, **shared} for n, rate in rates.items()]
    train_many(jobs)
    messages = {message.partition(":")[0]: message for message in warned(caplog)}
    assert len(messages) == len(warned(caplog))
    assert set(messages) == {"job low", "job high"}
    assert TOO_LOW in messages["job low"]
    assert TOO_HIGH in messages["job high"]


def test_a_resumed_run_of_many_jobs_says_it_once_and_knows_what_was_before(kinds, tmp_path, caplog):
    """high spoke in the first session; low speaks in the second, of losses of both."""
    caplog.set_level(logging.WARNING, "roadie")

    class Stop(Observer):
        def on_step(self, reports, seconds):
            if reports[0].step == STEPS // 2 - 1:
                raise KeyboardInterrupt

    shared = {"data": str(kinds / "asyncio.txt"), "steps": STEPS, "batch_size": 4, "max_length": 32}
    jobs = [
        {"name": n, "output": str(tmp_path / n), "learning_rate": r, **shared}
        for n, r in (("low", 1e-7), ("high", 0.9))
    ]
    settings = RunSettings(checkpoint_steps=STEPS // 2 - 2)
    with pytest.raises(KeyboardInterrupt):
        train_many(jobs, settings=settings, observers=[Stop()])
    assert [message.partition(":")[0] for message in warned(caplog)] == ["job high"]
    train_many(jobs, settings=settings, resume=True)
    assert [message.partition(":")[0] for message in warned(caplog)] == ["job high", "job low"]


def test_a_resumed_training_knows_what_was_before_and_says_it_once(kinds, tmp_path, caplog):
    """Interrupted before the loss has risen for long enough, and again after it was told."""
    caplog.set_level(logging.WARNING, "roadie")

    class Stop(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **_):
            if state.global_step == self.step:
                raise KeyboardInterrupt

    high = Recipe(**{**recipe(0.9).to_mapping(), "checkpoint_steps": 6})
    told = []
    for stop in (7, STEPS - 1):
        with pytest.raises(KeyboardInterrupt):
            train(kinds / "asyncio.txt", tmp_path / "adapter", recipe=high, resume=True, callbacks=[Stop(stop)])
        told.append(len(warned(caplog)))
    assert train(kinds / "asyncio.txt", tmp_path / "adapter", recipe=high, resume=True).resumed_from_step > WINDOW
    assert [*told, len(warned(caplog))] == [0, 1, 1]


def test_it_serves_any_trainer(kinds, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "roadie")
    tokens = embedded.load_tokenizer()((kinds / "topics.txt").read_text(), add_special_tokens=False)["input_ids"]
    rows = [Example(tuple(tokens[at : at + 32]), tuple(tokens[at : at + 32])) for at in range(0, 32 * 128, 32)]
    config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=48, learning_rate=0.9, warmup_steps=5, logging_steps=2, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=4, remove_unused_columns=False, label_names=["labels"], save_strategy="no",
    )  # fmt: skip
    model = roadie.get_peft_model(embedded.load_model(), config)
    Trainer(model, arguments, collate, rows, callbacks=[RateWatch()]).train()
    (message,) = warned(caplog)
    assert TOO_HIGH in message


def fed(losses, rate=1e-2):
    watch = LossWatch(len(losses), rate)
    return [said for step, loss in enumerate(losses, 1) if (said := watch.see(step, loss, rate)) is not None]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_told_at_once(bad):
    watch = LossWatch(100, 1e-2)
    assert watch.see(1, 3.0, 1e-2) is None
    assert f"is {bad} at step 2 of 100" in watch.see(2, bad, 1e-2)
    assert watch.see(3, bad, 1e-2) is None


def test_a_loss_that_falls_and_then_rises_beyond_its_lowest_is_told():
    noise = random.Random(0)
    falling = [3 - step / 40 + noise.gauss(0, 0.1) for step in range(60)]
    assert fed([*falling, *(1.5 + noise.gauss(0, 0.1) for _ in range(40))]) == []
    (said,) = fed([*falling, *(2.6 + noise.gauss(0, 0.1) for _ in range(40))])
    assert "rose from 1." in said


def test_a_rise_within_chance_is_not_told():
    """Losses whose scatter makes a rise of less than CERTAIN standard errors possible, though it is more than half a nat."""
    noise = random.Random(1)
    scatter = 2.0
    rise = 0.8 * CERTAIN * scatter * math.sqrt(2 / WINDOW)
    assert rise > 0.5
    for _ in range(50):
        level = [0.0] * 50 + [rise / 8] * 50
        assert fed([one + noise.gauss(0, scatter) for one in level]) == []


def test_short_trials_are_not_told_that_nothing_moved():
    assert fed([3.0] * (FEWEST_STEPS - 2), rate=1e-6) == []
    assert len(fed([3.0] * FEWEST_STEPS, rate=1e-6)) == 1


def test_a_loss_that_falls_at_a_small_rate_is_not_told():
    assert fed([3.0 - step / 100 for step in range(60)], rate=1e-6) == []


def test_a_gradient_that_is_not_finite_shows_where_the_trainer_hides_the_loss(caplog):
    caplog.set_level(logging.WARNING, "roadie")
    arguments = TrainingArguments("unused", learning_rate=1e-2)
    state = type("State", (), {"max_steps": 9, "log_history": [], "global_step": 1, "is_world_process_zero": True})()
    watch = RateWatch()
    watch.on_train_begin(arguments, state, None)
    watch.on_log(arguments, state, None, {"loss": 0.0, "grad_norm": math.nan, "learning_rate": 1e-2})
    assert "is nan at step 1" in warned(caplog)[0]


def test_a_record_keeps_the_losses_as_they_were(kinds, tmp_path):
    train(kinds / "topics.txt", tmp_path / "adapter", recipe=recipe(0.9, steps=3))
    history = json.loads((tmp_path / "adapter" / "training.json").read_text())["history"]
    assert len([entry for entry in history if "loss" in entry]) == 3


def test_the_command_shows_the_rate_and_the_warning(texts, tiny_path, tmp_path):
    command = [sys.executable, "-m", "roadie.cli", "train", str(texts), "--model", str(tiny_path), "--group-size", "16"]
    options = ["--max-steps", "30", "--batch-size", "4", "--output", str(tmp_path / "adapter"), "--lr", "1e-7"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert done.stderr.count("got a learning rate of 1e-07, with which the loss has not moved in 15 of 30 steps") == 1
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("learning rate")]
    assert row[-1] == "1e-07"
