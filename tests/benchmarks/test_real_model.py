"""Whole models: the steps that are timed do what they say, rivals share all but their adapters, bounds are the stated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import plan, real_model, record, report, run
from benchmarks.rivals import (
    FROZEN,
    PEFT_LORA,
    PEFT_ROAD,
    PRECISIONS,
    ROADIE,
    ROADIE_STAGES,
    adapt,
    adapted_layers,
    check_rival,
    sharing_copy,
)
from benchmarks.verdicts import bound_of
from benchmarks.workloads import real_model as whole
from benchmarks.workloads.model import DECODE, TRAINING
from benchmarks.workloads.real_model import CHECKPOINT, MIXED_NAMES, NAMES, ONE_TOKEN, RESIDENTS, Shapes, WholeCase

from roadie.testing import relative_error, tiny_llama

FP32 = PRECISIONS["fp32"]
ADAPTERS = 3
# Longer sums in another order than those of the whole sequence, and of a batch of one: errors of some 2^-24, layer by layer.
ALIKE = 1e-5


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return whole.load(plan.TINY_CHECKPOINT, torch.float32)


@pytest.fixture(scope="module")
def single(base: torch.nn.Module) -> whole.Models:
    return whole.single_models(base, FP32)


@pytest.fixture(scope="module")
def mixed(base: torch.nn.Module) -> whole.Models:
    return whole.mixed_models(base, ADAPTERS)


def own_parameters(model: torch.nn.Module, base: torch.nn.Module) -> list[torch.nn.Parameter]:
    theirs = {id(parameter) for parameter in base.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in theirs]


def test_every_step_that_a_user_is_told_of_is_measured_on_one_thread_and_on_two() -> None:
    found = whole.cases(Shapes(), "fp32")
    assert len(set(found)) == len(found)
    for threads in (1, 2):
        of_one = [case for case in found if case.adapters == 1 and case.threads == threads]
        assert [case.rows for case in of_one if case.mode == DECODE] == [1, 8, 32]
        assert [case.rows * case.tokens for case in of_one if case.mode == TRAINING] == [64, 256, 1024]
    assert {case.mode for case in found if case.adapters == 32} == {DECODE, TRAINING}
    assert found[0].rows == 1  # what has not begun when the time is over is left out: that is what takes longest
    assert {whole.tokens_in(case) for case in found[-3:]} == {1024}


def test_all_rivals_adapt_every_linear_layer_of_the_blocks_over_the_same_weights(
    base: torch.nn.Module, single: whole.Models, mixed: whole.Models
) -> None:
    assert tuple(single) == NAMES
    assert tuple(mixed) == MIXED_NAMES
    for name, model in [*single.items(), *mixed.items()]:
        assert {id(p) for p in base.parameters()} <= {id(p) for p in model.parameters()}, name
        if name != FROZEN:
            assert len(adapted_layers(model)) == 7 * 2  # q, k, v, o, gate, up, down of two layers
            assert own_parameters(model, base)


def test_rivals_of_different_layers_are_noticed(base: torch.nn.Module) -> None:
    one = adapt(sharing_copy(base), ROADIE, ["q_proj"], FP32)
    other = adapt(sharing_copy(base), PEFT_LORA, ["k_proj"], FP32)
    with pytest.raises(AssertionError, match="different layers"):
        whole._of_the_same_layers({FROZEN: base, ROADIE: one, PEFT_LORA: other})


def test_one_rotation_under_the_name_of_two_is_noticed(single: whole.Models) -> None:
    for name, claimed in ((ROADIE, ROADIE_STAGES), (ROADIE_STAGES, ROADIE)):
        with pytest.raises(AssertionError, match="this is not"):
            check_rival(single[name], claimed, FP32)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoding_step_gives_the_next_tokens_logits_each_time(name: str, single: whole.Models) -> None:
    case = WholeCase(DECODE, "fp32", rows=2, tokens=5, threads=1)
    tokens_BT = whole.tokens_of(single[name], 2, 6)
    with torch.no_grad():
        wanted = single[name](input_ids=tokens_BT).logits[:, -1:]
        frozen = single[FROZEN](input_ids=tokens_BT).logits[:, -1:]
    step = whole.once(name, single[name], case)
    for _ in range(3):
        assert relative_error(step(), wanted) < ALIKE
    assert name == FROZEN or relative_error(wanted, frozen) > 100 * ALIKE  # the adapter does something


@pytest.mark.parametrize("name", [ROADIE, PEFT_ROAD, PEFT_LORA])
@pytest.mark.parametrize("mode", [DECODE, ONE_TOKEN])
def test_each_row_of_a_mixed_step_gives_its_adapters_logits(mode: str, name: str, mixed: whole.Models) -> None:
    case = WholeCase(mode, "fp32", rows=4, tokens=1 if mode == ONE_TOKEN else 5, threads=1, adapters=ADAPTERS)
    model = mixed[name]
    got = whole.once(name, model, case)()
    tokens_BT = whole.tokens_of(model, 4, case.tokens + (mode == DECODE))
    of_row = []
    for row in range(4):
        model.set_adapter(f"a{row % ADAPTERS}")
        with torch.no_grad():
            of_row.append(model(input_ids=tokens_BT[row : row + 1]).logits[:, -1:])
    model.set_adapter("a0")
    wanted = torch.cat(of_row)
    assert relative_error(got, wanted) < ALIKE
    assert relative_error(got, wanted[[1, 2, 0, 1]]) > 100 * ALIKE


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_gives_gradients_to_the_embeddings_and_to_exactly_the_adapter(
    name: str, base: torch.nn.Module, single: whole.Models
) -> None:
    model, case = single[name], WholeCase(TRAINING, "fp32", rows=1, tokens=8, threads=1)
    own = own_parameters(model, base)
    with whole.adapters_trained({FROZEN: base, name: model}, trained=True):
        assert model.training
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own}
        of_embeddings, *of_adapter = whole.once(name, model, case)()
    assert of_embeddings.shape == (1, 8, plan.TINY.hidden)
    assert [gradient.shape for gradient in of_adapter] == [parameter.shape for parameter in own]
    assert all(bool(gradient.abs().sum() > 0) for gradient in (of_embeddings, *of_adapter))
    assert all(parameter.grad is None for parameter in model.parameters())  # those of the next step start from nothing


def test_a_mixed_training_step_trains_the_adapters_of_its_rows(base: torch.nn.Module, mixed: whole.Models) -> None:
    model, case = mixed[ROADIE], WholeCase(TRAINING, "fp32", rows=2, tokens=4, threads=1, adapters=ADAPTERS)
    with whole.adapters_trained({FROZEN: base, ROADIE: model}, trained=True):
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        _, *gradients = whole.once(ROADIE, model, case)()
    assert len(names) == ADAPTERS * 2 * 14
    for name, gradient in zip(names, gradients, strict=True):
        is_used = not name.endswith(".a2")  # rows 0 and 1 use a0 and a1
        assert bool(gradient is not None and gradient.abs().sum() > 0) == is_used, name


def test_what_is_trained_is_put_back(base: torch.nn.Module, single: whole.Models) -> None:
    before = {name: [p.requires_grad for p in model.parameters()] for name, model in single.items()}
    with whole.adapters_trained(single, trained=False):
        assert not any(p.requires_grad for model in single.values() for p in model.parameters())
        assert not any(model.training for model in single.values())
    assert before == {name: [p.requires_grad for p in model.parameters()] for name, model in single.items()}


def test_bytes_moved_are_those_of_every_output(single: whole.Models) -> None:
    # q, k, v, o and down have 64 outputs, gate and up 128; two layers.
    outputs = 2 * (5 * 64 + 2 * 128)
    decoding, training = WholeCase(DECODE, "fp32", 3, 9, 1), WholeCase(TRAINING, "bf16", 2, 9, 1)
    assert whole.bytes_moved(decoding, single[ROADIE]) == 2 * 3 * outputs * 4
    assert whole.bytes_moved(training, single[ROADIE]) == 5 * 2 * 9 * outputs * 2


def timed(workload: str, case: WholeCase, limit_ms: float = 1.0) -> dict[str, Any]:
    return {
        "workload": workload,
        "case": vars(case),
        "base": FROZEN,
        "limit_ms": limit_ms,
        "rivals": {FROZEN: {"median_ms": 1.0}},
    }


@pytest.mark.parametrize(
    ("workload", "case", "limit_ms", "bound"),
    [
        (CHECKPOINT, WholeCase(DECODE, "fp32", 1, 32, 1), 1.0, 1.03),
        (CHECKPOINT, WholeCase(DECODE, "fp32", 8, 32, 1), 1.0, 1.02),
        (CHECKPOINT, WholeCase(DECODE, "fp32", 32, 32, 1), 1.0, 1.02),
        (CHECKPOINT, WholeCase(DECODE, "fp32", 32, 32, 2), 1.0, None),
        (CHECKPOINT, WholeCase(DECODE, "fp32", 32, 32, 1, adapters=32), 1.0, 1.05),
        (CHECKPOINT, WholeCase(TRAINING, "fp32", 1, 64, 1), 1.0, 1.10),
        (CHECKPOINT, WholeCase(TRAINING, "fp32", 1, 256, 1), 1.0, 1.05),
        (CHECKPOINT, WholeCase(TRAINING, "fp32", 1, 1024, 1), 1.02, 1.03),
        (CHECKPOINT, WholeCase(TRAINING, "fp32", 1, 1024, 1), 1.04, 1.052),
        (CHECKPOINT, WholeCase(TRAINING, "fp32", 32, 32, 1, adapters=32), 1.0, None),
        (RESIDENTS, WholeCase(ONE_TOKEN, "fp32", 64, 1, 1, adapters=200), 1.0, 1.06),
    ],
)
def test_the_bounds_of_whole_models(workload: str, case: WholeCase, limit_ms: float, bound: float | None) -> None:
    assert bound_of(timed(workload, case, limit_ms)) == bound


def test_one_command_measures_a_folder_and_prints_the_section_and_the_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = tmp_path / "some-llama", tmp_path / "record.json"
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    assert real_model.main(["--quick", "--model", str(folder), "--output", str(path)]) == 0
    made = record.read(path)
    assert made["failures"] == made["left_out"] == []
    of_folder = [entry for entry in made["entries"] if entry["workload"] == CHECKPOINT]
    assert [entry["model"] for entry in of_folder] == ["some-llama"] * 6
    found = {(entry["case"]["mode"], entry["case"]["adapters"]): tuple(entry["rivals"]) for entry in of_folder}
    assert {names for (_, adapters), names in found.items() if adapters == 1} == {NAMES}
    assert (found[DECODE, 3], found[TRAINING, 3]) == (MIXED_NAMES, (FROZEN, ROADIE))
    assert all(entry["rivals"][FROZEN]["ratio"]["value"] == 1 for entry in made["entries"])
    assert all({"limit_ms", "parameters", "adapted_layers"} <= set(entry) for entry in made["entries"])
    text = capsys.readouterr().out
    assert {entry["adapted_layers"] for entry in of_folder} == {7}
    assert report.whole_models_section(made) in text
    assert "- decode, 1, 4 rows: roadie " in text
    assert "| 1    | decode, fp32, 1 row, 1 thread " in text
    assert str(tmp_path) not in path.read_text(encoding="utf-8")  # a record names the model, not where it lies


def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ROADIE_BENCH_MODEL", raising=False)
    refused = {
        "config.json": ["--model", str(tmp_path)],
        "--quick for a tiny random Llama": [],
        "use --threads 1": ["--processor-time", "--threads", "1", "2"],
        "--quick has steps of its own": ["--quick", "--most-tokens", "64"],
    }
    for said, arguments in refused.items():
        with pytest.raises(SystemExit):
            real_model.main(arguments)
        assert said in capsys.readouterr().err


def test_options_leave_steps_out_and_choose_the_clock(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    given = ["--most-tokens", "256", "--rounds", "3", "--processor-time", "--precision", "bf16"]
    options = real_model._parse(["--model", str(tmp_path), *given])
    shapes = real_model._shapes(options)
    assert (shapes.threads, shapes.training_tokens, shapes.mixed_training) == ((1,), (64, 256), ((32, 8),))
    budget = real_model._budget(options, whole.cases(shapes, "bf16")[0])
    assert (budget.seconds, budget.min_rounds, budget.processor_time) == (0, 3, True)
    titles = [task.title for task in real_model._tasks(options)]
    assert all("bf16" in title for title in titles[1:])  # after the residents
    assert len(titles) == 1 + 3 + 2 + 2 + 1


def test_the_environment_names_a_checkpoint_and_an_option_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("ROADIE_BENCH_MODEL", str(tmp_path))
    assert run._parse([]).checkpoint == whole.Checkpoint(tmp_path.name, tmp_path)
    assert run._parse(["--model-name", "of mine"]).checkpoint == whole.Checkpoint("of mine", tmp_path)


def test_all_benchmarks_go_on_without_a_checkpoint_and_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    residents = {"workload": RESIDENTS}
    monkeypatch.setattr(plan, "whole_models", lambda *_: [plan.Task("residents", lambda: [residents])])
    monkeypatch.setattr(plan, "full", lambda: [plan.Task("layer", lambda: [{"workload": "layer"}])])
    monkeypatch.setattr(run, "describe", lambda: {"name": "some machine", "copy_bytes_per_s": {"1": 1e9}})
    made = run.measure_everything(None, quick=False)
    assert "no checkpoint was given" in capsys.readouterr().out
    assert [entry["workload"] for entry in made["entries"]] == [RESIDENTS, "layer"]
    assert made["whole_models_s"] > 0
    assert not made["quick"]


def test_without_a_checkpoint_only_the_random_llama_is_planned() -> None:
    titles = [task.title for task in plan.whole_models(None, "fp32", Shapes(), plan.whole_budget)]
    assert titles == [f"{plan.RESIDENTS.name}: {ONE_TOKEN}, fp32, 64 x 1, 200 adapters, 1 threads"]
