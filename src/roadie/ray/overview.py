"""Many replicas seen as one engine: their adapters and figures put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from roadie.ray.catalogue import Entry
from roadie.serving.engine import AdapterState, AdapterStatus, Statistics

_FIRST = (AdapterState.RESIDENT, AdapterState.LOADING, AdapterState.UNLOADING, AdapterState.BROKEN)


def combined(name: str, parts: Sequence[AdapterStatus]) -> AdapterStatus:
    """How an adapter stands over all replicas: resident where it is so in one; counts are summed. No slot: each has its own."""
    states = {part.state for part in parts}
    return AdapterStatus(
        name,
        next((state for state in _FIRST if state in states), AdapterState.KNOWN),
        content_hash=next((part.content_hash for part in parts if part.content_hash), None),
        num_running=sum(part.num_running for part in parts),
        num_queued=sum(part.num_queued for part in parts),
        num_requests=sum(part.num_requests for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
        error=next((part.error for part in parts if part.error), None),
    )


def on_record(status: AdapterStatus, entry: Entry, uri: str) -> AdapterStatus:
    """With what the catalogue says of it."""
    source = entry.source or status.name
    path = source if "://" in source or source.startswith("/") else f"{uri.rstrip('/')}/{source}"
    return replace(status, path=path, is_pinned=entry.is_pinned)


def known_status(name: str, uri: str) -> AdapterStatus:
    """Of an adapter that lies in the folder, and was never asked for."""
    return AdapterStatus(name, AdapterState.KNOWN, path=f"{uri.rstrip('/')}/{name}")


def summed(parts: Sequence[Statistics]) -> Statistics:
    """The figures of all replicas together."""
    values: dict[str, Any] = {}
    for field in fields(Statistics):
        found = [getattr(part, field.name) for part in parts]
        if field.name.endswith("_by_tenant"):
            values[field.name] = dict(sum((Counter(each) for each in found), Counter()))
        elif field.name.endswith("_share"):
            values[field.name] = max(found, default=0.0)
        else:
            values[field.name] = sum(found)
    return Statistics(**values)
