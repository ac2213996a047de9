"""Figures for Prometheus: counted here where the HTTP side knows them, and read from the engine where it does.

Adapters have a label each up to a number, and share the label "(others)" beyond it; blends share "(blend)", and the base model
is "(base)". No adapter can have such a name. There are two registries, so that who may not see adapters' names gets the rest.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from roadie.serving.engine import AdapterState, AdapterWish, Engine, FinishReason, Output, Statistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
OTHERS, BLEND, BASE = "(others)", "(blend)", "(base)"

_GAUGES = (
    ("num_running", "roadie_running_requests", "Requests in the batch"),
    ("num_queued", "roadie_queued_requests", "Requests that wait for their turn or their adapter"),
    ("num_slots", "roadie_slots", "Slots for adapters and blends"),
    ("num_slots_leased", "roadie_slots_leased", "Slots that requests hold"),
    ("num_resident", "roadie_resident_adapters", "Adapters in slots"),
    ("num_blocks", "roadie_cache_blocks", "Key-value blocks"),
    ("num_blocks_free", "roadie_cache_blocks_free", "Key-value blocks that no request holds"),
    ("num_training_tenants", "roadie_training_tenants", "Tenants that train beside the requests"),
    ("num_training_waiting", "roadie_training_waiting_calls", "What tenants have asked for and has not been done"),
    ("training_share", "roadie_training_share", "Share of the time for training where requests wait too, as set"),
    ("training_owed_s", "roadie_training_owed_seconds", "What training may take before it is the requests' turn"),
)
_COUNTERS = (
    (
        "num_cached_prompt_tokens",
        "roadie_cached_prompt_tokens",
        "Tokens of prompts taken from another request's blocks",
    ),
    ("num_refused", "roadie_refused_requests", "Requests refused because too many waited"),
    ("num_loads", "roadie_adapter_loads", "Adapters put into a slot"),
    ("num_load_failures", "roadie_adapter_load_failures", "Adapters whose files could not be used"),
    ("num_evictions", "roadie_adapter_evictions", "Adapters that gave their slot to another"),
    ("num_steps", "roadie_steps", "Forward passes"),
    ("seconds_computing", "roadie_computing_seconds", "Seconds in forward passes and sampling"),
    ("seconds_training", "roadie_training_seconds", "Seconds in turns of training"),
    ("num_training_passes", "roadie_training_passes", "Forward and backward passes over rows of tenants"),
    ("num_training_tokens", "roadie_training_tokens", "Tokens of these passes, padding counted"),
    ("num_training_steps", "roadie_training_steps", "Steps of the optimiser, each of one tenant"),
    ("num_training_failed", "roadie_training_failed_calls", "Calls that failed: not finite, or an error of the model"),
)


class _EngineFigures(Collector):
    """Read when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        statistics: Statistics = self._engine.statistics()
        for field, name, help_text in _GAUGES:
            yield GaugeMetricFamily(name, help_text, value=getattr(statistics, field))
        for field, name, help_text in _COUNTERS:
            yield CounterMetricFamily(name, help_text, value=getattr(statistics, field))
        yield GaugeMetricFamily("roadie_ready", "Whether requests are taken", value=float(self._engine.is_ready))


class _ResidentAdapters(Collector):
    """Which adapters are in slots."""

    def __init__(self, engine: Engine, labels: Labels) -> None:
        self._engine, self.labels = engine, labels

    def collect(self) -> Iterator[Any]:
        there = (each.name for each in self._engine.adapters() if each.state is AdapterState.RESIDENT)
        counts = collections.Counter(map(self.labels.of, there))
        family = GaugeMetricFamily("roadie_adapter_resident", "Whether an adapter is in a slot", labels=["adapter"])
        for label, count in sorted(counts.items()):
            family.add_metric([label], count)
        yield family


