"""Whoever comes, goes, is scored, cancelled, loaded and unloaded meanwhile: no row is wrong, and nothing is held in the end."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.greedy import GreedyReference, GreedyVerdict
from tests.patience import HANG_S
from tests.serving.harness import Collector, prompt, serving

from roadie.bank import AdapterBank
from roadie.errors import RoadieError
from roadie.serving import EngineSettings, FinishReason, Scoring, Unload

WISHES = [None, "a0", "a1", "a2", "a3", {"a2": 0.5}, {"a1": -1.0}]
NUM_TURNS = 240


class Churn:
    """Turns of one kind or another, drawn from a seed, and what was asked for."""

    def __init__(self, collector: Collector, root: Path) -> None:
        self.collector, self.root = collector, root
        self.draw = random.Random(7)
        self.generated: dict[str, tuple[list[int], Any]] = {}
        self.scored: dict[str, tuple[list[int], Any]] = {}
        self.cancelled: list[str] = []
        self.loads: list[Any] = []

    def ask(self) -> None:
        prompt_ids, wish = prompt(self.draw.randrange(8), self.draw.choice((9, 24, 40))), self.draw.choice(WISHES)
        try:
            if self.draw.random() < 0.5:
                scoring = Scoring(last=self.draw.choice((None, 1, 5)))
                asked = self.collector.submit(prompt_ids, wish, max_tokens=0, scoring=scoring)
                self.scored[asked] = (prompt_ids, wish)
            else:
                scoring = self.draw.choice((None, Scoring(last=3)))
                asked = self.collector.submit(prompt_ids, wish, max_tokens=self.draw.randrange(1, 12), scoring=scoring)
                self.generated[asked] = (prompt_ids, wish)
        except RoadieError:  # of an adapter that is being unloaded
            return
        if self.draw.random() < 0.2 and self.collector.engine.cancel(asked):
            self.cancelled.append(asked)

    def change(self) -> None:
        """Load an adapter again, under its own name or another, or let one go."""
        engine, name = self.collector.engine, f"a{self.draw.randrange(1, 4)}"
        if self.draw.random() < 0.5:
            self.loads.append(engine.load_adapter(f"other-{name}", str(self.root / name), replace=True))
        else:
            how = self.draw.choice((Unload.WAIT, Unload.CANCEL))
            self.loads += [engine.unload_adapter(name, how), engine.load_adapter(name, str(self.root / name))]

    def settle(self) -> None:
        for each in self.loads:
            each.exception(HANG_S)
        self.loads.clear()
        self.collector.wait()


@pytest.mark.slow
def test_no_row_is_wrong_and_nothing_is_held_whoever_comes_and_goes(model: Any, adapters: Any, root: Path) -> None:
    settings = EngineSettings(num_slots=4, page_size=8, num_blocks=40, max_batch_tokens=64, max_running=8)
    with serving(model, root, settings) as collector:
        churn = Churn(collector, root)
        for turn in range(NUM_TURNS):
            churn.change() if turn % 12 == 11 else churn.ask()
            if turn % 40 == 39:
                churn.settle()
        churn.settle()
        statistics = collector.engine.statistics()
        assert (statistics.num_running, statistics.num_queued, statistics.num_slots_leased) == (0, 0, 0)
        assert statistics.num_blocks_free == statistics.num_blocks
        assert not collector.engine._batch._requests
        assert not collector.engine._batch._ids
    asked = {**churn.generated, **churn.scored}
    assert {collector.last(one).finish for one in asked} <= {FinishReason.LENGTH, FinishReason.CANCELLED}
    kept = [one for one, (_, wish) in asked.items() if wish in (None, "a0") and one not in churn.cancelled]
    assert len(kept) > NUM_TURNS // 8
    assert all(collector.last(one).finish is FinishReason.LENGTH for one in kept)
    reference, verdict = GreedyReference(model, adapters), GreedyVerdict()
    for one, (prompt_ids, wish) in churn.generated.items():
        verdict += reference.check(prompt_ids, wish, collector.tokens(one))
    assert verdict.num_wrong == 0
    _check_scores(model, adapters, collector, asked)


def _check_scores(model: Any, adapters: Any, collector: Collector, asked: dict[str, tuple[list[int], Any]]) -> None:
    num_scored = 0
    with AdapterBank(model, 16) as bank:
        for name, adapter in adapters.items():
            bank.admit(name, adapter)
        for one, (prompt_ids, wish) in asked.items():
            got = [entry for output in collector.outputs[one] for entry in output.prompt_logprobs]
            if not got:
                continue
            with torch.no_grad(), bank.rows([wish]):
                logprobs = bank.model(torch.tensor([prompt_ids])).logits[0, :-1].log_softmax(-1)
            wanted = logprobs.gather(-1, torch.tensor(prompt_ids[1:])[:, None])[-len(got) :, 0]
            torch.testing.assert_close(torch.tensor([entry.logprob for entry in got]), wanted, atol=1e-4, rtol=0)
            num_scored += len(got)
    assert num_scored > 100
