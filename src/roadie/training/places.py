"""Names of models, adapters and data: a place on this machine, or a repository of the hub.

What looks like a path is one: the hub is not asked for it, so that a mistyped folder is said to be missing at once.
"""

from __future__ import annotations

import re
from pathlib import Path

from roadie.errors import CheckpointError, ConfigError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a place on this machine.

    It begins with ``.``, ``/`` or ``~``, ends with ``/``, has more than one ``/`` (or a ``\\``), or its first part is a
    folder here; ``owner/name`` and a name without ``/`` may be on the hub.
    """
    folder, slash, rest = name.partition("/")
    if name.startswith((".", "/", "~")) or "\\" in name or (slash and (not rest or "/" in rest)):
        return True
    return bool(slash) and Path(folder).is_dir()


def may_be_repository(name: str) -> bool:
    """Whether the hub can be asked for ``owner/name``."""
    return _REPOSITORY.fullmatch(name) is not None and not looks_like_path(name)


def check_model_place(name: str) -> None:
    """Raise `ConfigError` for a base model that is no place here and looks like one, or is here and is no model."""
    wanted = 'wanted a causal language model: a folder, or a hub repository "owner/name"'
    place = Path(name)
    if place.is_dir():
        _check_model_folder(place, wanted)
    elif not place.exists() and looks_like_path(name):
        raise ConfigError(
            f"got {name!r}, which does not exist; {wanted}; check the path, or name another (--model NAME)"
        )


def _check_model_folder(folder: Path, wanted: str) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"got {str(folder)!r}, an adapter; {wanted}; leave --model out, and the base that the adapter names is taken"
        )
    raise ConfigError(f"got {str(folder)!r}, a folder without config.json; {wanted}; check the path")


def check_adapter_place(name: str, what: str = "an adapter folder", missing: str = "file or folder") -> None:
    """Raise `CheckpointError` for an adapter (or `what`) that is neither a place here nor the name of a hub repository."""
    if not Path(name).exists() and not may_be_repository(name):
        raise CheckpointError(f"{name}: got no such {missing}; wanted {what} or a hub repository; check the path")
