"""`--config FILE`: the options of a verb in a YAML file; what the command line says too goes before it.

data: [questions.jsonl, notes.txt]     # names are those of the options, without the dashes; DATA is data
output: answers
learning-rate: 3e-3                    # learning_rate and lr will do too
gradient-checkpointing: true
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from roadie.errors import ConfigError
from roadie.training.recipe import check_known


def _take(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make what the file says the defaults of the options that are parsed after this one."""
    if path is not None:
        from roadie.training.settings_file import read_yaml

        content = read_yaml(path)
        try:
            ctx.default_map = {**(ctx.default_map or {}), **_values(content, ctx.command)}
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=_take,
        is_eager=True,
        help="YAML file of these settings, by their names here; the command line goes before it.",
        show_default=False,
    ),
]


def _values(content: Any, command: Any) -> dict[str, Any]:
    """The values by names of parameters, in the types that the parameters take."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"got {type(content).__name__}; wanted a mapping of settings, such as 'epochs: 3'")
    by_word = _by_word(command.params)
    check_known([key for key in map(str, content) if key.replace("_", "-") not in by_word], by_word)
    kinds = typing.get_type_hints(inspect.unwrap(command.callback))
    values: dict[str, Any] = {}
    for key, value in content.items():
        param = by_word[str(key).replace("_", "-")]
        if param.name in values:
            raise ConfigError(f"got two values of {param.name}, one as {key}; wanted one; remove the other")
        if value is not None:
            values[param.name] = _value(str(key), value, kinds[param.name])
    return values


def _by_word(params: Sequence[Any]) -> dict[str, Any]:
    """The parameters by every word that may stand in a file: long options without dashes, arguments by their names."""
    words = {}
    for param in params:
        options = [option[2:] for option in param.opts if option.startswith("--")]
        for word in options or [param.name]:
            if word not in ("config", "help"):
                words[word.replace("_", "-")] = param
    return words


def _value(key: str, value: Any, kind: Any) -> Any:
    """A YAML value as the command line would give it, for a parameter of a verb with this type hint."""
    if type(None) in typing.get_args(kind):
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) is list:
        return [_word(key, one) for one in (value if isinstance(value, list) else [value])]
    if kind in _PLAIN:
        return _plain(key, value, *_PLAIN[kind])
    if isinstance(value, list):  # sizes, which the command line separates by commas
        return ",".join(_word(key, one) for one in value)
    return _word(key, value)


_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}


def _plain(key: str, value: Any, kinds: tuple[type, ...], wanted: str) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(f"got {key}={value!r}; wanted {wanted}")
    return value


def _word(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"got {key}={value!r}; wanted a text or a number")
    return str(value)
