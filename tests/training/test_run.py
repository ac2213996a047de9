"""Training from texts to a folder: it learns, it keeps the best, and an interruption changes nothing."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.versions import EVALUATES_AFTER_THE_LAST_STEP
from transformers import AutoModelForCausalLM, TrainerCallback

import roadie
from roadie import checkpoint
from roadie.errors import ConfigError
from roadie.share import Share
from roadie.subspaces import places_of_share
from roadie.training.checkpoints import last_complete, work_path
from roadie.training.folders import OutputExists
from roadie.training.recipe import Recipe
from roadie.training.rows import DataError
from roadie.training.run import train

QUICK = Recipe(epochs=3, batch_size=8, learning_rate=3e-2, group_size=16, checkpoint_steps=2, eval_share=0.25)
OF_LOSSES = runpy.run_path(str(Path(__file__).parent / "tiny.py"))["of_losses"](8 * 32)
"""How far apart losses of a batch of 8 may be, relative to their size; its examples have fewer than 32 tokens."""
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"}


class Stop(TrainerCallback):
    """Raises after some steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def record(output):
    return json.loads((output / "training.json").read_text())


def weights(output):
    return (output / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, texts, tiny_path):
    """An uninterrupted run: its result."""
    return train(texts, tmp_path_factory.mktemp("run") / "adapter", model=str(tiny_path), recipe=QUICK)


def test_the_loss_falls_and_the_adapter_gives_it(trained, texts, tiny, tiny_path):
    assert trained.loss_after < trained.loss_before - 0.05
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    adapted = roadie.PeftModel.from_pretrained(base, trained.output).eval()
    held_out = _held_out(texts, tiny)
    with torch.no_grad():
        assert adapted(**held_out).loss.item() == pytest.approx(trained.loss_after, rel=OF_LOSSES)
        with adapted.disable_adapter():
            assert adapted(**held_out).loss.item() == pytest.approx(trained.loss_before, rel=OF_LOSSES)


def _held_out(texts, tiny):
    from roadie.training.encoding import collate, encode, split
    from roadie.training.text import read

    return collate(split(encode(read(texts), tiny.tokenizer(), 128), 0.25, 0)[1])


