"""The command line: the table of all jobs, what is printed at the end, and the exit status."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from roadie.cli.app import app
from roadie.cli.jobs_table import JobsLines, JobsTable, live_table
from roadie.training.many import train_many


@pytest.fixture
def jobs_file(some_jobs, tiny_path, tmp_path):
    def write(jobs):
        path = tmp_path / "jobs.yaml"
        path.write_text(yaml.safe_dump({"model": str(tiny_path), "jobs": jobs}))
        return path

    return write


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="roadie")


def test_the_final_table_and_resume(jobs_file, some_jobs):
    path = jobs_file(some_jobs(3))
    done = call("train-many", path)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines[2:5]] == [[f"job{n}", "finished", "8"] for n in range(3)]
    assert all(Path(line[-1]).is_dir() for line in lines[2:5])
    assert done.stdout.splitlines()[-1].endswith(f"logs in {path.with_suffix('.training')}")
    again = call("train-many", path, "--resume")
    assert again.stdout.count("finished before") == 3
    refused = call("train-many", path)
    assert refused.exit_code == 2
    assert "not empty" in refused.stderr


def test_a_failed_job_makes_the_exit_status_1(jobs_file, some_jobs):
    jobs = some_jobs(2)
    Path(jobs[0]["data"]).write_text("{")
    done = call("train-many", jobs_file(jobs))
    assert done.exit_code == 1
    assert f"roadie: job job0 failed: {jobs[0]['data']}, line 1: got bad JSON" in done.stderr
    assert "job1  finished" in done.stdout


def test_a_bad_jobs_file_is_one_message(jobs_file, some_jobs):
    path = jobs_file(some_jobs(1, lerning_rate=1))
    done = call("train-many", path)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"roadie: {path}: job 'job0': got unknown setting lerning_rate")


def test_the_table_shows_every_job_and_what_it_does(some_jobs, tiny_path):
    jobs, seen = some_jobs(4, eval_share=0.2, eval_steps=4), []
    Path(jobs[3]["data"]).write_text("{")

    class Screen(JobsTable):
        def on_step(self, reports, seconds):
            super().on_step(reports, seconds)
            seen.append(drawn(self))

    table = Screen()
    train_many(jobs, model=str(tiny_path), observers=[table])
    middle, end = seen[3], drawn(table)
    assert "3 training, 1 failed" in middle
    assert "tokens/s" in middle
    assert all(f"job{n}" in middle for n in range(4))
    assert middle.count("4/8") == 3
    assert end.count(" finished") == 3 + 1  # in the title too
    assert "and 2 more" in drawn(table, most_lines=2)


def drawn(table: JobsTable, most_lines: int = 10) -> str:
    screen = io.StringIO()
    Console(width=120, file=screen).print(table.table(most_lines))
    return screen.getvalue()


@pytest.mark.parametrize(
    ("terminal", "shown", "kinds"), [(True, True, [JobsTable]), (True, False, []), (False, True, [JobsLines])]
)
def test_a_table_is_drawn_for_people_and_lines_for_files(terminal, shown, kinds):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with live_table(console, shown=shown) as observers:
        assert [type(observer) for observer in observers] == kinds
