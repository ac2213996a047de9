"""What a front sends to a replica, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from roadie.ray.catalogue import Entry
from roadie.serving.engine import GenerationRequest, Output


@dataclass(frozen=True)
class ReplicaRequest:
    """A request, the adapters it needs, and their entries as the front knows them: the answer is of these or later ones."""

    request: GenerationRequest
    names: tuple[str, ...] = ()
    entries: Mapping[str, Entry] | None = None


def merged(outputs: list[Output]) -> Output:
    """All outputs of a request as one, which is its last, too."""
    last = outputs[-1]
    return Output(
        last.request_id,
        tuple(token for output in outputs for token in output.token_ids),
        "".join(output.text for output in outputs),
        tuple(entry for output in outputs for entry in output.logprobs),
        last.finish,
        last.usage,
        last.error,
        tuple(entry for output in outputs for entry in output.prompt_logprobs),
    )
