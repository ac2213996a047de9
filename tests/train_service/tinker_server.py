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
request_conv = pytest.importorskip("tinker.proto.request_conv")
response_conv = pytest.importorskip("tinker.proto.response_conv")

NAME, PLACE = "roadie-tiny", str(embedded.model_path())
ALICE, BOB = "tml-alice-" + "a" * 32, "tml-bob-" + "b" * 32
PROTOBUF = {"content-type": "application/x-protobuf"}
ROWS = [embedded.load_tokenizer()(text)["input_ids"] for text in ("Flat is better than nested.", "Readability counts.")]
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


class Http:
    """A tenant's plain requests."""

    def __init__(self, server: Running, key: str = ALICE) -> None:
        self.client = server.http(key)

    def post(self, path: str, body: Any) -> Any:
        return self.client.post(f"/api/v1/{path}", json=body)

    def ok(self, path: str, body: Any) -> Any:
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def result(self, id: str) -> Any:
        """What became of a future: the output of a forward, or JSON."""
        while (answer := self.post("retrieve_future", {"request_id": id})).status_code == 408:
            pass
        assert answer.status_code == 200, answer.text
        if answer.headers["content-type"] == PROTOBUF["content-type"]:
            return response_conv.deserialize_forward_backward_output(answer.content)
        return answer.json()

    def session(self) -> str:
        return self.ok("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"})["session_id"]

    def model(self, session: str | None = None, number: int = 0, **words: Any) -> str:
        lora = {"rank": 8, **words}
        body = {
            "session_id": session or self.session(),
            "model_seq_id": number,
            "base_model": NAME,
            "lora_config": lora,
        }
        asked = self.ok("create_model", body)
        assert self.result(asked["request_id"])["model_id"] == asked["model_id"]
        return asked["model_id"]

    def forward_backward(self, model: str, seq: int, tokens: list[int] = ROWS[0]) -> str:
        answer = self.client.post("/api/v1/forward_backward", content=message(model, seq, tokens), headers=PROTOBUF)
        assert answer.status_code == 200, answer.text
        return answer.json()["request_id"]

    def step(self, model: str, seq: int) -> str:
        body = {"adam_params": {"learning_rate": 2e-2, "eps": 1e-3}, "model_id": model, "seq_id": seq}
        return self.ok("optim_step", body)["request_id"]


def message(model: str, seq: int, tokens: list[int] = ROWS[0]) -> bytes:
    data = tinker.types.ForwardBackwardInput(data=[datum(tokens)], loss_fn="cross_entropy")
    request = tinker.types.ForwardBackwardRequest(forward_backward_input=data, model_id=model, seq_id=seq)
    return request_conv.forward_backward_request_to_proto(request).SerializeToString()


def of_server(server: Running) -> Any:
    """What stands behind the routes."""
    stop: Any = server.service.extensions[0].stop
    return stop.__self__
