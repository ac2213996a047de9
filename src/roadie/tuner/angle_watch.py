"""A warning, once, when training turns the angles of a model's adapters so slowly that they learn next to nothing.

Trainer and TRL start from rates of 2e-5 to 5e-5, which are for weights; the parameters of RoAd are angles and factors. Whatever
loop trains the model, its forwards come by here, and the backwards of a parameter. There was an update in between if the
parameter has another version, or its gradient is another tensor (fused optimisers count no version). Then


    change(n) = median over the elements that moved of |theta after update n - theta before it|

looked at for n = 10, 20, 40, 80, ... until it is clear. A change of `SLOWEST` or more ends the watch, at any of them; a smaller
one, from the 20th on, warns and ends it, unless it has grown since n / 2, as in a warm-up. A model that is also run without
gradient between its updates is trained on its own texts, or beside a reference: methods of RL and of preferences take small
steps on purpose, and are not told.

`warnings.filterwarnings("ignore", category=roadie.errors.LearningRateWarning)` silences it.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from roadie.bank.live import on_this_process
from roadie.errors import LearningRateWarning
from roadie.kernels import writes_to
from roadie.learning_rate import LOWEST_RATE, default_learning_rate

SLOWEST = LOWEST_RATE / 10
"""Radians an update. AdamW moves an element by its rate where gradients agree, and by 0.15 of it, in the median, where they are
noise (0.67 deviations of sqrt(0.1 / 1.9) = 0.23): the lowest rate that the paper searched lies above, 5e-5 below."""
FIRST_LOOK, FIRST_VERDICT = 10, 20
GROWS = 1.25
"""From the 10th update to the 20th a linear warm-up doubles the rate, and AdamW's part of it falls, where gradients are noise,
from 0.33 to 0.26 as its first moment fills: the change grows by 1.57 to 2. At a constant rate by 0.79 to 1. This lies between."""


class AngleWatch:
    """A hook before the forward of a model, from when an adapter is added until it is clear whether there is something to say.

    width: of the model. Parameters are held weakly: they hold the watch.
    """

    def __init__(self, width: int | None) -> None:
        self._width = width
        self._handles: list[Any] = []
        self._forwards = 0
        self._tick: Any = None
        self._start([])

    def _start(self, samples: list[Tensor]) -> None:
        self._samples = [ref(sample) for sample in samples]
        self._version = writes_to(samples[-1]) if samples else 0
        self._gradient: Tensor | None = None
        self._is_counted = True
        self._updates = 0
        self._before: list[Tensor] | None = None  # of the update that is looked at
        self._next, self._last_change = FIRST_LOOK, 0.0
        # In training mode or not: after which updates the model was run without gradient.
        self._without_gradient: dict[bool, set[int]] = {True: set(), False: set()}
        if self._tick is not None:
            self._tick.remove()
        self._tick = samples[-1].register_post_accumulate_grad_hook(self._after_backward) if samples else None

    def stop(self) -> None:
        """Watch no longer."""
        self._start([])
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __call__(self, module: nn.Module, _: Any) -> None:
        """The model is called."""
        if torch.compiler.is_compiling() or not self._handles:
            return
        if not torch.is_grad_enabled():
            self._without_gradient[module.training].add(self._updates)
            return
        self._forwards += 1
        if self._forwards.bit_count() == 1:  # ever more seldom: it looks at all modules
            samples = _samples(module)
            if list(map(id, samples)) != [id(sample()) for sample in self._samples]:
                self._start(samples)
        clock = self._samples[-1]() if self._samples else None
        if clock is not None and writes_to(clock) != self._version:
            self._count(clock)

    def _after_backward(self, clock: Tensor) -> None:
        if clock.grad is not self._gradient:
            self._gradient = clock.grad
            if not self._is_counted:
                self._count(clock)
            self._is_counted = False

    def _count(self, clock: Tensor) -> None:
        self._version, self._is_counted = writes_to(clock), True
        self._updates += 1
        if self._updates == self._next - 1:
            self._before = [part.clone() for part in self._parts()]
        if self._updates < self._next:
            return
        change, self._before = self._change(), None
        if change is None or (
            change < SLOWEST and (self._updates < FIRST_VERDICT or change > GROWS * self._last_change)
        ):
            self._next, self._last_change = 2 * self._next, change or 0.0
            return
        updates, is_told = self._updates, change < SLOWEST and not self._takes_small_steps() and _is_first_process()
        self.stop()
        if is_told:
            warnings.warn(_said(self._width, updates, change), LearningRateWarning, stacklevel=2)

    def _parts(self) -> list[Tensor]:
        """What this process holds of each sample."""
        samples = [sample() for sample in self._samples]
        return [on_this_process(sample).detach() for sample in samples if sample is not None]

    def _change(self) -> float | None:
        """The median change of an angle in the last update; None where nothing has moved."""
        assert self._before is not None
        pairs = zip(self._parts(), self._before, strict=True)
        changes = torch.cat([(now - before).abs().float().flatten() for now, before in pairs])
        changes = changes[changes > 0]
        return float(changes.median()) if changes.numel() else None

    def _takes_small_steps(self) -> bool:
        """Whether the model was run without gradient between updates: more often than evaluating does, or while training."""
        training, evaluating = self._without_gradient[True], self._without_gradient[False]
        return len(training) > 1 or 2 * len(evaluating) >= self._updates

    def __deepcopy__(self, memo: dict[int, Any]) -> AngleWatch:
        copied = memo[id(self)] = AngleWatch(self._width)
        copied._handles = deepcopy(self._handles, memo)
        return copied

    def __reduce__(self) -> tuple[type[AngleWatch], tuple[int | None]]:
        return AngleWatch, (self._width,)  # without handles, it does nothing


def _said(width: int | None, updates: int, change: float) -> str:
    rate = default_learning_rate(width)
    return (
        f"got updates that turn the angles of a RoAd adapter by {change:.1e} radians each, after {updates} of them, with which "
        f"it learns next to nothing; wanted a learning rate of about {rate:g} with AdamW "
        f"{f'for a width of {width}' if width else 'where the width is not known'}; set learning_rate={rate:g} (Trainer and TRL "
        "start from 2e-5 to 5e-5, which is for weights), or silence roadie.errors.LearningRateWarning"
    )


def watch_angles(*modules: nn.Module) -> None:
    """Watch the training of a model, anew where it was watched.

    modules: one of them is called in each forward; the last one holds the adapted layers.
    """
    watch = AngleWatch(_width(modules[-1]))
    for module in modules:
        stop_watching(module)
    watch._handles += [module.register_forward_pre_hook(watch) for module in modules]
    watch._start(_samples(modules[-1]))


def stop_watching(model: nn.Module) -> None:
    """Say nothing of the training of `model`, whose trainer looks at its rate itself."""
    for hook in [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]:
        if isinstance(hook, AngleWatch):
            hook.stop()


def _samples(model: nn.Module) -> list[Tensor]:
    """The angles of a few layers, from the first to the last, of adapters that are trained."""
    found: list[Tensor] = []
    for module in model.modules():
        book = module._modules.get("road_theta")
        for theta in () if book is None else book.parameters():
            if theta.requires_grad and theta.numel() > 0:
                found.append(theta)
    return [found[0], found[(len(found) - 1) // 2], found[-1]] if found else []


def _width(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    width = getattr(getattr(config, "get_text_config", lambda: config)(), "hidden_size", None)
    return width if isinstance(width, int) and width > 0 else None


def _is_first_process() -> bool:
    return (
        not (torch.distributed.is_available() and torch.distributed.is_initialized())
        or torch.distributed.get_rank() == 0
    )
