"""adapter_config.json: read with suspicion, written so that one meaning has one text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from roadie.adapter import DEFAULT_VARIANT, check_settings
from roadie.checkpoint.layout import CONFIG_NAME, EXTRA_DEFAULTS, MAX_CONFIG_BYTES, prefix_for, without_prefix
from roadie.checkpoint.refusal import about, reading, refuse, shown
from roadie.checkpoint.replacement import advice_after_crash
from roadie.errors import ConfigError
from roadie.rotation import Variant

# The first key that matches wins, so that sorting these mappings would change what they mean.
_ORDERED_KEYS = ("group_size_pattern", "input_stages_pattern", "stages_pattern", "variant_pattern")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config in the folder `path`, checked, every key as it stands, the variant without roadie's prefix.

    Raises `CheckpointError` where it is missing, too large, not JSON, not a RoAd config, or holds bad settings.
    """
    folder = Path(path)
    return parse_config(folder / CONFIG_NAME, config_bytes(folder))


def config_bytes(folder: Path) -> bytes:
    """The bytes of the config in `folder`, at most one more than allowed."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        do = advice_after_crash(folder) or "check the path"
        refuse(file, None, "no such file", f"a folder with {CONFIG_NAME} and its weights", do)
    with reading(file), file.open("rb") as stream:
        return stream.read(MAX_CONFIG_BYTES + 1)


def parse_config(file: Path, text: bytes) -> dict[str, Any]:
    """The config that `text` holds; `file` is what errors call it."""
    if len(text) > MAX_CONFIG_BYTES:
        refuse(file, None, "more than 1 MiB", "at most 1 MiB of JSON", "this is not an adapter config; check the path")
    config = _parse_json(file, text)
    if not isinstance(config, dict):
        refuse(file, None, f"a JSON {type(config).__name__}", "a JSON object", "get the file again")
    if config.get("peft_type") != "ROAD":
        got = repr(config.get("peft_type"))[:80]
        refuse(file, "peft_type", got, "'ROAD'", "this is another kind of adapter; load it with PEFT")
    if "variant" in config:
        config["variant"] = without_prefix(config["variant"])
    with about(file):
        check_settings(config)
    return config


def _parse_json(file: Path, text: bytes) -> Any:
    hooks: dict[str, Any] = {
        "object_pairs_hook": _unique_keys,
        "parse_constant": _no_constant,
        "parse_float": _finite_float,
    }
    try:
        return json.loads(text.decode(), **hooks)
    except (ValueError, RecursionError) as error:
        refuse(file, None, f"text that is not JSON ({shown(error)})", "a JSON object", "get the file again", error)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return unique


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def config_text(config: Mapping[str, Any]) -> str:
    """The text of adapter_config.json for `config`: one text for one meaning, laid out as PEFT's.

    Keys are sorted and sets become sorted lists; lists and the order of the pattern mappings stay. Extra keys
    (`EXTRA_DEFAULTS`) are written only where they differ from their default, and then the variant gets roadie's
    prefix. Raises `ConfigError` for an unknown variant and where a value cannot be written as JSON.
    """
    written = {key: value for key, value in config.items() if not _is_default_extra(key, value)}
    prefix = prefix_for(written)
    if prefix or "variant" in written:
        written["variant"] = prefix + Variant.parse(without_prefix(config.get("variant", DEFAULT_VARIANT))).value
    ordered = {key: _plain(written[key], keep_order=key in _ORDERED_KEYS) for key in sorted(written)}
    try:
        return json.dumps(ordered, indent=2, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"got a config JSON cannot hold ({error}); wanted plain values; remove the value") from None


def _is_default_extra(key: str, value: object) -> bool:
    return key in EXTRA_DEFAULTS and (value is None or value == EXTRA_DEFAULTS[key])


def _plain(value: Any, *, keep_order: bool = False) -> Any:
    """JSON's own kinds in a fixed order: mappings by key (as it is where keep_order), sets sorted, tuples as lists."""
    if isinstance(value, Mapping):
        items = value.items() if keep_order else sorted(value.items(), key=lambda item: str(item[0]))
        return {key: _plain(inner) for key, inner in items}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(inner) for inner in value), key=lambda inner: (type(inner).__name__, inner))
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
