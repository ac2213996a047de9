"""Ctrl-C, as a real signal: what is kept is said, and is enough to go on from.

Each way to be interrupted is tried once in a process of its own, and the others of its kind in this one, where nothing has to be
imported first.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from contextlib import contextmanager

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.signals import COMMAND_LINE

STEPS = 60
SETTINGS = ("--group-size", 16, "--lr", 0.01, "--batch-size", 4, "--max-steps", STEPS, "--checkpoint-steps", 1000)


@contextmanager
def started(*arguments, **options):
    """A process of the command line, whose standard error can be read line by line."""
    command = [*COMMAND_LINE, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def line_with(process, pattern):
    """The next line that has it; all before it are lost."""
    for line in process.stderr:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"the process ended without {pattern!r}")


@pytest.fixture
def ctrl_c():
    """Interrupts this process, as a terminal does where it is not in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def rest(process):
    output = process.stderr.read()
    process.wait()
    assert "Traceback" not in output, output
    return output


def test_the_first_ctrl_c_ends_after_a_step_with_a_checkpoint_that_goes_on_to_the_same_adapter(
    roadie_cli, tiny_path, texts, tmp_path
):
    arguments = ("train", texts, "-m", tiny_path, *SETTINGS)
    with started(*arguments, "-o", tmp_path / "stopped") as process:
        line_with(process, rf"training: \d+/{STEPS} steps")
        process.send_signal(signal.SIGINT)
        line_with(process, "stopping after this step, with a checkpoint")
        said = rest(process)
    assert process.returncode == 130
    work = tmp_path / "stopped.training"
    (step,) = re.findall(r"Kept: the checkpoint after step (\d+) in (\S+)\.\n", said)
    assert step[1] == str(work)
    assert [path.name for path in work.glob("checkpoint-*")] == [f"checkpoint-{step[0]}"]
    assert not (tmp_path / "stopped").exists()

    (command,) = re.findall(r"Go on with: roadie (.*--resume)\n", said)
    resumed = roadie_cli(*shlex.split(command))
    assert resumed.exit_code == 0, resumed.output
    assert f"resumed from {step[0]}" in resumed.stdout
    assert roadie_cli(*arguments, "-o", tmp_path / "whole").exit_code == 0
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def environment_of(script, folder):
    """An environment whose Python begins with a script."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(script)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))}


def check_that_nothing_is_kept(status, said):
    assert status == 130
    assert "roadie: interrupted. Nothing" in said
    assert "Go on with" not in said


@pytest.mark.long
def test_before_the_first_step_nothing_is_kept(tiny_path, texts, tmp_path):
    """The model takes for ever to load, and says that it does."""
    script = (
        "import sys, time, transformers\n"
        "def load(*_, **__):\n"
        "    print('loading', file=sys.stderr, flush=True)\n"
        "    time.sleep(3600)\n"
        "transformers.AutoTokenizer.from_pretrained = load\n"
    )
    environment = environment_of(script, tmp_path / "scripts")
    before = sorted(tmp_path.iterdir())
    with started("train", texts, "-o", tmp_path / "a", "-m", tiny_path, env=environment) as process:
        line_with(process, "^loading$")
        process.send_signal(signal.SIGINT)
        said = rest(process)
    check_that_nothing_is_kept(process.returncode, said)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", ["train", "train-many", "find-lr"])
def test_before_the_first_step_of_any_verb_nothing_is_kept(
    roadie_cli, tiny_path, texts, tmp_path, monkeypatch, ctrl_c, verb
):
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(
        json.dumps({"jobs": [{"name": "a", "data": str(texts), "output": str(tmp_path / "a"), "steps": 1}]})
    )
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: ctrl_c())
    output = ("-o", tmp_path / "a") if verb == "train" else ()
    result = roadie_cli(verb, jobs if verb == "train-many" else texts, *output, "-m", tiny_path)
    check_that_nothing_is_kept(result.exit_code, result.stderr)
    assert sorted(tmp_path.iterdir()) == before


AT_STEP = 4
"""The step whose gradient is interrupted."""


def train_until(tiny_path, texts, interval, output):
    return ("train", texts, "-m", tiny_path, *SETTINGS[:-1], interval, "-o", output)


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_left(tiny_path, texts, tmp_path):
    """The step in which the first one comes takes for ever: its gradient waits."""
    script = (
        "import sys, time, torch\n"
        "backward, calls = torch.Tensor.backward, []\n"
        "def waits(self, *arguments, **more):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {AT_STEP}:\n"
        "        print('waiting', file=sys.stderr, flush=True)\n"
        "        while True:\n"
        "            time.sleep(0.01)\n"
        "    return backward(self, *arguments, **more)\n"
        "torch.Tensor.backward = waits\n"
    )
    environment = environment_of(script, tmp_path / "scripts")
    with started(*train_until(tiny_path, texts, 2, tmp_path / "some"), env=environment) as process:
        line_with(process, "^waiting$")
        process.send_signal(signal.SIGINT)
        line_with(process, "Ctrl-C again stops at once")
        process.send_signal(signal.SIGINT)
        said = rest(process)
    assert process.returncode == 130
    assert "the checkpoint after step 2 in" in said
    assert "Go on with" in said
    assert (tmp_path / "some.training").exists()


def test_a_second_ctrl_c_before_the_first_checkpoint_leaves_nothing(
    roadie_cli, tiny_path, texts, tmp_path, monkeypatch, caplog, ctrl_c
):
    backward, calls = torch.Tensor.backward, []

    def interrupted(self, *arguments, **more):
        calls.append(1)
        if len(calls) == AT_STEP:
            ctrl_c()
            assert "Ctrl-C again stops at once" in caplog.text
            ctrl_c()
        return backward(self, *arguments, **more)

    monkeypatch.setattr(torch.Tensor, "backward", interrupted)
    result = roadie_cli(*train_until(tiny_path, texts, 1000, tmp_path / "none"))
    assert len(calls) == AT_STEP
    check_that_nothing_is_kept(result.exit_code, result.stderr)
    assert "Nothing is kept" in result.stderr
    assert not (tmp_path / "none.training").exists()


def test_many_jobs_stop_with_a_checkpoint_and_go_on(roadie_cli, tiny_path, texts, tmp_path):
    def jobs_file(folder):
        folder.mkdir()
        common = {"data": str(texts), "group_size": 16, "batch_size": 4, "learning_rate": 0.01, "schedule": "constant"}
        jobs = [
            {"name": name, "steps": steps, "output": str(folder / name)} for name, steps in (("a", 4), ("b", STEPS))
        ]
        file = folder / "jobs.yaml"
        file.write_text(json.dumps({"model": str(tiny_path), "defaults": common, "jobs": jobs}))
        return file

    stopped, whole = jobs_file(tmp_path / "stopped"), jobs_file(tmp_path / "whole")
    with started("train-many", stopped) as process:
        line_with(process, "job a: finished")
        process.send_signal(signal.SIGINT)
        said = rest(process)
    assert process.returncode == 130
    work = tmp_path / "stopped" / "jobs.training"
    assert re.search(rf"Kept: the checkpoint after step \d+ in {re.escape(str(work))}; 1 finished jobs \(a\)\.\n", said)
    (command,) = re.findall(r"Go on with: roadie (.*--resume)\n", said)
    for arguments in (shlex.split(command), ["train-many", whole]):
        result = roadie_cli(*arguments)
        assert result.exit_code == 0, result.output
    ours, theirs = (load_file(tmp_path / name / "b" / "adapter_model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
