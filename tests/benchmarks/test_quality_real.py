"""The grid on real models: its configuration, its rows taken apart, its metrics, and the order of its runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import pytest
import torch
import yaml
from benchmarks.quality import real, records
from benchmarks.quality.__main__ import main
from benchmarks.quality.hub import data, style
from benchmarks.quality.hub.choices import taken_apart
from benchmarks.quality.hub.encoding import Encoder
from benchmarks.quality.hub.settings import Rows, Source, read
from benchmarks.quality.hub.sweep import Choice, sweep
from benchmarks.quality.hub.task import prepare
from benchmarks.quality.hub.training import pieces
from benchmarks.quality.methods import METHODS, nearest_exponent, rate
from benchmarks.quality.real_report import off_the_grid
from benchmarks.quality.tasks import IGNORED, LANGUAGE, Splits, Task, next_logits
from torch.nn import functional

from roadie import embedded
from roadie.errors import ConfigError
from roadie.learning_rate import default_learning_rate

TASKS = read(real.GRID)
NUMBERED = {
    "instruction": "Please choose the correct answer to the question: What runs?\n\nAnswer1: a stone Answer2: a cat, fast "
    "Answer3: ice\n\nAnswer format: answer1/answer2/answer3",
    "answer": "answer2",
}
TRUE_OR_FALSE = {
    "instruction": "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
    "answer": "false",
}
PROBLEM = {"original_text": "9 and 9 ?", "equation": "X=(9+9)", "ans": 18.0}
SOLUTION = {"question": "9 and 9?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}
FORMS = {"mawps": PROBLEM, "gsm8k": SOLUTION, "boolq": TRUE_OR_FALSE}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_of_the_grid_can_be_prepared(name: str, tmp_path: Path) -> None:
    for path in (one for source in TASKS[name].sources.values() for one in source.files.values()):
        (tmp_path / str(path)).parent.mkdir(exist_ok=True)
        (tmp_path / str(path)).write_text(f"{json.dumps(FORMS.get(name, NUMBERED))}\n" * 600, encoding="utf-8")
    told = TASKS[name].model_copy(
        update={"model": TASKS[name].model.model_copy(update={"name": str(embedded.model_path())})}
    )
    told = told.model_copy(update={"rows": told.rows.model_copy(update={"chat": False})})  # it has no chat template
    prepared = prepare(name, told, tmp_path, "cpu")
    row = prepared.task.splits.train[0]
    assert any(label != IGNORED for label in row["labels"])
    assert row["labels"][0] == IGNORED
    assert told.training.batch_rows * told.training.accumulation in (8, 16)
    assert {"road_1", "lora_r1", "ia3"} <= set(told.methods)


def test_answers_are_found_in_rows_of_the_papers_form() -> None:
    assert taken_apart(NUMBERED) == {
        "question": "What runs?",
        "right": "a cat, fast",
        "choices": ["a stone", "a cat, fast", "ice"],
    }
    assert taken_apart(TRUE_OR_FALSE) == {"question": "is it?", "right": "false", "choices": ["true", "false"]}
    for row in (NUMBERED | {"answer": "answer4"}, NUMBERED | {"answer": ""}, TRUE_OR_FALSE | {"instruction": "?"}):
        with pytest.raises(ConfigError, match="wanted a question"):
            taken_apart(row)


def test_the_parts_of_the_style_share_no_fact_and_follow_its_rules() -> None:
    facts = {}
    for part in style.PARTS:
        rows = data.load(Source(made="style"), part, Path())
        found = [re.fullmatch(r"LOG (\d+): (.+ // .+)\. (.+, .+)\.", answer) for answer in rows["answer"]]
        facts[part] = {one[2] for one in found if one}
        assert all(found)
        numbers = [int(one[1]) for one in found if one]
        assert numbers == [len(question.split()) - 1 for question in rows["question"]]
    assert not facts["train"] & facts["test"]
    assert not facts["train"] & facts["validation"]
    assert len(facts["train"]) > 2 * len(facts["test"]) > 40


def test_logits_at_some_places_are_those_of_all() -> None:
    model = embedded.load_model().eval()
    batch = {"input_ids": torch.randint(5, 200, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    places = torch.rand(3, 6) < 0.5
    with torch.no_grad():
        every = model(**batch).logits[:, :-1]
        torch.testing.assert_close(next_logits(model, batch, places), every[places])
        assert model(**batch).logits.shape[:2] == (3, 7)  # nothing stays behind


def test_the_likeliest_choice_is_that_of_each_alone(tmp_path: Path) -> None:
    words = ("return", "import", "class", "self", "a longer answer than that")
    rows = [
        {
            "question": f"def f{n}",
            "right": words[n % 5],
            "choices": [words[n % 5], words[(n + 1) % 5], words[(n + 2) % 5]],
        }
        for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"tasks": {"t": of_choices()}}, sort_keys=False), encoding="utf-8")
    prepared = prepare("t", read(config)["t"], tmp_path, "cpu")
    model = prepared.task.model().eval()
    right, losses = 0, []
    for row in rows:
        alone = [losses_of(model, f"{row['question']}:", f" {choice}") for choice in row["choices"]]
        means = [mean(one[:-1]) for one in alone]  # the end of the text is none of the answer's words
        right += means[0] == min(means)
        losses += alone[0]
    scores = prepared.judge(prepared.task, model, "test")
    assert 0 < right < len(rows)
    assert scores["choice"] == pytest.approx(right / len(rows))
    assert scores["loss"] == pytest.approx(mean(losses), rel=1e-5)


def losses_of(model: Any, prompt: str, answer: str) -> list[float]:
    """The losses of the answer's tokens and of the end."""
    tokenizer = embedded.load_tokenizer()
    before = tokenizer(prompt)["input_ids"]
    before = before[:-1] if before[-1] == tokenizer.eos_token_id else before
    after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return functional.cross_entropy(logits, torch.tensor(after), reduction="none").tolist()


