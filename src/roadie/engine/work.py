"""What a training engine does with what waits: adapters join and leave, passes over rows of many, steps over stacks.

One thread does it, an operation of each tenant at a time, the first in its line.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roadie.bank.families import Family
from roadie.bank.trainable import PartGradients, TrainableBank
from roadie.engine import optimiser
from roadie.engine.calls import Call, Join, Leave, Step, StepResult, Task, TrainingSettings
from roadie.engine.charges import Charges
from roadie.engine.choice import Chosen, choose
from roadie.engine.lines import Lines
from roadie.engine.passes import Passes, PlacedRow
from roadie.engine.tenants import TenantState
from roadie.errors import ConfigError, NotFinite, RoadieError
from roadie.kernels import Keep

_log = logging.getLogger("roadie")


@dataclass
class TrainingFigures:
    """Since the start. num_tokens: of all passes, padding counted."""

    num_passes: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    num_failed: int = 0


class Worker:
    """See the module; sum_: as `TrainingEngine` has it."""

    def __init__(
        self, model: Any, settings: TrainingSettings, lines: Lines, sum_: Callable[[Tensor], object] | None
    ) -> None:
        self.bank = TrainableBank(model.device, Keep.INPUT if settings.keep == "input" else None)
        self.passes = Passes(model, self.bank, settings.logits_bytes)
        self.figures = TrainingFigures()
        self._model, self._settings, self._lines, self._sum = model, settings, lines, sum_
        self._charges: Charges[str] = Charges(settings.owner_weights)
        self._owners: set[str] = set()

    def work(self, max_tokens: int | None = None) -> int:
        """See `TrainingEngine.work`."""
        if self.do_chores() or self._step():
            return 1
        return self._pass(max_tokens)

    def do_chores(self) -> bool:
        """See `TrainingEngine.do_chores`; whether there were any."""
        return self._join_and_leave() | self._do_tasks()

    def _fail(self, operation: Call | Step | Join | Task, error: Exception) -> None:
        self.figures.num_failed += 1
        self._lines.done(operation, error=error)

    def _join_and_leave(self) -> bool:
        """All at once: whoever does so copies a family."""
        joins, leaves = self._lines.first(Join), self._lines.first(Leave)
        if leaves:
            gone = {leave.tenant for leave in leaves}
            self.bank.keep_only([name for name in self.bank.names if name not in gone])
            for leave in leaves:
                self._lines.done(leave)
                self._lines.forget(leave.tenant)
        if not joins:
            return bool(leaves)
        try:
            self.bank.join({join.tenant: join.layers for join in joins})
        except Exception as error:  # no memory
            self._refuse(joins, error)
            return True
        for join in joins:
            try:
                if join.state is not None:
                    family = self.bank.family_of(join.tenant)
                    family.put(join.tenant, join.state.stacks(family))
                self._lines.done(join)
            except RoadieError as error:
                self._refuse([join], error)
        return True

    def _refuse(self, joins: Sequence[Join], error: Exception) -> None:
        gone = {join.tenant for join in joins}
        self.bank.keep_only([name for name in self.bank.names if name not in gone])
        for join in joins:
            self._fail(join, error)
            self._lines.forget(join.tenant, error)

    def _do_tasks(self) -> bool:
        tasks = self._lines.first(Task)
        for task in tasks:
            try:
                self._lines.done(task, task.run())
            except Exception as error:
                self._fail(task, error)
        return bool(tasks)

    def state(self, tenant: str) -> TenantState:
        """What `TenantState` says."""
        found = self._lines[tenant]
        family = self.bank.family_of(tenant)
        return TenantState.of(family, family.state(tenant), found.config, found.step)

    # Passes.

    def _pass(self, max_tokens: int | None) -> int:
        calls = self._lines.first(Call)
        if not calls:  # nobody waits: nobody is behind
            self._charges, self._owners = Charges(self._settings.owner_weights), set()
        for call in [call for call in calls if not call.waiting]:  # no rows, in one process of many
            self._finish(call)
        ready = [call for call in calls if call.waiting]
        if not ready:
            return int(bool(calls))
        self._note_owners({self._lines[call.tenant].owner for call in ready})
        limits = [limit for limit in (max_tokens, self._settings.max_tokens_per_pass) if limit is not None]
        chosen = choose(ready, lambda call: self._lines[call.tenant].owner, self._charges, min(limits, default=None))
        num_tokens = chosen.num_tokens
        self.figures.num_passes += 1
        self.figures.num_tokens += num_tokens
        self._compute(chosen)
        return num_tokens

    def _note_owners(self, owners: set[str]) -> None:
        """Who comes back starts no lower than whoever was served last."""
        for owner in owners - self._owners:
            self._charges.join(owner)
        self._owners = owners
        self._charges.forget_idle(owners.__contains__)

    def _compute(self, chosen: Chosen) -> None:
        try:
            self._compute_together(chosen)
        except Exception as error:
            parts = chosen.by_call()
            if len(parts) == 1:
                _log.exception("a pass of one tenant failed")
                self._fail(next(iter(chosen.calls)), error)
                return
            _log.warning("a pass of %d tenants failed (%s); each goes alone now", len(parts), error)
            for part in parts:
                self._compute(part)

    def _compute_together(self, chosen: Chosen) -> None:
        backward = chosen.backward
        self.bank.make_tables({call.tenant for call in chosen.calls})
        slots = self.bank.slots
        rows = [PlacedRow(call.rows[index], slots[call.tenant]) for call, index in chosen.rows]
        with self.bank.attached(self._model):
            results = self.passes.run(rows, backward=backward)
        for (call, index), result in zip(chosen.rows, results, strict=True):
            call.results[index] = result
        of_tenant = {call.tenant: call for call in chosen.calls}
        if backward:
            parts = list(self.bank.gradients())
            squares = iter(torch.cat([part.squares for part in parts]).tolist())  # one look at a device
            for part in parts:
                self._take(part, [(of_tenant[name], next(squares)) for name in part.names])
        for call in chosen.calls:
            if not call.waiting and self._lines.is_first(call):
                self._finish(call)

    def _take(self, part: PartGradients, calls: Sequence[tuple[Call, float]]) -> None:
        """Add the gradients of a family to those of its tenants, or to those of calls that go on; calls may fail.

        calls: of each tenant in turn, with the square of its gradient's norm.
        """
        whole = []
        for place, (call, square) in enumerate(calls):
            loss = sum(row.loss for row in call.results.values())
            if self._sum is None and not (math.isfinite(square) and math.isfinite(loss)):
                self._fail(call, _not_finite(loss, math.sqrt(square) if square >= 0 else math.nan))
            elif call.waiting or call.gradients is not None:
                call.add([tensor[:, :, place] for tensor in part.tensors])
            else:
                whole.append(place)
        if whole:
            part.add(whole)

    def _finish(self, call: Call) -> None:
        if call.backward:
            self._lines[call.tenant].num_calls += 1
        if call.gradients is not None:
            family = self.bank.family_of(call.tenant)
            row = family.names.index(call.tenant)
            for stack, gradient in zip(family.stacks, call.gradients, strict=True):
                stack.gradients[:, :, row] += gradient
        self._lines.done(call, call.result)

    # Steps of the optimiser.

    def _step(self) -> bool:
        steps = self._lines.first(Step)
        by_family: dict[int, tuple[Family, list[Step]]] = {}
        for each in steps:
            tenant = self._lines[each.tenant]
            if not tenant.num_calls:
                self._fail(each, ConfigError("got no gradients since the last step; call forward_backward first"))
                continue
            tenant.num_calls = 0
            family = self.bank.family_of(each.tenant)
            by_family.setdefault(id(family), (family, []))[1].append(each)
        for family, of_family in by_family.values():
            try:
                self._step_family(family, of_family)
            except Exception as error:  # no memory, or a device that fails: whoever trains elsewhere goes on
                _log.exception("a step of the optimiser failed")
                for each in filter(self._lines.is_first, of_family):
                    self._fail(each, error)
        return bool(steps)

    def _step_family(self, family: Family, steps: Sequence[Step]) -> None:
        steps = sorted(steps, key=lambda each: family.names.index(each.tenant))
        rows = [family.names.index(each.tenant) for each in steps]
        if self._sum is not None:
            for stack in family.stacks:
                summed = stack.gradients[:, :, rows]
                self._sum(summed)
                stack.gradients[:, :, rows] = summed
        squares = optimiser.squared_norms(family, rows)
        norms = squares.sqrt().tolist()
        good = [place for place, norm in enumerate(norms) if math.isfinite(norm)]
        if good:
            tenants = [self._lines[steps[place].tenant] for place in good]
            optimiser.step(
                family,
                [steps[place].settings for place in good],
                [tenant.step + 1 for tenant in tenants],
                squares[good],
                None if len(good) == len(family.names) else [rows[place] for place in good],
            )
            for tenant in tenants:
                tenant.step += 1
            self.figures.num_steps += len(good)
        for stack in family.stacks:
            stack.gradients[:, :, rows] = 0.0
        for place, (each, norm) in enumerate(zip(steps, norms, strict=True)):
            if place in good:
                self._lines.done(each, StepResult(self._lines[each.tenant].step, norm))
            else:
                self._fail(each, _not_finite(None, norm))


def _not_finite(loss: float | None, norm: float) -> NotFinite:
    return NotFinite(
        f"got {'' if loss is None else f'loss {loss:g} and '}gradient norm {norm:g}; wanted finite numbers; lower the learning "
        "rate, clip harder, or look at the rows",
        loss,
        norm,
    )
