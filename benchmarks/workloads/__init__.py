"""What is measured. Each workload has a function that runs one case and gives its entry of the record.

    checkpoint  a real model: decoding and training steps, one adapter or one for each row, on one thread and on two
    residents   a random Llama with 200 adapters: 64 rows of one token, each in an adapter of its own
    layer       one linear layer: time, against the frozen layer
    rotation    the rotation alone, in place: bytes a second, against copying
    kept        bytes kept for backward by a layer and by what follows it, eager and compiled
    model       a Llama of 160M parameters: prefill, decoding and a training step; bytes kept
    peak        the peak memory of a training step, in a process of its own

An entry is ``{"workload", "case", "threads", "rounds", "calls", "base", "bytes_moved",
"rivals"}`` where there are times (`entry` makes it, `with_limit` adds "limit_ms"), and ``{"workload", "case", "bytes"}``
where there are none.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Rounds
from benchmarks.statistics import summarise


def entry(
    workload: str, case: dict[str, Any], rounds: Rounds, *, base: str, ours: str | None, bytes_moved: int
) -> dict[str, Any]:
    """The record's entry of a timed case; bytes_moved: what must move for the rotation, read plus written."""
    return {
        "workload": workload,
        "case": case,
        "threads": torch.get_num_threads(),
        "rounds": rounds.count,
        "calls": rounds.calls,
        "base": base,
        "bytes_moved": bytes_moved,
        "rivals": summarise(rounds, base, ours),
    }


def with_limit(made: dict[str, Any], copy_bytes_per_s: dict[str, float]) -> dict[str, Any]:
    """The entry with "limit_ms": the base's own time, and the bytes that must move at the speed of copying.

    copy_bytes_per_s: by number of threads. Where copying is the base itself, its time is the limit.
    """
    if "rivals" not in made:
        return made
    base_ms = made["rivals"][made["base"]]["median_ms"]
    if made["workload"] == "rotation":
        return {**made, "limit_ms": base_ms}
    return {**made, "limit_ms": base_ms + made["bytes_moved"] / copy_bytes_per_s[str(made["threads"])] * 1e3}
