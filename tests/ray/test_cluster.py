"""Two replicas on a Ray of this machine: the API, adapters over all replicas, replacement and loss under load."""

from __future__ import annotations

import pytest
from tests.patience import HANG_S, until

pytest.importorskip("ray", reason="needs Ray, which has an environment of its own: make test-ray")

import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from tests.ray.cluster import Cluster
from tests.ray.expected import PROMPTS, greedy
from tests.ray.load import TOKENS, Answer, Asked, ask, under_load
from tests.serving.http.harness import USER_KEY
from tests.serving.http.openai_client import Served, exercise

REPLICA = "ray::ServeReplica:roadie:replica"


def load(cluster: Cluster, name: str, path: str | None = None, **more: Any) -> httpx2.Response:
    with cluster.http() as http:
        return http.post("/v1/adapters/load", json={"name": name, "path": path, **more})


def adapters(cluster: Cluster) -> dict[str, dict[str, Any]]:
    with cluster.http() as http:
        return {adapter["name"]: adapter for adapter in http.get("/v1/adapters").json()["data"]}


def wrong(answers: list[Answer], right: dict[str, set[str]]) -> list[Answer]:
    """Answers that are none of the right ones; right: for each model and prompt."""
    return [each for each in answers if each.text not in right[f"{each.asked.model}: {each.asked.prompt}"]]


@pytest.mark.smoke
def test_the_official_client_gets_all_it_asks_for(cluster: Cluster) -> None:
    exercise(Served(cluster.url, USER_KEY, "roadie-tiny", ("turtle", "asyncio")))


@pytest.mark.smoke
def test_every_answer_is_that_of_the_adapter_alone(cluster: Cluster, embedded_adapters: Path) -> None:
    models = ("base", "turtle", "asyncio", "topics")
    with under_load(cluster, models, PROMPTS) as running:
        running.wait_for(64)
    right = {
        f"{model}: {prompt}": {greedy(None if model == "base" else embedded_adapters / model, prompt, TOKENS)}
        for model in models
        for prompt in PROMPTS
    }
    assert wrong(running.answers, right) == []
    assert cluster.complete("turtle=1", "The turtle", max_tokens=4) == cluster.complete(
        "turtle", "The turtle", max_tokens=4
    )


@pytest.mark.smoke
def test_both_replicas_answer(cluster: Cluster) -> None:
    with under_load(cluster, ("turtle",), PROMPTS) as running:
        running.wait_for(40)
        with cluster.http() as http:
            until(lambda: http.get("/v1/status").json()["figures"]["running"] > 1)
    assert len(cluster.pids(REPLICA)) == 2


@pytest.mark.smoke
def test_keys_count_on_every_replica_and_metrics_are_of_all(cluster: Cluster) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 1}
    refused = [("not-a-key", "/v1/completions", body, 401), (USER_KEY, "/v1/adapters/pin", {"name": "turtle"}, 403)]
    for key, path, content, wanted in refused:
        with cluster.http(key) as http:
            assert {http.post(path, json=content).status_code for _ in range(8)} == {wanted}
    with cluster.http() as http:
        families = list(text_string_to_metric_families(http.get("/metrics").text))
    ready = next(family for family in families if family.name == "roadie_ready").samples
    assert [sample.value for sample in ready] == [1.0, 1.0]
    assert len({sample.labels["replica"] for sample in ready}) == 2


def test_adapters_are_loaded_pinned_and_unloaded_over_all_replicas(cluster: Cluster, embedded_adapters: Path) -> None:
    wanted = greedy(embedded_adapters / "topics", PROMPTS[0], 8)
    assert load(cluster, "loaded", "topics").json()["state"] == "resident"
    assert {cluster.complete("loaded", PROMPTS[0], max_tokens=8) for _ in range(8)} == {wanted}
    assert load(cluster, "loaded", "turtle").status_code == 400  # it is loaded already
    with cluster.http() as http:
        assert http.post("/v1/adapters/pin", json={"name": "loaded"}).json()["pinned"]
        assert adapters(cluster)["loaded"]["pinned"]
        assert not http.post("/v1/adapters/pin", json={"name": "loaded", "pinned": False}).json()["pinned"]
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "loaded"}).status_code == 200
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "loaded"}).status_code == 404
        body = {"model": "loaded", "prompt": "a", "max_tokens": 1}
        assert {http.post("/v1/completions", json=body).status_code for _ in range(8)} == {404}
    assert "loaded" not in adapters(cluster)


