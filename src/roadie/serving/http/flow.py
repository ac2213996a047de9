"""The engine's outputs of one HTTP request: submitted together, read as they come, cancelled together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from roadie.errors import ServingError
from roadie.serving.engine import Engine, FinishReason, GenerationRequest, Output
from roadie.serving.http.failures import ApiError
from roadie.serving.http.metrics import Meter


@dataclass
class Totals:
    """Tokens of a call so far; those of a prompt once, however many choices it has. cached_tokens: of choices that have ended."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def usage(self) -> dict[str, object]:
        """As OpenAI has it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Flow:
    """Choices of one call. index: of a choice, in the order of `requests`; those of one prompt follow each other.

    Raises what `Engine.submit` raises; nothing is left in the engine then.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[GenerationRequest], choices_per_prompt: int, meter: Meter
    ) -> None:
        self._engine, self._meter = engine, meter
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Output] = asyncio.Queue()
        self._index = {request.request_id: index for index, request in enumerate(requests)}
        self._live: set[str] = set()
        self._choices_per_prompt = choices_per_prompt
        self._completions = [0] * len(requests)
        self.totals = Totals(sum(len(request.prompt_ids) for request in requests[::choices_per_prompt]))
        try:
            for request in requests:
                engine.submit(request, self._take)
                self._live.add(request.request_id)
        except BaseException:
            self.close()
            raise

    def _take(self, output: Output) -> None:
        """In the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, output)

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Outputs of all choices, with the index of each. Raises where a choice ends otherwise than by itself."""
        while self._live:
            output = await self._arrived.get()
            if output.request_id not in self._live:
                continue
            self._meter.saw(output)
            index = self._index[output.request_id]
            if output.finish is not None:
                self._live.discard(output.request_id)
                _check_end(output)
            self._count(index, output)
            yield index, output

    def _count(self, index: int, output: Output) -> None:
        told = output.usage
        self._completions[index] = (
            self._completions[index] + len(output.token_ids) if told is None else told.completion_tokens
        )
        self.totals.completion_tokens = sum(self._completions)
        if told is not None and index % self._choices_per_prompt == 0:
            self.totals.cached_tokens += told.cached_tokens

    def close(self) -> None:
        """Cancel what has not ended; does nothing where all has."""
        for request_id in self._live:
            self._engine.cancel(request_id)
        self._meter.close(len(self._live))
        self._live.clear()


def _check_end(output: Output) -> None:
    if output.finish is FinishReason.FAILED:
        raise output.error or ServingError("the engine failed at this request")
    if output.finish is FinishReason.CANCELLED:
        raise ApiError(
            503, "the request was cancelled by whoever runs the server", "cancelled", "server_error", retry_after_s=1
        )
