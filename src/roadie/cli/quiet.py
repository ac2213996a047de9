"""Libraries that talk while a verb runs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block transformers' hints and future warnings are not shown, unless --verbose; undone afterwards.

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if hide_bars:
            transformers_logging.enable_progress_bar()
