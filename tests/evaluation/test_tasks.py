"""lm-eval's tasks over many adapters in one pass, and through the server, give what lm-eval gives for each adapter alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serving.harness import save_all
from tests.serving.http.harness import running
from tests.versions import NO_ENGINE
from typer.testing import CliRunner

from roadie import embedded
from roadie.bank import AdapterBank
from roadie.cli.app import app
from roadie.errors import ConfigError
from roadie.serving import ContinuousBatchingEngine, EngineSettings, Registry
from roadie.testing import random_adapter

pytest.importorskip("lm_eval", reason="needs lm-eval, which has an environment of its own: make test-eval")
if NO_ENGINE:
    pytest.skip("the engine needs a newer transformers", allow_module_level=True)

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from roadie.evaluation import Tasks, evaluate
from roadie.evaluation.harness import AdapterLM, Crowd
from roadie.evaluation.report import side_by_side

pytestmark = pytest.mark.slow
NUM_ADAPTERS = 8
WORDS = ("self", "None", "True", "the", "color", "x", "y", "screen")
QUESTIONS = [
    {
        "question": f"def {name}({WORDS[place]}):\n    return",
        "choices": [f" {word}" for word in WORDS[place:]],
        "gold": 0,
    }
    for place, name in enumerate(("left", "color", "close", "size"))
] + [
    {"question": f"    def {name}(self", "choices": [", color=None):", "):", ", *args):"], "gold": 1}
    for name in ("left", "color", "close", "size")
]
CHOICE = """\
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
TEXTS = """\
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}{{{{choices[0]}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
GENERATED = """\
task: generated
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks, of which the last generates."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choice.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, text in (("choice", CHOICE), ("texts", TEXTS), ("generated", GENERATED)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def adapters() -> dict[str, Any]:
    model = embedded.load_model()
    return {f"a{seed}": random_adapter(model, seed, scale=0.5, group_size=8) for seed in range(NUM_ADAPTERS)}


