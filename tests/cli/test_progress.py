"""Without a terminal a verb says how far it is in whole lines, a bounded number of them; with one, in place."""

from __future__ import annotations

import json
import re
import sys

import pytest
from transformers import TrainerControl, TrainerState

from roadie.training.progress import LINES_OF_A_RUN, ProgressBar, ProgressLines, shown_progress, steps_between_lines

QUICK = ("--group-size", 16, "--batch-size", 8)


def plain_lines(result):
    """The lines of standard error, which hold nothing that moves a cursor."""
    assert result.exit_code == 0, result.output
    assert not re.search(r"[\r\x1b\x08]", result.stderr)
    return result.stderr.splitlines()


def test_train_says_the_first_and_the_last_step_and_some_between(roadie_cli, tiny_path, texts, tmp_path):
    given = ("train", texts, "-o", tmp_path / "a", "-m", tiny_path, "--max-steps", 43, "--eval-share", 0.25, *QUICK)
    lines = plain_lines(roadie_cli(*given))
    steps = [re.match(r"training: (\d+)/43 steps, loss=\d+\.\d{4}", line) for line in lines]
    assert all(steps), lines
    numbers = [int(match[1]) for match in steps]
    assert numbers == [1, *range(2, 43, 2), 43]
    assert "held-out=" in lines[-1]
    assert all(re.search(r", \d+ s left$", line) for line in lines)
    silent = roadie_cli(*given, "--overwrite", "--no-progress")
    assert plain_lines(silent) == []


@pytest.mark.parametrize("steps", [1, 7, 19, 20, 21, 999, 100_000])
def test_a_run_of_any_length_has_about_as_many_lines(steps):
    between = steps_between_lines(steps)
    assert between >= 1
    assert steps // between < 2 * LINES_OF_A_RUN


def test_a_resumed_training_says_its_first_step(capsys):
    """The losses of the former session are not said again."""
    lines, state = ProgressLines(), TrainerState(max_steps=200, global_step=57)
    lines.on_train_begin(None, state, TrainerControl())
    for step in (58, 59, 60):
        state.global_step = step
        lines.on_log(None, state, TrainerControl(), {"loss": 1.5, "learning_rate": 0.1})
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in said] == ["training: 58/200 steps", "training: 60/200 steps"]


def test_a_terminal_has_a_bar(monkeypatch):
    assert isinstance(shown_progress(), ProgressLines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(shown_progress(), ProgressBar)


def test_many_jobs_say_their_steps_and_how_each_ended(roadie_cli, tiny_path, texts, tmp_path):
    jobs = [
        {"name": f"job{number}", "output": str(tmp_path / f"{number}"), "steps": 4 * (number + 1)}
        for number in range(6)
    ]
    common = {"data": str(texts), "group_size": 16, "batch_size": 2, "learning_rate": 0.01}
    file = tmp_path / "jobs.yaml"
    file.write_text(json.dumps({"model": str(tiny_path), "defaults": common, "jobs": jobs}))
    lines = plain_lines(roadie_cli("train-many", file))
    assert re.fullmatch(r"step 1: (job\d 1/\d+ loss=\d+\.\d{4}, ){4}and 2 more", lines[0])
    assert [line.split(":")[0] for line in lines if line.startswith("step ")] == [f"step {n}" for n in range(1, 25)]
    ended = [line for line in lines if line.startswith("job ")]
    assert len(ended) == 6
    for job, line in zip(jobs, ended, strict=True):
        pattern = (
            rf"job {job['name']}: finished after {job['steps']} steps, loss=\d+\.\d{{4}}: {re.escape(job['output'])}"
        )
        assert re.fullmatch(pattern, line)
    assert plain_lines(roadie_cli("train-many", file, "--overwrite", "--no-progress")) == []


def test_a_search_says_each_rate_that_it_tried(roadie_cli, tiny_path, texts):
    result = roadie_cli("find-lr", texts, "-m", tiny_path, "--steps", 2, "--first", 0.01, "--group-size", 16)
    tried = [re.fullmatch(r"tried (\S+): held-out loss \d+\.\d{4}", line)[1] for line in plain_lines(result)]
    rows = [line.split()[0] for line in result.stdout.split("\n\n")[0].splitlines()[2:]]
    assert tried[0] == "0.01"
    assert sorted(tried, key=float) == rows
    assert "too short to trust" in result.stdout


def test_a_fit_says_every_so_many_layers(roadie_cli, tiny_path, trained, tmp_path):
    merged, given = tmp_path / "merged", ("-m", tiny_path, "--group-size", 16)
    assert roadie_cli("merge", trained["one"], "-o", merged).exit_code == 0
    lines = plain_lines(roadie_cli("fit", merged, *given, "-o", tmp_path / "fitted"))
    assert len(lines) == 1
    assert lines[0].startswith("fitted 10 layers, the last of them model.layers.")
