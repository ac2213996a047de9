"""Replacing the two files of a checkpoint as one: new pair or old pair, and never one of each.

    folder/adapter_config.json, adapter_model.safetensors          the checkpoint
    folder/.roadie-save-XXXX/adapter_config.json, ...safetensors   the new pair, written and fsynced
    folder/.roadie-save-XXXX/previous/                             the old pair, from the moment it is moved out

Steps where the config changes: old config out, old weights out, new weights in, new config in; a reader finds no
config in between. An exception undoes the steps that were made. After a crash both pairs can be completed: moving
the new files in finishes the save, moving the previous ones back undoes it, whichever step was the last.
Where the config stays the same, one rename replaces the weights.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from roadie.checkpoint.layout import CONFIG_NAME, WEIGHTS_NAME
from roadie.checkpoint.refusal import writing

_STAGING_PREFIX = ".roadie-save-"
_PREVIOUS = "previous"


def replace_pair(folder: Path, config: str, tensors: Mapping[str, Tensor]) -> None:
    """Make `config` (the text) and `tensors` the checkpoint of `folder`; on an error, what was there stays whole."""
    with writing(folder):
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=folder))
        try:
            _stage(staging, config, tensors)
            _install(staging, folder)
        finally:
            _discard(staging, folder, created)


def advice_after_crash(folder: Path) -> str | None:
    """What to do about a save that was cut short in `folder`; None where there is none."""
    with suppress(OSError):
        left = [p for p in folder.iterdir() if p.name.startswith(_STAGING_PREFIX) and (p / _PREVIOUS).is_dir()]
        if left:
            last = max(left, key=lambda p: p.stat().st_mtime_ns)
            return (
                f"a save was interrupted: move the files in {last} here to finish it, or those in "
                f"{last / _PREVIOUS} to go back"
            )
    return None


def _stage(staging: Path, config: str, tensors: Mapping[str, Tensor]) -> None:
    config_file, weights_file = staging / CONFIG_NAME, staging / WEIGHTS_NAME
    config_file.write_bytes(config.encode())
    save_file(dict(tensors), weights_file, metadata={"format": "pt"})
    # safetensors 0.8 writes mode 0600 whatever the umask.
    weights_file.chmod(config_file.stat().st_mode & 0o777)
    for file in (config_file, weights_file):
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    (staging / _PREVIOUS).mkdir()
    sync_folder(staging)


def _install(staging: Path, folder: Path) -> None:
    if _same_bytes(staging / CONFIG_NAME, folder / CONFIG_NAME):
        os.replace(staging / WEIGHTS_NAME, folder / WEIGHTS_NAME)
        sync_folder(folder)
        return
    old = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if (folder / name).exists()]
    moves_out = [(folder / name, staging / _PREVIOUS / name) for name in old]
    moves_in = [(staging / name, folder / name) for name in (WEIGHTS_NAME, CONFIG_NAME)]
    _move_all(moves_out + moves_in, folder)


def _same_bytes(new: Path, old: Path) -> bool:
    return old.is_file() and old.stat().st_size == new.stat().st_size and old.read_bytes() == new.read_bytes()


def _move_all(moves: list[tuple[Path, Path]], folder: Path) -> None:
    """Rename in order, each rename on the disk before the next; an exception undoes those that were made."""
    try:
        for source, target in moves:
            os.replace(source, target)
            sync_folder(folder)
    except BaseException:
        for source, target in reversed(moves):
            if not source.exists():
                os.replace(target, source)
        raise


def _discard(staging: Path, folder: Path, created: bool) -> None:
    names = (CONFIG_NAME, WEIGHTS_NAME)
    if any((staging / _PREVIOUS / name).exists() and not (folder / name).exists() for name in names):
        return  # old files that could not be put back: there is no other copy
    shutil.rmtree(staging, ignore_errors=True)
    if created:
        with suppress(OSError):  # not empty: the checkpoint is in it
            folder.rmdir()


def replace_file(file: Path, content: str | bytes, mode: int | None = None) -> None:
    """Make `content` what is in `file`, as a whole: written beside it, fsynced, renamed. mode: None: that of new files."""
    handle, scratch = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content if isinstance(content, bytes) else content.encode())
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask if mode is None else mode)
        Path(scratch).replace(file)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some file systems cannot
        sync_folder(file.parent)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new empty folder to write into, which becomes `target` when the block ends and vanishes when it raises.

    What was at `target` stays as it was until the new folder is complete, and comes back where that cannot take its name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        sync_folder(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
