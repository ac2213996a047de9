"""Errors of adapter files: each names the file, the key, what was got, what was wanted, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError

from roadie.errors import AdapterError, CheckpointError, ConfigError


def refuse(file: Path, key: str | None, got: str, wanted: str, do: str, cause: Exception | None = None) -> NoReturn:
    """Raise `CheckpointError` for `key` of `file` (None: the file as a whole), caused by `cause`."""
    where = f"{file}: {key}" if key else f"{file}"
    raise CheckpointError(f"{where}: got {got}; wanted {wanted}; {do}") from cause


def shown(error: Exception) -> str:
    """What an exception says, short enough for a message."""
    return str(error)[:200] or type(error).__name__


@contextmanager
def about(file: Path, key: str | None = None) -> Iterator[None]:
    """Errors of values become errors of the file and key that they came from."""
    try:
        yield
    except (ConfigError, AdapterError) as error:
        raise CheckpointError(f"{file}: {key}: {error}" if key else f"{file}: {error}") from error


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Errors of the system become errors of the file that was read."""
    try:
        yield
    except OSError as error:
        refuse(file, None, f"a file that cannot be read ({shown(error)})", "a readable file", "check it", error)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Errors of the system and of safetensors become errors of the folder that was written."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        got = f"an adapter that could not be written ({shown(error)})"
        do = "free space or choose another folder; a checkpoint that was there stays whole"
        refuse(folder, None, got, "a writable folder with room", do, error)