def of_choices(**changes: Any) -> dict[str, Any]:
    part = {"split": "rows", "metric": {"kind": "choice"}}
    return {
        "title": "t",
        "published": "nothing",
        "model": {"name": str(embedded.model_path()), "kind": "causal-language-model"},
        "sources": {"data": {"format": "json", "files": {"rows": "rows.jsonl"}}},
        "train": {"split": "rows"},
        "validation": {"split": "rows"},
        "tests": {"test": part},
        "rows": {"prompt": "{question}:", "answer": " {right}", "choices": "choices", "longest_tokens": 64},
        "metric": {"kind": "loss"},
        "training": {"steps": 2, "batch_rows": 2},
        "evaluation": {"beaten": False},
        "methods": {"road_1": {"start": 0.011}, "lora_r1": [0.01]},
        "recipe": ["road_1"],
        "once": {"ia3": [0.01]},
        "seeds": [0, 1],
        **changes,
    }


@pytest.mark.slow
@pytest.mark.long
def test_the_order_of_runs_and_what_is_tested(tmp_path: Path) -> None:
    row = {"question": "def", "right": "return", "choices": ["return", "import"]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"tasks": {"t": of_choices()}}, sort_keys=False), encoding="utf-8")
    sweep(config, Choice(data=tmp_path), tmp_path / "records", lambda: False)
    (path,) = (tmp_path / "records").glob("*.jsonl")
    base, *found = records.read(path)
    (by_rule,) = off_the_grid(found, "road_1")
    assert by_rule["learning_rate"] == default_learning_rate(embedded.load_model().config.hidden_size)
    searched = [one for one in found if one["method"] == "road_1" and one["seed"] == 0 and one is not by_rule]
    assert [one["learning_rate"] for one in searched[:2]] == [0.01, 0.0032]
    losses = [one["validation"]["loss"] for one in searched]
    assert [one["test"] is None for one in searched] == [loss > min(losses[: n + 1]) for n, loss in enumerate(losses)]
    assert None in [one["test"] for one in searched]
    order = [(one["method"], one["seed"]) for one in found]
    assert order == [("road_1", 0)] * len(searched) + [
        ("lora_r1", 0),
        ("road_1", 1),
        ("lora_r1", 1),
        ("road_1", 0),
        ("ia3", 0),
    ]
    assert base["facts"]["settings"]["model"]["name"] == embedded.model_path().name  # no folder of this machine
    assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_products_in_bfloat16_are_of_whole_pieces_of_memory(tmp_path: Path) -> None:
    row = {"question": "def", "right": "return", "choices": ["return", "import"]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    model = {"name": str(embedded.model_path()), "kind": "causal-language-model", "products": "bfloat16"}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"tasks": {"t": of_choices(model=model)}}), encoding="utf-8")
    before = torch.get_float32_matmul_precision()
    try:
        task = prepare("t", read(config)["t"], tmp_path, "cpu").task
        adapted = METHODS["road_1"].adapt(task.model(), task)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    given: list[torch.Tensor] = []
    adapted.get_output_embeddings().register_forward_pre_hook(lambda layer, arguments: given.append(arguments[0]))
    adapted.generate(input_ids=torch.full((3, 5), 7), max_new_tokens=2, do_sample=False)
    assert [one.shape[:2] for one in given] == [(3, 1)] * 2
    assert all(one.is_contiguous() for one in given)


