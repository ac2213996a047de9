"""Which adapter each row of a batch uses, and for how long: one holder and one context for every host, `Routing`.

A choice holds for the length of a ``with`` block, of which nothing is left behind, also when the forward raises. It belongs to
the thread (or task) that made it, so that several can run one model at a time; a thread of autograd's engine that runs a
checkpointed block again has the rows of whoever called backward. A compiled model reads the choice from a plain attribute, so
that it sees other values, not another program; one thread at a time may run it.

Legend: B rows of the batch, T tokens of a row, D features, S slots; slot -1 is the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from copy import copy
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from roadie.errors import RoutingError
from roadie.sites.layout import Calls, before_calls, by_size, is_doubtful, offs, plain, wrapped, wrong_number

_MOST_PLACES = 64  # shapes of which a choice remembers where the rows lie: a model has a few for each number of tokens


class _Place(NamedTuple):
    """The slots in the shape of what a site gives, and whether sizes leave a doubt about them."""

    slots: Tensor
    is_doubtful: bool


class Choice:
    """The slots of one batch.

    slots: integers ``[B]``, or ``[B, T]`` for a slot a token, kept as int64; expansion: how many consecutive rows generation
    makes of one; model: whose rows they are; device: where the slots are read, if not where they are; held: what lives as long
    as something may read them; calls: of the model while the choice is in force, where another choice shares them. mark: what
    others remember a choice by, so that they do not keep its slots. Raises `RoutingError` for what are no slots.
    """

    def __init__(
        self,
        slots: Tensor,
        expansion: int = 1,
        *,
        model: nn.Module | None = None,
        device: torch.device | None = None,
        held: object = None,
        calls: Calls | None = None,
    ) -> None:
        if slots.is_floating_point() or slots.dtype == torch.bool or slots.dim() == 0:
            raise RoutingError(
                f"got slots of {slots.dtype} {tuple(slots.shape)}; wanted an integer tensor [B] or [B, T]"
            )
        slots = slots.to(torch.int64)
        self.slots = slots if device is None else slots.to(device)
        self.expansion, self.held, self.mark = expansion, held, object()
        self.calls = Calls(slots.shape[0], expansion, model) if calls is None else calls
        self._host = slots if slots.device.type == "cpu" else None
        self._places: dict[Hashable, _Place] = {}
        self._checked: set[Hashable] = set()

    @property
    def host(self) -> Tensor:
        """The slots on the CPU, so that looking at them does not wait for a device."""
        if self._host is None:
            self._host = self.slots.cpu()
        return self._host

    def check(self, num_slots: int) -> None:
        """Raise `RoutingError` unless the slots are from -1 to num_slots - 1."""
        lowest, highest = (int(each) for each in self.host.aminmax()) if self.host.numel() else (-1, -1)
        if lowest < -1 or highest >= num_slots:
            raise RoutingError(
                f"got slots from {lowest} to {highest}; wanted -1 (the base model) to {num_slots - 1}: there are "
                f"{num_slots} slots"
            )

    def starts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model, or the one inside, is called with these arguments now, in eager mode."""
        self.calls.note(plain(model), args, kwargs)
        self.calls.look(model)

    def ends(self, model: nn.Module) -> None:
        """A call of the model is over, or has raised."""

    def placed(self, y: Tensor, site: nn.Module, of_slot: tuple[int, ...] | None = None) -> Tensor:
        """The slots for what `site`, a linear layer, gives or is given: y ``[..., D]``; in the shape of y's first dimensions.

        of_slot: what stands for each slot at this site, where it is another number; the last is for slot -1. On y's device.
        Raises `RoutingError` where the rows of y are not those of the batch, or where nobody can tell. A shape is worked out
        once; where sizes leave a doubt, each site is looked at once.
        """
        if torch.compiler.is_compiling():
            return self._placed_in_graph(y, site, of_slot)
        lead = y.shape[:-1]
        key = lead, y.device, of_slot
        place = self._places.get(key)
        if place is None:
            if len(self._places) == _MOST_PLACES:
                self._places.clear()
            with torch.inference_mode(False):  # other calls of the block may be trained, and keep it for backward
                place = self._places[key] = self._place(y, of_slot)
        if place.is_doubtful and (site, lead) not in self._checked:
            self._check(y, site)
            self._checked.add((site, lead))
        return place.slots

    def placed_on_host(self, y: Tensor, site: nn.Module) -> Tensor:
        """As `placed`, on the CPU."""
        self.placed(y, site)
        found = by_size(self.host, self.expansion, y)
        assert found is not None
        return found

    def _placed_in_graph(self, y: Tensor, site: nn.Module, of_slot: tuple[int, ...] | None) -> Tensor:
        place = self._place(y, of_slot)
        may_be_rows = y.dim() == 2 and len(y) == len(self.slots)  # which they are, but in an expert of many
        if place.is_doubtful and not may_be_rows and not self.calls.is_sure:
            _check_in_eager(self, y, site)
        return place.slots

    def _place(self, y: Tensor, of_slot: tuple[int, ...] | None) -> _Place:
        found = by_size(self.slots, self.expansion, y)
        if found is None:
            raise RoutingError(
                wrong_number(self.slots.shape[0], y.shape[0] if y.dim() > 1 else 1)
                + f"Wanted adapters or slots, one for each row (or each token) of what a layer gives, {tuple(y.shape)}."
            )
        is_in_doubt = is_doubtful(y, found)
        if of_slot is not None:
            found = torch.tensor(of_slot, device=found.device)[found]
        return _Place(found.to(y.device), is_in_doubt)

    def _check(self, y: Tensor, site: nn.Module) -> None:
        self.calls.check(y, site, self.slots)