def test_the_output_is_an_adapter_in_peft_format_and_a_record(trained):
    assert {path.name for path in trained.output.iterdir()} == FILES
    assert not work_path(trained.output).exists()
    adapter = checkpoint.load(trained.output)
    assert adapter.num_parameters == trained.trainable_parameters
    assert trained.adapter_bytes == len(weights(trained.output))
    assert (adapter.variants, adapter.group_sizes) == ((roadie.Variant.ROAD_1,), (16,))
    assert {path.rpartition(".")[2] for path in adapter.layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_the_record_says_what_was_done(trained, texts, tiny_path):
    written = record(trained.output)
    assert written["data"] == [str(texts)]
    assert written["settings"]["model"] == written["result"]["model"] == str(tiny_path)
    assert written["result"]["loss_after"] == trained.loss_after
    assert {"roadie", "torch", "transformers", "peft"} == set(written["versions"])
    assert [entry["step"] for entry in written["history"] if "loss" in entry] == list(range(1, 10))
    evaluated = [2, 4, 6, 8, 9] if EVALUATES_AFTER_THE_LAST_STEP else [2, 4, 6, 8]
    assert [entry["step"] for entry in written["history"] if "eval_loss" in entry] == evaluated


def test_the_numbers_of_the_result(trained):
    assert (trained.steps, trained.resumed_from_step) == (9, 0)
    assert (trained.train_examples, trained.evaluation_examples) == (18, 6)
    assert trained.loss_on == "held-out data"
    assert trained.tokens == 3 * 18 * 27  # <s>, 6 of the prompt, 19 of the completion, </s>
    assert trained.share == trained.trainable_parameters / trained.total_parameters
    assert trained.tokens_per_second == trained.tokens / trained.seconds


def test_the_rate_rises_for_a_tenth_and_falls_to_nothing(trained):
    rates = [entry["learning_rate"] for entry in record(trained.output)["history"] if "loss" in entry]
    assert rates[0] == 0
    assert max(rates) == rates[1] == QUICK.learning_rate
    assert rates[1:] == pytest.approx([QUICK.learning_rate * (8 - n) / 8 for n in range(8)])


def test_the_best_checkpoint_is_kept(texts, tiny_path, tmp_path):
    # Held-out text that shares some letters with the training text: its loss falls at first, then it rises.
    other = tmp_path / "other.txt"
    other.write_text("the lazy fox" * 20)
    recipe = Recipe(
        max_steps=12, batch_size=8, learning_rate=0.3, schedule="constant", group_size=16, checkpoint_steps=2
    )
    result = train(texts, tmp_path / "adapter", model=str(tiny_path), recipe=recipe, eval_data=other)
    losses = {entry["step"]: entry["eval_loss"] for entry in record(result.output)["history"] if "eval_loss" in entry}
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    assert losses[result.best_step] == min(losses.values()) < losses[12] - 0.01
    assert result.loss_after == pytest.approx(min(losses.values()), rel=1e-6)


def test_a_killed_training_goes_on_to_the_same_result(trained, texts, tiny_path, tmp_path):
    output = tmp_path / "adapter"
    script = f"""
        import os, signal
        from transformers import TrainerCallback
        from roadie.training.recipe import Recipe
        from roadie.training.run import train

        class Kill(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == 5:
                    os.kill(os.getpid(), signal.SIGKILL)

        recipe = Recipe.from_mapping({QUICK.to_mapping()!r})
        train({str(texts)!r}, {str(output)!r}, model={str(tiny_path)!r}, recipe=recipe, callbacks=[Kill()])
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=False, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    assert last_complete(work_path(output)).name == "checkpoint-4"

    resumed = train(texts, output, model=str(tiny_path), recipe=QUICK, resume=True)
    assert resumed.resumed_from_step == 4
    assert record(output)["history"] == record(trained.output)["history"]
    assert (resumed.loss_before, resumed.loss_after) == (trained.loss_before, trained.loss_after)
    assert weights(output) == weights(trained.output)
    assert resumed.tokens < trained.tokens
    assert not work_path(output).exists()


def interrupted(output, texts, tiny_path, step=5, recipe=QUICK):
    with pytest.raises(KeyboardInterrupt):
        train(texts, output, model=str(tiny_path), recipe=recipe, callbacks=[Stop(step)])
    return work_path(output)


def test_checkpoints_hold_the_adapter_and_the_optimizer_only(texts, tiny_path, tmp_path):
    work = interrupted(tmp_path / "adapter", texts, tiny_path)
    held = last_complete(work)
    names = {path.name for path in held.iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert not {name for name in names if name.startswith(("model", "pytorch_model", "tokenizer"))}
    adapter = (held / "adapter_model.safetensors").stat().st_size
    assert (held / "optimizer.pt").stat().st_size < 6 * adapter
    base = (tiny_path / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in held.iterdir()) < base


def test_a_torn_checkpoint_is_passed_over(trained, texts, tiny_path, tmp_path):
    output = tmp_path / "adapter"
    work = interrupted(output, texts, tiny_path)
    (work / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "log_hi')
    resumed = train(texts, output, model=str(tiny_path), recipe=QUICK, resume=True)
    assert resumed.resumed_from_step == 2
    assert weights(output) == weights(trained.output)


def test_an_interruption_after_the_last_step_loses_nothing(trained, texts, tiny_path, tmp_path, monkeypatch):
    output = tmp_path / "adapter"

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("roadie.training.run.write_record", full_disk)
        with pytest.raises(OSError, match="no space"):
            train(texts, output, model=str(tiny_path), recipe=QUICK)
    assert not output.exists()
    resumed = train(texts, output, model=str(tiny_path), recipe=QUICK, resume=True)
    assert resumed.resumed_from_step == 9
    assert weights(output) == weights(trained.output)
    assert resumed.loss_after == trained.loss_after


def test_few_rows_that_are_seen_often_are_trained_at_a_lower_rate(texts, tiny_path, tmp_path):
    recipe = Recipe(max_steps=40, batch_size=2, group_size=16)
    result = train(texts, tmp_path / "adapter", model=str(tiny_path), recipe=recipe)
    assert result.train_examples < 80
    assert result.learning_rate == 8.5e-3  # sqrt(20 / 40) of what the width gives


def test_a_rate_by_the_models_width_is_recorded_and_kept_by_a_resumed_run(texts, tiny_path, tmp_path, monkeypatch):
    output, unsaid = tmp_path / "adapter", replace(QUICK, learning_rate=None)
    with pytest.raises(KeyboardInterrupt):
        train(texts, output, model=str(tiny_path), recipe=unsaid, callbacks=[Stop(5)])
    monkeypatch.setattr("roadie.training.recipe.default_learning_rate", lambda *of: 0.7)  # as another version may
    resumed = train(texts, output, model=str(tiny_path), recipe=unsaid, resume=True)
    assert resumed.resumed_from_step > 0
    assert resumed.learning_rate == 1.2e-2
    written = record(output)
    assert written["settings"]["learning_rate"] == written["result"]["learning_rate"] == 1.2e-2
    assert max(entry["learning_rate"] for entry in written["history"] if "loss" in entry) == 1.2e-2
    anew = train(texts, tmp_path / "new", model=str(tiny_path), recipe=replace(unsaid, max_steps=1))
    assert anew.learning_rate == 0.7


def test_resuming_with_other_settings_or_texts_is_refused(texts, tiny_path, tmp_path):
    output = tmp_path / "adapter"
    work = interrupted(output, texts, tiny_path, step=2)
    other = Recipe.from_mapping({**QUICK.to_mapping(), "learning_rate": 1e-3})
    with pytest.raises(ConfigError, match=r"learning_rate was 0.03 and is 0.001"):
        train(texts, output, model=str(tiny_path), recipe=other, resume=True)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(texts.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="data_sha256 was"):
        train(fewer, output, model=str(tiny_path), recipe=QUICK, resume=True)
    (work / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged record"):
        train(texts, output, model=str(tiny_path), recipe=QUICK, resume=True)


def test_what_is_there_is_not_overwritten(trained, texts, tiny_path, tmp_path):
    before = weights(trained.output)
    with pytest.raises(OutputExists, match="not empty"):
        train(texts, trained.output, model=str(tiny_path), recipe=QUICK)
    with pytest.raises(OutputExists, match="this training is finished"):
        train(texts, trained.output, model=str(tiny_path), recipe=QUICK, resume=True)
    with pytest.raises(ConfigError, match="overwrite and resume"):
        train(texts, trained.output, model=str(tiny_path), overwrite=True, resume=True)
    assert weights(trained.output) == before
    output = tmp_path / "adapter"
    interrupted(output, texts, tiny_path, step=2)
    with pytest.raises(OutputExists, match=r"did not finish.*--resume"):
        train(texts, output, model=str(tiny_path), recipe=QUICK)


def test_overwriting_starts_anew(texts, tiny_path, tmp_path):
    output = tmp_path / "adapter"
    output.mkdir()
    (output / "old").write_text("0")
    interrupted_work = work_path(output)
    interrupted_work.mkdir()
    (interrupted_work / "old").write_text("0")
    recipe = Recipe(max_steps=1, batch_size=8, group_size=16)
    result = train(texts, output, model=str(tiny_path), recipe=recipe, overwrite=True)
    assert (result.steps, result.resumed_from_step) == (1, 0)
    assert {path.name for path in output.iterdir()} == FILES
    assert not interrupted_work.exists()


def test_resuming_where_there_is_nothing_starts(texts, tiny_path, tmp_path):
    recipe = Recipe(max_steps=1, batch_size=8, group_size=16)
    result = train(texts, tmp_path / "adapter", model=str(tiny_path), recipe=recipe, resume=True)
    assert (result.steps, result.resumed_from_step, result.best_step) == (1, 0, None)
    assert result.loss_on == "training data"


def test_nothing_is_written_where_something_is_refused(texts, tiny_path, tmp_path):
    output, bad = tmp_path / "adapter", tmp_path / "bad.jsonl"
    bad.write_text("{")
    with pytest.raises(DataError, match="line 1"):
        train(bad, output, model=str(tiny_path))
    with pytest.raises(ConfigError, match="which does not exist; wanted a causal language model"):
        train(texts, output, model=str(tmp_path / "no-model"))
    with pytest.raises(ConfigError, match="evaluation data and eval_share"):
        train(texts, output, model=str(tiny_path), recipe=QUICK, eval_data=texts)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_group_size_adapts_only_where_asked(texts, tiny_path, tmp_path):
    wide = {"max_steps": 1, "batch_size": 8, "group_size": 48}
    with pytest.raises(ConfigError, match="group_size"):
        train(texts, tmp_path / "a", model=str(tiny_path), recipe=Recipe(**wide))
    result = train(texts, tmp_path / "b", model=str(tiny_path), recipe=Recipe(**wide, adapt_group_size=True))
    assert checkpoint.load(result.output).group_sizes == (16,)


def test_an_adapted_output_layer_is_not_saved_along(texts, tmp_path):
    recipe = Recipe(max_steps=1, batch_size=2, max_length=32, target_modules=("q_proj", "lm_head"))
    train(texts, tmp_path / "adapter", recipe=recipe)
    adapter = checkpoint.load(tmp_path / "adapter")
    assert "lm_head" in adapter.layers
    assert not adapter.other


def test_a_share_is_trained_and_the_rest_is_the_identity(texts, tiny_path, tmp_path):
    recipe = replace(QUICK, share="2/2", variant="road_2", weight_decay=0.3)
    result = train(texts, tmp_path / "a", model=str(tiny_path), recipe=recipe)
    assert result.loss_after < result.loss_before
    assert record(result.output)["settings"]["share"] == "2/2"
    whole = train(texts, tmp_path / "b", model=str(tiny_path), recipe=replace(recipe, share=None, max_steps=1))
    assert result.trainable_parameters * 2 == whole.trainable_parameters
    for layer in checkpoint.load(result.output).layers.values():
        inside = places_of_share(Share(2, 2), layer)
        assert torch.equal(layer.theta != 0, inside)
        assert torch.equal(layer.alpha != 1, inside)


def test_smaller_passes_and_recomputed_activations_change_nothing(texts, tiny_path, tmp_path):
    plain = {"max_steps": 3, "batch_size": 8, "group_size": 16, "learning_rate": 1e-2}
    thrifty = {**plain, "micro_batch_size": 2, "gradient_checkpointing": True}
    one = train(texts, tmp_path / "a", model=str(tiny_path), recipe=Recipe(**plain))
    two = train(texts, tmp_path / "b", model=str(tiny_path), recipe=Recipe(**thrifty))
    losses = [[e["loss"] for e in record(result.output)["history"]] for result in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=OF_LOSSES)
    assert one.loss_after == pytest.approx(two.loss_after, rel=OF_LOSSES)


def test_examples_are_no_longer_than_the_context_of_the_model(tiny, tmp_path, texts):
    short = tiny.build(tmp_path / "short", max_position_embeddings=16)
    result = train(
        texts, tmp_path / "adapter", model=str(short), recipe=Recipe(max_steps=1, batch_size=24, group_size=16)
    )
    assert record(result.output)["settings"]["max_length"] == 16
    assert result.tokens == 24 * 16


def test_evaluation_data_of_their_own(texts, tiny_path, tmp_path):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("turtles " * 20)
    recipe = Recipe(max_steps=2, batch_size=8, group_size=16)
    result = train(texts, tmp_path / "adapter", model=str(tiny_path), recipe=recipe, eval_data=[held_out])
    assert (result.train_examples, result.evaluation_examples) == (24, 2)
    assert record(result.output)["evaluation_data"] == [str(held_out)]


@pytest.mark.parametrize(
    ("changes", "schedule"),
    [
        ({"schedule": "cosine", "weight_decay": 0.02, "max_grad_norm": 0.5, "seed": 9}, "cosine"),
        ({"schedule": "constant"}, "constant_with_warmup"),
        ({}, "linear"),
    ],
)
def test_trainer_gets_what_the_recipe_says(texts, tiny_path, tmp_path, changes, schedule):
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            seen.append(args)

    recipe = Recipe(max_steps=1, batch_size=8, group_size=16, precision="float32", **changes)
    train(texts, tmp_path / "adapter", model=str(tiny_path), recipe=recipe, callbacks=[Look()])
    (args,) = seen
    assert (args.optim.value, args.learning_rate, args.weight_decay) == ("adamw_torch", 1.2e-2, recipe.weight_decay)
    assert (args.lr_scheduler_type.value, args.max_grad_norm) == (schedule, recipe.max_grad_norm)
    assert (args.seed, args.data_seed, args.bf16, args.fp16) == (recipe.seed, recipe.seed, False, False)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only a machine without an accelerator lacks bfloat16")
def test_bfloat16_is_refused_where_nothing_supports_it(texts, tiny_path, tmp_path):
    with pytest.raises(ConfigError, match="without an accelerator"):
        train(texts, tmp_path / "adapter", model=str(tiny_path), recipe=Recipe(precision="bfloat16"))


def test_the_embedded_model_is_the_default(texts, tmp_path):
    result = train(texts, tmp_path / "adapter", recipe=Recipe(max_steps=1, batch_size=4, max_length=32))
    assert result.model == str(roadie.embedded.model_path())
    assert os.fspath(result.output) == os.fspath(tmp_path / "adapter")


def test_a_single_step_learns(texts, tiny_path, tmp_path):
    """A warm-up begins with a rate of 0: in a run of one step nothing would be learnt."""
    result = train(texts, tmp_path / "adapter", model=str(tiny_path), recipe=replace(QUICK, max_steps=1))
    assert result.loss_after != result.loss_before
