"""The shipped configurations on rows of the form that their data sets have: parts, tokens, and answers that are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from benchmarks.machine import ROOT
from benchmarks.quality.hub import data
from benchmarks.quality.hub.encoding import Encoder
from benchmarks.quality.hub.metrics import is_right
from benchmarks.quality.hub.settings import Rows, read
from benchmarks.quality.hub.task import prepare

from roadie import embedded

CONFIGS = ROOT / "benchmarks" / "quality" / "configs"
TASKS = {name: task for path in sorted(CONFIGS.glob("*.yaml")) for name, task in read(path).items()}
NUMBERS = {
    "instruction": "How many are 9 and 9?",
    "input": "",
    "output": "9 + 9 = 18. The answer is 18.",
    "answer": "18.0",
}
LETTERS = {"instruction": "2 + 2? (A) 3 (B) 4", "input": "", "output": "2 + 2 = 4. The answer is (B).", "answer": ["B"]}
TRUE = {"instruction": "Is it?", "input": "", "output": "the correct answer is true", "answer": "true"}
QUERY = {
    "query": "9 and 9?",
    "response": "9 + 9 = 18.\n#### 18\nThe answer is: 18",
    "original_question": "",
    "type": "GSM",
}
QUESTION = {"question": "9 and 9?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}
PAIR = {
    "sentence": "One.",
    "sentence1": "One.",
    "sentence2": "Two.",
    "question1": "One?",
    "question2": "Two?",
    "idx": 0,
}
PAIR |= {"premise": "One.", "hypothesis": "Two.", "question": "One?", "label": 1}


def row_of(task: str, source: data.Source, split: str) -> dict[str, Any]:
    if task == "commonsense":
        return TRUE
    if task == "arithmetic":
        return LETTERS if split == "aqua" else NUMBERS
    if task.startswith("gsm8k"):
        return QUERY if source.hub == "meta-math/MetaMathQA" else QUESTION
    return PAIR


@pytest.mark.parametrize("name", list(TASKS))
def test_a_shipped_configuration_can_be_prepared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: data.Source, split: str, root: Path) -> Any:
        row = row_of(name, source, split)
        return datasets.Dataset.from_dict({key: [value] * 1200 for key, value in row.items()})

    monkeypatch.setattr(data, "load", load)
    here = TASKS[name].model.model_copy(update={"name": str(embedded.model_path()), "revision": None})
    settings = TASKS[name].model_copy(update={"model": here})
    prepared = prepare(name, settings, Path(), "cpu")
    counts = (prepared.task.facts or {})["rows"]
    assert all(counts.values())
    assert prepared.task.steps > 1
    if name.startswith("glue"):
        assert counts["validation"] + counts["tests.rest"] == 1200
    row = prepared.task.splits.train[0]
    assert len(row["input_ids"]) > 2
    for part, table in prepared.judge.parts.items():
        metric = settings.metric_of(settings.parts[part])
        if metric.kind == "exact_match":
            answer = str(settings.rows.answer).format_map(table[0])
            assert is_right(metric, answer, prepared.judge.encoder.reference(table[0]))
            assert not is_right(metric, "the answer is 17, or E", prepared.judge.encoder.reference(table[0]))


def test_the_prompts_are_those_that_are_published() -> None:
    def prompt(name: str, row: dict[str, Any]) -> str:
        rows: Rows = TASKS[name].rows
        encoder = Encoder(rows, embedded.load_tokenizer())
        return str(encoder.tokenizer.decode(encoder.prompt(row), skip_special_tokens=True))

    assert prompt("commonsense", TRUE) == "Is it?\n"
    assert prompt("gsm8k-road", QUERY) == "Question: 9 and 9? Think step by step.\nAnswer:"
    alpaca = prompt("arithmetic", NUMBERS)
    assert alpaca.startswith(
        "Below is an instruction that describes a task. Write a response that appropriately completes"
    )
    assert alpaca.endswith("the request.\n\n### Instruction:\nHow many are 9 and 9?\n\n### Response:\n")
