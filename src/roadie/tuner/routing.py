"""Which adapter each row of a batch uses, and for how long.

One `Routing` object is shared by all RoAd layers of a model. `rows` writes the choice of the rows there for the length
of a ``with`` block, as a tensor of slots, so that a compiled model sees other values, not another program. Nothing is
written anywhere else and everything is put back in ``finally``, also when the forward raises.

Legend: B rows of the batch, T tokens, S adapters. A slot is the position of an adapter in the model's `peft_config`;
-1 is the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from roadie.bank.bank import keep_lease
from roadie.bank.blends import BASE, Blend, Wish, parse
from roadie.bank.checkpointing import checkpoints_keep_rows
from roadie.bank.layout import Calls, Choice, calls_noted, can_be_turned_off, has_compiled_part
from roadie.bank.servers import announce
from roadie.errors import RoutingError
from roadie.tuner.residents import Residents, names_in


@dataclass(eq=False)
class Routing:
    """The choice that is in force: `slots` (None: every row uses the active adapters) into `names`.

    slots: int64, ``[B]``, ``[B, T]`` or any leading shape of the layers' outputs; names: the adapters (and blends of them) of
    the table, in slot order; batch: one set of rows, of these slots; in_bank: whether the bank of the model knows them too;
    trains: whether a parameter of them is trained. residents: the bank, kept from one batch to the next.
    """

    slots: Tensor | None = None
    names: tuple[str | Blend, ...] = ()
    batch: Choice | None = None
    in_bank: bool = False
    trains: bool = False
    residents: Residents = field(default_factory=Residents)

    def slots_of(self, y: Tensor, site: nn.Module) -> Tensor:
        """The slots for what the linear layer `site` gives, y ``[..., D]``: int64, in the shape of y's first dimensions."""
        assert self.batch is not None
        return self.batch.placed(y, site).to(y.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        copy = memo[id(self)] = Routing()
        return copy

    def __reduce__(self) -> tuple[type[Routing], tuple[()]]:
        return Routing, ()


def shared_routing(model: nn.Module) -> Routing:
    """The routing that the RoAd layers of `model` share; a new one where there are none yet."""
    for module in model.modules():
        routing = getattr(module, "_routing", None)
        if isinstance(routing, Routing):
            return routing
    return Routing()


def adapter_slots(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's RoAd adapters in slot order: slot k belongs to the k-th name."""
    known: dict[str, None] = {}
    for layer in road_layers(model):
        known.update(dict.fromkeys(layer.road_theta))
    config = getattr(model, "peft_config", None)
    ordered = [name for name in config if name in known] if isinstance(config, dict) else []
    return tuple(dict.fromkeys([*ordered, *known]))


def road_layers(model: nn.Module) -> Iterator[Any]:
    """The RoAd layers of a model, in module order."""
    return (module for module in model.modules() if isinstance(getattr(module, "_routing", None), Routing))


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
    table: tuple[str | Blend, ...] = adapter_slots(model)
    if not isinstance(slots, Tensor):
        wishes = _checked_wishes(model, slots)
        table = (*table, *dict.fromkeys(wish for wish in wishes if isinstance(wish, Blend)))
        slots = _slots_in(table, wishes)
    with _route(model, slots, table):
        yield


announce(rows)


@contextmanager
def adapter_rows(model: nn.Module, adapter_names: Sequence[Wish], expansion: int) -> Iterator[Choice]:
    """Route the rows of one call by name, where generation may make `expansion` consecutive rows of each.

    Where nothing is compiled the table holds just the adapters that are asked for: others cost nothing and get no gradient.
    """
    wishes = _checked_wishes(model, adapter_names)
    table: tuple[str | Blend, ...] = adapter_slots(model)
    wanted = {wish for wish in wishes if wish is not None}
    if not has_compiled_part(model):
        table = tuple(name for name in table if name in wanted)
    table = (*table, *(wish for wish in wanted if isinstance(wish, Blend)))
    with _route(model, _slots_in(table, wishes), table, expansion) as choice:
        yield choice


def _slots_in(table: tuple[str | Blend, ...], wishes: Sequence[str | Blend | None]) -> Tensor:
    position = {name: slot for slot, name in enumerate(table)}
    return torch.tensor([-1 if wish is None else position[wish] for wish in wishes], dtype=torch.int64)


def _checked_wishes(model: nn.Module, adapter_names: Sequence[Wish]) -> list[str | Blend | None]:
    if isinstance(adapter_names, (str, Mapping)):
        raise RoutingError(f"got adapter_names={adapter_names!r}; wanted a list with one adapter name for each row")
    wishes = [parse(wish) for wish in adapter_names]
    unknown = sorted({name for wish in wishes for name in names_in(wish)} - (known := set(adapter_slots(model))))
    if unknown:
        raise RoutingError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Wanted names among "
            f"{sorted(known)} or {BASE!r}; load the adapter first."
        )
    return wishes


@contextmanager
def _route(model: nn.Module, slots: Tensor, names: tuple[str | Blend, ...], expansion: int = 1) -> Iterator[Choice]:
    _check_slots(slots, len(names))
    routing = shared_routing(model)
    layers = _layers_by_path(model)
    if any(layer.merged or layer.held_by for layer in layers.values()):
        raise RoutingError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    device = next(iter(layers.values())).get_base_layer_device() if layers else slots.device
    slots = slots.to(device=device, dtype=torch.int64)
    choice = Choice(slots, expansion, Calls(len(slots), expansion, model))
    chosen = Routing(slots, names, choice)
    chosen.trains = _trains(layers.values(), names)
    with ExitStack() as stack:
        if not torch.compiler.is_compiling():
            stack.enter_context(calls_noted(model, lambda: routing.batch))
            stack.enter_context(can_be_turned_off(lambda: _in_force(routing, Routing())))
        if not (_is_compiled(model) or (chosen.trains and torch.is_grad_enabled())):
            chosen.in_bank = _enter_bank(stack, model, routing, layers, chosen)
        stack.enter_context(_in_force(routing, chosen))
        stack.enter_context(_saved_modules_by_row(model, routing))
        if torch.is_grad_enabled():
            stack.enter_context(checkpoints_keep_rows(model, lambda: _in_force(routing, chosen)))
        yield choice


def _layers_by_path(model: nn.Module) -> dict[str, Any]:
    """The RoAd layers of a model; where it is one itself, it is called "layer"."""
    root = "layer" if isinstance(getattr(model, "_routing", None), Routing) else ""
    modules = model.named_modules(prefix=root)
    return {path: module for path, module in modules if isinstance(getattr(module, "_routing", None), Routing)}


def _is_compiled(model: nn.Module) -> bool:
    return torch.compiler.is_compiling() or has_compiled_part(model)


def _trains(layers: Iterable[Any], names: Sequence[str | Blend]) -> bool:
    wanted = {name for wish in names for name in names_in(wish)}
    return any(
        slot is not None and slot.requires_grad for layer in layers for slot in (layer._slot(name) for name in wanted)
    )


def _enter_bank(stack: ExitStack, model: nn.Module, routing: Routing, layers: dict[str, Any], chosen: Routing) -> bool:
    """Put the rows in force in the bank too; whether that is possible."""
    assert chosen.slots is not None
    assert chosen.batch is not None
    places = [slot for slot in chosen.slots.unique().tolist() if slot >= 0]
    held = routing.residents.admit(model, layers, [chosen.names[slot] for slot in places])
    if held is None:
        return False
    place = torch.full((len(chosen.names) + 1,), -1, dtype=torch.int64)  # the last is -1 too: the base model
    place[places] = held
    slots = keep_lease(place.to(chosen.slots.device)[chosen.slots], held)
    choice = Choice(slots.clone(), chosen.batch.expansion, chosen.batch.calls)
    stack.enter_context(routing.residents.bank.chosen(choice, slots))
    return True


def _check_slots(slots: Tensor, num_names: int) -> None:
    if slots.is_floating_point() or slots.dtype == torch.bool or slots.dim() == 0:
        raise RoutingError(f"got slots of {slots.dtype} {tuple(slots.shape)}; wanted an integer tensor [B] or [B, T]")
    if slots.numel() and (int(slots.min()) < -1 or int(slots.max()) >= num_names):
        raise RoutingError(
            f"got slots from {int(slots.min())} to {int(slots.max())}; wanted -1 (base) to {num_names - 1}: "
            f"the model has {num_names} adapter(s)"
        )


@contextmanager
def _in_force(routing: Routing, chosen: Routing) -> Iterator[None]:
    before = replace(routing)
    _set(routing, chosen)
    try:
        yield
    finally:
        _set(routing, before)


def _set(routing: Routing, chosen: Routing) -> None:
    routing.slots, routing.names, routing.batch = chosen.slots, chosen.names, chosen.batch
    routing.in_bank, routing.trains = chosen.in_bank, chosen.trains


@contextmanager
def _saved_modules_by_row(model: nn.Module, routing: Routing) -> Iterator[None]:
    """Modules that PEFT trains whole (modules_to_save, trainable tokens): each row goes through its adapter's copy."""
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for wrapper in wrappers:
        wrapper.__dict__["forward"] = _by_row(wrapper, routing)
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper.__dict__.pop("forward", None)


def _by_row(wrapper: AuxiliaryTrainingWrapper, routing: Routing) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        slots = routing.slots
        if slots is None or wrapper.disable_adapters:
            return type(wrapper).forward(wrapper, *args, **kwargs)
        if not args:
            raise RoutingError(
                f"got keyword arguments only for {type(wrapper.original_module).__name__}, which PEFT trains whole; a "
                "mixed batch needs its input as the first positional argument"
            )
        return _mix(wrapper, routing, *args, **kwargs)

    return forward


def _mix(wrapper: AuxiliaryTrainingWrapper, routing: Routing, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Runs each distinct copy on its own rows and puts the results back in order; differentiable."""
    slots = routing.slots_of(x.unsqueeze(-1), wrapper)
    if slots.dim() != 1:
        raise RoutingError(
            "got a slot for each token in a model whose adapters train whole modules (modules_to_save, trainable "
            "tokens); these are chosen by row; pass one slot for each row"
        )
    copies = wrapper._get_available_adapters()
    wishes = [routing.names[slot] if slot >= 0 else BASE for slot in slots.tolist()]
    chosen = [_whole(wish, copies) for wish in wishes]
    order, parts = [], []
    for name in dict.fromkeys(chosen):
        indices = [row for row, other in enumerate(chosen) if other == name]
        rows_x = x[torch.tensor(indices, device=x.device)]
        order += indices
        parts.append(_through_copy(wrapper, name, rows_x, *args, **kwargs))
    inverse = torch.empty(len(order), dtype=torch.int64)
    inverse[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    joined = torch.cat(parts)
    return joined.index_select(0, inverse.to(joined.device))


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
