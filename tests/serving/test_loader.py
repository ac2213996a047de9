"""The thread that loads: it gives way, rests in proportion, delays no single load, and changes nothing for other threads."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass

import pytest
import torch
from tests.patience import HANG_S

from roadie.serving.loader import MOST_REST, Loader, rest_per_work

WORK_S = 0.02
REST_S = WORK_S * MOST_REST
LONG_S = 2 * HANG_S  # a rest that no test waits for


@dataclass
class Load:
    """What the engine says of itself."""

    num_running: int = 0
    num_waiting: int = 0


@pytest.fixture
def load() -> Load:
    return Load()


@pytest.fixture
def loader(load: Load) -> Iterator[Loader]:
    loader = Loader(lambda: load.num_running, lambda: load.num_waiting)
    loader.submit(int).result()  # the thread is there
    yield loader
    loader.close()


def compute(seconds: float = WORK_S) -> float:
    """Take so much processor time; gives the moment when it began."""
    begin_s, until_s = time.monotonic(), time.thread_time() + seconds
    while time.thread_time() < until_s:
        pass
    return begin_s


def test_rest_is_in_proportion_to_who_is_disturbed() -> None:
    assert rest_per_work(0, 0) == rest_per_work(0, 5) == 0
    assert rest_per_work(1, 0) == rest_per_work(64, 0) == rest_per_work(64, 1) == MOST_REST
    assert rest_per_work(8, 4) == 2
    assert rest_per_work(1, 10) == 0.1


def test_the_loader_rests_while_requests_run(loader: Loader, load: Load) -> None:
    load.num_running = 4
    begin_s = [future.result() for future in [loader.submit(compute) for _ in range(3)]]
    assert begin_s[1] - begin_s[0] >= WORK_S + REST_S
    assert begin_s[2] - begin_s[1] >= WORK_S + REST_S


@pytest.mark.parametrize("change", [{"num_running": 0}, {"num_waiting": 10**9}])
def test_rest_ends_when_nobody_is_disturbed_or_many_wait(
    loader: Loader, load: Load, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roadie.serving.loader.MOST_REST", LONG_S / WORK_S)
    load.num_running = 4
    loader.submit(compute).result(HANG_S)  # the first is not delayed
    second = loader.submit(compute)
    time.sleep(0.1)
    assert not second.done()
    vars(load).update(change)
    second.result(HANG_S)


def test_waiting_for_a_file_is_no_work(loader: Loader) -> None:
    loader.submit(time.sleep, 0.5).result()
    assert loader._worked_s < 0.5 / 2  # processor time, of which sleeping takes none


def test_the_thread_has_one_torch_thread_and_others_keep_theirs(loader: Loader) -> None:
    num_threads = torch.get_num_threads()
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert (loader.submit(torch.get_num_threads).result(), seen) == (1, [num_threads])
    assert torch.get_num_threads() == num_threads


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_the_thread_has_a_low_priority(loader: Loader) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert loader.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result() >= max(10, before)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_closing_waits_for_no_rest_and_cancels_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roadie.serving.loader.MOST_REST", LONG_S / WORK_S)
    loader = Loader(lambda: 1, lambda: 0)
    loader.submit(compute).result()
    waiting = [loader.submit(compute) for _ in range(3)]
    begin_s = time.monotonic()
    loader.close()
    assert time.monotonic() - begin_s < HANG_S
    with pytest.raises(CancelledError):
        waiting[-1].result()


def test_errors_are_told(loader: Loader) -> None:
    with pytest.raises(ValueError, match="wrong"):
        loader.submit(_raise).result()


def _raise() -> None:
    raise ValueError("wrong")
