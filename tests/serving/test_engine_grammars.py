"""Answers that are kept to a constraint: each row its own, beside rows that have none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.serving.harness import Collector, serving
from tests.versions import needs_grammars

from roadie import embedded, extras
from roadie.errors import ConfigError
from roadie.serving import grammars
from roadie.serving.engine import EngineSettings, FinishReason, Sampling
from roadie.serving.grammars import Constraint, Grammars, Kind, one_of
from roadie.serving.sampling import RowSampler, choose

pytestmark = needs_grammars
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["a", "b"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
JSON = Constraint(Kind.JSON, json.dumps(SCHEMA))
REGEX = Constraint(Kind.REGEX, "[0-9]{3}-[a-z]{2,4}")
CHOICE = one_of(["left", 'no "q"', "ü€\n😀"])
SETTINGS = EngineSettings(num_slots=4, num_blocks=128, max_batch_tokens=128, max_running=16)
TOKENIZER = embedded.load_tokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def engine() -> Iterator[Collector]:
    with serving(embedded.load_model().eval(), embedded.adapters_path(), SETTINGS, TOKENIZER) as collector:
        yield collector


def ask(engine: Collector, constraint: Constraint | None, **rules: Any) -> str:
    prompt_ids = TOKENIZER("The turtle")["input_ids"]
    return engine.submit(
        prompt_ids, rules.pop("adapter", None), **{"max_tokens": 60, "temperature": 1.0, **rules}, constraint=constraint
    )


def is_met(text: str, constraint: Constraint) -> bool:
    if constraint is JSON:
        found = json.loads(text)
        return set(found) == {"name", "kind"} and len(found["name"]) <= 8 and found["kind"] in ("a", "b")
    return bool(re.fullmatch(REGEX.source, text)) if constraint is REGEX else text in ("left", 'no "q"', "ü€\n😀")


def test_each_row_is_kept_to_its_own_constraint_and_the_others_are_what_they_were(engine: Collector) -> None:
    alone = [ask(engine, None, seed=seed, max_tokens=12, adapter=name) for seed, name in enumerate((None, "turtle"))]
    engine.wait()
    texts = [engine.text(one) for one in alone]
    mixed = {
        ask(engine, constraint, seed=seed, adapter=name): constraint
        for seed in range(3)
        for constraint in (JSON, REGEX, CHOICE)
        for name in (None, "turtle")
    }
    beside = [ask(engine, None, seed=seed, max_tokens=12, adapter=name) for seed, name in enumerate((None, "turtle"))]
    engine.wait()
    for one, constraint in mixed.items():
        assert engine.last(one).finish is FinishReason.STOP
        assert is_met(engine.text(one), constraint), engine.text(one)
    assert len({engine.text(one) for one in mixed}) > 10
    assert [engine.text(one) for one in beside] == texts


def test_what_ends_before_its_constraint_is_met_says_length(engine: Collector) -> None:
    cut = ask(engine, JSON, max_tokens=3)
    engine.wait(cut)
    assert (engine.last(cut).finish, len(engine.tokens(cut))) == (FinishReason.LENGTH, 3)
    exact = ask(engine, Constraint(Kind.LARK, 'start: "a"'), max_tokens=1)
    engine.wait(exact)
    assert (engine.last(exact).finish, engine.text(exact)) == (FinishReason.STOP, "a")


def test_stop_strings_end_tokens_and_logprobs_go_on_as_they_do(engine: Collector) -> None:
    stopped = ask(engine, JSON, stop=('"kind',))
    engine.wait(stopped)
    assert engine.text(stopped).endswith((", ", ","))
    assert engine.last(stopped).finish is FinishReason.STOP
    found = []
    for constraint in (CHOICE, None):  # one after the other, so that both are batches of one row: the same sums
        one = ask(engine, constraint, logprobs=2, temperature=0.0, max_tokens=1)
        engine.wait(one)
        found.append(engine.outputs[one][0])
    told, free = found
    # The model's own distribution, bit for bit; where it is constrained, most of it is cut away.
    assert told.logprobs[0].top == free.logprobs[0].top
    assert told.token_ids != free.token_ids
    ended = ask(engine, Constraint(Kind.REGEX, "[a-z]{1,200}"), ignore_eos=False, max_tokens=200)
    engine.wait(ended)
    assert re.fullmatch("[a-z]+", engine.text(ended))


def compiled(constraint: Constraint) -> Any:
    return Grammars(TOKENIZER, len(TOKENIZER)).begin(constraint)


def test_an_end_may_come_where_the_answer_is_whole_and_not_before_min_tokens() -> None:
    logits = torch.zeros(1, len(TOKENIZER))
    logits[0, EOS], logits[0, 5] = 50.0, 60.0  # 5 is an end that the tokenizer does not know as one
    digits = Constraint(Kind.REGEX, "[0-9]{2,}")
    for min_tokens in (0, 6):
        row = RowSampler(Sampling(temperature=0.0, min_tokens=min_tokens), (), {EOS, 5}, compiled(digits))
        said: list[int] = []
        while not said or said[-1] not in (EOS, 5):
            said += [each.token_id for each in choose(logits, [row])]
        text = TOKENIZER.decode(said[:-1]).strip()
        assert (text.isdigit(), len(text) >= 2, said[-1], len(said) > min_tokens) == (True, True, 5, True)
    assert torch.equal(logits.isfinite(), torch.ones_like(logits, dtype=torch.bool)), (
        "the caller's logits are left alone"
    )


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        (Constraint(Kind.REGEX, "[0-9"), "unclosed character class"),
        (Constraint(Kind.REGEX, r"(a)\1"), "backreferences are not supported"),
        (Constraint(Kind.JSON, '{"type": "strin"}'), "Invalid type"),
        (Constraint(Kind.JSON, '{"type": "string", "enum": [1]}'), "Unsatisfiable"),
        (Constraint(Kind.JSON, '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Constraint(Kind.JSON, '{"$ref": "http://127.0.0.1:1/schema.json"}'), "does not fetch"),
        (Constraint(Kind.JSON, '{"$ref": "file:///etc/passwd"}'), "does not fetch"),
        (Constraint(Kind.JSON, "[1]"), "xpect"),
        (Constraint(Kind.JSON, '{"allOf":' * 500 + "1" + "}" * 500), "cannot be used"),
        (Constraint(Kind.REGEX, "a" * 70_000), "70000 characters; wanted at most 65536"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_the_reason(engine: Collector, constraint: Constraint, said: str) -> None:
    for refuse in (engine.engine.prepare, lambda each: ask(engine, each)):
        with pytest.raises(ConfigError, match=said):
            refuse(constraint)


def test_an_answer_that_costs_too_much_fails_alone_and_the_next_is_compiled_anew(
    engine: Collector, monkeypatch: Any
) -> None:
    """What answers have found out about a constraint is shared: where it is too much for one, it is for all that use it."""
    limits = grammars._limits
    monkeypatch.setattr(
        grammars, "_limits", lambda library: library.LLParserLimits(max_lexer_states=300, verbose_errors=False)
    )
    costly = Constraint(Kind.REGEX, "(?:[a-z ]*[aeiou][a-z ]{18})+")
    failed, other = ask(engine, costly, max_tokens=200), ask(engine, None, max_tokens=20)
    engine.wait(failed, other)
    error = engine.last(failed).error
    assert isinstance(error, ConfigError)
    assert "too many states" in str(error)
    assert engine.last(other).finish is FinishReason.LENGTH
    monkeypatch.setattr(grammars, "_limits", limits)
    again = ask(engine, costly, max_tokens=10)
    engine.wait(again)
    assert engine.last(again).finish in (FinishReason.LENGTH, FinishReason.STOP)


def test_an_object_has_no_properties_that_its_schema_does_not_name() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    row = RowSampler(Sampling(temperature=0.0), (), {EOS}, compiled(Constraint(Kind.JSON, json.dumps(schema))))
    logits = torch.zeros(1, len(TOKENIZER))
    logits[0, [token for token in range(len(TOKENIZER)) if "," in TOKENIZER.decode([token])]] = (
        50.0  # goes on if it may
    )
    said: list[int] = []
    while not row.progress.is_over and len(said) < 20:
        said += [each.token_id for each in choose(logits, [row])]
    assert json.loads(TOKENIZER.decode(said)) == {"a": 1}


def test_objects_are_closed_where_their_schema_does_not_speak_of_other_properties() -> None:
    inner, opened = (
        {"properties": {"b": {}}},
        {"properties": {"default": {"properties": {}}}, "additionalProperties": True},
    )
    shut = inner | {"additionalProperties": False}
    schema = {
        "properties": {"properties": inner, "c": opened},
        "items": inner,
        "anyOf": [inner],
        "$defs": {"d": inner},
        "const": inner,
    }
    wanted = {
        **schema,
        "properties": {
            "properties": shut,
            "c": opened | {"properties": {"default": {"properties": {}, "additionalProperties": False}}},
        },
    }
    assert grammars.closed(schema) == wanted | {"items": shut, "anyOf": [shut], "$defs": {"d": shut}}
    both = {"allOf": [{"$ref": "#/$defs/d"}], "$defs": {"d": inner}}
    assert grammars.closed(both) == both
    assert grammars.closed({"properties": {"a": True}}) == {"properties": {"a": True}, "additionalProperties": False}
    assert grammars.closed([1]) == [1]


def test_grammars_are_kept_and_no_more_than_there_is_room_for(monkeypatch: Any) -> None:
    kept = Grammars(TOKENIZER, len(TOKENIZER))
    assert kept.compile(JSON) is kept.compile(Constraint(Kind.JSON, JSON.source))
    first = kept.compile(JSON)
    monkeypatch.setattr(grammars, "MAX_KEPT_CHARS", len(JSON.source) + 10)
    kept.compile(one_of(["a" * 20]))
    assert kept.compile(JSON) is not first
    assert len(kept._kept) == 1


def test_without_the_library_or_a_tokenizer_of_its_kind_constraints_are_refused(monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match="fast tokenizer"):
        Grammars(None, 10).compile(JSON)
    with pytest.raises(ConfigError, match="vocab size too small"):
        Grammars(TOKENIZER, 10).compile(JSON)
    monkeypatch.setattr(extras, "_is_there", lambda module: module != "llguidance")
    with pytest.raises(ConfigError, match=r"roadie\[serve\]"):
        Grammars(TOKENIZER, len(TOKENIZER)).compile(JSON)
