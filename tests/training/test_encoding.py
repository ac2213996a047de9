"""Tokens and labels: the loss is taken where it should be, nothing is lost in silence, blocks are full."""

from __future__ import annotations

import logging

import pytest
import torch
from tokenizers.processors import ByteLevel, TemplateProcessing

from roadie.errors import ConfigError
from roadie.training.encoding import IGNORED, Example, collate, encode, fingerprint, split
from roadie.training.rows import Chat, Completion, DataError, Instruction, Preference, Text

BOS, EOS = 0, 1


@pytest.fixture
def tokenizer(tiny):
    return tiny.tokenizer()


def learnt(example, tokenizer):
    """The text on which the loss is taken, specials included."""
    return tokenizer.decode([token for token in example.labels if token != IGNORED])


def whole(example, tokenizer):
    return tokenizer.decode(example.input_ids)


def test_a_text_is_learnt_whole(tokenizer):
    (example,) = encode([Text("über", "here")], tokenizer, 64)
    assert whole(example, tokenizer) == "<s>über</s>"
    assert example.labels == example.input_ids


def test_of_a_completion_only_the_completion_is_learnt(tokenizer):
    (example,) = encode([Completion("ask: ", "answer", "here")], tokenizer, 64)
    assert whole(example, tokenizer) == "<s>ask: answer</s>"
    assert learnt(example, tokenizer) == "answer</s>"


def test_a_tokenizer_that_ends_everything_does_not_end_the_prompt(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    completion, text = encode([Completion("a", "b", "here"), Text("c", "there")], tokenizer, 64)
    assert whole(completion, tokenizer) == "<s>ab</s>"
    assert whole(text, tokenizer) == "<s>c</s>"


def test_of_a_chat_the_turns_of_the_assistant_are_learnt(tokenizer, tiny):
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    turns = (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B"))
    (example,) = encode([Chat(turns, "here")], tokenizer, 64)
    assert whole(example, tokenizer) == "[system]S</s>[user]U</s>[assistant]A</s>[user]V</s>[assistant]B</s>"
    assert learnt(example, tokenizer) == "A</s>B</s>"


def test_turns_that_the_template_rewrites_are_not_learnt(tokenizer):
    # As templates do that drop the reasoning of all turns but the last.
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] if loop.last else '...' }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = (("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B"))
    with pytest.raises(DataError, match="here: the chat template gives no assistant turn"):
        encode([Chat(turns, "here")], tokenizer, 64)


@pytest.mark.parametrize(("given", "task"), [("", "T"), ("I", "T\n\nI")])
def test_an_instruction_is_a_chat_where_the_model_has_a_template(tokenizer, tiny, given, task):
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    (example,) = encode([Instruction("T", given, "O", "here")], tokenizer, 64)
    assert whole(example, tokenizer) == f"[user]{task}</s>[assistant]O</s>"
    assert learnt(example, tokenizer) == "O</s>"


@pytest.mark.parametrize(("given", "between"), [("", ""), ("I", "### Input:\nI\n\n")])
def test_an_instruction_is_written_under_headings_where_it_has_none(tokenizer, given, between):
    (example,) = encode([Instruction("T", given, "O", "here")], tokenizer, 64)
    assert whole(example, tokenizer) == f"<s>### Instruction:\nT\n\n{between}### Response:\nO</s>"
    assert learnt(example, tokenizer) == "O</s>"


def test_a_preference_is_not_learnt_as_it_is(tokenizer):
    with pytest.raises(DataError, match=r"line 3: got a preference .*--method dpo"):
        encode([Preference("q", "y", "n", "line 3")], tokenizer, 64)


def test_turns_that_the_template_refuses_are_named_by_their_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"line 3: got turns user, assistant; .* takes others \(roles must alternate\)"):
        encode([Chat((("user", "U"), ("assistant", "A")), "line 3")], tokenizer, 64)


