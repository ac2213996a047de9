"""What the tests of the engine share: an engine over a folder of adapters, and somebody who collects outputs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tests.patience import HANG_S

from roadie import checkpoint
from roadie.adapter import Adapter
from roadie.serving import (
    AdapterWish,
    ContinuousBatchingEngine,
    EngineSettings,
    GenerationRequest,
    Output,
    Registry,
    Sampling,
    Scoring,
)
from roadie.serving.grammars import Constraint
from roadie.testing import random_adapter

KINDS = (("road_1", 16), ("road_2", 8), ("road_4", 4))
SMALL = EngineSettings(num_slots=4, page_size=8, num_blocks=128, max_batch_tokens=128, max_running=16)


class Collector:
    """Submits requests and keeps what comes back."""

    def __init__(self, engine: ContinuousBatchingEngine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[Output]] = {}
        self.heard_s: dict[str, float] = {}  # when the last output came
        self._changed = threading.Condition()
        self._ids = count()

    def submit(
        self,
        prompt_ids: Sequence[int],
        adapter: AdapterWish = None,
        *,
        tenant: str = "default",
        scoring: Scoring | None = None,
        constraint: Constraint | None = None,
        **rules: Any,
    ) -> str:
        request_id = f"r{next(self._ids)}"
        sampling = Sampling(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **rules})
        self.outputs[request_id] = []
        try:
            request = GenerationRequest(
                request_id, tuple(prompt_ids), adapter, sampling, tenant, scoring=scoring, constraint=constraint
            )
            self.engine.submit(request, self._take)
        except Exception:
            del self.outputs[request_id]
            raise
        return request_id

    def _take(self, output: Output) -> None:
        with self._changed:
            self.outputs[output.request_id].append(output)
            self.heard_s[output.request_id] = time.monotonic()
            self._changed.notify_all()

    def wait(self, *request_ids: str, num_tokens: int | None = None) -> None:
        """Until these requests (all, where none is named) have ended, or have so many tokens."""

        def is_done() -> bool:
            ids = request_ids or tuple(self.outputs)
            return all(
                self.last(one).finish is not None or (num_tokens is not None and len(self.tokens(one)) >= num_tokens)
                for one in ids
            )

        with self._changed:
            assert self._changed.wait_for(is_done, HANG_S), {one: self.last(one) for one in self.outputs}

    @contextmanager
    def held(self, num_tokens: int) -> Iterator[None]:
        """Within it requests that run get so many tokens and then no more; whatever else the engine does goes on.

        A test that looks at running requests is in no race with them: they would otherwise end while it is held up.
        """
        batch, step = self.engine._batch, self.engine._batch.step

        def step_or_not() -> bool:
            if any(live.num_generated < num_tokens for live in self.engine._running.values()):
                return step()
            time.sleep(0.001)
            return False

        batch.step = step_or_not  # type: ignore[method-assign]
        try:
            yield
        finally:
            batch.step = step  # type: ignore[method-assign]

    def last(self, request_id: str) -> Output:
        return self.outputs[request_id][-1] if self.outputs[request_id] else Output(request_id)

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def text(self, request_id: str) -> str:
        return "".join(output.text for output in self.outputs[request_id])


def adapters_of(model: Any, number: int) -> dict[str, Adapter]:
    """So many adapters of all variants: a0, a1, ..."""
    return {
        f"a{seed}": random_adapter(model, seed, variant=KINDS[seed % 3][0], group_size=KINDS[seed % 3][1])
        for seed in range(number)
    }


def save_all(adapters: Mapping[str, Adapter], root: Path) -> None:
    for name, adapter in adapters.items():
        checkpoint.save(adapter, root / name)


@contextmanager
def serving(
    model: Any,
    root: Path,
    settings: EngineSettings = SMALL,
    tokenizer: Any = None,
    names: Sequence[str] = (),
    **registry: Any,
) -> Iterator[Collector]:
    """A running engine, which is stopped afterwards and must have given everything back."""
    engine = ContinuousBatchingEngine(model, tokenizer, Registry.open(root, **registry), settings, names)
    engine.start()
    try:
        yield Collector(engine)
    finally:
        engine.stop()
    assert not any(module._forward_hooks for module in model.modules())


def prompt(seed: int, length: int, vocabulary: int = 128) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()