_check_in_eager: Callable[[Choice, Tensor, nn.Module], None] = torch.compiler.disable(Choice._check)

C = TypeVar("C", bound=Choice)


class Routing(Generic[C]):
    """The choice in force for one model, which all of its sites ask for; a copy of a model has one of its own, without a choice.

    here: the calling thread's own choice, for what has no time for `current`; nothing while a graph is traced.
    """

    def __init__(self) -> None:
        self.here: ContextVar[C | None] = ContextVar("roadie_rows", default=None)
        self._latest: C | None = None
        self._in_force: list[C | None] = []
        self._done: dict[Hashable, tuple[ExitStack, list[None]]] = {}
        self._lock = Lock()

    def current(self) -> C | None:
        """What holds for the calling thread; in a compiled model, and in autograd's threads, what was chosen last."""
        if torch.compiler.is_compiling():
            return self._latest
        choice = self.here.get()
        if choice is None and torch._C._current_graph_task_id() != -1:  # a backward pass, which runs a block again
            return self._latest
        return choice

    @contextmanager
    def chosen(self, model: nn.Module, choice: C) -> Iterator[None]:
        """Within the block the choice holds for `model`, whose calls are noted and whose checkpointed blocks keep their rows."""
        with self.attached(model), self.in_force(choice):
            yield

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Within the block calls of `model` are noted, and what it checkpoints keeps its rows."""
        with ExitStack() as stack:
            if not torch.compiler.is_compiling():
                stack.enter_context(self.once(("calls", model), lambda: self._note_calls(model)))
                if torch.is_grad_enabled():
                    stack.enter_context(self.once(("checkpoints", model), lambda: self._keep_in_checkpoints(model)))
            yield

    @contextmanager
    def in_force(self, choice: C | None) -> Iterator[None]:
        """Within the block the choice holds; None: nobody chose."""
        if torch.compiler.is_compiling():
            before, self._latest = self._latest, choice
            try:
                yield
            finally:
                self._latest = before
            return
        self._enter(choice)
        token, off = self.here.set(choice), offs.set((*offs.get(), self._off))
        try:
            yield
        finally:
            offs.reset(off)
            self.here.reset(token)
            self._leave(choice)

    def _off(self) -> Any:
        return self.in_force(None)

    def _enter(self, choice: C | None) -> None:
        with self._lock:
            self._in_force.append(choice)
            self._latest = choice

    def _leave(self, choice: C | None) -> None:
        """Other threads may have entered since, and not left yet."""
        with self._lock:
            places = [place for place, other in enumerate(self._in_force) if other is choice]
            del self._in_force[places[-1]]
            self._latest = self._in_force[-1] if self._in_force else None

    @contextmanager
    def once(self, key: Hashable, do: Callable[[], ExitStack]) -> Iterator[None]:
        """Within the block what `do` did is done: by the first of several that want it, in any thread; the last undoes it."""
        with self._lock:
            if key not in self._done:
                self._done[key] = do(), []
            undo, users = self._done[key]
            users.append(None)
        try:
            yield
        finally:
            with self._lock:
                users.pop()
                if not users:
                    del self._done[key]
                    undo.close()

    def _note_calls(self, model: nn.Module) -> ExitStack:
        """From now on choices know how the model is called, or the model inside, where PEFT wraps it."""

        def starts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            choice = None if torch.compiler.is_compiling() else self.here.get()
            if choice is not None:
                choice.starts(module, args, kwargs)

        def ends(module: nn.Module, args: Any, output: Any) -> None:
            choice = None if torch.compiler.is_compiling() else self.here.get()
            if choice is not None:
                choice.ends(module)

        stack = ExitStack()
        for part in wrapped(model):
            stack.callback(before_calls(part, starts))
            stack.callback(part.register_forward_hook(ends, always_call=True).remove)
        return stack

    def _keep_in_checkpoints(self, model: nn.Module) -> ExitStack:
        """From now on what transformers checkpoints in `model` runs with the rows it had, also when it runs again in backward."""
        stack = ExitStack()
        for module in model.modules():
            original = module.__dict__.get("_gradient_checkpointing_func")
            if callable(original) and getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = self._keeping_rows(original)  # type: ignore[assignment]
                stack.callback(setattr, module, "_gradient_checkpointing_func", original)
        return stack

    def _keeping_rows(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            choice = copy(self.current())  # as it is now: a call of the model may be over when the block runs again

            def with_rows(*inputs: Any, **named: Any) -> Any:
                with self.in_force(choice):
                    return function(*inputs, **named)

            return original(with_rows, *args, **kwargs)

        return checkpoint

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = type(self)()
        return made

    def __reduce__(self) -> tuple[type[Any], tuple[()]]:
        return type(self), ()