def test_a_chat_without_a_template_is_refused(tokenizer):
    with pytest.raises(DataError, match="line 7: got messages, but the tokenizer of this model has no chat template"):
        encode([Chat((("assistant", "A"),), "line 7")], tokenizer, 64)


@pytest.mark.parametrize(
    ("second", "lengths"), [("ijkl", [4, 4, 4, 4]), ("ijk", [4, 4, 4, 3]), ("ijklm", [4, 4, 4, 4])]
)
def test_plain_texts_are_joined_and_cut_into_full_blocks(tokenizer, second, lengths):
    examples = encode([Text("abcdefgh", "x", packed=True), Text(second, "y", packed=True)], tokenizer, 4)
    assert [len(example.input_ids) for example in examples] == lengths
    assert all(example.labels == example.input_ids for example in examples)
    tokens = [token for example in examples for token in example.input_ids]
    joined = tokenizer(f"abcdefgh</s><s>{second}</s>")["input_ids"]
    assert tokens == joined[: sum(lengths)]  # of 17 tokens the last is a block of one, from which nothing is learnt


def test_long_texts_are_cut_and_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "roadie"):
        examples = encode([Text("abcdefgh", "x"), Text("ab", "y")], tokenizer, 5)
    assert whole(examples[0], tokenizer) == "<s>abcd"
    assert "cut 1 of 2 examples at 5 tokens" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "completion", "kept", "to_learn"),
    [
        ("0123456789", "abc", "6789abc</s>", "abc</s>"),  # the completion stays whole, the prompt loses its beginning
        ("0123456789", "abcdefgh", "6789abcd", "abcd"),  # half of the window is left to the prompt
        ("01", "abcdefgh", "<s>01abcde", "abcde"),  # a short prompt stays whole
    ],
)
def test_a_long_completion_is_cut_where_it_hurts_least(tokenizer, prompt, completion, kept, to_learn):
    (example,) = encode([Completion(prompt, completion, "here")], tokenizer, 8)
    assert whole(example, tokenizer) == kept
    assert learnt(example, tokenizer) == to_learn


def test_nothing_to_learn_is_refused(tokenizer):
    tokenizer.eos_token = None
    tokenizer.backend_tokenizer.post_processor = ByteLevel()
    with pytest.raises(DataError, match="here: got nothing to predict"):
        encode([Text("a", "here")], tokenizer, 8)
    with pytest.raises(DataError, match="got no example"):
        encode([Text("a", "here", packed=True)], tokenizer, 8)


def examples(count):
    return [Example((number, number + 1), (number, number + 1)) for number in range(count)]


def test_a_split_takes_a_share_by_its_seed():
    train, held_out = split(examples(20), 0.25, seed=3)
    assert len(held_out) == 5
    assert sorted(train + held_out, key=lambda e: e.input_ids) == examples(20)
    assert split(examples(20), 0.25, seed=3) == (train, held_out)
    assert split(examples(20), 0.25, seed=4) != (train, held_out)
    assert split(examples(3), 0, seed=0) == (examples(3), [])


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_split_leaves_one_on_each_side(share):
    train, held_out = split(examples(5), share, seed=0)
    assert train
    assert held_out
    with pytest.raises(ConfigError, match="of 1 example"):
        split(examples(1), share, seed=0)


def test_the_fingerprint_sees_order_labels_and_boundaries():
    one, two = examples(2)
    masked = Example(one.input_ids, (IGNORED, one.labels[1]))
    joined = Example(one.input_ids + two.input_ids, one.labels + two.labels)
    prints = [fingerprint(e) for e in ([one, two], [two, one], [masked, two], [joined], [one])]
    assert len(set(prints)) == len(prints)
    assert fingerprint(iter([one, two])) == prints[0]


def test_a_batch_is_padded_on_the_right_without_loss_there():
    batch = collate([Example((5, 6, 7), (IGNORED, 6, 7)), Example((8, 9), (8, 9))], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, 9, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
