"""Who waits for whom on a GPU where several streams use one bank: one admits adapters while others run the model.

A stream that reads waits for what was written last, and one that writes into a slot waits for those that read it before: on the
device, by events, so that no thread of the host stops. In a graph that is being captured nothing of it can be: who captures, and
who replays, has called `AdapterBank.slots` in the stream before. On CPUs there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Streams:
    """The order of writes and reads of one bank. devices: the CUDA devices on which it has tables."""

    cuda: Any = torch.cuda

    def __init__(self) -> None:
        self.devices: set[torch.device] = set()
        # Where the last writes end, and the streams that come after them.
        self._last: tuple[list[Any], set[Any]] = [], set()

    def add(self, device: torch.device) -> None:
        """There are tables on this device, too."""
        if device.type == "cuda":
            self.devices.add(device)

    def before_reading(self) -> None:
        """The current streams are going to read tables."""
        written, known = self._last
        if not written or self.cuda.is_current_stream_capturing():
            return
        for stream in self._current():
            if stream not in known:
                for event in written:
                    stream.wait_event(event)
                known.add(stream)

    def readers(self) -> Callable[[], list[Any]] | None:
        """What to call when those who read now have issued all that reads; it gives events. None where there is nothing to do."""
        if not self.devices:
            return None
        streams = self._current()

        def ended() -> list[Any]:
            return [] if self.cuda.is_current_stream_capturing() else [stream.record_event() for stream in streams]

        return ended

    def before_writing(self, events: Iterable[Any]) -> None:
        """The current streams are going to write into slots that were read until these events, after all earlier writes."""
        self.before_reading()
        for event in events:
            for stream in self._current():
                stream.wait_event(event)

    def wrote(self) -> None:
        """What the current streams were to write has been issued."""
        if self.devices:
            streams = self._current()
            self._last = [stream.record_event() for stream in streams], set(streams)

    def _current(self) -> list[Any]:
        return [self.cuda.current_stream(device) for device in self.devices]