class Labels:
    """Labels of adapters: one each for the first `most` that were asked for."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def of(self, wish: AdapterWish) -> str:
        if wish is None:
            return BASE
        if not isinstance(wish, str):
            return next(iter(wish)) if list(wish.values()) == [1.0] else BLEND
        if wish not in self._known and len(self._known) < self._most:
            self._known.add(wish)
        return wish if wish in self._known else OTHERS


class Metrics:
    """Everything that `/metrics` says of one server."""

    def __init__(self, engine: Engine, max_labelled_adapters: int) -> None:
        self._plain, self._named = CollectorRegistry(), CollectorRegistry()
        self.labels = Labels(max_labelled_adapters)
        self._plain.register(_EngineFigures(engine))
        self._named.register(_ResidentAdapters(engine, self.labels))
        self.http_requests = Counter(
            "roadie_http_requests", "HTTP requests", ["route", "method", "status"], registry=self._plain
        )
        self.first = Histogram(
            "roadie_time_to_first_token_seconds", "From a request's arrival", buckets=_SECONDS, registry=self._plain
        )
        self.between = Histogram(
            "roadie_time_between_tokens_seconds", "Between tokens of a choice", buckets=_GAPS, registry=self._plain
        )
        self.whole = Histogram(
            "roadie_request_seconds", "From a request's arrival to its end", buckets=_SECONDS, registry=self._plain
        )
        self.requests = self._by_adapter(Counter, "roadie_requests", "Choices that ended", "finish")
        self.prompt_tokens = self._by_adapter(Counter, "roadie_prompt_tokens", "Tokens of prompts")
        self.generated = self._by_adapter(Counter, "roadie_generated_tokens", "Generated tokens")
        self.first_of = self._by_adapter(
            Summary, "roadie_adapter_time_to_first_token_seconds", "From a request's arrival, by adapter"
        )

    def _by_adapter(self, kind: Any, name: str, help_text: str, *labels: str) -> Any:
        return kind(name, help_text, ["adapter", *labels], registry=self._named)

    def meter(self, wish: AdapterWish, arrived_s: float) -> Meter:
        """What measures one request. arrived_s: by time.monotonic."""
        return Meter(self, wish, arrived_s)

    def text(self, *, with_names: bool) -> bytes:
        """In Prometheus's text format."""
        named = generate_latest(self._named) if with_names else b""
        return generate_latest(self._plain) + named


class Meter:
    """Measures the choices of one request. Its label is taken with the first output, when its adapter is known to exist."""

    def __init__(self, metrics: Metrics, wish: AdapterWish, arrived_s: float) -> None:
        self._metrics, self._wish, self._arrived_s = metrics, wish, arrived_s
        self._last_s: dict[str, float] = {}
        self._is_closed = False

    @property
    def _label(self) -> str:
        return self._metrics.labels.of(self._wish)

    def saw(self, output: Output) -> None:
        """An output came."""
        now_s = time.monotonic()
        if output.token_ids:
            self._saw_tokens(output.request_id, len(output.token_ids), now_s)
        if output.finish is not None:
            self._metrics.requests.labels(self._label, output.finish.value).inc()
        if output.usage is not None:
            self._metrics.prompt_tokens.labels(self._label).inc(output.usage.prompt_tokens)

    def _saw_tokens(self, request_id: str, count: int, now_s: float) -> None:
        last_s = self._last_s.get(request_id)
        if last_s is None:
            self._metrics.first.observe(now_s - self._arrived_s)
            self._metrics.first_of.labels(self._label).observe(now_s - self._arrived_s)
        else:
            self._metrics.between.observe((now_s - last_s) / count)
        self._last_s[request_id] = now_s
        self._metrics.generated.labels(self._label).inc(count)

    def close(self, num_cancelled: int) -> None:
        """The request has ended, or its caller has gone, and so many choices were cancelled."""
        if num_cancelled:
            self._metrics.requests.labels(self._label, FinishReason.CANCELLED.value).inc(num_cancelled)
        if not self._is_closed:
            self._is_closed = True
            self._metrics.whole.observe(time.monotonic() - self._arrived_s)
