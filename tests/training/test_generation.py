"""Continuations: a mixed batch writes what each row would write alone."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers.processors import ByteLevel
from transformers import AutoModelForCausalLM

import roadie
from roadie.errors import ConfigError, RoutingError
from roadie.training.adapters import load_adapted
from roadie.training.generation import Decoding, continue_prompts, generate
from roadie.training.prompts import Prompt, assign, read_prompts
from roadie.training.rows import DataError

MIXED = [
    Prompt("the turtle", "one"),
    Prompt("a", "two"),
    Prompt("the turtle", None),
    Prompt("something much longer than the others", "one"),
    Prompt("the turtle", "two"),
]


@pytest.fixture(scope="module")
def loaded(adapters):
    return load_adapted([f"{name}={path}" for name, path in adapters.items()])


@pytest.mark.parametrize("decoding", [Decoding(16), Decoding(12, beams=3)], ids=["greedy", "beams"])
def test_a_mixed_batch_writes_what_its_rows_write_alone(loaded, decoding):
    together = generate(loaded.model, loaded.tokenizer, MIXED, decoding)
    alone = [generate(loaded.model, loaded.tokenizer, [prompt], decoding)[0] for prompt in MIXED]
    assert together == alone
    assert len({together[0], together[2], together[4]}) == 3


def test_a_row_writes_what_a_model_with_only_its_adapter_writes(loaded, adapters, tiny_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    plain = generate(base, loaded.tokenizer, [Prompt("the turtle")], Decoding(16))
    single = roadie.PeftModel.from_pretrained(base, adapters["two"]).eval()
    tokens = loaded.tokenizer("the turtle", return_tensors="pt")
    output = single.generate(**tokens, max_new_tokens=16, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    two = loaded.tokenizer.decode(output, skip_special_tokens=True)
    mixed = generate(loaded.model, loaded.tokenizer, MIXED, Decoding(16))
    assert (mixed[2], mixed[4]) == (plain[0], two)


def test_sampling_follows_its_seed_and_leaves_the_random_state(loaded):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    texts = [
        generate(loaded.model, loaded.tokenizer, MIXED, Decoding(16, temperature=1.0, seed=seed)) for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] != generate(loaded.model, loaded.tokenizer, MIXED, Decoding(16))


def test_a_small_top_p_takes_the_likeliest(loaded):
    nearly_greedy = Decoding(16, temperature=1.0, top_p=1e-6)
    assert generate(loaded.model, loaded.tokenizer, MIXED, nearly_greedy) == generate(
        loaded.model, loaded.tokenizer, MIXED, Decoding(16)
    )


def test_settings_of_the_model_do_not_count(loaded):
    greedy = generate(loaded.model, loaded.tokenizer, MIXED, Decoding(16))
    config = loaded.model.generation_config
    before = (config.do_sample, config.temperature, config.num_beams)
    config.do_sample, config.temperature, config.num_beams = True, 5.0, 2
    try:
        assert generate(loaded.model, loaded.tokenizer, MIXED, Decoding(16)) == greedy
    finally:
        config.do_sample, config.temperature, config.num_beams = before


def test_an_adapter_that_is_not_loaded_is_refused(loaded, tiny_path):
    with pytest.raises(RoutingError, match="got adapter 'three'; wanted one of one, two, __base__"):
        generate(loaded.model, loaded.tokenizer, [Prompt("a", "three")])
    with pytest.raises(RoutingError, match="got adapter 'one'"):
        continue_prompts([Prompt("a", "one")], model=str(tiny_path))


def test_prompts_must_be_something(loaded, tiny):
    assert generate(loaded.model, loaded.tokenizer, []) == []
    bare = tiny.tokenizer()
    bare.backend_tokenizer.post_processor = ByteLevel()
    with pytest.raises(ConfigError, match="got an empty prompt"):
        generate(loaded.model, bare, [Prompt("")])


def test_chat_goes_through_the_template(loaded, tiny):
    with pytest.raises(ConfigError, match="without a chat template"):
        generate(loaded.model, loaded.tokenizer, [Prompt("hi", "one")], chat=True)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "<s>" + tiny.CHAT_TEMPLATE
    by_hand = generate(loaded.model, tokenizer, [Prompt("[user]hi</s>[assistant]", "one")], Decoding(12))
    assert generate(loaded.model, tokenizer, [Prompt("hi", "one")], Decoding(12), chat=True) == by_hand


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"beams": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}]
)
def test_decoding_is_checked(settings):
    with pytest.raises(ConfigError, match=f"got {next(iter(settings))}="):
        Decoding(**settings)


@pytest.mark.parametrize(
    ("names", "use", "chosen"),
    [
        ([], [], [None, None]),
        (["a"], [], ["a", "a"]),
        (["a", "b"], [], ["a", "b"]),
        (["a", "b"], ["b"], ["b", "b"]),
        (["a", "b"], ["b", "__base__"], ["b", None]),
    ],
)
def test_prompts_get_their_adapters(names, use, chosen):
    assert assign(["x", "y"], names, use) == [Prompt("x", chosen[0]), Prompt("y", chosen[1])]


def test_adapters_and_prompts_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="got 2 prompts and 3 adapters"):
        assign(["x", "y"], ["a", "b", "c"])


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "x"}, {"prompt": "y", "adapter": "b"}, {"prompt": "z", "adapter": None}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_prompts(path, ["a"]) == [Prompt("x", "a"), Prompt("y", "b"), Prompt("z")]
    with pytest.raises(DataError, match='line 1: got no "adapter" with 2 adapters'):
        read_prompts(path, ["a", "b"])
    path.write_text('{"prompt": "x"}\n{"text": "y"}')
    with pytest.raises(DataError, match='line 2: got no "prompt"'):
        read_prompts(path, [])
    path.write_text('{"prompt": "x", "adapter": 3}')
    with pytest.raises(DataError, match="line 1: got adapter=3"):
        read_prompts(path, [])
