"""What the tests of Tinker's API share: a server with the embedded model, and clients of the official SDK."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.serving.http.harness import Running, running
from transformers import AutoModelForCausalLM

from roadie import embedded
from roadie.engine import TrainingSettings
from roadie.serving import ContinuousBatchingEngine, EngineSettings, Registry
from roadie.serving.http.keys import Caller, Keys, hash_key
from roadie.serving.http.launch import Ground
from roadie.serving.http.settings import HttpSettings
from roadie.train_service.launch import extensions

tinker = pytest.importorskip("tinker")

NAME, PLACE = "roadie-tiny", str(embedded.model_path())
ALICE, BOB = "tml-alice-" + "a" * 32, "tml-bob-" + "b" * 32
KEYS = Keys(((hash_key(ALICE), Caller("alice")), (hash_key(BOB), Caller("bob"))))


@contextmanager
def serving(state: Path, model: Any = None, settings: EngineSettings | None = None) -> Iterator[Running]:
    """A server that trains, with this folder of state."""
    model = model if model is not None else AutoModelForCausalLM.from_pretrained(PLACE)
    (state / "adapters").mkdir(parents=True, exist_ok=True)
    (state / "models").mkdir(exist_ok=True)
    registry, tokenizer = Registry.open(state / "adapters"), embedded.load_tokenizer()
    settings = settings or EngineSettings(num_slots=16, num_blocks=512)
    engine = ContinuousBatchingEngine(model, tokenizer, registry, settings, (NAME, PLACE), TrainingSettings())
    parts = extensions(state)(Ground(engine, model, tokenizer, registry, (NAME, PLACE)))
    http = HttpSettings(model_name=NAME, model_aliases=(PLACE,))
    with running(engine, http, KEYS, tokenizer, parts) as found:
        yield found


@contextmanager
def client(server: Running, key: str = ALICE) -> Iterator[Any]:
    """The SDK's client of a server, closed afterwards."""
    found = tinker.ServiceClient(base_url=server.url, api_key=key)
    try:
        yield found
    finally:
        found.close("success").result()


def datum(tokens: list[int], **values: Any) -> Any:
    """A text, of which each token is to be predicted from those before it."""
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1), **values},
    )
