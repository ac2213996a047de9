"""Which adapter each row of a batch uses, in a model with RoAd layers: names become slots, and PEFT's whole modules go by row.

One `RoadRouting` is shared by all RoAd layers of a model; `rows` and `adapter_rows` put a choice in force there for the length of
a ``with`` block, as a tensor of slots, so that a compiled model sees other values, not another program. In inference the bank of
the model serves the choice (`roadie.tuner.residents`), and it is asked once in a call of the model; in training, in compiled
models and in layers that are called by themselves each layer makes a table of its parameters.

Legend: B rows of the batch, T tokens, S adapters. A slot is the position of an adapter in the model's `peft_config`;
-1 is the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from roadie.bank.bank import AdapterBank
from roadie.bank.blends import BASE, Blend, Wish, parse
from roadie.bank.servers import announce
from roadie.errors import RoutingError
from roadie.sites.layout import has_compiled_part
from roadie.sites.rows import Choice, Routing
from roadie.tuner.residents import Residents, names_in


class AdapterChoice(Choice):
    """The slots of one batch into `names`: the adapters (and blends of them) of the table, in slot order.

    layers: the RoAd layers of `model` by path. in_bank: the same rows in slots of the model's bank, which has what they wish for
    as it is now; None where no call of the model is running that the bank can serve. Raises `RoutingError` for slots out of
    range, or merged adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, Any],
        slots: Tensor,
        names: tuple[str | Blend, ...],
        residents: Residents,
        expansion: int = 1,
    ) -> None:
        device = next(iter(layers.values())).get_base_layer_device() if layers else None
        super().__init__(slots, expansion, model=model, device=device)
        self.check(len(names))
        if any(layer.merged or layer.held_by for layer in layers.values()):
            raise RoutingError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        self.names, self._layers, self._residents = names, layers, residents
        self._is_compiled = torch.compiler.is_compiling() or has_compiled_part(model)
        self._model = model
        self._running: nn.Module | None = None
        self._bank: AdapterBank | None = None
        self._served: Choice | None = None
        self.in_bank: Choice | None = None

    @cached_property
    def trains(self) -> bool:
        """Whether a parameter of the adapters is trained."""
        names = {name for wish in self.names for name in names_in(wish)}
        slots = (layer._slot(name) for layer in self._layers.values() for name in names)
        return any(slot is not None and slot.requires_grad for slot in slots)

    def starts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called now: the bank serves the call, unless it is compiled, or trains what the rows wish for."""
        super().starts(model, args, kwargs)
        if self._running is None and not self._is_compiled and not (torch.is_grad_enabled() and self.trains):
            self._running, self.in_bank = model, self._from_bank()

    def ends(self, model: nn.Module) -> None:
        """Layers that are called by themselves look at their parameters themselves."""
        if self._running is model:
            self._running = self.in_bank = None

    def _from_bank(self) -> Choice | None:
        wishes = {slot: self.names[slot] for slot in self.host.unique().tolist() if slot >= 0}
        names = dict.fromkeys(name for wish in wishes.values() for name in names_in(wish))
        if self._served is not None and self._residents.are_unwritten(names, self._bank):
            return self._served
        held = self._residents.admit(self._model, self._layers, list(wishes.values()))
        if held is None:
            return None
        place = torch.full((len(self.names) + 1,), -1, dtype=torch.int64)  # the last is -1 too: the base model
        place[list(wishes)] = held
        self._bank = self._residents.bank
        self._served = Choice(place[self.host], self.expansion, device=self.slots.device, held=held, calls=self.calls)
        return self._served


class RoadRouting(Routing[AdapterChoice]):
    """The choice in force for a model with RoAd layers; residents: its bank, kept from one batch to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.residents = Residents()

    @contextmanager
    def by_name(
        self,
        model: nn.Module,
        layers: dict[str, Any],
        slots: Tensor,
        names: tuple[str | Blend, ...],
        expansion: int = 1,
    ) -> Iterator[AdapterChoice]:
        """Within the block row b of every batch uses ``names[slots[b]]``."""
        choice = AdapterChoice(model, layers, slots, names, self.residents, expansion)
        with self.chosen(model, choice), self.once(("whole modules", model), lambda: self._route_whole_modules(model)):
            yield choice

    def _route_whole_modules(self, model: nn.Module) -> ExitStack:
        """From now on each row goes through its adapter's copy of what PEFT trains whole: modules_to_save, trainable tokens."""
        stack = ExitStack()
        for wrapper in model.modules():
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                wrapper.__dict__["forward"] = _by_row(wrapper, self)
                stack.callback(wrapper.__dict__.pop, "forward", None)
        return stack


