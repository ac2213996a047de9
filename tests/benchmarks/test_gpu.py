"""`make gpu`: what it plans, that nothing that fails takes others along, what a killed run keeps, and what becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from benchmarks import record
from benchmarks import report as document
from benchmarks.gpu import driver, plan, report, worker
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.assembled import assembled
from benchmarks.gpu.journal import BEGAN, DIED, ENDED, RUN, STOPPED, Journal
from benchmarks.gpu.plan import MIXED, NAMED, NAMED_PEFT, ONE, Case, Step
from benchmarks.gpu.setting import Setting
from benchmarks.rivals import FROZEN, PEFT_LORA, PEFT_ROAD, ROADIE, ROADIE_TRAINABLE
from tests.patience import HANG_S, until

from roadie.kernels.triton import TritonImplementation
from roadie.testing import random_adapter, relative_error
from roadie.testing.accuracy import unit_roundoff

STEPS = ["machine", "kernels", "tests", "layers", "decoding", "training", "figure"]
CPU = Setting("cpu", plan.TOY.sizes)
DTYPES = {"bfloat16", "float32", "float16"}


# What is planned


def test_the_most_important_comes_first_and_all_of_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert [step.name for step in plan.steps(tiny=False)] == STEPS
    assert [step.name for step in plan.steps(tiny=True)] == STEPS
    assert sum(plan.budget(tiny=False).values()) <= 480
    assert sum(plan.budget(tiny=False).values()) <= plan.LIMIT_S
    assert main(["--budget"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*STEPS, "together"))


@pytest.mark.parametrize("tiny", [True, False])
def test_every_case_has_a_title_of_its_own_and_belongs_to_one_process(tiny: bool) -> None:
    for step in plan.steps(tiny):
        titles = [case.title for case in step.cases]
        assert len(set(titles)) == len(titles)
        dealt = [case.title for index in range(step.shards) for case in step.shard(index)]
        assert sorted(dealt) == sorted(titles)


def test_a_step_has_more_than_its_share_of_the_time() -> None:
    planned = plan.steps(tiny=False)
    seconds = plan.LIMIT_S - plan.ASSEMBLING_S
    for step in planned:
        assert plan.most_s(step, planned, seconds) >= 1.5 * step.expected_s
        assert plan.most_s(step, planned, 1e6) > 1e4


def test_every_kernel_is_checked_in_every_dtype() -> None:
    (kernels,) = (step for step in plan.steps(tiny=False) if step.name == "kernels")
    for kind in ("rotation", "product", "prepared", "gradients"):
        assert {case.arguments["dtype"] for case in kernels.cases if case.kind == kind} == DTYPES
    routes = {(case.arguments["route"], case.arguments["dtype"]) for case in kernels.cases if case.kind == "rotation"}
    assert routes == {(route, dtype) for route in ("one", "rows", "repeat", "sizes") for dtype in DTYPES}


def test_the_figure_has_every_point_and_its_slowest_rival_is_last() -> None:
    steps = {step.name: step.cases for step in plan.steps(tiny=False)}
    hows = [case.arguments["how"] for case in steps["figure"]]
    assert hows == sorted(hows, key=[MIXED, NAMED, NAMED_PEFT].index)
    points = [
        case.arguments
        for case in (*steps["decoding"], *steps["figure"])
        if case.arguments["size"] == plan.REAL.figure and case.arguments["rows"] == 64
    ]
    for how, graphs in ((MIXED, {False, True}), (NAMED, {False}), (NAMED_PEFT, {False})):
        found = [(point["adapters"], point["graph"]) for point in points if point["how"] == how]
        assert sorted(found) == [(2**power, graph) for power in range(7) for graph in sorted(graphs)]


def test_the_shapes_are_those_of_the_models() -> None:
    llama, smollm2 = (plan.REAL.sizes[name] for name in (plan.LLAMA, plan.SMOLLM2))
    assert (llama["hidden"], llama["intermediate"], llama["kv_heads"]) == (4096, 14336, 8)
    assert (smollm2["hidden"], smollm2["layers"], smollm2["vocabulary"]) == (576, 30, 49152)


@pytest.mark.slow
def test_neither_the_plan_nor_the_record_needs_torch() -> None:
    code = "import sys; import benchmarks.gpu.__main__, benchmarks.gpu.assembled; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=driver.ROOT, check=True)


# What fails takes nothing along


def cases_of(*titles: str, seconds: float = 0) -> tuple[Case, ...]:
    return tuple(Case(title, "any", {}, seconds) for title in titles)


def call(case: Case) -> list[dict[str, Any]]:
    if case.title.startswith("bad"):
        raise ValueError("why")
    return [{"workload": case.title}]


def outcomes(journal: Journal) -> dict[str, str | None]:
    return {line["case"]: line.get("error") for line in journal.lines(ENDED)}


def test_a_case_that_raises_is_written_down_and_the_next_begins(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    cases = cases_of("one", "bad", "two")
    assert worker.work(journal, "s", "s/0", cases, time.monotonic() + HANG_S, call, lambda: False) == 0
    assert outcomes(journal) == {"one": None, "bad": "ValueError: why", "two": None}


def test_where_the_device_is_lost_another_process_does_the_rest(tmp_path: Path) -> None:
    journal, cases, later = Journal(tmp_path), cases_of("bad", "two"), time.monotonic() + HANG_S
    assert worker.work(journal, "s", "s/0", cases, later, call, lambda: True) == worker.LOST
    assert list(outcomes(journal)) == ["bad"]
    assert worker.work(journal, "s", "s/0", cases, later, call, lambda: True) == 0
    assert list(outcomes(journal)) == ["bad", "two"]  # and "bad" not again


def test_what_does_not_fit_into_the_time_that_is_left_is_not_begun(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    cases = (*cases_of("long", seconds=HANG_S), *cases_of("short"))
    assert worker.work(journal, "s", "s/0", cases, time.monotonic() + HANG_S / 2, call, lambda: False) == 0
    assert list(outcomes(journal)) == ["short"]


def test_a_missing_library_fails_the_cases_that_need_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    (case,) = (case for step in plan.steps(tiny=True) for case in step.cases if case.kind == "copying")
    with mock.patch.dict(sys.modules, {"benchmarks.gpu.timed": None}):
        worker.work(
            journal, "s", "s/0", (case,), time.monotonic() + HANG_S, lambda c: worker.call(CPU, c), lambda: False
        )
    assert "benchmarks.gpu.timed" in str(outcomes(journal)["copying"])


def test_a_line_that_was_being_written_is_passed_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.put(BEGAN, step="s", by="s/0", case="one")
    journal.put(ENDED, step="s", by="s/0", case="one", entries=[])
    journal.put(BEGAN, step="s", by="s/0", case="two")
    with journal.path.open("a") as file:
        file.write('\n{"what": "ended", "step": "s", "ca')
    assert journal.seen("s") == {"one"}
    assert [line["case"] for line in journal.unended()] == ["two"]
    journal.bury("s/1")
    assert journal.seen("s") == {"one"}
    journal.bury("s/0")
    assert outcomes(journal) == {"one": None, "two": DIED}


PROCESS = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.journal import BEGAN, ENDED, Journal
folder, by = Path(sys.argv[1]), sys.argv[2]
journal = Journal(folder)
journal.bury(by)
for case in sys.argv[3:]:
    if case in journal.seen("s"):
        continue
    if case == "nothing":
        os._exit(3)
    journal.put(BEGAN, step="s", by=by, case=case)
    if case == "crash":
        os.abort()
    if case == "hang":
        time.sleep(10**6)
    journal.put(ENDED, step="s", by=by, case=case, entries=[])
"""


