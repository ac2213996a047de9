"""How runs go on, for who watches: what each that has trained since the server started has learnt from, and its last steps.

    begin ──> learnt, learnt, stepped ──> learnt, stepped ... ──> stands: it rests; and it may begin again

A step learns from one request or several: its loss is their sum, its reward, where one is told, their mean. In memory alone: a
run that is brought back after a restart is there again, with the steps since.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from roadie.serving.http.extensions import RunFigures, StepFigures

RUNNING = "running"
MAX_STEPS = 60
"""Of one run that are told."""
MAX_RUNS = 1024
"""Of all tenants that are remembered; those that rest go first, who was heard of longest ago before others."""
MAX_TOLD = 50
_RATED_PASSES = 16


@dataclass(eq=False)
class _Run:
    """parts: loss and reward of each request since the last step; passes: when some were done, and their tokens."""

    tenant: str
    kind: str
    num_steps: int | None
    state: str = RUNNING
    tokens: int = 0
    parts: list[tuple[float, float | None]] = field(default_factory=list)
    steps: deque[StepFigures] = field(default_factory=lambda: deque(maxlen=MAX_STEPS))
    passes: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RATED_PASSES))

    def tokens_per_s(self, now_s: float) -> float:
        """Since the beginning, or the end of the oldest pass that is remembered: less and less where no more come."""
        if self.state != RUNNING:
            return 0.0
        tokens = sum(tokens for _, tokens in self.passes) - self.passes[0][1]
        return tokens / max(now_s - self.passes[0][0], 1e-3)


class Progress:
    """See the module; any thread may call. What is told of a run that is not known is passed over. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._runs: OrderedDict[str, _Run] = OrderedDict()

    def begin(self, tenant: str, id: str, kind: str, num_steps: int | None = None) -> None:
        """A run is in training from now on; kind: what its API calls it; num_steps: it is to make, where that is known."""
        with self._lock:
            before = self._runs.pop(id, None)
            run = self._runs[id] = before or _Run(tenant, kind, num_steps)
            run.state, run.num_steps = RUNNING, num_steps
            run.parts.clear()
            run.passes.clear()
            run.passes.append((self._clock(), 0))
            self._forget_oldest()

    def learnt(self, id: str, tokens: int, loss: float, reward: float | None = None) -> None:
        """It has the gradients of so many tokens."""
        with self._lock:
            run = self._runs.get(id)
            if run is not None:
                run.tokens += tokens
                run.parts.append((loss, reward))
                run.passes.append((self._clock(), tokens))

    def stepped(self, id: str, step: int) -> None:
        """It has made this step; one that is made again counts for the one before, and those after it."""
        with self._lock:
            run = self._runs.get(id)
            if run is None:
                return
            while run.steps and run.steps[-1].step >= step:
                run.steps.pop()
            rewards = [reward for _, reward in run.parts if reward is not None]
            loss = sum(loss for loss, _ in run.parts) if run.parts else None
            run.steps.append(StepFigures(step, loss, sum(rewards) / len(rewards) if rewards else None))
            run.parts.clear()
            self._runs.move_to_end(id)

    def stands(self, id: str, state: str) -> None:
        """How it stands, in the words of its API."""
        with self._lock:
            if id in self._runs:
                self._runs[id].state = state

    def of(self, tenant: str) -> list[RunFigures]:
        """The runs of a tenant, those that made a step last first."""
        now = self._clock()
        with self._lock:
            found = [(id, run) for id, run in reversed(self._runs.items()) if run.tenant == tenant][:MAX_TOLD]
            return [
                RunFigures(
                    id, each.kind, each.state, each.num_steps, each.tokens, each.tokens_per_s(now), tuple(each.steps)
                )
                for id, each in found
            ]

    def _forget_oldest(self) -> None:
        over = len(self._runs) - MAX_RUNS
        for id in [id for id, run in self._runs.items() if run.state != RUNNING][: max(0, over)]:
            del self._runs[id]
