"""Which rows a step sees."""

from __future__ import annotations

from roadie.training.encoding import IGNORED, Example
from roadie.training.many.data import JobData


def example(number: int, length: int = 3) -> Example:
    return Example((number,) * length, (IGNORED,) + (number,) * (length - 1))


def order(seed: int, steps: int, batch_size: int = 2, count: int = 5) -> list[int]:
    data = JobData([example(number) for number in range(count)], [], batch_size, seed)
    return [row.input_ids[0] for step in range(steps) for row in data.rows(step)]


def test_each_pass_sees_every_example_once_in_an_order_of_its_own():
    seen = order(seed=3, steps=10)
    passes = [seen[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_the_order_is_the_seed_s_alone():
    assert order(seed=3, steps=10) == order(seed=3, steps=10) == order(seed=3, steps=4, batch_size=5)
    assert order(seed=3, steps=10) != order(seed=4, steps=10)


def test_a_step_can_be_found_again_from_its_number():
    examples = [example(number) for number in range(5)]
    walked, jumped = JobData(examples, [], 3, 1), JobData(examples, [], 3, 1)
    rows = [walked.rows(step) for step in range(9)]
    assert jumped.rows(8) == rows[8]
    assert jumped.rows(2) == rows[2]
    assert JobData(examples, [], 12, 1).rows(1) == [*rows[4], *rows[5], *rows[6], *rows[7]]
