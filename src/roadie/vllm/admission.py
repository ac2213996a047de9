"""Requests for adapters, before the engine sees them: checked, and pointed at a copy that will not change.

An engine knows an adapter by a number and a name, and takes for granted that both mean one content for ever: it never
reads an adapter twice, its prefix cache goes by name and path, and a step that holds two requests of one name keeps one.
So each content gets a number and a name of its own here. The first content of a name keeps what the user gave; another
one is "NAME@HASH". A request that is running goes on with the adapter that it began with.
"""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from vllm.lora.request import LoRARequest

from roadie.errors import AdapterError
from roadie.vllm.store import AdapterStore, reason_left

FIRST_OWN_NUMBER = 1 << 30  # below are the users' numbers; above 2^31 some of vLLM's arrays end
KEPT_S = 3600.0  # how long a copy stays that no name stands for any more: requests that began with it may still run


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
        self._unused_since: dict[Path, float] = {}
        self._lock = threading.Lock()

    def known(self, request: Any) -> Any:
        """The engine's request for one that is settled and needs no reading; None for others. Waits for nothing."""
        if request.load_inplace:
            return None
        return self._current.get(_Given(request.lora_name, request.lora_int_id, request.lora_path))

    def admit(self, request: Any) -> Any:
        """The engine's `LoRARequest` for what is in the files now; nothing stands for it before `settle`.

        Raises `CheckpointError` where the files are not a sound RoAd adapter.
        """
        given = _Given(request.lora_name, request.lora_int_id, request.lora_path)
        with self._lock:
            copy = self._store.add(_local_folder(request.lora_path))
            return self._of_content.get((given.name, copy)) or self._new(given, copy, request.base_model_name)

    def settle(self, request: Any, admitted: Any) -> None:
        """From now on the user's request stands for this one, which the workers have taken."""
        given = _Given(request.lora_name, request.lora_int_id, request.lora_path)
        with self._lock:
            before = self._current.get(given)
            self._current[given] = admitted
            self._loaded.add(admitted.lora_int_id)
            if self._unused_since or before not in (None, admitted):
                self._remove_unused()

    def _new(self, given: _Given, copy: Path, base_model_name: str | None) -> Any:
        name = given.name if given.name not in self._names else f"{given.name}@{copy.name[:12]}"
        number = given.number if given.number not in self._numbers else next(self._own_numbers)
        self._names.add(name)
        self._numbers.add(number)
        admitted = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(copy), base_model_name=base_model_name)
        self._of_content[given.name, copy] = admitted
        return admitted

    def unload(self, name: str) -> None:
        """Forget what `name` stands for; requests that run with it go on."""
        with self._lock:
            for given in [given for given in self._current if given.name == name]:
                del self._current[given]
            self._remove_unused()

    def _remove_unused(self) -> None:
        """Remove the copies that nothing has stood for since `KEPT_S`; their names and numbers are not given again."""
        used, now = {Path(admitted.lora_path) for admitted in self._current.values()}, time.monotonic()
        for name, copy in list(self._of_content):
            if copy in used:
                self._unused_since.pop(copy, None)
            elif now - self._unused_since.setdefault(copy, now) >= KEPT_S:
                self._loaded.discard(self._of_content.pop((name, copy)).lora_int_id)
                self._store.remove(copy)

    def is_loaded(self, admitted: Any) -> bool:
        """Whether the workers have taken it once, so that it is known to fit the model."""
        return admitted.lora_int_id in self._loaded


def _local_folder(path: str) -> str:
    """`path` as a folder on this machine; a name on the hub is downloaded as vLLM would."""
    from vllm.lora.utils import get_adapter_absolute_path

    return str(get_adapter_absolute_path(path))


def refused(request: Any, admitted: Any) -> AdapterError:
    """The error for an adapter that the workers would not take."""
    return AdapterError(f"{request.lora_name} ({request.lora_path}): {reason_left(admitted.lora_path)}")


def explained(error: Exception) -> Exception:
    """An error of the workers; a better one, where it is that the plug-in is not there."""
    if "Missing required configuration fields" not in str(error):
        return error
    return AdapterError(
        "got workers in which roadie's plug-in is not active, though it is in this process: they took a RoAd adapter for "
        "LoRA; wanted the plug-in in every process; install roadie where the workers run, leave it in VLLM_PLUGINS if "
        f"that is set, and look for 'roadie' in the workers' log ({str(error)[:200]})"
    )
