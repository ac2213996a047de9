"""Folders that appear whole or not at all: written under a temporary name beside their place, then renamed."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roadie.checkpoint.replacement import replaced_folder
from roadie.errors import RoadieError


class OutputExists(RoadieError, FileExistsError):
    """The output folder holds something already, and overwriting was not asked for."""


class OutputRefused(RoadieError, OSError):
    """Nothing can be written where the output shall be."""


def check_free(
    output: Path, *, overwrite: bool = False, advice: str = "choose another folder, or overwrite (--overwrite)"
) -> None:
    """Raise `OutputExists` unless `output` is absent, an empty folder, or may be overwritten; a file never may.

    Raises `OutputRefused` where nothing can be written there.
    """
    check_writable(output)
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise OutputExists(
            f"{output}: got something that is not a plain folder; wanted a new folder; choose another name"
        )
    if any(output.iterdir()) and not overwrite:
        raise OutputExists(f"{output}: got a folder that is not empty; wanted a new one; {advice}")


def check_file(output: Path) -> None:
    """Raise `OutputExists` for a folder, and as `check_writable`; a file of that name will be replaced."""
    if output.is_dir():
        raise OutputExists(f"{output}: got a folder; wanted the name of a file; choose another name")
    check_writable(output)


def check_writable(output: Path) -> None:
    """Raise `OutputRefused` unless `output` can be made where it shall be, with the folders above it.

    A folder is made there, and removed, since what a disk allows is known by trying. Nothing else is changed.
    """
    above = next(folder for folder in output.absolute().parents if folder.exists() or folder.is_symlink())
    if not above.is_dir():
        raise OutputRefused(
            f"{output}: got {above}, which is no folder, on the way; wanted folders; choose another name"
        )
    try:
        Path(tempfile.mkdtemp(prefix=".roadie-", dir=above)).rmdir()
    except OSError as error:
        raise OutputRefused(
            f"{output}: got {above}, into which nothing can be written ({error.strerror}); wanted a folder that can be "
            "written; choose another one"
        ) from error


@contextmanager
def whole_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new empty folder to write into, which becomes `output` when the block ends and vanishes when it raises.

    An `output` that is overwritten stays as it was until the new folder is complete. A process that is told to terminate
    in the block, as torchrun tells those of a training of which one has failed, cleans up before it does.
    """
    check_free(output, overwrite=overwrite)
    with _termination_raises(), replaced_folder(output) as new:
        yield new


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit, where nobody else has said what it does."""
    is_ours = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not is_ours:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
