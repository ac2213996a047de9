"""What the routes share: one engine and what is around it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fastapi import Request

from roadie.errors import ConfigError, UnknownAdapter
from roadie.serving.engine import AdapterWish, Engine, GenerationRequest, Sampling, Scoring
from roadie.serving.grammars import Constraint, is_installed
from roadie.serving.http.extensions import Extension
from roadie.serving.http.failures import ApiError, lacking, unknown_model
from roadie.serving.http.flow import Flow
from roadie.serving.http.gate import Gate
from roadie.serving.http.keys import Caller
from roadie.serving.http.metrics import Metrics
from roadie.serving.http.naming import ModelNames, shown
from roadie.serving.http.prompts import Prompts
from roadie.serving.http.settings import HttpSettings
from roadie.serving.validation import check_length


@dataclass(frozen=True, eq=False)
class Service:
    """One server. started_s: Unix time, whole seconds."""

    engine: Engine
    prompts: Prompts
    names: ModelNames
    settings: HttpSettings
    metrics: Metrics
    gate: Gate
    extensions: Sequence[Extension] = ()
    started_s: int = field(default_factory=lambda: int(time.time()))
    compiling: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "roadie-grammars"))

    def start(self) -> None:
        """The engine, and what stands on it."""
        self.engine.start()
        for each in self.extensions:
            each.start()

    def stop(self) -> None:
        """What stands on the engine, and the engine."""
        for each in self.extensions:
            each.stop()
        self.engine.stop()
        self.prompts.close()
        self.compiling.shutdown(wait=False, cancel_futures=True)

    def flow(
        self,
        call: Call,
        prompts: Sequence[tuple[int, ...]],
        rules: Sequence[Sampling],
        *,
        whole: bool,
        scoring: Scoring | None = None,
        constraint: Constraint | None = None,
    ) -> Flow:
        """Submit each prompt with each of the rules; raises what `Engine.submit` raises. whole: nothing is streamed."""
        requests = [
            GenerationRequest(
                f"{call.id}-{place}-{choice}", prompt, call.wish, sampling, call.caller.name, whole, scoring, constraint
            )
            for place, prompt in enumerate(prompts)
            for choice, sampling in enumerate(rules)
        ]
        try:
            return Flow(self.engine, requests, len(rules), self.metrics.meter(call.wish, call.arrived_s))
        except UnknownAdapter:
            raise unknown_model(call.shown) from None  # in the same words as where a key may not use it

    async def prepare(self, asked: tuple[str, Constraint] | None) -> Constraint | None:
        """What an answer must be, by the field that says so, compiled beside the loop. Raises `ApiError` with that field."""
        if asked is None:
            return None
        field_name, constraint = asked
        if not is_installed():
            raise lacking(field_name, 'llguidance, which keeps answers to constraints (pip install "roadie[serve]")')
        try:
            await asyncio.get_running_loop().run_in_executor(self.compiling, self.engine.prepare, constraint)
        except ConfigError as error:
            raise ApiError(400, f"{field_name}: {error}", "invalid_value", param=field_name) from None
        return constraint

    def begin(self, kind: str, model: str, adapters: Mapping[str, float] | None, request: Request) -> Call:
        """A call of a caller: who, what it is called, which adapter; raises `ApiError` for one they may not use."""
        caller: Caller = request.state.caller
        wish = self.names.wish(model, adapters, caller)
        return Call(
            f"{kind}-{uuid.uuid4().hex}",
            int(time.time()),
            model,
            shown(model, adapters),
            wish,
            caller,
            request.state.arrived_s,
        )

    def check_choices(self, num_choices: int) -> None:
        """Raise `ApiError` for more choices, over all prompts, than the server allows."""
        if num_choices > self.settings.max_choices:
            raise ApiError(
                400,
                f"got {num_choices} choices over all prompts; wanted at most {self.settings.max_choices}; send several requests",
                "invalid_value",
                param="n",
            )

    def check_length(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise `PromptTooLong`, before anything is submitted, and `ApiError` for more tokens than this server gives."""
        most = self.settings.max_tokens
        if most is not None and max_tokens > most:
            raise ApiError(
                400, f"got max_tokens={max_tokens}; wanted at most {most}", "invalid_value", param="max_tokens"
            )
        check_length(num_prompt_tokens, max_tokens, self.engine.limits)


@dataclass(frozen=True)
class Call:
    """One request to generate. created: Unix time, whole seconds; shown: what it asks for; arrived_s: by time.monotonic."""

    id: str
    created: int
    model: str
    shown: str
    wish: AdapterWish
    caller: Caller
    arrived_s: float


def service_of(request: Request) -> Service:
    """The server that a request came to."""
    service: Service = request.app.state.service
    return service
