"""Where the losses of a training are reported to while it runs: transformers' own integrations (TensorBoard, wandb, ...)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from roadie.errors import ConfigError
from roadie.training.recipe import nearest

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


def check_reports(names: Sequence[str]) -> None:
    """Raise `ConfigError` unless transformers knows each of the names, and finds what it needs installed."""
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known, here = sorted(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise ConfigError(f"got report_to={name!r}{nearest(name, known)}; wanted some of {', '.join(known)}")
        if name not in here:
            raise ConfigError(
                f"got report_to={name!r}, whose package is not installed; wanted it installed, or one of those that are "
                f"({', '.join(here) or 'none'}); run: pip install {name.replace('_', '-')}"
            )


@contextmanager
def kept_reports(names: Sequence[str], output: Path) -> Iterator[None]:
    """TensorBoard's files, unless the user has named a place for them, go to ``OUTPUT.runs``, which outlives the training.

    transformers would put them into the working folder, and takes another place from the environment alone.
    """
    if "tensorboard" not in names or _TENSORBOARD in os.environ:
        yield
        return
    os.environ[_TENSORBOARD] = str(output.absolute().with_name(f"{output.name}.runs"))
    try:
        yield
    finally:
        del os.environ[_TENSORBOARD]
