"""Libraries that talk while a verb runs.

transformers imports torchao, and PEFT bitsandbytes, wherever they are installed, and both warn then of compiled parts that this
machine cannot use and nobody asked for. Whoever imports them cannot be told not to, so that what they log is left out.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("bitsandbytes", "torch.utils._pytree", "torchao", "triton")
"""Loggers of libraries that warn when they are imported."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block hints of libraries and future warnings are not shown, unless --verbose; undone afterwards.

    Errors are, and whatever is a warning to the user: Python's other warnings, and all that roadie logs.

    Bars of downloads and of loading stay, where a person can see them.
    """
    if logging.getLogger("roadie").isEnabledFor(logging.INFO):
        yield
        return
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    level, hide_bars = transformers_logging.get_verbosity(), not (sys.stderr.isatty() or are_progress_bars_disabled())
    transformers_logging.set_verbosity_error()
    if hide_bars:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), _errors_only(TALKATIVE), _warnings_on_a_line():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if hide_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _errors_only(names: tuple[str, ...]) -> Iterator[None]:
    """Within the block these loggers, and those below them, pass on errors alone."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _warnings_on_a_line() -> Iterator[None]:
    """Within the block a warning is written as what it says, without the place in the code."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
