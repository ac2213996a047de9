"""Prompts, and which adapter continues which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roadie.errors import ConfigError
from roadie.training.rows import DataError
from roadie.training.text import json_objects

BASE = "__base__"
"""What the base model is called where an adapter could be named."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and the name of the adapter to do it with; None: the base model."""

    text: str
    adapter: str | None = None


def assign(texts: Sequence[str], names: Sequence[str], use: Sequence[str] = ()) -> list[Prompt]:
    """The prompts with their adapters: `use` names one for all, or one for each, in order.

    Without `use` the only one of `names` serves all prompts, several serve one prompt each, in order, and where there
    is none the base model does. Raises `ConfigError` where the numbers do not fit.
    """
    chosen = list(use or names or [BASE])
    if len(chosen) == 1:
        chosen *= len(texts)
    if len(chosen) != len(texts):
        raise ConfigError(
            f"got {len(texts)} prompts and {len(chosen)} adapters for them; wanted one adapter, or one for each prompt; "
            f"say which (--use NAME, {BASE} for the base model)"
        )
    return [Prompt(text, None if name == BASE else name) for text, name in zip(texts, chosen, strict=True)]


def read_prompts(path: str | Path, names: Sequence[str]) -> list[Prompt]:
    """The prompts of a file of JSON lines ``{"prompt": ..., "adapter": ...}``.

    A line without "adapter" takes the only one of `names`, or the base model where there is none or it is null. Raises
    `DataError`, naming the line.
    """
    return [_prompt(value, where, names) for value, where in json_objects(Path(path))]


def _prompt(value: object, where: str, names: Sequence[str]) -> Prompt:
    text = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(text, str):
        raise DataError(f'{where}: got no "prompt"; wanted an object such as {{"prompt": "...", "adapter": "..."}}')
    if "adapter" not in value and len(names) > 1:
        raise DataError(
            f'{where}: got no "adapter" with {len(names)} adapters loaded; wanted one of {", ".join(names)} or null'
        )
    name = value.get("adapter", names[0] if names else None)
    if name is not None and not isinstance(name, str):
        raise DataError(f"{where}: got adapter={name!r}; wanted a name or null")
    return Prompt(text, None if name == BASE else name)
