"""What goes between fronts and replicas: a request of HTTP, and the messages of ASGI that answer it; many answers as one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_STATES = ("resident", "loading", "unloading", "broken", "known")
_SUMMED = ("running", "queued", "requests", "tokens")


@dataclass(frozen=True)
class Call:
    """A request, its body read. revision: of the newest catalogue that its front has heard of, which the answer is to follow."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes
    revision: int = 0

    def scope(self) -> dict[str, Any]:
        """As ASGI has it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "client": self.client,
        }


@dataclass(frozen=True)
class Answer:
    """What one replica says."""

    replica: str
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def status(answers: Sequence[Answer]) -> bytes:
    """`/v1/status` of all replicas: figures are summed, and the longest time counts that one is up."""
    parts = [json.loads(answer.body) for answer in answers]
    figures = {key: sum(part["figures"][key] for part in parts) for key in parts[0]["figures"]}
    figures["uptime_s"] = max(part["figures"]["uptime_s"] for part in parts)
    ready = any(part["ready"] for part in parts)
    return _json({**parts[0], "ready": ready, "figures": figures, "adapters": _adapters(parts, "adapters")})


def adapters(answers: Sequence[Answer]) -> bytes:
    """`/v1/adapters` of all replicas: an adapter is resident where it is so in one; counts are summed, each has its own slot."""
    parts = [json.loads(answer.body) for answer in answers]
    return _json({**parts[0], "data": _adapters(parts, "data")})


def metrics(answers: Sequence[Answer]) -> bytes:
    """`/metrics` of all replicas, each sample with a label that says whose it is."""
    families: dict[str, list[str]] = {}
    head, samples = "", []
    for answer in answers:
        label = f'replica="{answer.replica}"'
        for line in answer.body.decode().splitlines():
            if line.startswith("# HELP"):
                head = line
            elif line.startswith("#"):
                samples = families.setdefault(f"{head}\n{line}", [])
            elif "{" in line:
                samples.append(line.replace("{", f"{{{label},", 1))
            else:
                samples.append(line.replace(" ", f"{{{label}}} ", 1))
    return "".join("\n".join((head, *samples, "")) for head, samples in families.items()).encode()


def _adapters(parts: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for each in (each for part in parts for each in part[key]):
        before = found.get(each["name"])
        found[each["name"]] = _joined(before, each) if before else {**each, "slot": None}
    return [found[name] for name in sorted(found)]


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: value if value is not None else other[key] for key, value in one.items()}
    state = min(one["state"], other["state"], key=_STATES.index)
    return {**both, **{key: one[key] + other[key] for key in _SUMMED}, "state": state, "slot": None}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
