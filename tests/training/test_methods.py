"""Ways to train beside the plain one: on a base model in 4 bits, with an early end, and on preferences."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

import roadie
from roadie.errors import ConfigError, MissingExtra
from roadie.training.checkpoints import work_path
from roadie.training.encoding import IGNORED
from roadie.training.many.job import Job
from roadie.training.models import as_source
from roadie.training.preferences import Pair, encode_pairs
from roadie.training.rates import find_learning_rate
from roadie.training.recipe import Recipe
from roadie.training.rows import DataError, Preference, Text
from roadie.training.run import adapted_model, train
from roadie.training.stopping import step_of_end

QUICK = Recipe(epochs=3, batch_size=8, learning_rate=3e-2, group_size=16, checkpoint_steps=2, eval_share=0.25)


class Stop(TrainerCallback):
    """Interrupts after some steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def record(folder):
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


# 4 bits


def test_a_base_in_4_bits_is_trained_on(texts, tiny_path, tmp_path):
    pytest.importorskip("bitsandbytes")
    result = train(texts, tmp_path / "out", model=str(tiny_path), recipe=replace(QUICK, load_in_4bit=True))
    assert result.loss_after < result.loss_before - 0.05
    said = record(tmp_path / "out")
    assert said["settings"]["load_in_4bit"] is True
    assert "bitsandbytes" in said["versions"]
    quantised = AutoModelForCausalLM.from_pretrained(
        tiny_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    adapted = roadie.PeftModel.from_pretrained(quantised, tmp_path / "out")
    assert adapted.peft_config["default"].group_size == 16


def test_gradients_of_a_base_in_4_bits_are_right_after_a_loss_was_measured(tiny_path):
    """Measuring lays weights out anew on some processors, with which nothing below an adapted layer had a gradient."""
    pytest.importorskip("bitsandbytes")
    model = adapted_model(as_source(str(tiny_path)), replace(QUICK, load_in_4bit=True))
    assert {type(module.base_layer).__name__ for module in model.modules() if hasattr(module, "road_theta")} == {
        "Linear4bit"
    }
    batch = torch.arange(3, 35)[None]

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    before = gradients()
    with torch.no_grad():
        model.eval()
        model(input_ids=batch)
    after = gradients()
    assert len(before) == 28
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    assert all(gradient.any() for gradient in before.values())


def test_4_bits_without_bitsandbytes_say_what_to_install(texts, tiny_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r'got no bitsandbytes; wanted .*; run: pip install "roadie\[quant\]"'):
        train(texts, tmp_path / "out", model=str(tiny_path), recipe=replace(QUICK, load_in_4bit=True))
    assert not list(tmp_path.iterdir())


# an early end


@pytest.mark.parametrize(
    ("losses", "patience", "step"),
    [
        ([3, 2, 1], 1, None),
        ([3, 2, 2], 1, 3),
        ([3, 4, 5, 2], 2, 3),
        ([3, 4, 2, 4, 5], 2, 5),
        ([3, float("nan"), float("nan")], 2, 3),
    ],
)
def test_the_end_is_where_patience_is_over(losses, patience, step):
    history = [{"step": number, "eval_loss": loss} for number, loss in enumerate(losses, start=1)]
    assert step_of_end([{"step": 1, "loss": 9.0}, *history], patience) == step


@pytest.fixture(scope="module")
def worse(tmp_path_factory):
    """Texts, and held-out texts of which the loss soon rises."""
    folder = tmp_path_factory.mktemp("worse")
    for name, text in (("texts", "aaaa"), ("held", "zzzz")):
        (folder / name).with_suffix(".jsonl").write_text(f"{json.dumps({'text': text * 6})}\n" * 8, encoding="utf-8")
    return SimpleNamespace(texts=folder / "texts.jsonl", held=folder / "held.jsonl")


ENDS = replace(QUICK, eval_share=0.0, patience=2, epochs=40, learning_rate=0.2, checkpoint_steps=1)


def test_a_training_ends_early_and_keeps_the_best(worse, tiny_path, tmp_path):
    result = train(worse.texts, tmp_path / "out", model=str(tiny_path), recipe=ENDS, eval_data=worse.held)
    said = record(tmp_path / "out")["history"]
    seen = {entry["step"]: entry["eval_loss"] for entry in said if "eval_loss" in entry}
    assert result.steps == max(seen) < 40
    assert result.best_step == min(seen, key=seen.get) == result.steps - 2
    assert result.loss_after == pytest.approx(min(seen.values()), rel=1e-6)


@pytest.mark.parametrize("step", ["before", "at"])
def test_an_interrupted_training_ends_where_it_would_have_ended(worse, tiny_path, tmp_path, monkeypatch, step):
    run = {"model": str(tiny_path), "recipe": ENDS, "eval_data": worse.held}
    whole = train(worse.texts, tmp_path / "whole", **run)
    stop = Stop(whole.steps - 1 if step == "before" else None)
    if step == "at":
        monkeypatch.setattr("roadie.training.run.write_record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(worse.texts, tmp_path / "out", **run, callbacks=[stop])
    monkeypatch.undo()
    assert work_path(tmp_path / "out").exists()
    resumed = train(worse.texts, tmp_path / "out", **run, resume=True)
    assert (resumed.steps, resumed.best_step) == (whole.steps, whole.best_step)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def interrupt(*_, **__):
    raise KeyboardInterrupt


# preferences

PAIR = Preference("ask: ", "yes", "no no", "line 1")


@pytest.fixture
def tokenizer(tiny):
    return tiny.tokenizer()


def test_a_pair_is_a_prompt_and_two_ended_answers(tokenizer):
    (pair,) = encode_pairs([PAIR], tokenizer, 64)
    assert [tokenizer.decode(part) for part in (pair.prompt, pair.chosen, pair.rejected)] == [
        "<s>ask: ",
        "yes</s>",
        "no no</s>",
    ]
    chosen, rejected = pair.examples
    assert chosen.labels == (IGNORED,) * 6 + pair.chosen
    assert rejected.input_ids == pair.prompt + pair.rejected


def test_a_pair_of_turns_is_written_with_the_template(tokenizer, tiny):
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    turns = (("user", "U"), ("assistant", "A"), ("user", "V")), (("assistant", "B"),), (("assistant", "C"),)
    (pair,) = encode_pairs([Preference(*turns, "here")], tokenizer, 64)
    assert tokenizer.decode(pair.prompt) == "[user]U</s>[assistant]A</s>[user]V</s>[assistant]"
    assert [tokenizer.decode(part) for part in (pair.chosen, pair.rejected)] == ["B</s>", "C</s>"]


@pytest.mark.parametrize(("length", "sizes"), [(20, (6, 4, 6)), (10, (5, 4, 5)), (8, (4, 4, 4)), (4, (2, 2, 2))])
def test_an_overlong_pair_loses_the_beginning_of_its_prompt_first(tokenizer, length, sizes, caplog):
    (whole,), (pair,) = (encode_pairs([PAIR], tokenizer, n) for n in (64, length))
    assert tuple(len(part) for part in (pair.prompt, pair.chosen, pair.rejected)) == sizes
    assert pair == Pair(whole.prompt[-sizes[0] :], whole.chosen[: sizes[1]], whole.rejected[: sizes[2]])
    assert ("cut 1 of 1 pairs" in caplog.text) == (length < 12)


def test_what_is_no_preference_is_named(tokenizer):
    with pytest.raises(DataError, match="line 7: got a row to learn as it is; wanted a preference"):
        encode_pairs([PAIR, Text("a", "line 7")], tokenizer, 64)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"{n:02d} is", "chosen": " a number", "rejected": " no" * (1 + n % 3)} for n in range(24)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


DPO = replace(QUICK, method="dpo", beta=None)


def test_the_loss_of_dpo_is_that_of_its_definition(pairs, tiny, tiny_path, tmp_path):
    """-log sigmoid(beta * (how much likelier the chosen became - how much likelier the rejected)), by hand, of the result."""
    pytest.importorskip("trl")
    result = train(pairs, tmp_path / "out", model=str(tiny_path), recipe=replace(DPO, beta=0.3))
    from roadie.training.encoding import split
    from roadie.training.text import read

    held_out = split(encode_pairs(read(pairs), tiny.tokenizer(), 128), 0.25, 0)[1]
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    adapted = roadie.PeftModel.from_pretrained(base, tmp_path / "out").eval()

    def gain(example):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])

        def likelihood():
            likelihoods = adapted(ids).logits[0, :-1].log_softmax(-1)
            return sum(float(likelihoods[place, label]) for place, label in enumerate(labels) if label != IGNORED)

        with adapted.disable_adapter():
            before = likelihood()
        return likelihood() - before

    with torch.no_grad():
        margins = [0.3 * (gain(chosen) - gain(rejected)) for chosen, rejected in (pair.examples for pair in held_out)]
    wanted = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    # sums of up to 12 likelihoods of about 6 in float32, each the end of inner products of up to 128 terms
    assert result.loss_after == pytest.approx(wanted, abs=4 * 12 * 6 * 128**0.5 * 2**-24)
    assert result.loss_after < math.log(2) - 0.05


