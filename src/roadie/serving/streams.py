"""Outputs of an engine for asyncio: one asynchronous iterator a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from roadie.serving.engine import Engine, GenerationRequest, Output


async def stream(engine: Engine, request: GenerationRequest) -> AsyncIterator[Output]:
    """The outputs of a request as they come, the last with `finish`; leaving early cancels it.

    Raises what `Engine.submit` raises, at the first step of the iteration.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Output] = asyncio.Queue()

    def hand_over(output: Output) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(arrived.put_nowait, output)

    engine.submit(request, hand_over)
    is_over = False
    try:
        while not is_over:
            output = await arrived.get()
            is_over = output.finish is not None
            yield output
    finally:
        if not is_over:
            engine.cancel(request.request_id)
