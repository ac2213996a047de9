"""Requests for adapters, before the engine sees them: checked, and pointed at a copy that will not change.

An engine knows an adapter by a number and a name, and takes for granted that both mean one content for ever: it never
reads an adapter twice, its prefix cache goes by name and path, and a step that holds two requests of one name keeps one.
So each content gets a number and a name of its own here. The first content of a name keeps what the user gave; another
one is "NAME@HASH". A request that is running goes on with the adapter that it began with.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any, NamedTuple

from vllm.lora.request import LoRARequest

from roadie.errors import AdapterError
from roadie.vllm.store import AdapterStore

FIRST_OWN_NUMBER = 1 << 30  # below are the users' numbers; above 2^31 some of vLLM's arrays end


class _Given(NamedTuple):
    """How a user names an adapter."""

    name: str
    number: int
    path: str


class Admissions:
    """The adapters of one engine that its front end has let in."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._current: dict[_Given, Any] = {}  # the engine's request for what a user names, as of its last reading
        self._of_content: dict[tuple[str, Path], Any] = {}
        self._numbers: set[int] = set()
        self._names: set[str] = set()
        self._own_numbers = itertools.count(FIRST_OWN_NUMBER)
        self._loaded: set[int] = set()
        self._lock = threading.Lock()

    def admit(self, request: Any) -> Any:
        """The engine's `LoRARequest` for a user's; read from the files the first time, and where it says ``load_inplace``.

        Raises `CheckpointError` where the files are not a sound RoAd adapter; nothing has changed then.
        """
        given = _Given(request.lora_name, request.lora_int_id, request.lora_path)
        with self._lock:
            known = self._current.get(given)
            if known is not None and not request.load_inplace:
                return known
            copy = self._store.add(_local_folder(request.lora_path))
            admitted = self._of_content.get((given.name, copy)) or self._new(given, copy, request.base_model_name)
            self._current[given] = admitted
            return admitted

    def _new(self, given: _Given, copy: Path, base_model_name: str | None) -> Any:
        name = given.name if given.name not in self._names else f"{given.name}@{copy.name[:12]}"
        number = given.number if given.number not in self._numbers else next(self._own_numbers)
        self._names.add(name)
        self._numbers.add(number)
        admitted = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(copy), base_model_name=base_model_name)
        self._of_content[given.name, copy] = admitted
        return admitted

    def is_loaded(self, admitted: Any) -> bool:
        """Whether the workers have taken it once, so that it is known to fit the model."""
        return admitted.lora_int_id in self._loaded

    def mark_loaded(self, admitted: Any) -> None:
        """Remember that the workers took it."""
        self._loaded.add(admitted.lora_int_id)

    def forget(self, request: Any) -> None:
        """Read the files again at the next request: the workers refused what was in them."""
        self._current.pop(_Given(request.lora_name, request.lora_int_id, request.lora_path), None)


def _local_folder(path: str) -> str:
    """`path` as a folder on this machine; a name on the hub is downloaded as vLLM would."""
    from vllm.lora.utils import get_adapter_absolute_path

    return str(get_adapter_absolute_path(path))


def explained(error: Exception) -> Exception:
    """What a worker's refusal means, where it is that the plug-in does not run there."""
    if "Missing required configuration fields" not in str(error):
        return error
    return AdapterError(
        "got workers in which roadie's plug-in is not active, though it is in this process: they took a RoAd adapter for "
        "LoRA; wanted the plug-in in every process; install roadie where the workers run, leave it in VLLM_PLUGINS if "
        f"that is set, and look for 'roadie' in the workers' log ({str(error)[:200]})"
    )