def processes(folder: Path, cases: Sequence[Sequence[str]]) -> tuple[Step, driver.Command]:
    def command(step: Step, index: int, seconds: float) -> list[str]:
        return [sys.executable, "-c", PROCESS, str(folder), f"s/{index}", *cases[index]]

    return Step("s", cases_of(*(case for of_shard in cases for case in of_shard)), len(cases)), command


def here() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{driver.ROOT / 'src'}:{driver.ROOT}"}


@pytest.mark.slow
def test_a_crash_is_one_failure_and_another_process_does_the_rest(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    step, command = processes(tmp_path, [["one", "crash", "two"], ["nothing"], ["three"]])
    assert driver.run_step(step, journal, time.monotonic() + HANG_S, command, here())
    found = outcomes(journal)
    assert found.pop("crash") == DIED
    assert "before it did anything" in str(found.pop("process s/1"))
    assert found == {"one": None, "two": None, "three": None}


@pytest.mark.slow
def test_a_step_ends_with_its_time_and_what_it_was_at_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    step, command = processes(tmp_path, [["one", "hang", "two"]])
    late = SimpleNamespace(
        sleep=time.sleep, monotonic=lambda: float(any(each["case"] == "hang" for each in journal.unended()))
    )
    with mock.patch.object(driver, "time", late):
        assert not driver.run_step(step, journal, 0.5, command, here())
    assert [line["case"] for line in journal.lines(STOPPED)] == ["hang"]
    assert outcomes(journal) == {"one": None}


# What a run needs from the machine


def wheel(folder: Path, name: str, version: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n")


def test_wheels_are_used_where_the_package_is_older_or_missing(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for name, version in (("torch", "0.4"), ("peft", "9999.1"), ("roadie_needs_no_such_package", "1.0")):
        wheel(wheels, name, version)
    assert driver.unpack_newer(wheels, site) == ["peft", "roadie_needs_no_such_package"]
    assert "9999.1" in (site / "peft" / "__init__.py").read_text()
    assert driver.environment("cuda", wheels, site)["PYTHONPATH"].split(":")[0] == str(site)
    assert str(site) not in driver.environment("cuda", tmp_path / "no such folder", site)["PYTHONPATH"]


def test_kernels_are_compiled_on_a_gpu_and_interpreted_on_a_cpu(tmp_path: Path) -> None:
    assert driver.environment("cuda", tmp_path, tmp_path)["TRITON_INTERPRET"] == "0"
    assert driver.environment("cpu", tmp_path, tmp_path)["TRITON_INTERPRET"] == "1"


def test_the_command_refuses_what_cannot_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
    assert "add --tiny" in capsys.readouterr().err


# What is checked and measured


def checked(title: str) -> list[dict[str, Any]]:
    (case,) = (case for step in plan.steps(tiny=True) for case in step.cases if case.title.startswith(title))
    return worker.call(CPU, case)


needs_triton = pytest.mark.skipif(
    TritonImplementation().refusal(torch.device("cpu"), torch.float32, torch.float32) is not None,
    reason="Triton's interpreter is not here",
)


@needs_triton
@pytest.mark.parametrize("title", ["rotation, bfloat16, rows, 3 rows x 96", "rotation, float32, sizes"])
def test_right_kernels_pass(title: str) -> None:
    (entry,) = checked(title)
    assert set(entry["worst"]) == {"z", "grad_x", "own", "partner"}
    assert all(0 < error <= 1 for what, error in entry["worst"].items() if what in ("z", "grad_x"))


@needs_triton
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_right_gradients_and_products_pass(dtype: str) -> None:
    assert checked(f"gradients, {dtype}, keeping the output")
    assert checked(f"product, {dtype}")


def turned_backwards(self: Any, x: Any, out: Any, turns: Any) -> None:
    TRUE_ROTATE(self, x, out, turns._replace(cross=-turns.cross))


def with_swapped_sums(self: Any, grad: Any, kept: Any, grad_x: Any, turns: Any, own: Any, partner: Any) -> None:
    TRUE_BACKWARD(self, grad, kept, grad_x, turns, partner, own)


def a_little_off(self: Any, x: Any, out: Any, turns: Any) -> None:
    TRUE_ROTATE(self, x, out, turns._replace(direct=turns.direct * (1 + 2**-6)))


TRUE_ROTATE, TRUE_BACKWARD = TritonImplementation.rotate, TritonImplementation.backward


@needs_triton
@pytest.mark.parametrize(
    ("method", "wrong", "what"),
    [
        ("rotate", turned_backwards, "'z'"),
        ("rotate", a_little_off, "'z'"),
        ("backward", with_swapped_sums, "'own'"),
    ],
)
def test_wrong_kernels_do_not(method: str, wrong: Any, what: str) -> None:
    with mock.patch.object(TritonImplementation, method, wrong), pytest.raises(AssertionError, match=what):
        checked("rotation, bfloat16, rows, 3 rows x 96")


def test_layers_are_timed_with_frozen_adapters_but_the_one_that_says_otherwise() -> None:
    seen: dict[str, list[bool]] = {}
    from benchmarks.workloads import layer

    kept = layer.forward

    def forward(module: Any, parameters: list[Any], x: Any) -> Any:
        seen[type(module).__module__ + str(len(seen))] = [p.requires_grad for p in parameters]
        return kept(module, parameters, x)

    with mock.patch.object(layer, "forward", forward):
        (entry,) = checked("forward, 64 to 128, 1 tokens, graph")
    assert list(entry["rivals"]) == [FROZEN, ROADIE, ROADIE_TRAINABLE, PEFT_ROAD, PEFT_LORA]
    assert [any(trained) for trained in seen.values()] == [False, False, True, False, False]
    assert entry["case"]["graph"]
    assert entry["kernels"] == 1
    (trained,) = checked("forward+backward, 64 to 64, 4 tokens")
    assert list(trained["rivals"]) == [FROZEN, ROADIE, PEFT_ROAD, PEFT_LORA]


def test_rows_that_are_named_once_decode_each_in_its_own_adapter() -> None:
    from benchmarks.gpu import timed
    from benchmarks.workloads import adapters
    from benchmarks.workloads.model import TARGETS, ModelSize

    models = timed._models(CPU, ModelSize(**CPU.sizes["a toy"]), 4, MIXED)

    def logits(count: int, named: list[int]) -> torch.Tensor:
        with torch.no_grad(), timed._rows(models, 4, count, MIXED):
            return adapters.step(ROADIE, models[ROADIE], named, 4, named=False)()

    mixed, first = logits(2, [0, 1, 0, 1]), logits(1, [0, 0, 0, 0])
    u = unit_roundoff(torch.bfloat16)
    assert relative_error(mixed[::2], first[::2]) < 4 * u
    assert relative_error(mixed[1::2], first[1::2]) > 4 * u
    frozen = adapters.step(FROZEN, models[FROZEN], [0] * 4, 4, named=False)()
    assert relative_error(first, frozen) > 4 * u
    adapted = random_adapter(models[FROZEN], 0, group_size=64).layers
    assert {path.rpartition(".")[2] for path in adapted} == set(TARGETS)


def test_what_cannot_be_captured_says_so_and_the_others_go_on() -> None:
    from benchmarks.gpu import timed

    def captured(run: Any) -> Any:
        if run() == "reads the device":
            raise RuntimeError("not while capturing\nand more")
        return run

    on_gpu = Setting("cuda", {})
    runs = {FROZEN: lambda: "works", ROADIE: lambda: "reads the device", PEFT_LORA: lambda: "works"}
    with mock.patch.object(timed, "captured", captured), mock.patch.object(torch.cuda, "synchronize"):
        graphs, refused = timed._as_graphs(on_gpu, runs)
        assert list(graphs) == [FROZEN, PEFT_LORA]
        assert refused == {ROADIE: "RuntimeError: not while capturing"}
        with pytest.raises(RuntimeError, match="not while capturing"):
            timed._as_graphs(on_gpu, {FROZEN: runs[ROADIE]})


PYTEST_FILE = """
import os, pytest

def test_right(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip
def test_skipped(): pass
def test_crash(): os.abort()
"""


@pytest.mark.slow
def test_tests_are_dealt_to_parts_and_each_is_written_down(tmp_path: Path) -> None:
    """Also where one of them ends the process: the next one goes on behind it."""
    (tmp_path / "pytest.ini").write_text("[pytest]")
    (tmp_path / "test_some.py").write_text(PYTEST_FILE)
    (tmp_path / "test_none.py").write_text("import pytest; pytest.skip('no device', allow_module_level=True)")
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    journal = Journal(tmp_path)
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu import suite; from benchmarks.gpu.journal import Journal\n"
        "folder, index = Path(sys.argv[1]), int(sys.argv[2]); journal = Journal(folder); journal.bury(f's/{index}')\n"
        "part = suite.Part(journal, 's', f's/{index}', index, 2, 1e6, lambda: False)\n"
        "sys.exit(not suite.run(part, (sys.argv[1],)))"
    )
    step = Step("s", cases_of("one", "two"), 2)

    def command(step: Step, index: int, seconds: float) -> list[str]:
        return [sys.executable, "-c", code, str(tmp_path), str(index)]

    assert driver.run_step(step, journal, time.monotonic() + HANG_S, command, here())
    found = {name.rpartition("/")[2].rpartition(":")[2]: error for name, error in outcomes(journal).items()}
    assert found.pop("test_right") is found.pop("test_skipped") is found.pop("test_none.py") is None
    assert "assert 1 == 2" in str(found.pop("test_wrong"))
    assert "no_such_module" in str(found.pop("test_broken.py"))
    assert found == {"test_crash": DIED}


# What becomes of it

MS = {"median_ms": 1.0, "q1_ms": 1.0, "q3_ms": 1.0}


def ratio(value: float) -> dict[str, float]:
    return dict.fromkeys(("value", "low", "high"), value)


def timed_entry(workload: str, case: dict[str, Any], ratios: dict[str, float], **more: Any) -> dict[str, Any]:
    ours = ratios.get(ROADIE)
    rivals = {
        name: {**MS, "median_ms": value, "ratio": ratio(value)}
        | ({} if ours is None or name == ROADIE else {"ratio_to_roadie": ratio(value / ours)})
        for name, value in {FROZEN: 1.0, **ratios}.items()
    }
    head = {"workload": workload, "case": case, "threads": 2, "rounds": 5, "calls": 1, "base": FROZEN}
    return {**head, "bytes_moved": 10**9, "kernels": 5, "rivals": rivals, **more}


def decoding(adapters: int, how: str, graph: bool, ratios: dict[str, float]) -> dict[str, Any]:
    case = {"model": "m", "rows": 8, "adapters": adapters, "how": how, "context": 4, "graph": graph}
    return timed_entry("decoding", case, ratios)


def a_journal(folder: Path) -> Journal:
    """As a killed run leaves it: the machine, a kernel that is right, one that is not, some times, one unended."""
    machine = {"name": "some-gpu", "cores": 16, "versions": {"torch": "2.11"}}
    layer = {"mode": "forward+backward", "precision": "bf16", "out_features": 64, "in_features": 32, "graph": False}
    training = {"model": "m", "mode": "training step", "rows": 1, "tokens": 8, "graph": False}
    amounts = {FROZEN: 2**20, ROADIE: 2**21}
    ended = {
        ("machine", "machine"): [
            {"workload": "machine", "machine": machine, "commit": {"commit": "unknown", "dirty": False}}
        ],
        ("machine", "copying"): [{"workload": "copying", "bytes_per_s": 1e12}],
        ("kernels", "right"): [{"workload": "kernels", "worst": {"z": 0.5, "own": 0.25}}],
        ("tests", "a test"): [{"workload": "tests", "outcome": "skipped"}],
        ("layers", "l"): [timed_entry("layer", {**layer, "tokens": 4096}, {ROADIE: 1.11, PEFT_LORA: 1.2})],
        ("decoding", "d"): [decoding(1, ONE, False, {ROADIE: 1.5, PEFT_LORA: 1.2})],
        ("decoding", "e"): [decoding(8, MIXED, True, {ROADIE: 1.14})],
        ("figure", "f"): [decoding(2, MIXED, True, {ROADIE: 1.12})],
        ("figure", "g"): [decoding(2, NAMED, False, {report.ROADIE_NAMED: 2.0})],
        ("training", "t"): [timed_entry("training", training, {ROADIE: 1.1}, bytes=amounts, peak_bytes=amounts)],
    }
    journal = Journal(folder)
    journal.put(RUN, tiny=False, device="cuda", date="2026-01-02T03:04:05Z", commit="abc", limit_s=450)
    for (step, case), entries in ended.items():
        journal.put(ENDED, step=step, by=f"{step}/0", case=case, seconds=1, entries=entries)
    journal.put(ENDED, step="kernels", by="kernels/1", case="wrong", seconds=1, error="AssertionError: off")
    journal.put(BEGAN, step="figure", by="figure/0", case="cut off")
    return journal


def test_the_record_of_a_killed_run_has_what_it_did_and_says_what_is_missing(tmp_path: Path) -> None:
    made = assembled(a_journal(tmp_path))
    assert (made["kind"], made["quick"], made["commit"], made["machine"]["name"]) == ("gpu", False, "abc", "some-gpu")
    assert [entry["workload"] for entry in made["entries"]] == ["layer", *["decoding"] * 4, "training"]
    assert {(failure["task"], failure["error"]) for failure in made["failures"]} == {
        ("kernels: wrong", "AssertionError: off"),
        ("figure: cut off", DIED),
    }
    assert made["checks"]["kernels"] == {"passed": 1, "failed": 1, "skipped": 0, "largest_error_in_bounds": 0.5}
    assert made["checks"]["tests"] == {"passed": 0, "failed": 0, "skipped": 1}
    planned = {f"{step.name}: {case.title}" for step in plan.steps(tiny=False) for case in step.cases}
    assert set(made["left_out"]) == planned - {"machine: machine", "machine: copying"}


def test_a_run_that_is_ended_leaves_a_record(tmp_path: Path) -> None:
    a_journal(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.object(driver, "run", side_effect=lambda *_: signal.raise_signal(signal.SIGTERM)),
        mock.patch.object(sys, "path", [*sys.path]),
        pytest.raises(SystemExit),
    ):
        main(["--folder", str(tmp_path)])
    signal.signal(signal.SIGTERM, before)
    assert len(record.read(tmp_path / "record.json")["entries"]) == 6


def test_a_record_is_kept_under_the_machines_name_and_goes_into_the_document(tmp_path: Path) -> None:
    a_journal(tmp_path)
    results = tmp_path / "results"
    with mock.patch.object(record, "RESULTS", results):
        assert main(["--keep", str(tmp_path)]) == 1  # a kernel was wrong
    assert [path.relative_to(results) for path in results.rglob("*.json")] == [
        Path("some-gpu", "2026-01-02-abc-gpu.json")
    ]
    newest, cpu = record.newest(record.GPU, results), record.newest(record.CPU)
    assert cpu is not None
    assert "## On a GPU\n\nsome-gpu, commit abc" in document.text_of(cpu, newest)


def test_each_time_has_its_bound_beside_it(tmp_path: Path) -> None:
    made = assembled(a_journal(tmp_path))
    for entry in made[
        "entries"
    ]:  # 1 ms of the base; a gigabyte at a terabyte a second is another, and five kernels of 2 us
        assert entry["limit_ms"] == pytest.approx(2.01)
        assert entry["bound_ms"] == pytest.approx(1 + 1.3 * (1 + 0.01))


def test_the_document_says_all_of_it(tmp_path: Path) -> None:
    text = "\n".join(report.section(assembled(a_journal(tmp_path))))
    for words in (
        "some-gpu, commit abc",
        "copies 1000 GB/s",
        "Kernels against float64: 1 passed, 1 failed, 0 skipped; the largest error is 0.50",
        "kernels: wrong failed: AssertionError: off",
        "2.313: met",
        "layers: 48 left out",
        "1.0 (1.00) | 2.0 (2.00)",
    ):
        assert words in text, words


def test_what_roadie_is_built_for_is_held_against_the_record(tmp_path: Path) -> None:
    aims = {aim.about: (aim.at_most, aim.is_met) for aim in report.aims(assembled(a_journal(tmp_path))["entries"])}
    assert aims == {
        "layer, forward+backward, 32 to 64, 4096 tokens": (1.10, False),
        "decoding, m, rows: 8, adapters: 1, over PEFT LoRA r=8": (1.0, False),
        "decoding, m, rows: 8, adapters: 8, graph": (1.15, True),
        "decoding, m, rows: 8, adapters: 2, graph": (1.15, True),
    }


def test_the_figure_is_drawn_of_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib: pip install roadie[bench]")
    from benchmarks import plots

    made = assembled(a_journal(tmp_path))
    assert report.figure(made["entries"]) == {
        "frozen, graph": [(2, 8000.0), (8, 8000.0)],
        "roadie, graph": [(2, 8000 / 1.12), (8, 8000 / 1.14)],
        "frozen": [(2, 8000.0)],
        "roadie, adapter_names": [(2, 4000.0)],
    }
    assert plots.adapters_plot(made, tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_does_not_even_know_its_machine_makes_no_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.put(RUN, tiny=True, device="cpu", date="", commit=None, limit_s=1)
    with pytest.raises(ValueError, match="run it again"):
        assembled(journal)


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_run_keeps_what_it_had_and_goes_on_from_there(tmp_path: Path) -> None:
    """The whole of it at toy sizes, in two parts."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--tiny",
        "--folder",
        str(tmp_path),
        "--limit-s",
        str(100 * HANG_S),
    ]
    journal = Journal(tmp_path)
    first = subprocess.Popen(command, cwd=driver.ROOT, env=here(), stdout=subprocess.DEVNULL)
    until(lambda: len(journal.seen("kernels")) >= 2 or first.poll() is not None)
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: not processes_in(tmp_path))
    kept = assembled(journal)
    assert kept["checks"]["kernels"]["passed"] >= 2
    assert len(kept["left_out"]) > 0

    done = subprocess.run(command, cwd=driver.ROOT, env=here(), capture_output=True, text=True, check=False)
    made = assembled(journal)
    assert made["left_out"] == [], done.stdout
    assert {failure["error"] for failure in made["failures"]} <= {DIED}, done.stdout
    assert len(made["failures"]) <= plan.TOY.shards  # what was killed in the middle, in each process
    assert made["entries"] == assembled(journal)["entries"]
    assert {entry["workload"] for entry in made["entries"]} == {"layer", "decoding", "training"}
    assert made["checks"]["tests"]["passed"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.jsonl", "log.txt", "record.json"]


def processes_in(folder: Path) -> list[str]:
    """The command lines of processes that name a folder; none where the system does not tell."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:  # it has ended meanwhile
            continue
    return [line for line in lines if str(folder) in line and "benchmarks.gpu" in line]
