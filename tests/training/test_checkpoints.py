"""The working folder: which checkpoint a run goes on from."""

from __future__ import annotations

import json

import pytest

from roadie.training.checkpoints import last_complete, open_work, record_start, work_path

WHOLE = {"checkpoint-9": '{"global_step": 9}', "checkpoint-10": '{"global_step": 10}'}


def checkpoints(folder, states):
    for name, state in states.items():
        (folder / name).mkdir()
        if state is not None:
            (folder / name / "trainer_state.json").write_text(state)
    return folder


def test_the_one_with_the_most_steps_is_taken(tmp_path):
    assert last_complete(tmp_path) is None
    assert last_complete(checkpoints(tmp_path, WHOLE)).name == "checkpoint-10"


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("checkpoint-11", None),
        ("checkpoint-11", ""),
        ("checkpoint-11", '{"global_step": 11'),
        ("checkpoint-11", "[]"),
        ("checkpoint-11", "{}"),
        ("checkpoint-11", '{"global_step": 10}'),
        ("checkpoint-best", '{"global_step": 11}'),
    ],
)
def test_what_is_not_whole_is_passed_over(tmp_path, name, state):
    assert last_complete(checkpoints(tmp_path, {**WHOLE, name: state})).name == "checkpoint-10"


def test_a_run_that_never_started_is_started_anew(tmp_path):
    output = tmp_path / "adapter"
    work = work_path(output)
    work.mkdir()
    checkpoints(work, WHOLE)  # without settings.json nobody knows what they are of
    opened = open_work(output, {"seed": 0}, resume=True)
    assert (opened.path, opened.checkpoint, opened.loss_before) == (work, None, None)
    assert list(work.iterdir()) == []


def test_a_run_that_started_goes_on_with_what_it_measured(tmp_path):
    output = tmp_path / "adapter"
    work = open_work(output, {"seed": 0}, resume=False).path
    record_start(work, {"seed": 0}, 1.5)
    checkpoints(work, WHOLE)
    opened = open_work(output, json.loads('{"seed": 0}'), resume=True)
    assert (opened.checkpoint, opened.loss_before) == (work / "checkpoint-10", 1.5)
    assert {path.name for path in work.iterdir()} == {"settings.json", *WHOLE}
