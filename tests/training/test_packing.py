"""Examples in one row: as many tokens and the same losses as in rows of their own, and models that mix them are refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import roadie
from roadie.errors import ConfigError
from roadie.training.encoding import IGNORED, Example, collate
from roadie.training.packing import check_packable, pack
from roadie.training.recipe import Recipe
from roadie.training.run import train
from roadie.training.trainer import GlobalBatchTrainer

QUICK = Recipe(
    packing=True, epochs=2, batch_size=2, learning_rate=3e-2, group_size=16, checkpoint_steps=1, max_length=64
)


def example(number, size):
    ids = tuple(3 + (number * 7 + place) % 200 for place in range(size))
    return Example(ids, (IGNORED, IGNORED, *ids[2:]) if size > 3 else ids)


EXAMPLES = [example(number, size) for number, size in enumerate((30, 5, 2, 64, 17, 40, 9, 24, 3, 12))]


def test_every_example_is_in_one_row_and_rows_are_full():
    rows = pack(EXAMPLES, 64)
    assert sum(len(row.input_ids) for row in rows) == 206
    assert len(rows) == 4  # 206 tokens do not go into three rows of 64
    parts = [
        row.input_ids[start:end]
        for row in rows
        for start, end in zip(row.starts, (*row.starts[1:], len(row.input_ids)), strict=True)
    ]
    assert sorted(parts) == sorted(one.input_ids for one in EXAMPLES)


def test_rows_are_never_longer_and_nothing_is_lost():
    generator = random.Random(0)
    examples = [example(number, generator.randint(2, 50)) for number in range(200)]
    rows = pack(examples, 50)
    assert max(len(row.input_ids) for row in rows) <= 50
    assert sum(len(row.starts) for row in rows) == 200
    # any two rows of best-fit decreasing together hold more than one has room for
    sizes = sorted(len(row.input_ids) for row in rows)
    assert sizes[0] + sizes[1] > 50


def test_a_row_starts_each_example_anew():
    (row,) = pack([Example((5, 6, 7), (5, 6, 7)), Example((8, 9), (8, 9))], 8)
    assert row == Example((5, 6, 7, 8, 9), (IGNORED, 6, 7, IGNORED, 9), (0, 3))
    batch = collate([row, Example((4, 5), (4, 5))], pad_token_id=2)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


# Five norms, and angles that rotate queries and keys, in float32, each off by one rounding in each of up to 64 terms of the
# inner products that they go into.
ROUNDING = 6 * 64 * 2.0**-24


def losses(model, batch):
    """The losses of learnt tokens, by the token."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
    )
    return loss[labels != IGNORED]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mistral"])
def test_losses_and_gradients_are_those_of_rows_of_their_own(kind):
    """In float64, but for norms and angles of positions, which the models compute in float32: see `ROUNDING`."""
    torch.manual_seed(0)
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "o_proj"]
    model = roadie.get_peft_model(small(kind).double(), roadie.RoadConfig(target_modules=targets, group_size=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "road_theta" in name:
                parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype))
    check_packable(model)
    found = {}
    for way, rows in (("packed", pack(EXAMPLES, 64)), ("alone", EXAMPLES), ("mixed", pack(EXAMPLES, 64))):
        batch = collate(rows)
        if way == "packed":
            batch.pop("attention_mask")
        if way == "mixed":  # with its mask transformers takes a row for one example
            batch.pop("position_ids")
        own = losses(model, batch)
        model.zero_grad()
        own.sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        found[way] = own.detach().sort().values, gradients
    (packed, of_packed), (alone, of_alone) = found["packed"], found["alone"]
    assert packed.shape == alone.shape
    assert torch.allclose(packed, alone, rtol=ROUNDING, atol=0)
    assert not torch.allclose(found["mixed"][0], alone, rtol=ROUNDING, atol=0)
    size = max(float(gradient.abs().max()) for gradient in of_alone)
    assert len(of_alone) > 0
    for one, other in zip(of_packed, of_alone, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=ROUNDING * size)


def small(kind):
    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    more = {
        "gpt2": {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "attn_pdrop": 0,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
        },
        "mamba": {"state_size": 4, "time_step_rank": 4},
        "bloom": {"n_layer": 2, "n_head": 4},
    }
    config = AutoConfig.for_model(
        kind, **{**({} if kind == "gpt2" else settings), "vocab_size": 259, **more.get(kind, {})}
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("kind", "why"), [("mamba", "takes no positions"), ("bloom", "takes no positions")])
def test_a_model_that_cannot_keep_examples_apart_is_refused_by_name(kind, why):
    with pytest.raises(ConfigError, match=f"got packing for {kind}, which {why}"):
        check_packable(small(kind))


def test_a_leak_is_seen():
    """A layer that adds to each token what came before it, as a recurrent one does; nothing is left on the model."""
    model = small("llama")
    layer = model.model.layers[0].mlp
    hook = layer.register_forward_hook(lambda module, inputs, output: output + output.cumsum(1))
    with pytest.raises(ConfigError, match="got packing for llama, in which an example sees the one before it"):
        check_packable(model)
    hook.remove()
    check_packable(model)
    assert not model.get_input_embeddings()._forward_hooks


def test_training_with_packing_takes_fewer_rows_and_learns(texts, tiny_path, tmp_path):
    result = train(texts, tmp_path / "out", model=str(tiny_path), recipe=replace(QUICK, eval_share=0.25))
    assert result.train_examples == 18
    assert result.steps == 2 * -(-9 // 2)  # rows of 64 tokens hold two examples of 27
    assert result.tokens == 2 * 18 * 27
    assert result.loss_after < result.loss_before
    assert json.loads((tmp_path / "out" / "training.json").read_text())["settings"]["packing"] is True


def test_the_model_is_given_positions_and_no_mask(texts, tiny_path, tmp_path, monkeypatch):
    seen = []

    def compute_loss(self, model, inputs, *rest, **more):
        seen.append(set(inputs))
        return super(GlobalBatchTrainer, self).compute_loss(model, inputs, *rest, **more)

    monkeypatch.setattr(GlobalBatchTrainer, "compute_loss", compute_loss, raising=False)
    train(texts, tmp_path / "out", model=str(tiny_path), recipe=replace(QUICK, max_steps=1))
    assert seen == [{"input_ids", "labels", "position_ids", "use_cache"}]


def test_a_packed_training_resumes(texts, tiny_path, tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise KeyboardInterrupt

    train(texts, tmp_path / "whole", model=str(tiny_path), recipe=QUICK)
    with pytest.raises(KeyboardInterrupt):
        train(texts, tmp_path / "resumed", model=str(tiny_path), recipe=QUICK, callbacks=[Stop()])
    train(texts, tmp_path / "resumed", model=str(tiny_path), recipe=QUICK, resume=True)
    whole, resumed = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
