"""Which adapter each row of a batch uses, in a model with RoAd layers: names become slots, and PEFT's whole modules go by row.

One `RoadRouting` is shared by all RoAd layers of a model; `rows` and `adapter_rows` put a choice in force there for the length of
a ``with`` block, as a tensor of slots, so that a compiled model sees other values, not another program. In inference the bank of
the model serves the choice (`roadie.tuner.residents`), and it is asked once in a call of the model. In training, and where the
bank cannot serve, the tables of all layers are made before it is called (`roadie.tuner.tables`); in compiled models and for
blends each layer makes its own.

Legend: B rows of the batch, T tokens, S adapters. A slot is the position of an adapter in the model's `peft_config`;
-1 is the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from roadie.bank.blends import BASE, Blend, Wish, names_in, parse
from roadie.bank.servers import announce
from roadie.bank.static import static_slots
from roadie.errors import RoutingError
from roadie.kernels import is_looked_on
from roadie.sites.rows import Choice, Mark, Routing
from roadie.tuner.residents import Held, Residents
from roadie.tuner.tables import Kept, Tables, are_trained


@dataclass(frozen=True, eq=False)
class Parts:
    """What of a model rows are about, as long as its modules are the ones it had.

    layers: the RoAd layers by path, in module order; where the model is one itself, it is called "layer". wholes: what PEFT
    trains whole, modules_to_save and trainable tokens.
    """

    model: nn.Module
    layers: dict[str, Any]
    wholes: list[AuxiliaryTrainingWrapper]
    _additions: int
    _has_compiled: bool
    _books: list[dict[str, Any]]
    _children: list[dict[str, Any]]
    _found: list[list[Any]]

    @classmethod
    def of(cls, model: nn.Module, additions: int) -> Parts:
        root = "layer" if _layers_in([model]) else ""
        modules = dict(model.named_modules(prefix=root))
        those = set(_layers_in(modules.values()))
        layers = {path: each for path, each in modules.items() if each in those}
        wholes = [each for each in modules.values() if isinstance(each, AuxiliaryTrainingWrapper)]
        # What is inside of a RoAd layer changes where adapters are added or deleted alone.
        outside = [each for each in modules.values() if each not in those]
        children = [each._modules for each in outside if each._modules or isinstance(each, _LISTS)]
        has_compiled = any("_orig_mod" in each._modules for each in modules.values())
        books = [each.__dict__ for each in modules.values() if each._modules]
        found = [list(each.values()) for each in children]
        return cls(model, layers, wholes, additions, has_compiled, books, children, found)

    def are_of(self, model: nn.Module, additions: int) -> bool:
        """Whether they are still what `model` has; additions: of adapters to its layers (`RoadRouting.additions`)."""
        if model is not self.model or additions != self._additions:
            return False
        return [list(children.values()) for children in self._children] == self._found

    def are_compiled(self) -> bool:
        """Whether the model was given to torch.compile, or a module in it, or is being compiled."""
        if self._has_compiled or torch.compiler.is_compiling():
            return True
        return any(map(dict.get, self._books, repeat("_compiled_call_impl")))

    def slots(self) -> tuple[str, ...]:
        """The names of the adapters in slot order: slot k belongs to the k-th name."""
        known: dict[str, Any] = {}
        for layer in self.layers.values():
            known.update(layer.variant)
        config = getattr(self.model, "peft_config", None)
        ordered = [name for name in config if name in known] if isinstance(config, dict) else []
        return tuple(dict.fromkeys([*ordered, *known]))


_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class AdapterChoice(Choice):
    """The slots of one batch into `names`: the adapters (and blends of them) of the table, in slot order.

    adapters: those that the names and blends are made of. in_bank: the same rows in slots of the model's bank, which has what
    they wish for as it is now; None where no call of the model is running that the bank can serve. is_refused: whether one is
    that it cannot serve, since its parameters cannot be watched. Raises `RoutingError` for slots out of range.
    """

    def __init__(
        self,
        parts: Parts,
        slots: Tensor,
        names: tuple[str | Blend, ...],
        routing: RoadRouting,
        expansion: int,
        is_compiled: bool,
        is_static: bool = False,
    ) -> None:
        first = next(iter(parts.layers.values()), None)
        device = None if first is None else first.get_base_layer_device()
        super().__init__(
            slots, expansion, model=parts.model, device=device, is_compiled=is_compiled, is_static=is_static
        )
        self.check(len(names))
        self.names, self._parts, self._routing, self._residents = names, parts, routing, routing.residents
        self.blends = [name for name in names if isinstance(name, Blend)]
        self.adapters: tuple[Any, ...] = names
        if self.blends:
            self.adapters = tuple(dict.fromkeys([adapter for name in names for adapter in names_in(name)]))
        self._running: nn.Module | None = None
        self._held: Held | None = None
        self._served: Choice | None = None
        self.in_bank: Choice | None = None
        self.is_refused = False

    @cached_property
    def trains(self) -> bool:
        """Whether a parameter of the adapters is trained."""
        return are_trained(self._parts.layers.values(), self.adapters)

    def starts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called now: the bank serves the call, unless it is compiled, or trains what the rows wish for."""
        super().starts(model, args, kwargs)
        if self._running not in (None, model):  # in a call of what is around it; a call of itself has raised
            return
        self._running, self.in_bank, self.is_refused = None, None, False
        if not self.calls.is_compiled and not (torch.is_grad_enabled() and self.trains):
            self._running, self.in_bank = model, self._from_bank()
            self.is_refused = self.in_bank is None
            if self.in_bank is None:
                self._routing.by.set(self._routing.tables_for(model))
            else:
                self._routing.by.set(None if is_looked_on() else self.in_bank.mark)

    def ends(self, model: nn.Module) -> None:
        """Layers that are called by themselves look at their parameters themselves."""
        if self._running is model:
            self._running = self.in_bank = None

    def _from_bank(self) -> Choice | None:
        additions = self._routing.additions
        if self._held is None or not self._residents.are_current(self._held, additions):
            wishes = self._wishes()
            self._held = self._residents.admit(self._parts.model, self._parts.layers, list(wishes.values()), additions)
            if self._held is None:
                return None
            place = torch.full((len(self.names) + 1,), -1, dtype=torch.int64)  # the last is -1 too: the base model
            place[list(wishes)] = self._held.slots
            self._served = self._in_slots(self._held, place)
        self._held.bank.streams.before_reading()
        return self._served

    def _wishes(self) -> dict[int, str | Blend]:
        """What the bank has to have, by slot."""
        return {slot: self.names[slot] for slot in self.host.unique().tolist() if slot >= 0}

    def _in_slots(self, held: Held, place: Tensor) -> Choice:
        """The rows in slots of the bank; place: which each slot is there."""
        slots, device = place[self.host], self.slots.device
        mark = held.bank.mark(slots, self.expansion, self.calls, device)
        return Choice(slots, self.expansion, device=device, held=held.slots, calls=self.calls, mark=mark)