def test_an_interrupted_dpo_goes_on_to_the_same_result(pairs, tiny_path, tmp_path):
    pytest.importorskip("trl")
    whole = train(pairs, tmp_path / "whole", model=str(tiny_path), recipe=DPO)
    with pytest.raises(KeyboardInterrupt):
        train(pairs, tmp_path / "out", model=str(tiny_path), recipe=DPO, callbacks=[Stop(5)])
    resumed = train(pairs, tmp_path / "out", model=str(tiny_path), recipe=DPO, resume=True)
    assert resumed.resumed_from_step == 4
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)
    assert record(tmp_path / "out")["history"] == record(tmp_path / "whole")["history"]


def test_dpo_on_a_base_in_4_bits_keeps_its_adapter_in_float32(pairs, tiny_path, tmp_path):
    """TRL would have it in bfloat16, where a rotation near 1 does not move."""
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    seen = set()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            seen.update(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)

    recipe = replace(DPO, load_in_4bit=True, max_steps=2, eval_share=0.0)
    train(pairs, tmp_path / "out", model=str(tiny_path), recipe=recipe, callbacks=[Look()])
    assert seen == {torch.float32}


def test_dpo_of_a_share_and_of_rotations_in_a_row_starts_at_ln_2(pairs, tiny_path, tmp_path):
    pytest.importorskip("trl")
    for name, changes in (("share", {"share": "1/2"}), ("stages", {"stages": (2, 16), "group_size": 64})):
        recipe = replace(DPO, max_steps=2, **changes)
        result = train(pairs, tmp_path / name, model=str(tiny_path), recipe=recipe)
        assert result.loss_before == pytest.approx(math.log(2), abs=8 * 2**-24)


def test_dpo_without_trl_says_what_to_install(pairs, tiny_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtra, match=r'got no trl; wanted .*; run: pip install "roadie\[trl\]"'):
        train(pairs, tmp_path / "out", model=str(tiny_path), recipe=DPO)
    assert not list(tmp_path.iterdir())


def test_dpo_on_several_devices_is_refused(pairs, tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ConfigError, match="got 2 processes or GPUs for method='dpo'; wanted one"):
        train(pairs, tmp_path / "out", model=str(tiny_path), recipe=DPO)


# who cannot have them


@pytest.mark.parametrize(
    "changes", [{"method": "dpo"}, {"packing": True}, {"patience": 2}], ids=lambda c: next(iter(c))
)
def test_a_search_and_jobs_refuse_what_they_would_pass_over(changes, texts, tiny_path):
    (name,) = changes
    with pytest.raises(ConfigError, match=f"got {name}=.*in a search of a rate"):
        find_learning_rate(texts, model=str(tiny_path), recipe=Recipe(**changes))
    with pytest.raises(ConfigError, match=f"got {name}=.*train this one with roadie train"):
        Job("one", texts, "out", Recipe(**changes))
