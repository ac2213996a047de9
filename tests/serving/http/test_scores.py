"""Logprobs of prompts over HTTP: `echo` with `logprobs`, as evaluation harnesses ask for them, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.harness import save_all
from tests.serving.http.harness import Running, running
from tests.serving.http.test_generation import complete, converse, events
from tests.versions import NO_ENGINE
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from roadie import embedded
from roadie.bank import AdapterBank
from roadie.serving import ContinuousBatchingEngine, EngineSettings, Registry
from roadie.serving.http.pieces import Pieces
from roadie.serving.http.scores import prompt_offsets
from roadie.testing import random_adapter

PROMPT = "The turtle goes back"
IDS = embedded.load_tokenizer()(PROMPT)["input_ids"]
PIECES = Pieces(embedded.load_tokenizer())
KEYS = [PIECES.key_of(token) for token in IDS]


def logprobs_of(server: Running, **body: Any) -> tuple[str, dict[str, Any]]:
    choice = complete(server, **{"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0, **body})["choices"][0]
    return choice["text"], choice["logprobs"]


def test_an_echo_alone_is_scored_and_nothing_is_generated(open_server: Running) -> None:
    answer = complete(open_server, prompt=PROMPT, echo=True, logprobs=2, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (len(IDS), 0)
    found = choice["logprobs"]
    assert found["tokens"] == KEYS
    assert found["token_logprobs"] == [None, *(-float(place) for place in range(1, len(IDS)))]
    assert found["top_logprobs"][0] is None
    for place, top in enumerate(found["top_logprobs"][1:], 1):
        assert top == {PIECES.key_of(IDS[place] - 1): -place + 0.5, KEYS[place]: -place - 0.5}
    starts = dict(zip(found["text_offset"], KEYS, strict=True))
    assert all(PROMPT.startswith(piece, start) for start, piece in starts.items())


def test_an_echo_goes_on_with_the_completion(open_server: Running) -> None:
    for fields in ({"prompt": PROMPT}, {"prompt": IDS}):
        text, found = logprobs_of(open_server, max_tokens=2, **fields)
        assert text == f"{PROMPT} base {len(IDS)}"
        assert found["tokens"][: len(IDS)] == KEYS
        assert {len(values) for values in found.values()} == {len(IDS) + 2}
        assert found["token_logprobs"][-2:] == [-0.5, -0.5]
        assert found["text_offset"][len(IDS)] == len(PROMPT)


def test_what_an_evaluation_harness_sends_and_reads(open_server: Running) -> None:
    prompts = [IDS, IDS[:3], [7, 8, 9, 10]]
    sent = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = sorted(complete(open_server, **sent)["choices"], key=lambda choice: choice["index"])
    for choice, ids, num_context in zip(choices, prompts, (2, 1, 3), strict=True):
        scored = choice["logprobs"]["token_logprobs"][num_context:-1]  # the last one was generated
        assert sum(scored) == -sum(range(num_context, len(ids)))
        tops = choice["logprobs"]["top_logprobs"][num_context:-1]
        assert not any(value == max(top.values()) for value, top in zip(scored, tops, strict=True))


def test_a_stream_begins_with_the_scores_of_what_is_echoed(open_server: Running) -> None:
    asked = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 2}
    whole = complete(open_server, **asked)["choices"][0]
    parts = [event["choices"][0] for event in events(open_server, "/v1/completions", **asked)]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for part in parts for value in part["logprobs"][name]] == values


def test_an_echo_of_no_tokens_is_the_prompt(open_server: Running) -> None:
    choice = complete(open_server, prompt=PROMPT, echo=True, max_tokens=0)["choices"][0]
    assert (choice["text"], choice["logprobs"]) == (PROMPT, None)
    assert "prompt_logprobs" not in choice


def test_prompt_logprobs_are_by_id_with_ranks(open_server: Running) -> None:
    asked = complete(open_server, prompt=[PROMPT, IDS[:1]], prompt_logprobs=3, echo=True, logprobs=1, max_tokens=1, n=2)
    first, again, alone, _ = asked["choices"]
    assert first["prompt_logprobs"] == again["prompt_logprobs"]
    assert alone["prompt_logprobs"] == [None]
    scored = first["prompt_logprobs"]
    assert (scored[0], len(scored)) == (None, len(IDS))
    for place, entries in enumerate(scored[1:], 1):
        token = IDS[place]
        assert list(entries) == [str(token), str(token - 1), str(token + 1)]
        assert entries[str(token - 1)] == {
            "logprob": 0.5 - place,
            "rank": 1,
            "decoded_token": PIECES.text_of(token - 1),
        }
        assert entries[str(token)]["rank"] == 2
    assert [len(top) for top in first["logprobs"]["top_logprobs"][1:-1]] == [2] * (len(IDS) - 1)  # one, and itself
    assert complete(open_server, prompt_logprobs=0, max_tokens=0)["choices"][0]["prompt_logprobs"][0] is None


def test_chats_have_the_logprobs_of_their_prompt_too(open_server: Running) -> None:
    answer = converse(open_server, prompt_logprobs=1, max_tokens=1)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None
    assert "prompt_logprobs" not in converse(open_server, max_tokens=1)


@pytest.mark.parametrize(
    ("path", "fields", "wanted"),
    [
        ("/v1/completions", {"max_tokens": 0}, "wanted 1 at least, or the prompt: echo=true, or prompt_logprobs"),
        ("/v1/completions", {"max_tokens": 0, "logprobs": 1}, "wanted 1 at least"),
        ("/v1/completions", {"prompt_logprobs": 1, "stream": True}, "wanted stream=false, or echo with logprobs"),
        ("/v1/chat/completions", {"prompt_logprobs": 1, "stream": True}, "wanted stream=false"),
    ],
)
def test_what_does_not_go_together_is_refused(
    open_server: Running, path: str, fields: dict[str, Any], wanted: str
) -> None:
    body = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    refused = open_server.http().post(path, json={"model": "base", **body, **fields})
    assert refused.status_code == 400
    assert wanted in refused.json()["error"]["message"]


def spaced_tokenizer() -> Any:
    """As Llama's first: a space before every text, and a token of its own at the beginning."""
    words = ["<unk>", "<s>", "▁The", "▁turtle", "s"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def test_tokens_begin_where_the_text_has_them() -> None:
    tokenizer = spaced_tokenizer()
    ids = tokenizer("The turtle")["input_ids"]
    assert ids == [1, 2, 3]
    for text in ("The turtle", tokenizer.decode(ids, skip_special_tokens=True)):
        offsets = prompt_offsets(text, ids, Pieces(tokenizer))
        assert [offsets.next(token) for token in ids] == [0, 0, 3]


def test_special_tokens_are_somewhere_only_where_the_text_has_them() -> None:
    tokenizer = embedded.load_tokenizer()
    special = tokenizer.all_special_tokens[0]
    text = f"a{special} é b"
    ids = [tokenizer.all_special_ids[0], *tokenizer(text, add_special_tokens=False)["input_ids"]]
    pieces = Pieces(tokenizer)
    inside = prompt_offsets(text, ids[1:], pieces)
    found = [inside.next(token) for token in ids[1:]]
    assert found[1:3] == [1, 1 + len(special)]
    around = prompt_offsets("a é b", [ids[0], *tokenizer("a é b", add_special_tokens=False)["input_ids"]], pieces)
    assert [around.next(ids[0]), around.next(ids[1])] == [0, 0]


@pytest.mark.skipif(NO_ENGINE, reason="the engine needs a newer transformers")
def test_multiple_choice_through_the_server_is_that_of_the_model_with_each_adapter(tmp_path: Path) -> None:
    model, tokenizer = embedded.load_model().eval(), embedded.load_tokenizer()
    adapters = {f"a{seed}": random_adapter(model, seed, scale=0.5, group_size=8) for seed in range(8)}
    save_all(adapters, tmp_path)
    questions = [
        (f"def {name}(self):\n    return", [" self", " None", f" {name}", " x + 1", " not"])
        for name in ("left", "color", "close", "size", "run")
    ]
    rows = [
        (tokenizer(question)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"])
        for question, answers in questions
        for answer in answers
    ]
    engine = ContinuousBatchingEngine(model, tokenizer, Registry.open(tmp_path), EngineSettings(num_slots=8))
    with running(engine, tokenizer=tokenizer) as server:
        got = {name: _likelihoods(server, name, rows) for name in adapters}
    chosen = set()
    with AdapterBank(copy.deepcopy(model), 8) as bank:
        for name, adapter in adapters.items():
            bank.admit(name, adapter)
            wanted = torch.tensor([_alone(bank, name, context, answer) for context, answer in rows])
            best = wanted.view(5, 5).topk(2).values
            assert (
                float((best[:, 0] - best[:, 1]).min()) > 2e-3
            )  # no ties: accuracies are equal where logprobs nearly are
            assert float((got[name] - wanted).abs().max()) < 1e-3
            assert torch.equal(got[name].view(5, 5).argmax(1), wanted.view(5, 5).argmax(1))
            chosen.add(tuple(wanted.view(5, 5).argmax(1).tolist()))
    assert len(chosen) > 2  # or any adapter would do


def _likelihoods(server: Running, name: str, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    prompts = [context + answer for context, answer in rows]
    sent = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = complete(server, model=name, **sent)["choices"]
    return torch.tensor(
        [
            sum(choice["logprobs"]["token_logprobs"][len(context) : -1])
            for choice, (context, _) in zip(choices, rows, strict=True)
        ]
    )


def _alone(bank: AdapterBank, name: str, context: list[int], answer: list[int]) -> float:
    with torch.no_grad(), bank.rows([name]):
        logprobs = bank.model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(-1, torch.tensor(answer)[:, None]).sum())