def shared_routing(model: nn.Module) -> RoadRouting:
    """The routing that the RoAd layers of `model` share; a new one where there are none yet."""
    return _routing_of(road_layers(model))


def adapter_slots(layers: Iterable[Any], config: Any) -> tuple[str, ...]:
    """The names of the adapters of RoAd layers in slot order, which is that of `config`: slot k belongs to the k-th name."""
    known: dict[str, None] = {}
    for layer in layers:
        known.update(dict.fromkeys(layer.road_theta))
    ordered = [name for name in config if name in known] if isinstance(config, dict) else []
    return tuple(dict.fromkeys([*ordered, *known]))


def road_layers(model: nn.Module) -> dict[str, Any]:
    """The RoAd layers of a model by path, in module order; where it is one itself, it is called "layer"."""
    root = "layer" if isinstance(getattr(model, "_routing", None), RoadRouting) else ""
    modules = model.named_modules(prefix=root)
    return {path: module for path, module in modules if isinstance(getattr(module, "_routing", None), RoadRouting)}


@contextmanager
def rows(model: nn.Module, slots: Tensor | Sequence[str]) -> Iterator[None]:
    """Within the block, row b of every batch uses adapter ``slots[b]``.

    model: a PeftModel, or any model with RoAd layers inside, compiled or not. slots: an integer tensor, ``[B]`` for a
    slot a row or ``[B, T]`` for a slot a token (-1: the base model; k: the k-th adapter of ``model.peft_config``), or a
    sequence of B wishes: adapter names, "__base__" or None for the base model, mappings of names to weights for blends. Works in
    training too: each row's gradient goes to its own adapter (to all of a blend), and trainable adapters that no row uses get a
    gradient of zero: the table holds all adapters, so that a compiled model stays one program whatever the rows choose.

    Raises `RoutingError` for unknown adapters, slots out of range, or a model with merged adapters.
    """
    layers = road_layers(model)
    table: tuple[str | Blend, ...] = adapter_slots(layers.values(), getattr(model, "peft_config", None))
    if not isinstance(slots, Tensor):
        wishes = _checked_wishes(slots, table)
        table = (*table, *dict.fromkeys(wish for wish in wishes if isinstance(wish, Blend)))
        slots = _slots_in(table, wishes)
    with _routing_of(layers).by_name(model, layers, slots, table):
        yield


announce(rows)


@contextmanager
def adapter_rows(model: nn.Module, adapter_names: Sequence[Wish], expansion: int) -> Iterator[AdapterChoice]:
    """Route the rows of one call by name, where generation may make `expansion` consecutive rows of each.

    Where nothing is compiled the table holds just the adapters that are asked for: others cost nothing and get no gradient.
    """
    layers = road_layers(model)
    table: tuple[str | Blend, ...] = adapter_slots(layers.values(), getattr(model, "peft_config", None))
    wishes = _checked_wishes(adapter_names, table)
    wanted = dict.fromkeys(wish for wish in wishes if wish is not None)
    if not has_compiled_part(model):
        table = tuple(name for name in table if name in wanted)
    table = (*table, *(wish for wish in wanted if isinstance(wish, Blend)))
    with _routing_of(layers).by_name(model, layers, _slots_in(table, wishes), table, expansion) as choice:
        yield choice


def _routing_of(layers: dict[str, Any]) -> RoadRouting:
    return next((layer._routing for layer in layers.values()), None) or RoadRouting()


def _slots_in(table: tuple[str | Blend, ...], wishes: Sequence[str | Blend | None]) -> Tensor:
    position = {name: slot for slot, name in enumerate(table)}
    return torch.tensor([-1 if wish is None else position[wish] for wish in wishes], dtype=torch.int64)


def _checked_wishes(adapter_names: Sequence[Wish], known: Iterable[str | Blend]) -> list[str | Blend | None]:
    if isinstance(adapter_names, (str, Mapping)):
        raise RoutingError(f"got adapter_names={adapter_names!r}; wanted a list with one adapter name for each row")
    wishes = [parse(wish) for wish in adapter_names]
    unknown = sorted({name for wish in wishes for name in names_in(wish)} - set(known))
    if unknown:
        raise RoutingError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Wanted names among "
            f"{sorted(map(str, known))} or {BASE!r}; load the adapter first."
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
    parts = [
        _through_copy(wrapper, name, x[torch.tensor(indices, device=x.device)], *args, **kwargs)
        for name, indices in members.items()
    ]
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


def _through_copy(wrapper: AuxiliaryTrainingWrapper, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if name == BASE:
        return wrapper.original_module(x, *args, **kwargs)
    return wrapper._forward_wrapped_mixed_batch(x, name, *args, **kwargs)
