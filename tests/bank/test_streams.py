"""Streams that read a bank on a GPU and streams that write into it wait for each other; here they write down what they do."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roadie
from roadie.bank import AdapterBank
from roadie.bank.streams import Streams
from roadie.testing import random_adapter

D = 16


class Event:
    """Where a stream was; done: whether the device has come there."""

    def __init__(self, stream: str, place: int) -> None:
        self.at, self.done = (stream, place), False

    def query(self) -> bool:
        return self.done


class Stream:
    """What it was told, in order."""

    def __init__(self, name: str) -> None:
        self.name, self.told = name, []

    def record_event(self) -> Event:
        event = Event(self.name, len(self.told))
        self.told.append("event")
        return event

    def wait_event(self, event: Event) -> None:
        self.told.append(event.at)


class Cuda:
    """As much of torch.cuda as a bank uses."""

    def __init__(self) -> None:
        self.current, self.is_capturing = Stream("first"), False

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    def is_current_stream_capturing(self) -> bool:
        return self.is_capturing

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[Stream]:
        before, self.current = self.current, stream
        yield stream
        self.current = before


class Net(nn.Module):
    """One layer; what reads the tables is written down."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self.layer, self._cuda = nn.Linear(D, D), cuda

    def forward(self, input_ids: Tensor) -> Tensor:
        self._cuda.current.told.append("reads")
        return self.layer(input_ids)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(Streams, "cuda", made)
    return made


def _bank(cuda: Cuda, slots: int = 1) -> AdapterBank:
    bank = AdapterBank(Net(cuda), slots=slots)
    bank.streams.devices.add(torch.device("cuda", 0))
    return bank


def _adapter(bank: AdapterBank, seed: int = 0) -> roadie.Adapter:
    return random_adapter(bank.model, seed=seed, group_size=4)


def _run(bank: AdapterBank, *names: str, **arguments: Any) -> None:
    with bank.rows(names, **arguments), torch.no_grad():
        bank.model(torch.ones(len(names), D))


def test_who_reads_waits_once_for_what_was_written(cuda: Cuda) -> None:
    bank = _bank(cuda)
    with cuda.stream(Stream("admission")) as admission:
        bank.admit("a", _adapter(bank))
    for _ in range(2):
        _run(bank, "a")
    written = ("admission", admission.told.index("event"))
    assert cuda.current.told.count(written) == 1
    assert cuda.current.told.index(written) < cuda.current.told.index("reads")


def test_who_writes_waits_for_those_who_read_the_slot(cuda: Cuda) -> None:
    """There is one slot, and one to spare: the second adapter that comes after the first takes the slot of the first."""
    bank = _bank(cuda)
    bank.admit("a", _adapter(bank))
    with cuda.stream(Stream("reader")) as reader:
        _run(bank, "a")
    gc.collect()
    end = ("reader", len(reader.told) - 1)
    assert reader.told[-2:] == ["reads", "event"]
    with cuda.stream(Stream("admission")) as admission:
        bank.replace("a", _adapter(bank, seed=1))
        assert end not in admission.told  # in the slot to spare
        bank.replace("a", _adapter(bank, seed=2))
    assert admission.told.index(end) < len(admission.told) - 1
    assert admission.told[-1] == "event"


def test_writers_come_after_each_other(cuda: Cuda) -> None:
    """So that who waits for the last one has waited for all."""
    bank = _bank(cuda, slots=4)
    streams = [Stream("one"), Stream("two"), Stream("three")]
    for seed, stream in enumerate(streams):
        with cuda.stream(stream):
            bank.admit(f"a{seed}", _adapter(bank, seed))
    for before, after in pairwise(streams):
        assert (before.name, len(before.told) - 1) in after.told


def test_nothing_is_recorded_or_waited_for_in_a_capture(cuda: Cuda) -> None:
    bank = _bank(cuda)
    with cuda.stream(Stream("admission")):
        bank.admit("a", _adapter(bank))
    held = bank.slots(["a"])
    told = list(cuda.current.told)
    assert len(told) == 1
    static, cuda.is_capturing = held.clone(), True
    with bank.rows(static, static=True), torch.no_grad():
        bank.model(torch.ones(1, D))
    del held
    gc.collect()
    assert cuda.current.told == [*told, "reads"]


@pytest.mark.slow
def test_events_that_are_done_are_forgotten(cuda: Cuda) -> None:
    bank = _bank(cuda)
    bank.admit("a", _adapter(bank))
    for _ in range(5):
        _run(bank, "a")
        gc.collect()
        bank._book._settle()
        for events in bank._book._read.values():
            assert len(events) <= 2
            for event in events:
                event.done = True


def test_on_a_cpu_there_is_nothing_to_do() -> None:
    streams = Streams()
    streams.add(torch.device("cpu"))
    streams.wrote()
    streams.before_reading()
    assert streams.readers() is None
