"""What a model's name stands for that a server has not loaded: an adapter of the folder, or a blend of adapters.

A blend is asked for as of `roadie serve` (`roadie.bank.blends`). It has no files until it is let in: where a path would stand,
its request has "blend:legal=0.7+terse=0.3".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from roadie import checkpoint
from roadie.bank.blends import from_text, without_base
from roadie.errors import ConfigError
from roadie.vllm.settings import KEY

BASE = "base"  # names the base model whatever it is served as, as in `roadie serve`
_BLEND = "blend:"


def weights_in(path: str) -> dict[str, float]:
    """The weights by name of a blend, whose name alone is all of it; none where `path` is that of files."""
    if not path.startswith(_BLEND):
        return {}
    weights = from_text(path[len(_BLEND) :])
    return {weights: 1.0} if isinstance(weights, str) else weights


def path_of(model: str, base_names: Sequence[str], folder: str | None, is_known: Callable[[str], bool]) -> str | None:
    """The path of what a server is asked for as `model`; None where it, or a part of it, is no adapter.

    base_names: of the base model; is_known: whether an adapter of that name is loaded or in the folder. Raises `RoutingError`
    for a blend that is none.
    """
    place = in_folder(folder, model)
    if place is not None:
        return str(place)
    text = without_base(model, (*base_names, BASE))
    if text is None or (text == model and "=" not in text):
        return None
    path = f"{_BLEND}{text}=1" if is_known(text) else f"{_BLEND}{text}"
    return path if all(map(is_known, weights_in(path))) else None


def in_folder(folder: str | None, name: str) -> Path | None:
    """The adapter of that name in `folder`.

    A name is never a path: it stands for a folder right inside, also where that is a link to elsewhere.
    """
    if folder is None or not name or name.startswith(".") or any(sign in name for sign in '/\\\0"'):
        return None
    path = Path(folder) / name
    return path if (path / checkpoint.CONFIG_NAME).is_file() else None


def check_folder(folder: str | None) -> None:
    """Raise `ConfigError` where it is none."""
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"got {KEY}.adapters={folder!r}; wanted a folder; make it, or correct the path")
