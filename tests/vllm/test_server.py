"""vLLM's own OpenAI server: adapters listed, loaded, replaced and unloaded while it runs."""

from __future__ import annotations

import pytest
from tests.patience import HANG_S

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
from tests.vllm import cases


class Server:
    """A running server, and its clients."""

    def __init__(self, port: int, process: subprocess.Popen[str], log: Path, folder: Path) -> None:
        self.url, self.process, self.log, self.folder = f"http://127.0.0.1:{port}", process, log, folder
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=self.url, timeout=HANG_S)

    def wait(self) -> None:
        end = time.monotonic() + HANG_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-4000:])

    def load(self, name: str, path: Path, **more: bool) -> httpx.Response:
        return self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})

    def unload(self, name: str) -> httpx.Response:
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def names(self) -> dict[str, str | None]:
        return {model.id: getattr(model, "parent", None) for model in self.openai.models.list()}

    def complete(self, model: str, prompt: Sequence[int], tokens: int = 10) -> tuple[int, ...]:
        more = {"return_token_ids": True, "ignore_eos": True}
        answer = self.openai.completions.create(
            model=model, prompt=list(prompt), max_tokens=tokens, temperature=0, extra_body=more
        )
        return tuple(answer.choices[0].token_ids)


@pytest.fixture(scope="module")
def server(base: Path, kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that looks for unknown names in a folder, in which "found", "broken" and "gentle" are."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(kinds["all-2"], folder / "found")
    shutil.copytree(kinds["all-1"], folder / "broken")
    cases.save_random(folder / "gentle", {"group_size": 32}, seed=3, scale=0.2)
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (
        f"-m vllm.entrypoints.openai.api_server --model {base} --served-model-name base --dtype float32 --max-model-len 128 "
        f"--enforce-eager --block-size 32 --enable-lora --max-loras 32 --host 127.0.0.1 --port {port} --additional-config"
    )
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command.split(), json.dumps({"roadie": {"adapters": str(folder)}})],
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LOGGING_LEVEL": "INFO"},
        )
    running = Server(port, process, log, folder)
    try:
        running.wait()
        yield running
    finally:
        process.terminate()
        process.wait(timeout=HANG_S)


@pytest.mark.smoke
def test_adapters_are_loaded_listed_used_together_and_unloaded(server: Server, kinds: dict[str, Path]) -> None:
    for name, path in kinds.items():
        assert server.load(name, path).status_code == 200
    assert server.names() == {"base": None, **dict.fromkeys(kinds, "base")}
    asked = [("base", None), *kinds.items()] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        tokens = list(pool.map(lambda i: server.complete(asked[i][0], cases.prompt(i)), range(len(asked))))
    verdict = cases.judged([cases.Generated(path, cases.prompt(i), tokens[i]) for i, (_, path) in enumerate(asked)])
    print(f"\nserver: {verdict}")
    assert verdict.wrong == 0
    assert verdict.like_base <= 2 + 4
    for name in kinds:
        assert server.unload(name).status_code == 200
    assert server.names() == {"base": None}
    with pytest.raises(openai.NotFoundError):
        server.complete("all-1", cases.prompt(0))


def test_an_unknown_name_is_looked_for_in_the_folder(server: Server, kinds: dict[str, Path]) -> None:
    tokens = server.complete("found", cases.prompt(1))
    assert cases.judged([cases.Generated(kinds["all-2"], cases.prompt(1), tokens)]).wrong == 0
    assert server.names()["found"] == "base"
    assert server.unload("found").status_code == 200


def blend_is_right(server: Server, model: str, *parts: tuple[Path, float]) -> None:
    """The server's answer to `model` is that of the own bank's blend."""
    tokens = server.complete(model, cases.prompt(6))
    verdict = cases.judged_by_bank([cases.Generated(parts, cases.prompt(6), tokens)])
    assert (model, verdict.wrong) == (model, 0)


def test_blends_and_strengths_are_models_of_their_own(server: Server, tmp_path: Path) -> None:
    """Of adapters that are loaded or in the folder; what is made of an adapter follows it when it is replaced."""
    gentle = server.folder / "gentle"
    legal, newer = (
        cases.save_random(tmp_path / n, {"group_size": 32}, seed=7 + len(n), scale=0.2) for n in ("a", "bb")
    )
    assert server.load("legal", legal).status_code == 200
    blend_is_right(server, "base:legal=0.7+gentle=1.3", (legal, 0.7), (gentle, 1.3))
    blend_is_right(server, "legal=-2", (legal, -2.0))
    blend_is_right(server, "base:gentle", (gentle, 1.0))
    assert len({server.complete(model, cases.prompt(6)) for model in ("base", "legal", "legal=-2", "gentle")}) == 4
    assert server.names()["legal=-2"] == "base"
    assert server.load("legal", newer, load_inplace=True).status_code == 200
    blend_is_right(server, "legal=-2", (newer, -2.0))
    assert server.unload("legal").status_code == 200
    with pytest.raises(openai.BadRequestError, match="got a blend of 'legal', which is no adapter that is loaded"):
        server.complete("legal=-2", cases.prompt(6))