def test_choices_need_an_answer_that_they_can_replace(tmp_path: Path) -> None:
    rows = {"prompt": "{question}", "answer": "{right} {question}", "choices": "choices"}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"tasks": {"t": of_choices(rows=rows)}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="wanted one with one column"):
        read(config)


def test_a_step_in_pieces_has_its_rows_once_and_similar_ones_together() -> None:
    rows = [{"input_ids": list(range(2, 3 + n)), "labels": list(range(2, 3 + n))} for n in range(12)]
    task = Task("t", LANGUAGE, "t", embedded.load_model, Splits(rows, (), ()), 0, "all-linear", 1, 3)
    steps = pieces(task, 2, seed=0)
    lengths = [[[int((one > 1).sum()) for one in piece["input_ids"]] for piece in next(steps)] for _ in range(2)]
    assert sorted(length for step in lengths for piece in step for length in piece) == list(range(1, 13))
    assert all(step[0] + step[1] == sorted(step[0] + step[1]) for step in lengths)


def test_a_prompt_in_a_chat_is_the_users_turn() -> None:
    tokenizer = embedded.load_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    encoder = Encoder(Rows(prompt="{question}", answer="{answer}", chat=True), tokenizer)
    raw = {"question": "import?", "answer": "return"}
    assert tokenizer.decode(encoder.prompt(raw)) == "<user>import?<assistant>"
    row = encoder.row(raw)
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "return"


def test_a_search_begins_at_the_rate_of_the_grid_that_is_nearest() -> None:
    assert [rate(nearest_exponent(one)) for one in (0.01, 0.011, 0.0032, 0.003, 0.03)] == [
        0.01,
        0.01,
        0.0032,
        0.0032,
        0.032,
    ]


def test_the_grid_runs_the_models_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["real", "--data", str(tmp_path), "--models", str(tmp_path), "--records", str(tmp_path)]) == 2
    assert "python -m benchmarks.models fetches them" in capsys.readouterr().err
    swept: list[tuple[str, tuple[str, ...], str]] = []

    def sweep_one(path: Path, choice: Choice, folder: Path, stop: Any) -> int:
        swept.append((str(choice.model), tuple(choice.tasks), choice.device))
        return 3

    monkeypatch.setattr(real, "sweep", sweep_one)
    monkeypatch.setattr(real.models, "present", lambda name, folder: tmp_path / name if name == "smollm2" else None)
    assert real.sweep_all(tmp_path, tmp_path, tmp_path, "cuda", lambda: False, ["boolq", "mawps"]) == 3
    assert swept == [(str(tmp_path / "smollm2"), ("mawps", "boolq"), "cuda")]
    assert {task for tasks in real.TASKS.values() for task in tasks} == set(TASKS)
