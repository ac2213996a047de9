"""`AdapterBank`: many adapters of one model in memory, every row of a batch its own.

    bank = AdapterBank(model, slots=1000)              # any transformers model; PEFT is not needed
    bank.admit("legal", "adapters/legal")              # a folder, an Adapter, or a live PEFT adapter
    with bank.rows(["legal", None, {"legal": 0.5}]):   # a name, the base model, a blend
        model.generate(**batch)

Every adapted layer has one pair of tables ``[slots, D]``, and its input another once an adapter rotates that too. Writing goes
into a slot that nobody reads, and then the name moves to it in one step: a forward sees the old adapter or the new one, never
half of each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roadie import checkpoint
from roadie.adapter import Adapter, check_adapter_name, experts_kind, is_input, layer_of
from roadie.bank.admission import ReadyAdapter, SiteChains, rotations, rotations_of_row
from roadie.bank.attachment import LayerRotation, Site, refused_in, sites_in
from roadie.bank.blends import Blend, Wish, blended, parse
from roadie.bank.families import Family
from roadie.bank.live import live_adapter
from roadie.bank.servers import serve, stop_serving
from roadie.bank.slots import SlotBook
from roadie.bank.static import BankChoice, Graphs, static_slots
from roadie.bank.streams import Streams
from roadie.errors import AdapterError, BankFull, ConfigError, RoutingError
from roadie.kernels import Chain
from roadie.rotation import Rotation
from roadie.sites.layout import Calls
from roadie.sites.rows import Choice, Mark, Routing
from roadie.sites.table import SlotTable


class AdapterBank:
    """Adapters in numbered slots, for one model whose rows choose among them; see the module.

    model: any module with linear layers, whose paths are those of the adapters; kept as `model`. slots: how many adapters (and
    blends) fit at once. dtype: of the tables, kept as `dtype`: float32, or bfloat16 or float16 for half the memory, at one
    rounding of direct and cross (relative error up to 2^-9 in bfloat16, 2^-12 in float16, of every rotated element); a model in
    one of these takes no tables in the other.
    wait_s: how long `replace` and `admit` wait for a slot that is being read. sites: of layers that rotate by themselves, by
    path; None: those of the model, by forward hooks. check_name: raises for names that are not allowed; PEFT's rules, unless
    somebody has others.

    One thread may admit, replace and evict while others run the model. `close` (or a with block) takes the bank off the model.

    storage_version: how often tables have become others: the bank grew, or an adapter came in with a group size, a number of
    stages or a layer that none had before. Graphs that were captured before (CUDA graphs) go on reading the old tables, which
    stay as long as their static slots do: capture them again before adapters that came later are asked for. graphs: over which
    static slots they may have been captured.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int = 64,
        *,
        dtype: torch.dtype = torch.float32,
        wait_s: float = 10.0,
        sites: Mapping[str, Site] | None = None,
        check_name: Callable[[str], None] = check_adapter_name,
    ) -> None:
        if slots < 1 or not dtype.is_floating_point:
            raise ConfigError(f"got slots={slots}, dtype={dtype}; wanted at least one slot and a floating-point dtype")
        self.model, self._is_hooked = model, sites is None
        self._sites = sites_in(model) if sites is None else sites
        self._refusals = refused_in(model) if sites is None else {}
        if not self._sites:
            raise ConfigError(f"got a {type(model).__name__} without linear layers; wanted a model that RoAd can adapt")
        self.dtype, self._wait_s, self._check_name = dtype, wait_s, check_name
        self._attached: dict[str, LayerRotation] = {}
        self._detach = ExitStack()
        self._book = SlotBook(slots + 1)  # one to spare, so that a full bank can replace
        self._spare = 1
        self._versions: dict[str, int] = {}
        self._layers_of: dict[str, frozenset[str]] = {}
        self._blends: set[Blend] = set()
        self._admissions = 0
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._routing: Routing[Choice] = Routing()
        self.writes = 0
        self._last: tuple[Hashable, Tensor, Mark] = None, torch.empty(0), Mark()
        self.storage_version = 0
        self.graphs, self.streams = Graphs(), Streams()
        if self._is_hooked:
            serve(model, self.rows)

    def admit(self, name: str, source: Adapter | ReadyAdapter | str | Path | tuple[nn.Module, str]) -> int:
        """Take an adapter in, validated first; gives its slot. Where the bank is full a blend leaves, or the least
        recently used adapter.

        source: an `Adapter`, an adapter folder, ``(peft_model, name)`` for an adapter that is loaded in a PEFT model, or what
        `prepare` gave.
        Raises `ConfigError` for a name that is taken or not allowed, `AdapterError` (`CheckpointError`) for an adapter that does
        not fit the model, `BankFull` where every slot is pinned or being read. Nothing is changed then.
        """
        self._check_name(name)
        made = self._made({name: source})
        with self._lock:
            if name in self._book:
                raise ConfigError(f"got {name!r}, which is in the bank already; use replace, or evict it first")
            return self._publish([name], made)[0]

    def prepare(self, name: str, source: Adapter | ReadyAdapter | str | Path | tuple[nn.Module, str]) -> ReadyAdapter:
        """Everything of `admit` and `replace` that does not need a slot; changes nothing.

        Raises what `admit` would raise because of the name or the adapter itself.
        """
        self._check_name(name)
        return ReadyAdapter(self, self._made({name: source}))

    def prepare_row(self, family: Family, name: str) -> ReadyAdapter:
        """As `prepare`, of an adapter in training, from its stacks; raises `AdapterError` where it is not finite."""
        return ReadyAdapter(self, rotations_of_row(family, name))

    def replace(self, name: str, source: Adapter | ReadyAdapter | str | Path | tuple[nn.Module, str]) -> int:
        """Put another adapter behind a name; gives its new slot. Rows that run now go on with the old one.

        Raises as `admit` does, and `RoutingError` for unknown names; the old adapter stays then.
        """
        made = self._made({name: source})
        with self._lock:
            self._require(name)
            return self._publish([name], made)[0]

    def update(self, sources: Mapping[str, Adapter | str | Path | tuple[nn.Module, str]]) -> None:
        """Admit or replace many adapters at once, all or none: much faster than one by one.

        Raises as `admit` does; `BankFull` where there are not as many slots free (or to be had from others) as adapters.
        """
        for name in sources:
            self._check_name(name)
        made = self._made(sources)
        with self._lock:
            self._publish(list(sources), made)

    def evict(self, name: str) -> None:
        """Let an adapter go, and the blends it is part of; rows that run now go on. Raises `RoutingError` for unknown names."""
        with self._lock:
            self._require(name)
            self._forget(name)
            self._book.drop(name)

    def pin(self, name: str) -> None:
        """Keep an adapter from giving way to others. Raises `RoutingError` for unknown names."""
        with self._lock:
            self._require(name)
            self._book.pin(name)

    def unpin(self, name: str) -> None:
        """Let an adapter give way again. Raises `RoutingError` for unknown names."""
        with self._lock:
            self._require(name)
            self._book.unpin(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the bank, the least recently used first (blends are not listed)."""
        with self._lock:
            return tuple(name for name in self._book if isinstance(name, str))

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return isinstance(name, str) and name in self._book

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_slots(self) -> int:
        """How many adapters and blends fit."""
        return self._book.num_slots - self._spare

    @property
    def total_slots(self) -> int:
        """How many rows a table has: one more than fit, so that a full bank can replace."""
        return self._book.num_slots

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(rotation.table.nbytes for rotation in self._attached.values())

    @property
    def bytes_per_adapter(self) -> int:
        """Bytes that one slot takes over all adapted layers."""
        return self.nbytes // self._book.num_slots

    def grow(self, slots: int) -> None:
        """Make room for `slots` adapters in all. The tables move: see `storage_version`."""
        with self._lock:
            if slots <= self.num_slots:
                raise ConfigError(
                    f"got slots={slots}; wanted more than the {self.num_slots} there are; a bank does not shrink"
                )
            for rotation in self._attached.values():
                rotation.table.grow(slots + self._spare)
            self._book.grow(slots + self._spare)
            self.storage_version += 1
            self.graphs.tell(f"the bank has grown to {slots} slots")

    @property
    def tables(self) -> list[Chain]:
        """Those of all sites, as they are now."""
        return [held.table.current for held in self._attached.values()]

    def slots(self, names: Sequence[Wish]) -> Tensor:
        """The slot of each row's wish: int64 ``[B]`` on the CPU, -1 for the base model. Blends are made where they are new.

        The slots stay what they are as long as the tensor lives: nothing else is written into them.
        Raises `RoutingError` for unknown names, `AdapterError` or `ConfigError` for blends that do not exist.
        """
        if isinstance(names, (str, Mapping)):
            raise RoutingError(
                f"got {names!r}; wanted a sequence of one wish a row: a name, None, or a mapping of weights"
            )
        return self.slots_of([parse(wish) for wish in names])

    def slots_of(self, wishes: Sequence[str | Blend | None]) -> Tensor:
        """As `slots`, of what has been parsed."""
        with self._lock:
            wanted = dict.fromkeys(wishes)
            blends = [wish for wish in wanted if isinstance(wish, Blend)]
            parts = [wish for wish in wanted if isinstance(wish, str)]
            for blend in blends:
                parts += blend.names
            # Names before blends, and each held as soon as it is found: making a blend may let others go.
            of_wish: dict[str | Blend | None, int] = {name: self._slot_of(name) for name in parts}
            ended = self.streams.readers()
            leases = [self._book.lease([*of_wish.values()], ended)]
            if blends:
                leases.append(self._book.lease([of_wish[wish] for wish in wanted if wish in of_wish], ended))
            for blend in blends:
                of_wish[blend] = slot = self._slot_of(blend)
                leases.append(self._book.lease((slot,), ended))
            self.streams.before_reading()
            if blends:
                leases.pop(0).close()  # a blend, once made, does not read its parts
            of_wish[None] = -1
            slots = torch.tensor(list(map(of_wish.__getitem__, wishes)), dtype=torch.int64)
            slots._roadie_leases = leases  # type: ignore[attr-defined]
            return slots

    def rows(
        self, slots: Tensor | Sequence[Wish], *, expansion: int = 1, static: bool = False
    ) -> AbstractContextManager[Any]:
        """Within the block, row b of every batch uses ``slots[b]``.

        slots: integers ``[B]``, or ``[B, T]`` for a slot a token (a packed batch is ``[1, T]``), or a sequence of B wishes.
        expansion: how many consecutive rows generation makes of one (beams, returned sequences). static: see `roadie.rows`; hold
        what `slots` gave for as long as the static tensor has these values.
        Raises `RoutingError` for what is none of these, or out of range.
        """
        if static:
            return self._routing.chosen(BankChoice(self, static_slots(slots), expansion, is_static=True), self.model)
        if not isinstance(slots, Tensor):
            slots = self.slots(slots)
        # Layers remember where a batch lay; the leases hang on the tensor that was given, and end with the choice.
        choice = BankChoice(self, slots.clone(), expansion, held=slots)
        choice.check(self._book.num_slots)
        return self._routing.chosen(choice, self.model)

    def mark(self, slots: Tensor, expansion: int, calls: Calls, device: torch.device) -> Mark:
        """That of the last rows, if they had these slots, on the CPU, and nothing was written since; else a new one.

        slots: of a call that has begun; where they have the mark of the last ones layers know already what they do.
        """
        kind = self.writes, expansion, device, frozenset(calls.tokens)
        before, as_before, mark = self._last
        if kind != before or slots.shape != as_before.shape or not torch.equal(slots, as_before):
            mark = Mark()
            self._last = kind, slots, mark
        return mark

    def close(self) -> None:
        """Take the bank off the model, which is then what it was."""
        with self._lock:
            if self._is_hooked:
                stop_serving(self.model)
            self._detach.close()
            self._attached.clear()
            self._blends.clear()
            self._book = SlotBook(self._book.num_slots)

    def __enter__(self) -> AdapterBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _made(self, sources: Mapping[str, Any]) -> Mapping[str, Sequence[SiteChains]]:
        """The rotations of sources, by layer, once they fit the model; in the dtype and on the device of their layers."""
        first = next(iter(sources.values()), None)
        if isinstance(first, ReadyAdapter) and len(sources) == 1 and first.bank is self:
            return first.layers
        adapters = {name: self._read(source) for name, source in sources.items()}
        for name, adapter in adapters.items():
            self._check_fits(name, adapter)
        layers = {name: adapter.layers for name, adapter in adapters.items()}
        return rotations(layers, self.dtype, lambda path: self._sites[path].device())

    def _check_fits(self, name: str, adapter: Adapter) -> None:
        for path in adapter.layers:
            if layer_of(path) in self._refusals:
                of_layers = "; wanted layers that are called; train it with that layer in exclude_modules"
                raise AdapterError(
                    f"got adapter {name!r} with a rotation of {path!r}: {self._refusals[layer_of(path)]}"
                    + ("" if experts_kind(path) else of_layers)
                )
        problems = [f"{path}: not a linear layer of the model" for path in adapter.layers if path not in self._sites]
        if problems:
            raise AdapterError(
                f"got adapter {name!r} with {'; '.join(problems[:3])}; wanted layers of this model; use the base model that it "
                f"was trained on ({adapter.base_model_name or 'not named in its config'})"
            )
        for path, layer in adapter.layers.items():
            self._sites[path].check(name, path, layer)

    def _read(self, source: Any) -> Adapter:
        if isinstance(source, Adapter):
            return source
        if isinstance(source, tuple):
            return live_adapter(*source)
        if isinstance(source, (str, Path)):
            return checkpoint.load(source)
        raise AdapterError(
            f"got a source of type {type(source).__name__}; wanted an Adapter, a folder, (model, name), or what prepare gave"
        )

    def _publish(self, names: Sequence[str | Blend], made: Mapping[str, Sequence[SiteChains]]) -> list[int]:
        """Write rows for names into slots of their own, and then let the names move there; all or none."""
        slots: list[int] = []
        try:
            for name in names:
                slots.append(self._slot_to_write(name, names[: len(slots)]))
            with torch.no_grad():
                self.streams.before_writing(self._book.reads_of(slots))
                self._write(slots, made)
                self.streams.wrote()
        except BaseException:
            for slot in slots:
                self._book.give_back(slot)
            raise
        for index, (name, slot) in enumerate(zip(names, slots, strict=True)):
            if isinstance(name, str):
                self._forget(name)
                self._admissions += 1
                self._versions[name] = self._admissions
                are_all = len(names) == 1
                self._layers_of[name] = frozenset(path for path, parts in made.items() if are_all or _has(parts, index))
            else:
                self._blends.add(name)
            self._book.publish(name, slot)
        return slots

    def _slot_to_write(self, name: str | Blend, coming: Sequence[str | Blend]) -> int:
        """A slot that nobody reads; lets another name go where the bank is full, and waits where all are being read.

        coming: what will be in the bank soon.
        """
        deadline = time.monotonic() + self._wait_s
        while True:
            expected = len(self._book) + sum(other not in self._book for other in coming)
            if name in self._book or expected < self.num_slots or self._let_one_go():
                slot = self._book.take()
                if slot is not None:
                    return slot
            if time.monotonic() > deadline:
                raise BankFull(
                    f"got no free slot within {self._wait_s:g} s: all {self.num_slots} are pinned or being read; unpin some, "
                    "end the blocks that read them, or use grow"
                )
            self._changed.wait(0.001)  # others may read and end meanwhile

    def _let_one_go(self) -> bool:
        evicted = self._book.evict(is_dispensable=lambda name: isinstance(name, Blend))
        if isinstance(evicted, Blend):
            self._blends.discard(evicted)
        elif isinstance(evicted, str):
            self._forget(evicted)
        return evicted is not None

    def _write(self, slots: Sequence[int], made: Mapping[str, Sequence[SiteChains]]) -> None:
        self.writes += 1
        before = self._layout()
        for path in made:
            if path not in self._attached:
                self._attach(path)
        for path, held in self._attached.items():
            parts = made.get(path, ())
            for rows in parts:
                held.table.write([slots[index] for index in rows.of], rows.rotations)
            if not parts or len(slots) > 1:  # of one slot all are written, or none
                others = [slot for index, slot in enumerate(slots) if not _has(parts, index)]
                if others:
                    held.table.clear(others)
        if self._layout() != before:
            self.storage_version += 1
            self.graphs.tell("an adapter came in with a group size, a number of stages or a layer that none had before")

    def _layout(self) -> tuple[int, int]:
        """Another one when a table has become another."""
        return len(self._attached), sum([held.table.version for held in self._attached.values()])

    def _attach(self, path: str) -> None:
        site = self._sites[path]
        device = site.device()
        is_sparse = is_input(path) or experts_kind(path) is not None
        table = SlotTable(site.out_features, self._book.num_slots, self.dtype, device, is_sparse=is_sparse)
        self.streams.add(device)
        self._attached[path] = rotation = LayerRotation(table, self._routing, site, path)
        self._detach.callback(site.attach(rotation))

    def _forget(self, name: str) -> None:
        """An adapter's blends are not those of the one that comes after it."""
        self._versions.pop(name, None)
        self._layers_of.pop(name, None)
        for wish in [wish for wish in self._blends if name in wish.names]:
            self._blends.discard(wish)
            self._book.drop(wish)

    def _slot_of(self, wish: str | Blend) -> int:
        if isinstance(wish, Blend):
            for name in wish.names:
                self._require(name)
            wish = Blend(wish.weights, tuple(self._versions[name] for name in wish.names))
        slot = self._book.use(wish)
        if slot is not None:
            return slot
        if isinstance(wish, str):
            raise self._unknown(wish)
        return self._publish([wish], self._blend(wish))[0]

    def _blend(self, wish: Blend) -> dict[str, list[SiteChains]]:
        slots = {name: self._slot_of(name) for name in wish.names}
        made = {}
        for path, held in self._attached.items():
            parts = [
                (name, weight, held.table.read(slots[name]) if path in self._layers_of[name] else None)
                for name, weight in wish.weights
            ]
            chain = blended(path, parts)
            if chain is not None:
                made[path] = [SiteChains((0,), tuple(_in_range(stage, self.dtype, path, wish) for stage in chain))]
        return made

    def _require(self, name: str) -> None:
        if name not in self._book:
            raise self._unknown(name)

    def _unknown(self, name: str) -> RoutingError:
        known = ", ".join(map(repr, list(self.names)[:8])) or "none"
        return RoutingError(f"got adapter {name!r}, which is not in the bank; wanted one of {known}; admit it first")


def _has(parts: Sequence[SiteChains], index: int) -> bool:
    return any(index in rows.of for rows in parts)


def _in_range(rotation: Rotation, dtype: torch.dtype, path: str, wish: Blend) -> Rotation:
    """The blend as a row ``[1, D]``, if the tables' dtype can hold it; powers grow fast."""
    direct, cross = (vector.unsqueeze(0).to(dtype) for vector in (rotation.direct, rotation.cross))
    if not bool(torch.isfinite(direct).all() and torch.isfinite(cross).all()):
        shown = " + ".join(f"{weight:g} {name}" for name, weight in wish.weights)
        raise AdapterError(f"got blend {shown}, which {dtype} cannot hold in layer {path!r}; wanted smaller weights")
    return Rotation(direct, cross, rotation.group_size)
