"""Requests for adapters, before the engine sees them: checked, and pointed at a copy that will not change.

An engine knows an adapter by a number and a name, and takes for granted that both mean one content for ever: it never
reads an adapter twice, its prefix cache goes by name and path, and a step that holds two requests of one name keeps one.
So each content gets a number and a name of its own here. The first content of a name keeps what the user gave; another
one is "NAME@HASH". A request that is running goes on with the adapter that it began with.

A blend is made here, of the copies that its adapters' names stand for, and is an adapter as any other from then on. Where one of
them has been replaced since, the next request for the blend makes it anew.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm.lora.request import LoRARequest

from roadie import checkpoint
from roadie.adapter_algebra import blend_adapters
from roadie.errors import AdapterError
from roadie.vllm.resolver import check_folder, in_folder, path_of, weights_in
from roadie.vllm.store import AdapterStore, reason_left

FIRST_OWN_NUMBER = 1 << 30  # below are the users' numbers; above 2^31 some of vLLM's arrays end
KEPT_S = 3600.0  # how long a copy stays that no name stands for any more: requests that began with it may still run
MAX_BLENDS = 256  # that are remembered, the last that were asked for: anybody can think of more


class _Given(NamedTuple):
    """How a user names an adapter."""

    name: str
    number: int
    path: str


class Admissions:
    """The adapters of one engine that its front end has let in. folder: where names are looked for that nothing stands for."""

    def __init__(self, store: AdapterStore, folder: str | None = None) -> None:
        check_folder(folder)
        self._store, self._folder = store, folder
        self._copies: dict[str, Path] = {}  # of the adapters that a blend may be made of, by name
        self._made_of: dict[int, dict[str, Path]] = {}  # the copies that a blend was made of, by the blend's number
        self.blends: dict[str, None] = {}  # their names, the last that was asked for last
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
        admitted = None if request.load_inplace else self._current.get(_given(request))
        parts = {} if admitted is None else self._made_of[admitted.lora_int_id]
        if any(self._copies.get(name) != copy for name, copy in parts.items()):
            return None
        if parts:
            self._note_blend(request.lora_name)
        return admitted

    def path_of(self, model: str, base_names: Sequence[str]) -> str | None:
        """See `resolver.path_of`."""

        def is_known(name: str) -> bool:
            return name in self._copies or in_folder(self._folder, name) is not None

        return path_of(model, base_names, self._folder, is_known)

    def _note_blend(self, name: str) -> None:
        self.blends.pop(name, None)
        self.blends[name] = None

    def admit(self, request: Any) -> Any:
        """The engine's `LoRARequest` for what is in the files now; nothing stands for it before `settle`.

        Raises `CheckpointError` where the files are not a sound RoAd adapter, `AdapterError` or `ConfigError` for a blend
        that cannot be made.
        """
        given = _given(request)
        with self._lock:
            weights = weights_in(given.path)
            parts = {name: self._part(name) for name in weights}
            copy = self._blended(parts, weights) if parts else self._store.add(_local_folder(given.path))
            admitted = self._of_content.get((given.name, copy)) or self._new(given, copy, request.base_model_name)
            self._made_of[admitted.lora_int_id] = parts
            return admitted

    def _part(self, name: str) -> Path:
        """The copy that a name stands for; the first blend of an adapter in the folder reads it."""
        place = in_folder(self._folder, name)
        if name not in self._copies and place is not None:
            self._copies[name] = self._store.add(place)
        if name not in self._copies:
            raise AdapterError(
                f"got a blend of {name!r}, which is no adapter that is loaded; wanted its name; load it first"
            )
        return self._copies[name]

    def _blended(self, parts: Mapping[str, Path], weights: Mapping[str, float]) -> Path:
        adapters = [checkpoint.load(copy) for copy in parts.values()]
        return self._store.keep(blend_adapters(adapters, [weights[name] for name in parts], names=list(parts)))

    def settle(self, request: Any, admitted: Any) -> None:
        """From now on the user's request stands for this one, which the workers have taken."""
        given = _given(request)
        with self._lock:
            before = self._current.get(given)
            self._current[given] = admitted
            if self._made_of[admitted.lora_int_id]:
                self._note_blend(given.name)
            else:
                self._copies[given.name] = Path(admitted.lora_path)
            self._loaded.add(admitted.lora_int_id)
            spare = list(self.blends)[:-MAX_BLENDS]
            for name in spare:
                self._forget(name)
            if spare or self._unused_since or before not in (None, admitted):
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
            self._copies.pop(name, None)
            self._forget(name)
            self._remove_unused()

    def _forget(self, name: str) -> None:
        self.blends.pop(name, None)
        for given in [given for given in self._current if given.name == name]:
            del self._current[given]

    def _remove_unused(self) -> None:
        """Remove the copies that nothing has stood for since `KEPT_S`; their names and numbers are not given again."""
        used = {*(Path(admitted.lora_path) for admitted in self._current.values()), *self._copies.values()}
        now = time.monotonic()
        for name, copy in list(self._of_content):
            if copy in used:
                self._unused_since.pop(copy, None)
            elif now - self._unused_since.setdefault(copy, now) >= KEPT_S:
                self._loaded.discard(self._of_content.pop((name, copy)).lora_int_id)
                self._store.remove(copy)

    def is_loaded(self, admitted: Any) -> bool:
        """Whether the workers have taken it once, so that it is known to fit the model."""
        return admitted.lora_int_id in self._loaded


def _given(request: Any) -> _Given:
    return _Given(request.lora_name, request.lora_int_id, request.lora_path)


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
