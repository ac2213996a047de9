"""Libraries are quiet while a verb runs, roadie is not, and afterwards everything is as it was."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from roadie.cli.quiet import quiet_libraries


@pytest.fixture
def roadie_logger():
    logger = logging.getLogger("roadie")
    before = logger.level
    yield logger
    logger.setLevel(before)


@pytest.fixture
def verbosity():
    """A level of transformers' that is neither its default nor the quiet one."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.DEBUG)
    yield logging.DEBUG
    transformers_logging.set_verbosity(before)


def interrupted_while_quiet():
    with quiet_libraries():
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert are_progress_bars_disabled()  # standard error is no terminal here
        raise KeyboardInterrupt


def test_libraries_are_quiet_and_then_as_before(roadie_logger, verbosity):
    roadie_logger.setLevel(logging.WARNING)
    before = are_progress_bars_disabled()
    with pytest.raises(KeyboardInterrupt):
        interrupted_while_quiet()
    assert transformers_logging.get_verbosity() == verbosity
    assert are_progress_bars_disabled() == before


def test_warnings_of_the_future_are_left_out(roadie_logger):
    roadie_logger.setLevel(logging.WARNING)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn("later", FutureWarning, stacklevel=1)
            warnings.warn("now", UserWarning, stacklevel=1)
        warnings.warn("again", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["now", "again"]


def test_what_libraries_log_when_they_are_imported_is_left_out(roadie_logger, caplog):
    roadie_logger.setLevel(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("torchao", "bitsandbytes.backends.cpu.ops", "torch.utils._pytree")]
    before = [logger.level for logger in loggers]
    with quiet_libraries():
        for logger in loggers:
            logger.warning("no such library")
            logger.error("an error")
        roadie_logger.warning("a warning to the user")
    assert [record.getMessage() for record in caplog.records] == ["an error"] * 3 + ["a warning to the user"]
    assert [logger.level for logger in loggers] == before


def spoken(*arguments):
    """What a process of its own writes to standard error."""
    command = [sys.executable, "-m", "roadie.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_verb_says_nothing_before_its_answer(tiny_path, texts, tmp_path):
    """PEFT and transformers, with all that they import, each in a process that imports them for the first time."""
    adapter = tmp_path / "adapter"
    quick = ("--group-size", 16, "--max-steps", 1, "--batch-size", 8, "--no-progress")
    assert spoken("train", texts, "-m", tiny_path, "-o", adapter, *quick) == ""
    assert spoken("generate", "07 is ", "-a", adapter, "-n", 2) == ""


def test_verbose_leaves_everything_as_it_is(roadie_cli, roadie_logger, verbosity, tmp_path):
    roadie_cli("--verbose", "info", tmp_path)
    assert roadie_logger.level == logging.INFO
    with quiet_libraries():
        assert transformers_logging.get_verbosity() == verbosity
    roadie_cli("info", tmp_path)
    assert roadie_logger.level == logging.WARNING