def test_blends_that_cannot_be_made_are_the_callers_error_with_the_reason(
    server: Server, kinds: dict[str, Path]
) -> None:
    assert server.load("mirrored", kinds["all-4"]).status_code == 200
    for model, reason in {
        "mirrored=0.5": r"layer model\.layers\.0.*logarithm",
        "mirrored=1+gentle=1": r"layer model\.layers\.0.*group_size",
        "gentle=0.5+broken=0.5": "corrupt or truncated",
        "gentle=high": "wanted names with weights",
        "base:gentle=11": "wanted one from -10 to 10",
    }.items():
        with pytest.raises(openai.BadRequestError, match=reason):
            server.complete(model, cases.prompt(0))
    with pytest.raises(openai.NotFoundError):
        server.complete("gentle=0.5+nowhere=0.5", cases.prompt(0))
    assert server.unload("mirrored").status_code == 200
    assert len(server.complete("base", cases.prompt(0))) == 10


@pytest.mark.parametrize("name", ["nowhere", "..", "../adapters/found", "found/", "found/../found", "/etc", "a\\b"])
def test_names_that_are_not_in_the_folder_are_not_found(server: Server, name: str) -> None:
    with pytest.raises(openai.NotFoundError):
        server.complete(name, cases.prompt(0))


def test_a_broken_adapter_of_the_folder_is_the_callers_error_and_the_server_lives(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="corrupt or truncated"):
        server.complete("broken", cases.prompt(0))
    assert len(server.complete("base", cases.prompt(0))) == 10


@pytest.mark.smoke
def test_bad_adapters_are_refused_with_the_reason_and_the_server_lives(
    server: Server, kinds: dict[str, Path], tmp_path: Path
) -> None:
    foreign = cases.write_adapter(tmp_path / "foreign", "road_1", 64, ("q_proj",), base=cases.deeper_model())
    for path, reason in {
        server.folder / "broken": "corrupt or truncated",
        tmp_path / "nowhere": "no such file",
        foreign: "model.layers.2.self_attn.q_proj (not in the model)",
    }.items():
        refused = server.load("bad", path)
        assert refused.status_code == 400
        assert reason in refused.json()["error"]["message"]
    assert server.load("good", kinds["all-1"]).status_code == 200
    before = server.complete("good", cases.prompt(2))
    assert server.load("good", foreign, load_inplace=True).status_code == 400
    assert server.complete("good", cases.prompt(2)) == before
    assert server.unload("good").status_code == 200
    assert server.load("", kinds["all-1"]).status_code == 400
    assert server.unload("bad").status_code == 404
    assert "bad" not in server.names()
    assert len(server.complete("base", cases.prompt(0))) == 10
    assert server.process.poll() is None


def test_what_was_loaded_in_place_is_not_read_again_for_each_request(
    server: Server, kinds: dict[str, Path], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(kinds["all-1"], place)
    assert server.load("once", place).status_code == 200
    shutil.copytree(kinds["all-4"], place, dirs_exist_ok=True)
    assert server.load("once", place, load_inplace=True).status_code == 200
    loaded = server.complete("once", cases.prompt(3))
    (place / "adapter_model.safetensors").write_bytes(b"half of a file that somebody is writing")
    assert server.complete("once", cases.prompt(3)) == loaded
    assert server.load("once", place, load_inplace=True).status_code == 400
    assert server.complete("once", cases.prompt(3)) == loaded
    assert server.unload("once").status_code == 200


@pytest.mark.smoke
def test_an_adapter_is_replaced_under_load_without_a_mixed_answer(
    server: Server, kinds: dict[str, Path], tmp_path: Path
) -> None:
    """Four clients never stop asking; the files change and are loaded in place; every answer is the old or the new one's."""
    place, versions = tmp_path / "place", [kinds["all-1"], kinds["all-4"], kinds["pairs-2"]]
    shutil.copytree(versions[0], place)
    assert server.load("swap", place).status_code == 200
    stop, answers, asked = threading.Event(), [], cases.prompt(5) * 3

    def client() -> None:
        while not stop.is_set():
            answers.append(server.complete("swap", asked[:100], tokens=20))

    expected = []
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        for version in versions:
            shutil.copytree(version, place, dirs_exist_ok=True)
            assert server.load("swap", place, load_inplace=True).status_code == 200
            expected.append(server.complete("swap", asked[:100], tokens=20))
            time.sleep(0.5)
        stop.set()
        for each in clients:
            each.result()
    whole = [cases.Generated(path, asked[:100], tokens) for path, tokens in zip(versions, expected, strict=True)]
    assert cases.judged(whole).wrong == 0
    assert len(set(expected)) == 3
    assert set(answers) <= set(expected)
    assert len(answers) >= 8
    print(
        f"\nreplaced under load: {len(answers)} answers, {[answers.count(each) for each in expected]} of the versions"
    )


def test_the_log_says_that_the_server_is_for_road_adapters(server: Server) -> None:
    assert "serves RoAd adapters" in server.log.read_text()
