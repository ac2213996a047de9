"""What users may choose: the value of "roadie" in vLLM's ``additional_config``, which reaches every worker.

vLLM hashes ``additional_config`` into the key of its compile cache, so that graphs with and without RoAd never mix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any

from roadie.errors import ConfigError
from roadie.version import __version__

KEY = "roadie"
_VERSION_KEY = "version"  # of roadie, put in by the front end: another one may compute with another graph


class Packing(str, Enum):
    """How a layer is rotated that vLLM made of several (q, k and v; gate and up)."""

    WHOLE = "whole"  # in one operation: the parts have one group size an adapter
    PARTS = "parts"  # in one operation a part, each with group sizes of its own


@dataclass(frozen=True)
class Settings:
    """The settings of a RoAd engine.

    adapters: a folder; a request for an unknown name looks there for a folder of that name (None: nowhere);
    store: a folder for the copies of adapters that workers read; None: a temporary one, removed at the end. Several
    machines, or several API servers, need one that they share. packing: see `Packing`. stages, input_stages: how many
    rotations in a row adapters may have of outputs, and of inputs (0: none); None: as many as they have, where vLLM runs
    eagerly, and where it compiles 1 and 0 (see `settled`).
    """

    adapters: str | None = None
    store: str | None = None
    packing: Packing = Packing.WHOLE
    stages: int | None = None
    input_stages: int | None = None

    def __post_init__(self) -> None:
        for name in ("adapters", "store"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"got {KEY}.{name}={value!r}; wanted the path of a folder")
        try:
            object.__setattr__(self, "packing", Packing(self.packing))
        except ValueError:
            raise ConfigError(f"got {KEY}.packing={self.packing!r}; wanted 'whole' or 'parts'") from None
        for name, least in (("stages", 1), ("input_stages", 0)):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
                raise ConfigError(f"got {KEY}.{name}={number!r}; wanted how many rotations in a row, from {least}")

    def settled(self) -> Settings:
        """The same for an engine that compiles, or captures graphs: how many tables a layer has does not change after that."""
        return replace(self, stages=self.stages or 1, input_stages=self.input_stages or 0)

    def as_config(self) -> dict[str, Any]:
        """What stands under "roadie" in `additional_config` once the front end has read it."""
        return {**asdict(self), "packing": self.packing.value, _VERSION_KEY: __version__}


def settings_of(additional_config: object) -> Settings | None:
    """The settings in vLLM's `additional_config`; None where it does not ask for RoAd.

    Raises `ConfigError` for unknown keys and bad values, and where another version of roadie wrote them.
    """
    value = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if value is None or value is False:
        return None
    if value is True:
        return Settings()
    if not isinstance(value, Mapping):
        raise ConfigError(f"got {KEY}={value!r} in additional_config; wanted true, or an object such as {{}}")
    given = dict(value)
    version = given.pop(_VERSION_KEY, __version__)
    if version != __version__:
        raise ConfigError(
            f"got settings of roadie {version} in a worker with roadie {__version__}; wanted one version everywhere; "
            "install the same roadie where the workers run"
        )
    known = [field.name for field in fields(Settings)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"got {KEY}.{unknown[0]} in additional_config; wanted one of {', '.join(known)}")
    return Settings(**given)


def engine_arguments(num_slots: int, *, num_kept: int | None = None, **settings: Any) -> dict[str, Any]:
    """Arguments for `vllm.LLM` or `AsyncEngineArgs` that make it serve RoAd adapters.

    num_slots: how many different adapters may run at once (a slot holds 8 bytes an output of each adapted layer on each
    device); num_kept: how many stay in the workers' memory (default: as many as slots); settings: fields of `Settings`.
    """
    config = Settings(**settings).as_config()
    return {
        "enable_lora": True,
        "max_loras": num_slots,
        "max_cpu_loras": max(num_slots, num_kept or 0),
        "additional_config": {KEY: config},
    }
