"""Libraries are quiet while a verb runs, roadie is not, and afterwards everything is as it was."""

from __future__ import annotations

import logging
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


def test_verbose_leaves_everything_as_it_is(roadie_cli, roadie_logger, verbosity, tmp_path):
    roadie_cli("--verbose", "info", tmp_path)
    assert roadie_logger.level == logging.INFO
    with quiet_libraries():
        assert transformers_logging.get_verbosity() == verbosity
    roadie_cli("info", tmp_path)
    assert roadie_logger.level == logging.WARNING
