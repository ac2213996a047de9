"""Which adapter each row of a batch uses, and for how long: one holder and one context for every host, `Routing`.

A choice holds for the length of a ``with`` block, of which nothing is left behind, also when the forward raises. It belongs to
the thread (or task) that made it, so that several can run one model at a time; a thread of autograd's engine that runs a
checkpointed block again has the rows of whoever called backward. A compiled model reads the choice from a plain attribute, so
that it sees other values, not another program; one thread at a time may run it.

Legend: B rows of the batch, T tokens of a row, D features, S slots; slot -1 is the base model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from copy import copy
from functools import cached_property
from threading import RLock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from roadie.errors import RoutingError
from roadie.kernels.constants import constant, moved
from roadie.sites import layout

_MOST_SHAPES = 64  # of which a choice remembers where the rows lie: a model has a few for each number of tokens


class Mark:
    """What sites remember a choice by, and what is worked out of it once: neither its leases nor its calls.

    by_shape: the slots for leading dimensions, and whether sizes leave a doubt; checked: where that was looked into.
    """

    def __init__(self) -> None:
        self.by_shape: dict[Hashable, tuple[Tensor, bool]] = {}
        self.checked: set[Hashable] = set()


class Choice:
    """The slots of one batch.

    slots: integers ``[B]``, or ``[B, T]`` for a slot a token, kept as int64; expansion: how many consecutive rows generation
    makes of one; model: whose rows they are; device: where the slots are read, if not where they are; held: what lives as long
    as something may read them; calls: of the model while the choice is in force, where another choice shares them; is_compiled:
    whether a part of the model is, None where that is to be looked up; mark: of an earlier choice, where slots and numbers of
    tokens are the same. is_static: the slots are read where they lie in every call, and may be others each time: nobody asks the
    device for them. Raises `RoutingError` for what are no slots, or none that can be static.
    """

    def __init__(
        self,
        slots: Tensor,
        expansion: int = 1,
        *,
        model: nn.Module | None = None,
        device: torch.device | None = None,
        held: object = None,
        calls: layout.Calls | None = None,
        is_compiled: bool | None = None,
        mark: Mark | None = None,
        is_static: bool = False,
    ) -> None:
        if slots.is_floating_point() or slots.dtype == torch.bool or slots.dim() == 0:
            raise RoutingError(
                f"got slots of {slots.dtype} {tuple(slots.shape)}; wanted an integer tensor [B] or [B, T]"
            )
        if is_static and (
            slots.dtype != torch.int64 or not slots.is_contiguous() or device not in (None, slots.device)
        ):
            raise RoutingError(
                f"got static slots of {slots.dtype} with strides {slots.stride()} on {slots.device}; wanted contiguous ones of "
                f"torch.int64 on {device or slots.device}, where they are read: nothing may be copied"
            )
        slots = slots.to(torch.int64)
        self.slots = slots if device is None else moved(slots, device)
        self.is_static = is_static
        self._marks: dict[frozenset[int], Mark] = {}
        self.expansion, self.held, self.mark = expansion, held, mark or Mark()
        self.calls = layout.Calls(slots.shape[0], expansion, model, is_compiled) if calls is None else calls
        if slots.device.type == "cpu" and not is_static:
            self.host = slots

    @cached_property
    def host(self) -> Tensor:
        """The slots on the CPU, so that looking at them does not wait for a device. Raises `RoutingError` for static ones."""
        if self.is_static:
            raise RoutingError(
                "got static slots in a model that chooses by their values on the CPU (modules_to_save, trainable tokens); wanted "
                "adapters that only rotate; pass slots, or names, that are not static"
            )
        return self.slots.cpu()

    def check(self, num_slots: int) -> None:
        """Raise `RoutingError` unless the slots are from -1 to num_slots - 1.

        Those of static slots are checked on their device, in debug mode: Python's development mode, or where ROADIE_DEBUG is set.
        """
        if self.is_static:
            if is_debugging():
                torch._assert_async(((self.slots >= -1) & (self.slots < num_slots)).all())
            return
        lowest, highest = map(int, self.host.aminmax()) if self.host.numel() else (-1, -1)
        if lowest < -1 or highest >= num_slots:
            raise RoutingError(
                f"got slots from {lowest} to {highest}; wanted -1 (the base model) to {num_slots - 1}, the last adapter"
            )

    def starts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model, or the one inside, is called with these arguments now, in eager mode."""
        self.calls.note(model, args, kwargs)
        if self.calls.is_compiled is not False:
            self.calls.look(model)
        if self.is_static:  # of others the values say which mark they have
            self.mark = self._marks.setdefault(frozenset(self.calls.tokens), Mark())

    def ends(self, model: nn.Module) -> None:
        """A call of the model is over; not called where it has raised."""

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
        by_shape, checked = self.mark.by_shape, self.mark.checked
        found = by_shape.get(key)
        if found is None:
            if len(by_shape) == _MOST_SHAPES:
                by_shape.clear()
            with torch.inference_mode(False):  # other calls of the block may be trained, and keep it for backward
                found = self._find(y, of_slot)
            if not self.is_static or found[0] is self.slots:
                by_shape[key] = found
        slots, is_in_doubt = found
        if is_in_doubt and (site, lead) not in checked:
            self.calls.check(y, site, self.slots)
            checked.add((site, lead))
        return slots

    def placed_on_host(self, y: Tensor, site: nn.Module) -> Tensor:
        """As `placed`, on the CPU."""
        self.placed(y, site)
        found = layout.by_size(self.host, self.expansion, y)
        assert found is not None
        return found

    def _placed_in_graph(self, y: Tensor, site: nn.Module, of_slot: tuple[int, ...] | None) -> Tensor:
        slots, is_in_doubt = self._find(y, of_slot)
        may_be_rows = y.dim() == 2 and len(y) == len(self.slots)  # which they are, but in an expert of many
        if is_in_doubt and not may_be_rows and not self.calls.is_sure:
            _check_in_eager(self.calls, y, site, self.slots)
        return slots

    def _find(self, y: Tensor, of_slot: tuple[int, ...] | None) -> tuple[Tensor, bool]:
        found = layout.by_size(self.slots, self.expansion, y)
        if found is None:
            raise RoutingError(
                layout.wrong_number(self.slots.shape[0], y.shape[0] if y.dim() > 1 else 1)
                + f"Wanted adapters or slots, one for each row (or each token) of what a layer gives, {tuple(y.shape)}."
            )
        is_in_doubt = layout.is_doubtful(y, found)
        if of_slot is not None:
            found = constant(of_slot, torch.int64, found.device)[found]
        return moved(found, y.device), is_in_doubt