class StaticChoice(AdapterChoice):
    """Static slots, where slot k is the k-th of all adapters: the bank has all of them, and each call looks up its slots anew.

    What a graph reads, the bank's tables and the table of slots, lives as long as the caller's slots do.
    """

    def starts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().starts(model, args, kwargs)
        self.check(len(self.names))
        if self._running is model and self.in_bank is not None:
            torch.take(self._kept["place"], self.slots, out=self._kept["slots"])

    def _from_bank(self) -> Choice | None:
        served = super()._from_bank()
        if served is not None:
            served.mark = self.mark
        return served

    def _wishes(self) -> dict[int, str | Blend]:
        return dict(enumerate(self.names))

    def _in_slots(self, held: Held, place: Tensor) -> Choice:
        self._kept = kept = held.bank.graphs.kept(held.bank, self.slots)
        with torch.inference_mode(False):
            if "place" not in kept:
                kept["place"], kept["slots"] = place.to(self.slots.device), torch.empty_like(self.slots)
            else:  # a graph goes on with the adapters as they are now
                kept["place"].copy_(place)
        kept["held"] = held.slots
        return Choice(kept["slots"], self.expansion, calls=self.calls, is_static=True)


class RoadRouting(Routing[AdapterChoice]):
    """What the RoAd layers of a model share: the choice in force, and what is done once a call of the model.

    residents: the bank of the model, kept from one batch to the next. by: what layers rotate by while a call of the model runs in
    this thread: tables of all of them, or the mark of rows that the bank serves; None where each layer looks for itself.
    changes: how often what a layer rotates by has become another one, such as other active adapters; additions: how often a
    layer was given an adapter, or lost one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.residents = Residents()
        self._parts: Parts | None = None
        self._unmerged = -1
        self.by: ContextVar[Tables | Mark | None] = ContextVar("roadie_by", default=None)
        self.changes = self.additions = 0
        self._kept = Kept()

    def listen(self, model: nn.Module) -> None:
        """From now on the tables of all layers of `model` are made before it is called."""
        if self._starts not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(self._starts)
            model.register_forward_hook(self._ends, always_call=True)

    def stop_listening(self, model: nn.Module) -> None:
        """Take that back."""
        for hooks, ours in ((model._forward_pre_hooks, self._starts), (model._forward_hooks, self._ends)):
            for key in [key for key, hook in hooks.items() if hook == ours]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)

    @contextmanager
    def call(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model is called."""
        if torch.compiler.is_compiling():
            yield
            return
        self._starts(model)
        try:
            yield
        finally:
            self._ends(model)

    def _starts(self, model: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            choice = self.here.get()
            if choice is None or choice.in_bank is None:
                self.by.set(self.tables_for(model))

    def _ends(self, model: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.by.set(None)

    def tables_for(self, model: nn.Module) -> Tables | None:
        """Those of all layers for the call of the model that is running, or those of the last one, which hold."""
        choice, wants_graph = self.here.get(), torch.is_grad_enabled()
        names: Any = None
        if choice is not None:  # in inference the bank serves it
            if choice.blends or not (choice.is_refused or (wants_graph and choice.trains)):
                return None
            names = choice.names
        kept = self._kept.current(names, self.changes)
        if kept is not None and not (wants_graph and kept.layout.is_trained()):
            return kept._replace() if is_looked_on() else kept  # the same, but no layer rotates as it did the last time
        layout = self._kept.layout(partial(_layers_in, model.modules()), names, self.changes)
        if not layout.is_whole():
            return None
        return layout.tables(has_graph=True) if wants_graph and layout.is_trained() else self._kept.make(layout)

    def parts_of(self, model: nn.Module) -> Parts:
        """What of the model rows are about, looked up again where its modules are others."""
        parts = self._parts
        if parts is None or not parts.are_of(model, self.additions):
            parts = self._parts = Parts.of(model, self.additions)
        return parts

    def check_unmerged(self, parts: Parts) -> None:
        """Raise `RoutingError` where adapters are merged into a layer."""
        if self._unmerged == self.changes:
            return
        for layer in parts.layers.values():
            if layer.__dict__.get("merged_adapters") or layer.held_by:  # of an input its layer knows
                raise RoutingError(ARE_MERGED)
        self._unmerged = self.changes

    def prepare(self, model: nn.Module, undo: ExitStack) -> None:
        """As for any model; and each row goes through its adapter's copy of what PEFT trains whole."""
        super().prepare(model, undo)
        parts = self._parts if self._parts is not None and self._parts.model is model else self.parts_of(model)
        for wrapper in parts.wholes:
            wrapper.__dict__["forward"] = _by_row(wrapper, self)
            undo.callback(wrapper.__dict__.pop, "forward", None)


ARE_MERGED = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."


def shared_routing(model: nn.Module) -> RoadRouting:
    """The routing that the RoAd layers of `model` share; a new one where there are none yet."""
    for module in model.modules():
        routing = module.__dict__.get("_routing")
        if isinstance(routing, RoadRouting):
            return routing
    return RoadRouting()


def _layers_in(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if isinstance(module.__dict__.get("_routing"), RoadRouting)]


def rows(model: nn.Module, slots: Tensor | Sequence[str], *, static: bool = False) -> AbstractContextManager[Any]:
    """As `roadie.rows`, for a model with RoAd layers inside: slot k is the k-th adapter of ``model.peft_config``.

    The table holds all adapters, so that a compiled model stays one program whatever the rows choose. Raises `RoutingError` for
    unknown adapters, slots out of range, or a model with merged adapters.
    """
    return adapter_rows(model, static_slots(slots) if static else slots, are_all=True, is_static=static)


announce(rows)


def adapter_rows(
    model: nn.Module,
    wanted: Tensor | Sequence[Wish],
    expansion: int = 1,
    *,
    are_all: bool = False,
    is_static: bool = False,
) -> AbstractContextManager[Any]:
    """Route the rows of one call by name, or by slot, where generation may make `expansion` consecutive rows of each.

    Where nothing is compiled the table holds just the adapters that are asked for: others cost nothing and get no gradient.
    are_all: whether it holds all adapters all the same.
    """
    routing = shared_routing(model)
    parts = routing.parts_of(model)
    routing.check_unmerged(parts)
    is_compiled = parts.are_compiled()
    table: tuple[str | Blend, ...] = parts.slots() if are_all or is_compiled else ()
    if not isinstance(wanted, Tensor):
        wishes = _wishes(parts, wanted)
        blends = dict.fromkeys([wish for wish in wishes if isinstance(wish, Blend)])
        table = (*(table or sorted({wish for wish in wishes if isinstance(wish, str)})), *blends)
        wanted = _slots_in(table, wishes)
    kind = StaticChoice if is_static else AdapterChoice
    return routing.chosen(kind(parts, wanted, table, routing, expansion, is_compiled, is_static), model)


def _slots_in(table: tuple[str | Blend, ...], wishes: Sequence[str | Blend | None]) -> Tensor:
    position = {name: slot for slot, name in enumerate(table)}
    return torch.tensor([-1 if wish is None else position[wish] for wish in wishes], dtype=torch.int64)


def _wishes(parts: Parts, adapter_names: Sequence[Wish]) -> list[str | Blend | None]:
    if isinstance(adapter_names, (str, Mapping)):
        raise RoutingError(f"got adapter_names={adapter_names!r}; wanted a list with one adapter name for each row")
    wishes = [wish if type(wish) is str and wish != BASE else parse(wish) for wish in adapter_names]
    unknown = {wish for wish in wishes if isinstance(wish, str)}
    unknown.update([name for wish in wishes if isinstance(wish, Blend) for name in wish.names])
    for layer in parts.layers.values():
        unknown.difference_update(layer.variant)
        if not unknown:
            return wishes
    if unknown:
        raise RoutingError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. Wanted names among "
            f"{sorted(parts.slots())} or {BASE!r}; load the adapter first."
        )
    return wishes


def _by_row(wrapper: AuxiliaryTrainingWrapper, routing: RoadRouting) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        choice = routing.current()
        if choice is None or wrapper.disable_adapters:
            return type(wrapper).forward(wrapper, *args, **kwargs)
        if not args:
            raise RoutingError(
                f"got keyword arguments only for {type(wrapper.original_module).__name__}, which PEFT trains whole; a "
                "mixed batch needs its input as the first positional argument"
            )
        return _mix(wrapper, choice, *args, **kwargs)

    return forward


def _mix(wrapper: AuxiliaryTrainingWrapper, choice: AdapterChoice, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Runs each distinct copy on its own rows and puts the results back in order; differentiable."""
    slots = choice.placed_on_host(x.unsqueeze(-1), wrapper)
    if slots.dim() != 1:
        raise RoutingError(
            "got a slot for each token in a model whose adapters train whole modules (modules_to_save, trainable "
            "tokens); these are chosen by row; pass one slot for each row"
        )
    copies = wrapper._get_available_adapters()
    members: dict[str, list[int]] = {}
    for row, slot in enumerate(slots.tolist()):
        members.setdefault(_whole(choice.names[slot] if slot >= 0 else BASE, copies), []).append(row)
    parts = []
    for name, indices in members.items():
        part = x[torch.tensor(indices, device=x.device)]
        if name == BASE:
            parts.append(wrapper.original_module(part, *args, **kwargs))
        else:
            parts.append(wrapper._forward_wrapped_mixed_batch(part, name, *args, **kwargs))
    order = torch.tensor([row for indices in members.values() for row in indices], dtype=torch.int64)
    joined = torch.cat(parts)
    return joined.index_select(0, order.argsort().to(joined.device))


def _whole(wish: str | Blend, copies: Iterable[str]) -> str:
    """Whose copy of a whole module a row goes through."""
    if isinstance(wish, Blend) and not set(wish.names).isdisjoint(copies):
        raise RoutingError(
            f"got a blend of {', '.join(wish.names)}, of which some train whole modules (modules_to_save, trainable tokens); "
            "wanted adapters that only rotate: whole modules do not blend"
        )
    return wish if isinstance(wish, str) and wish in copies else BASE
