"""What the tests of fine-tuning share: a server that trains the embedded model, and files for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from fastapi import APIRouter
from tests.patience import until
from tests.serving.http.harness import Running, running

from roadie import embedded
from roadie.engine import TrainingSettings
from roadie.serving import ContinuousBatchingEngine, EngineSettings
from roadie.serving.http.extensions import Extension
from roadie.serving.http.keys import Caller, Keys, hash_key
from roadie.serving.http.launch import Folders, Ground, Launch, open_registry
from roadie.serving.http.settings import HttpSettings
from roadie.train_service.database import Database
from roadie.train_service.fine_tuning.limits import Limits
from roadie.train_service.fine_tuning.part import fine_tuning
from roadie.train_service.launch import MODELS, with_training

ALICE, BOB, ADMIN = "alice-" + "a" * 32, "bob-" + "b" * 32, "admin-" + "c" * 32
KEYS = Keys(
    (
        (hash_key(ALICE), Caller("alice", ())),
        (hash_key(BOB), Caller("bob")),
        (hash_key(ADMIN), Caller("operator", None, is_admin=True)),
    )
)
SMALL = EngineSettings(num_slots=8, num_blocks=128, max_batch_tokens=128, max_running=16)
BASE = "roadie-tiny"
ENDED = ("succeeded", "failed", "cancelled")


@contextmanager
def serving(
    state: Path, keys: Keys | None = None, limits: Limits | None = None, training: TrainingSettings | None = None
) -> Iterator[Running]:
    """A server as `roadie serve --train --train-state STATE` has it."""
    model, tokenizer = embedded.load_model().eval(), embedded.load_tokenizer()
    launch = with_training(Launch(folders=Folders(), training=training), state)
    with open_registry(launch, is_embedded=False) as registry:
        engine = ContinuousBatchingEngine(model, tokenizer, registry, SMALL, (BASE,), launch.training)
        ground, database = Ground(engine, model, tokenizer, registry, (BASE,)), Database(state / "state.sqlite")
        parts = [fine_tuning(ground, database, state, state / MODELS, limits)]
        parts.append(Extension(APIRouter(), {}, stop=database.close))
        with running(engine, HttpSettings(model_name=BASE), keys, tokenizer, parts) as server:
            yield server


def jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def turns(*texts: str) -> list[dict[str, str]]:
    """What the user and the assistant say in turn."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def chats(answer: str, num: int = 8) -> bytes:
    """Rows in which whatever is asked gets the same answer."""
    return jsonl([{"messages": turns(f"What is number {number}?", answer)} for number in range(num)])


def preferences(better: str, worse: str, num: int = 8) -> bytes:
    return jsonl(
        [
            {
                "input": {"messages": turns(f"What is number {number}?")},
                "preferred_output": [{"role": "assistant", "content": better}],
                "non_preferred_output": [{"role": "assistant", "content": worse}],
            }
            for number in range(num)
        ]
    )


def upload(client: openai.OpenAI, content: bytes, name: str = "rows.jsonl") -> str:
    file = client.files.create(file=(name, content), purpose="fine-tune")
    return file.id


def wait(client: openai.OpenAI, job_id: str, *statuses: str) -> Any:
    """The job, when it has one of these statuses (or has ended)."""
    found: list[Any] = []

    def is_there() -> bool:
        found[:] = [client.fine_tuning.jobs.retrieve(job_id)]
        return found[0].status in (statuses or ENDED) + ENDED

    until(is_there)
    return found[0]


def answer(client: openai.OpenAI, model: str, text: str = "What is number 3?", max_tokens: int = 12) -> str:
    """What a model says."""
    chat = client.chat.completions.create(
        model=model,
        messages=turns(text),
        temperature=0,
        max_tokens=max_tokens,  # type: ignore[arg-type]
    )
    return str(chat.choices[0].message.content).strip()