def is_debugging() -> bool:
    """Whether slots that only their device knows are checked there."""
    return sys.flags.dev_mode or bool(os.environ.get("ROADIE_DEBUG"))


_check_in_eager: Callable[[layout.Calls, Tensor, nn.Module, Tensor], None] = torch.compiler.disable(layout.Calls.check)

C = TypeVar("C", bound=Choice)


class Routing(Generic[C]):
    """The choice in force for one model, which all of its sites ask for; a copy of a model has one of its own, without a choice.

    here: the calling thread's own choice, for what has no time for `current`; nothing while a graph is traced.
    """

    def __init__(self) -> None:
        self.here: ContextVar[C | None] = ContextVar("roadie_rows", default=None)
        self._latest: C | None = None
        self._in_force: list[C | None] = []
        self._is_told = False
        self._attached: dict[tuple[nn.Module, bool], tuple[ExitStack, list[None]]] = {}
        self._lock = RLock()

    def current(self) -> C | None:
        """What holds for the calling thread; in a compiled model, and in autograd's threads, what was chosen last."""
        if torch.compiler.is_compiling():
            return self._latest
        choice = self.here.get()
        if choice is None and torch._C._current_graph_task_id() != -1:  # a backward pass, which runs a block again
            return self._latest
        return choice

    @contextmanager
    def chosen(self, choice: C | None, model: nn.Module | None = None) -> Iterator[C | None]:
        """Within the block the choice holds (None: nobody chose), for `model`, which is attached meanwhile where it is given."""
        if torch.compiler.is_compiling():
            before, self._latest = self._latest, choice
            try:
                yield choice
            finally:
                self._latest = before
            return
        key = None if model is None else self.attach(model)
        with self._lock:
            self._in_force.append(choice)
            self._latest = choice
        here, all_of_thread = (
            self.here.set(choice),
            layout.routings_in_force.set((*layout.routings_in_force.get(), self)),
        )
        try:
            yield choice
        finally:
            with self._lock:  # other threads may have entered since, and not left yet
                place = len(self._in_force) - 1
                while self._in_force[place] is not choice:
                    place -= 1
                del self._in_force[place]
                self._latest = self._in_force[-1] if self._in_force else None
            if key is not None:
                self.detach(key)
            layout.routings_in_force.reset(all_of_thread)
            self.here.reset(here)

    def attach(self, model: nn.Module) -> tuple[nn.Module, bool]:
        """From now on calls of `model` are noted, and what it checkpoints keeps its rows, until what this gives is detached.

        Several, also of several threads, may have attached it: the first does it, the last to detach undoes it.
        """
        key = model, torch.is_grad_enabled()
        with self._lock:
            if key not in self._attached:
                with ExitStack() as undo:
                    self.prepare(model, undo)
                    self._attached[key] = undo.pop_all(), []
            self._attached[key][1].append(None)
        return key

    def detach(self, key: tuple[nn.Module, bool]) -> None:
        """Undo `attach`, of which this is what it gave."""
        with self._lock:
            undo, users = self._attached[key]
            users.pop()
            if not users:
                del self._attached[key]
                undo.close()

    def prepare(self, model: nn.Module, undo: ExitStack) -> None:
        """What is done to a model while it is attached; undo: takes what takes it back."""
        self._note_calls(model, undo)
        if torch.is_grad_enabled():
            self._keep_in_checkpoints(model, undo)

    def _note_calls(self, model: nn.Module, undo: ExitStack) -> None:
        """From now on choices know how the model is called, or the model inside, where PEFT wraps it."""

        def starts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return
            choice = self.here.get()
            if choice is not None:
                choice.starts(module, args, kwargs)
            else:
                self._tell_of_others()

        def ends(module: nn.Module, args: Any, output: Any) -> None:
            choice = None if torch.compiler.is_compiling() else self.here.get()
            if choice is not None:
                choice.ends(module)

        for part in layout.wrapped(model):
            undo.callback(layout.before_calls(part, starts))
            undo.callback(part.register_forward_hook(ends).remove)

    def _tell_of_others(self) -> None:
        """Say once that a thread which chose nothing runs without the rows of another: it may have been started to have them."""
        is_meant = self in layout.routings_in_force.get() or torch._C._current_graph_task_id() != -1
        if is_meant or self._is_told or not self._in_force:
            return
        self._is_told = True
        layout.logger.warning(
            "got a call of a model in a thread that chose no rows, while those of another thread are in force: it runs without "
            "them; where it is to have them, enter roadie.rows in this thread, or pass adapter_names"
        )

    def _keep_in_checkpoints(self, model: nn.Module, undo: ExitStack) -> None:
        """From now on what transformers checkpoints in `model` runs with the rows it had, also when it runs again in backward."""
        for module in model.modules():
            original = module.__dict__.get("_gradient_checkpointing_func")
            if callable(original) and getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = self._keeping_rows(original)  # type: ignore[assignment]
                undo.callback(setattr, module, "_gradient_checkpointing_func", original)

    def _keeping_rows(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            choice = copy(self.current())  # as it is now: a call of the model may be over when the block runs again
            if choice is None or torch.compiler.is_compiling():
                return original(function, *args, **kwargs)

            def with_rows(*inputs: Any, **named: Any) -> Any:
                with self.chosen(choice):
                    return function(*inputs, **named)

            return original(with_rows, *args, **kwargs)

        return checkpoint

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = type(self)()
        return made

    def __reduce__(self) -> tuple[type[Any], tuple[()]]:
        return type(self), ()
