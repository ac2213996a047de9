"""What is told of runs that go on: sums and means of steps, a rate, and of whom nothing is told any more."""

from __future__ import annotations

import pytest

from roadie.serving.http.extensions import RunFigures, StepFigures
from roadie.train_service import progress
from roadie.train_service.progress import Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def found(clock: Clock) -> Progress:
    progress = Progress(clock)
    progress.begin("alice", "a", "training_run")
    return progress


def test_a_step_has_the_sum_of_its_losses_and_the_mean_of_its_rewards(found: Progress, clock: Clock) -> None:
    clock.now += 3.0
    found.learnt("a", 10, 3.0, 0.25)
    found.learnt("a", 5, 4.0, 0.75)
    found.stepped("a", 1)
    found.learnt("a", 5, 2.0)
    found.stepped("a", 2)
    found.learnt("a", 7, 9.0)
    assert found.of("alice") == [
        RunFigures("a", "training_run", "running", None, 27, 9.0, (StepFigures(1, 7.0, 0.5), StepFigures(2, 2.0, None)))
    ]
    assert found.of("bob") == []


def test_steps_that_are_made_again_stand_for_those_before(found: Progress) -> None:
    for step in (1, 2, 3, 2):
        found.learnt("a", 1, float(step))
        found.stepped("a", step)
    found.begin("alice", "a", "training_run")
    found.learnt("a", 1, 8.0)
    found.stepped("a", 2)
    (run,) = found.of("alice")
    assert [(each.step, each.loss) for each in run.steps] == [(1, 1.0), (2, 8.0)]
    assert run.tokens == 5


def test_the_rate_is_that_of_the_last_passes_and_falls_when_no_more_come(found: Progress, clock: Clock) -> None:
    for _ in range(3 * progress._RATED_PASSES):
        clock.now += 2.0
        found.learnt("a", 100, 1.0)
    assert found.of("alice")[0].tokens_per_s == pytest.approx(50.0)
    clock.now += 2.0 * (progress._RATED_PASSES - 1)
    assert found.of("alice")[0].tokens_per_s == pytest.approx(25.0)
    found.stands("a", "idle")
    assert (found.of("alice")[0].tokens_per_s, found.of("alice")[0].state) == (0.0, "idle")


def test_who_rests_longest_is_forgotten_first_and_who_trains_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MAX_RUNS", 2)
    found = Progress()
    for number in range(4):
        found.begin("alice", f"run {number}", "training_run")
    found.stands("run 2", "idle")
    found.stepped("run 0", 1)
    assert [run.id for run in found.of("alice")] == ["run 0", "run 3", "run 2", "run 1"]
    found.begin("alice", "run 4", "training_run")
    assert [run.id for run in found.of("alice")] == ["run 4", "run 0", "run 3", "run 1"]
    found.stepped("run 2", 9)
    assert len(found.of("alice")) == 4


def test_a_run_has_its_last_steps(found: Progress) -> None:
    for step in range(1, progress.MAX_STEPS + 4):
        found.stepped("a", step)
    (run,) = found.of("alice")
    assert [each.step for each in run.steps] == list(range(4, progress.MAX_STEPS + 4))
    assert run.steps[0].loss is None