@pytest.fixture
def engine(adapters: dict[str, Any], tmp_path: Path) -> Iterator[ContinuousBatchingEngine]:
    save_all(adapters, tmp_path)
    settings = EngineSettings(num_slots=NUM_ADAPTERS, page_size=8)
    engine = ContinuousBatchingEngine(
        embedded.load_model().eval(), embedded.load_tokenizer(), Registry.open(tmp_path), settings
    )
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def wanted(adapters: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """lm-eval with transformers, an adapter at a time."""
    found, model = {}, embedded.load_model().eval()
    with AdapterBank(model, NUM_ADAPTERS) as bank:
        for name, adapter in adapters.items():
            bank.admit(name, adapter)
            with bank.rows([name]):  # batches of one row
                found[name] = _evaluated(HFLM(model, tokenizer=embedded.load_tokenizer(), batch_size=1), folder)
    return found


def _evaluated(model: Any, folder: Path, **more: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = ["choice", "texts", "generated"]
    return simple_evaluate(model, tasks=tasks, task_manager=manager, log_samples=False, **more)["results"]


def assert_equal(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for task, metric in (("choice", "acc,none"), ("choice", "acc_norm,none"), ("generated", "exact_match,none")):
        assert got[task][metric] == wanted[task][metric], (task, metric)
    assert got["texts"]["bits_per_byte,none"] == pytest.approx(wanted["texts"]["bits_per_byte,none"], rel=1e-5)


def test_one_pass_over_all_adapters_is_a_pass_over_each(
    engine: Any, adapters: Any, folder: Path, wanted: dict[str, Any]
) -> None:
    tasks = Tasks(("choice", "texts", "generated"), include=(folder,))
    told: list[int] = []
    results = evaluate(engine, embedded.load_tokenizer(), list(adapters), tasks, told.append)
    for name in adapters:
        assert_equal(results[name]["results"], wanted[name])
    accuracies = {found["results"]["choice"]["acc,none"] for found in results.values()}
    assert len(accuracies) > 1  # or one adapter would do for all
    # Four questions whose answers of a token each are one prompt, and four of three answers; a text; a continuation.
    assert told[-1] == NUM_ADAPTERS * (engine_questions() + 8 + 8) == engine.statistics().num_finished
    head, rows = side_by_side(results)
    assert head[0] == "adapter"
    assert {"choice acc", "choice acc_norm", "texts bits_per_byte", "generated exact_match"} == set(head[1:])
    assert [row[0] for row in rows] == list(adapters)
    assert rows[0][head.index("choice acc")] == f"{wanted['a0']['choice']['acc,none']:.4f}"


def engine_questions() -> int:
    """Prompts that answer all of `QUESTIONS`, counted by hand from their tokens."""
    tokenizer, found = embedded.load_tokenizer(), set()
    for each in QUESTIONS:
        for choice in each["choices"]:
            ids = tokenizer(each["question"] + choice)["input_ids"]
            found.add(tuple(ids[:-1]))
    return len(found)


def test_the_server_answers_lm_eval_alike(engine: Any, folder: Path, wanted: dict[str, Any]) -> None:
    pytest.importorskip("tenacity", reason="needs lm-eval's clients of servers: lm_eval[api]")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    engine.stop()
    engine = ContinuousBatchingEngine(
        embedded.load_model().eval(), embedded.load_tokenizer(), engine._registry, engine.settings
    )
    with running(engine, tokenizer=embedded.load_tokenizer()) as server:
        for name, batch_size in (("a1", 1), ("a2", 7), ("a5", 16)):
            client = LocalCompletionsAPI(
                model=name,
                base_url=f"{server.url}/v1/completions",
                tokenizer=str(embedded.model_path()),
                batch_size=batch_size,
                add_bos_token=True,  # as the tokenizer does
                max_length=engine.limits.max_context_tokens,
            )
            assert_equal(_evaluated(client, folder), wanted[name])


def test_the_command_line_reports_every_adapter(folder: Path, tmp_path: Path) -> None:
    written = tmp_path / "results.json"
    arguments = ["eval", "choice", "--include", folder, "--limit", 2, "--json", written, "-a", "turtle", "-a", "topics"]
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "base"
    assert [line.split()[0] for line in lines[-3:]] == ["base", "turtle", "topics"]
    results = json.loads(written.read_text())
    for line in lines[-3:]:
        name, accuracy, _ = line.split()
        assert float(accuracy) == pytest.approx(results[name]["results"]["choice"]["acc,none"], abs=1e-4)
    refused = CliRunner().invoke(app, ["eval", "choice", "-a", "nobody"])
    assert (refused.exit_code, "got adapter 'nobody', which is not in the folder" in refused.output) == (2, True)


def test_windows_of_long_texts_are_those_of_lm_eval(engine: Any, adapters: Any) -> None:
    class Short(AdapterLM):
        max_length = 16

    model, text = embedded.load_model().eval(), " ".join(WORDS * 4)
    request = [type("Request", (), {"args": (text,)})()]
    got = Short(Crowd(engine, embedded.load_tokenizer(), {"base": None}, lambda number: None), "base")
    rival = HFLM(model, tokenizer=embedded.load_tokenizer(), batch_size=1, max_length=16)
    assert got.loglikelihood_rolling(request) == pytest.approx(rival.loglikelihood_rolling(request), rel=1e-5)


def test_what_cannot_be_evaluated_is_refused(engine: Any, folder: Path) -> None:
    tokenizer = embedded.load_tokenizer()
    with pytest.raises(ConfigError, match="got 'no_such_task' as a task"):
        evaluate(engine, tokenizer, ["a0"], Tasks(("choice", "no_such_task"), (folder,)))
    with pytest.raises(ConfigError, match="got no adapter"):
        evaluate(engine, tokenizer, [], Tasks(("choice",), (folder,)))
    model = AdapterLM(Crowd(engine, tokenizer, {"base": None}, lambda number: None), "base")
    for given, words in (({"num_beams": 2}, "got 'num_beams'"), ({"max_gen_toks": 10**6}, "wanted fewer than")):
        with pytest.raises(ConfigError, match=words):
            model.generate_until([type("Request", (), {"args": ("a", given)})()])


def test_texts_that_are_drawn_are_drawn_once_each(engine: Any) -> None:
    model = AdapterLM(Crowd(engine, embedded.load_tokenizer(), {"base": None}, lambda number: None), "base")
    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    requests = [type("Request", (), {"args": ("def", drawn)})()] * 4
    first = model.generate_until(requests)
    assert len(set(first)) > 1
    assert model.generate_until(requests) == first
