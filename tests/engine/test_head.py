"""Logits of chosen tokens: of models whose logits are their output embeddings' alone, and of others."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.engine.tenants import engine, filled, row
from torch import nn

import roadie
from roadie.engine.head import Head
from roadie.errors import ConfigError
from roadie.testing import tiny_llama


def gemma():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "final_logit_softcapping": 0.5}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, **more, pad_token_id=0)).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(("make", "is_all"), [(tiny_llama, True), (gpt2, True), (gemma, False)])
def test_logits_are_those_of_the_model(make, is_all):
    model = make().eval()
    head, ids = Head(model), torch.tensor([[3, 4, 5], [7, 8, 0]])
    with torch.no_grad():
        hidden, expected = head.hidden(ids), model(input_ids=ids).logits
        assert head.is_all is is_all
        assert torch.allclose(head.logits(hidden.flatten(0, 1)), expected.flatten(0, 1), atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_with_a_cap_trains_as_a_peft_model_does():
    made = engine(gemma(), logits_bytes=4 * 128 * 2)
    config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], group_size=8)
    made.create("a", config)
    result = made.forward_backward("a", [row(1, 5), row(2, 7)], "cross_entropy")
    made.run()
    model = roadie.get_peft_model(gemma().double(), config).eval()
    total = 0.0
    for one in (row(1, 5), row(2, 7)):
        logits = model(input_ids=one.tokens[None]).logits[0].log_softmax(-1)
        total = total - (logits.gather(1, one.targets[:, None])[:, 0] * one.weights).sum()
    total.backward()
    assert result.result().loss == pytest.approx(total.item(), rel=1e-5)
    family, own = made.bank.family_of("a"), dict(model.named_parameters())
    for stack in family.stacks:
        for index, path in enumerate(stack.paths):
            for place, part in enumerate(("theta", "alpha")):
                expected = own[f"base_model.model.{path}.road_{part}.default"].grad
                found = stack.gradients[index, place, 0].double()
                assert float((found - expected).norm()) <= 1e-4 * float(expected.norm()), path
    with pytest.raises(ConfigError, match="got 'lm_head', after which this model changes its logits"):
        made.create("b", {"target_modules": ["lm_head"], "group_size": 8})


def test_adapted_output_embeddings_are_rotated_token_by_token():
    made = engine(logits_bytes=4 * 128 * 3)
    for name in "ab":
        made.create(name, {"target_modules": ["lm_head", "q_proj"], "group_size": 8, "input_stages": [4]})
    made.create("plain", {"target_modules": ["q_proj"], "group_size": 8})
    filled(made, "a", "b", "plain")
    names = ("b", "plain", "a")
    together = [made.forward(name, [row(number, 4 + number)], "cross_entropy") for number, name in enumerate(names)]
    made.run()
    for number, (name, future) in enumerate(zip(names, together, strict=True)):
        alone = made.forward(name, [row(number, 4 + number)], "cross_entropy")
        made.run()
        assert torch.allclose(future.result().logprobs[0], alone.result().logprobs[0], atol=1e-5)
        made.forward_backward(name, [row(number, 4 + number)], "cross_entropy")
    made.run()
    stack = next(stack for stack in made.bank.family_of("a").stacks if "lm_head" in stack.paths)
    assert stack.gradients.any()


def test_a_model_without_output_embeddings_is_refused():
    with pytest.raises(ConfigError, match="got a Sequential without output embeddings"):
        Head(nn.Sequential(nn.Linear(2, 2)))