def test_a_folder_that_is_put_there_is_found_by_its_name(cluster: Cluster, embedded_adapters: Path) -> None:
    shutil.copytree(embedded_adapters / "asyncio", cluster.folder / "adapters" / "dropped")
    assert cluster.complete("dropped", PROMPTS[2], max_tokens=8) == greedy(embedded_adapters / "asyncio", PROMPTS[2], 8)


@pytest.mark.parametrize("kind", ["truncated", "pickled", "of another model", "nowhere", "outside", "link"])
def test_a_bad_adapter_is_a_400_and_changes_nothing(cluster: Cluster, embedded_adapters: Path, kind: str) -> None:
    place = cluster.folder / "adapters" / "bad"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(embedded_adapters / "turtle", place)
    weights = place / "adapter_model.safetensors"
    path = "bad"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "pickled":
        weights.rename(place / "adapter_model.bin")
    elif kind == "of another model":
        write_for_another_model(place)
    elif kind == "nowhere":
        path = "not-there"
    elif kind == "outside":
        path = "../../etc"
    else:
        (cluster.folder / "adapters" / "linked").symlink_to(embedded_adapters / "turtle")
        path = "linked"
    answer = load(cluster, "turtle", path, replace=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_unusable"), answer.text
    assert cluster.complete("turtle", PROMPTS[0], max_tokens=8) == greedy(embedded_adapters / "turtle", PROMPTS[0], 8)


def write_for_another_model(place: Path) -> None:
    from roadie import checkpoint
    from roadie.testing import random_adapter, tiny_llama

    shutil.rmtree(place)
    checkpoint.save(random_adapter(tiny_llama(), 0), place)


def test_an_adapter_is_replaced_under_load_and_no_answer_is_mixed(cluster: Cluster, embedded_adapters: Path) -> None:
    """Every answer is wholly the old or the new adapter's; those that were asked for after the call are the new one's."""
    place, versions = cluster.folder / "adapters" / "swap", ["turtle", "topics", "asyncio", "turtle"]
    shutil.copytree(embedded_adapters / versions[0], place)
    assert load(cluster, "swap").status_code == 200
    replaced_s: list[float] = []
    with under_load(cluster, ("swap",), PROMPTS) as running:
        running.wait_for(20)
        for version in versions[1:]:
            shutil.copytree(embedded_adapters / version, place, dirs_exist_ok=True)
            assert load(cluster, "swap", replace=True).status_code == 200
            replaced_s.append(time.monotonic())
            running.wait_for(30)
    right = [
        {f"swap: {prompt}": {greedy(embedded_adapters / version, prompt, TOKENS)} for prompt in PROMPTS}
        for version in versions
    ]
    failed = [answer for answer in running.answers if answer.text is None]
    assert failed == []
    either = {key: set().union(*(each[key] for each in right)) for key in right[0]}
    assert wrong(running.answers, either) == []
    for number, moment_s in enumerate(replaced_s):
        later = replaced_s[number + 1] if number + 1 < len(replaced_s) else float("inf")
        settled = [each for each in running.answers if each.began_s > moment_s and each.ended_s < later - 2]
        assert wrong(settled, right[number + 1]) == []
    print(f"\nreplaced {len(replaced_s)} times under load: {len(running.answers)} answers, none failed or mixed")


LONG = 160


def test_a_replica_that_is_killed_costs_no_request_but_streams_that_had_begun(cluster: Cluster) -> None:
    """Sixteen long requests at once, half of them streams; when all streams have begun, one replica is killed."""
    begun = threading.Semaphore(0)

    def client(number: int) -> Answer:
        asked = Asked(("base", "turtle")[number // 2 % 2], "The turtle", number % 2 == 0)
        with cluster.http() as http:
            return ask(http, asked, LONG, begun.release)

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(client, number) for number in range(16)]
        for _ in range(8):
            assert begun.acquire(timeout=HANG_S)
        os.kill(cluster.pids(REPLICA)[0], signal.SIGKILL)
        answers = [each.result() for each in clients]
    whole = [each for each in answers if not each.asked.is_streamed]
    cut = [each for each in answers if each.text is None]
    assert all(each.text is not None for each in whole), whole
    assert len({(each.asked.model, each.text) for each in answers if each.text is not None}) == 2
    assert 0 < len(cut) < 8, cut  # those of the other replica went on
    assert all(each.asked.is_streamed and each.has_begun and "engine_failed" in each.problem for each in cut), cut
    print(
        f"\na replica killed with 16 requests in flight: {len(whole)} whole ones answered, {len(cut)} of 8 streams cut"
    )


def test_another_replica_takes_the_place_of_one_that_is_killed_and_has_the_newest_adapters(
    cluster: Cluster, embedded_adapters: Path
) -> None:
    until(lambda: num_slots(cluster) == 16)
    assert load(cluster, "kept", "topics").status_code == 200
    shutil.copytree(embedded_adapters / "turtle", cluster.folder / "adapters" / "kept")
    assert load(cluster, "kept", "kept", replace=True).status_code == 200
    models = ("base", "turtle", "kept")
    with under_load(cluster, models, PROMPTS, num_clients=8) as running:
        running.wait_for(24)
        os.kill(cluster.pids(REPLICA)[0], signal.SIGKILL)
        killed_s = time.monotonic()  # what is lost had begun: its first part was sent by who has died by now
        until(lambda: num_slots(cluster) == 8)
        running.wait_for(20)
        until(lambda: num_slots(cluster) == 16)
        running.wait_for(60)
    place = {"base": None, "turtle": embedded_adapters / "turtle", "kept": embedded_adapters / "turtle"}
    right = {f"{model}: {prompt}": {greedy(place[model], prompt, TOKENS)} for model in models for prompt in PROMPTS}
    answered = [each for each in running.answers if each.text is not None]
    assert wrong(answered, right) == []
    for lost in (each for each in running.answers if each.text is None):
        assert lost.asked.is_streamed, lost
        assert lost.has_begun, lost
        assert lost.began_s < killed_s, lost
    num_lost = len(running.answers) - len(answered)
    print(f"\na replica killed under load: {len(answered)} answers, {num_lost} streams cut that had begun")


def num_slots(cluster: Cluster) -> int:
    """Of the replicas that run, eight each."""
    with cluster.http() as http:
        return http.get("/v1/status").json()["figures"]["slots"]


def test_the_directory_may_die_and_comes_back_with_what_was_written(cluster: Cluster, embedded_adapters: Path) -> None:
    assert load(cluster, "lasting", "asyncio").status_code == 200
    with under_load(cluster, ("base", "lasting"), PROMPTS) as running:
        running.wait_for(10)
        os.kill(cluster.pids("ray::ServeReplica:roadie:directory")[0], signal.SIGKILL)
        running.wait_for(20)
        until(lambda: load(cluster, "later", "topics", replace=True).status_code == 200)
        running.wait_for(10)
    place = {"base": None, "lasting": embedded_adapters / "asyncio"}
    right = {f"{model}: {prompt}": {greedy(place[model], prompt, TOKENS)} for model in place for prompt in PROMPTS}
    assert wrong(running.answers, right) == []
    assert cluster.complete("later", PROMPTS[0], max_tokens=8) == greedy(embedded_adapters / "topics", PROMPTS[0], 8)
    assert {"lasting", "later"} <= set(adapters(cluster))
