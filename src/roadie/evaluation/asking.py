"""Many requests of an engine, whose answers are waited for together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from roadie.errors import QueueFull, ServingError
from roadie.serving.engine import Engine, FinishReason, GenerationRequest, Output, TokenLogprob


class Asking:
    """Requests of one engine. Its queue is kept full, and no fuller: they come one after another from an iterator.

    on_answer: called with every answer, from the engine's thread.
    """

    def __init__(self, engine: Engine, on_answer: Callable[[], None] = lambda: None) -> None:
        self._engine, self._on_answer = engine, on_answer
        self._most = engine.limits.max_running + engine.limits.max_queued
        self._changed = threading.Condition()
        self._live: dict[str, Answer] = {}
        self._failure: Exception | None = None

    def ask(self, requests: Iterable[GenerationRequest]) -> list[Answer]:
        """The answers, in the order of the requests. Raises what `Engine.submit` raises, or why an answer failed."""
        answers = []
        try:
            for request in requests:
                answers.append(self._submit(request))
            self._wait(lambda: not self._live)
        finally:
            for request_id in list(self._live):
                self._engine.cancel(request_id)
        return answers

    def _submit(self, request: GenerationRequest) -> Answer:
        answer = Answer()
        while True:
            self._wait(lambda: len(self._live) < self._most)
            with self._changed:
                self._live[request.request_id] = answer
            try:
                self._engine.submit(request, self._take)
                return answer
            except QueueFull:  # others ask the same engine, too
                with self._changed:
                    del self._live[request.request_id]
                    self._changed.wait(1.0)
            except BaseException:
                del self._live[request.request_id]
                raise

    def _wait(self, is_reached: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: is_reached() or self._failure is not None)
            if self._failure is not None:
                raise self._failure

    def _take(self, output: Output) -> None:
        with self._changed:
            answer = self._live[output.request_id]
            answer.text += output.text
            answer.prompt_logprobs += output.prompt_logprobs
            if output.finish is None:
                return
            del self._live[output.request_id]
            if output.finish in (FinishReason.FAILED, FinishReason.CANCELLED):
                self._failure = (
                    self._failure or output.error or ServingError("a request was cancelled by somebody else")
                )
            self._changed.notify_all()
        self._on_answer()


class Answer:
    """What came back for one request."""

    def __init__(self) -> None:
        self.text = ""
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
