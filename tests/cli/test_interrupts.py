"""Ctrl-C, as a real signal to a real process: what is kept is said, and is enough to go on from."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
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


def rest(process):
    output = process.stderr.read()
    process.wait()
    assert "Traceback" not in output, output
    return output


def test_the_first_ctrl_c_ends_after_a_step_with_a_checkpoint_that_goes_on_to_the_same_adapter(
    tiny_path, texts, tmp_path
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
    resumed = subprocess.run(
        [sys.executable, "-m", "roadie.cli", *shlex.split(command)], capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed from {step[0]}" in resumed.stdout
    whole = [sys.executable, "-m", "roadie.cli", *map(str, arguments), "-o", str(tmp_path / "whole")]
    assert subprocess.run(whole, capture_output=True, check=False).returncode == 0
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def slow_loading(folder):
    """An environment in which the model takes for ever to load, and says that it does."""
    (folder / "sitecustomize.py").write_text(
        "import sys, time, transformers\n"
        "def load(*_, **__):\n"
        "    print('loading', file=sys.stderr, flush=True)\n"
        "    time.sleep(3600)\n"
        "transformers.AutoTokenizer.from_pretrained = load\n"
    )
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))}


@pytest.mark.parametrize("verb", ["train", "train-many", "find-lr"])
def test_before_the_first_step_nothing_is_kept(tiny_path, texts, tmp_path, verb):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    environment = slow_loading(scripts)
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(
        json.dumps({"jobs": [{"name": "a", "data": str(texts), "output": str(tmp_path / "a"), "steps": 1}]})
    )
    arguments = {"train": (texts, "-o", tmp_path / "a"), "train-many": (jobs,), "find-lr": (texts,)}[verb]
    before = sorted(tmp_path.iterdir())
    with started(verb, *arguments, "-m", tiny_path, env=environment) as process:
        line_with(process, "^loading$")
        process.send_signal(signal.SIGINT)
        said = rest(process)
    assert process.returncode == 130
    assert "roadie: interrupted. Nothing" in said
    assert "Go on with" not in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_left(tiny_path, texts, tmp_path):
    """The step in which the first one comes takes for ever: its gradient waits."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "sitecustomize.py").write_text(
        "import sys, time, torch\n"
        "backward, calls = torch.Tensor.backward, []\n"
        "def waits(self, *arguments, **more):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4:\n"
        "        print('waiting', file=sys.stderr, flush=True)\n"
        "        while True:\n"
        "            time.sleep(0.01)\n"
        "    return backward(self, *arguments, **more)\n"
        "torch.Tensor.backward = waits\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(scripts), os.environ.get("PYTHONPATH", "")))}
    for name, interval, kept in (("some", 2, "the checkpoint after step 2 in"), ("none", 1000, "Nothing is kept")):
        arguments = ("train", texts, "-m", tiny_path, *SETTINGS[:-1], interval, "-o", tmp_path / name)
        with started(*arguments, env=environment) as process:
            line_with(process, "^waiting$")
            process.send_signal(signal.SIGINT)
            line_with(process, "Ctrl-C again stops at once")
            process.send_signal(signal.SIGINT)
            said = rest(process)
        assert process.returncode == 130
        assert kept in said
        assert ("Go on with" in said) == (tmp_path / f"{name}.training").exists() == (name == "some")


def test_many_jobs_stop_with_a_checkpoint_and_go_on(tiny_path, texts, tmp_path):
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
    for arguments in (shlex.split(command), ["train-many", str(whole)]):
        done = subprocess.run(
            [sys.executable, "-m", "roadie.cli", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(tmp_path / name / "b" / "adapter_model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
