"""`roadie bench-serve`: who is asked for how often, how each fared, and guidellm, where it is installed, against an engine."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.harness import KEYS, LEGAL_KEY, free_port, running
from typer.testing import CliRunner

from roadie.cli.app import app
from roadie.errors import ConfigError, ServingError
from roadie.traffic import Popularity, Traffic, by_model, models_of

MODELS = tuple(f"m{number}" for number in range(10))
PROMPTS = [f"prompt {number}" for number in range(2000)]


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_the_kth_model_is_asked_for_by_zipfs_law(skew: float) -> None:
    counts = Counter(map(Popularity(MODELS, skew).of, PROMPTS))
    weights = [rank**-skew for rank in range(1, 11)]
    for name, weight in zip(MODELS, weights, strict=True):
        share = weight / sum(weights)
        assert abs(counts[name] - 2000 * share) < 5 * math.sqrt(2000 * share * (1 - share))  # five standard deviations


def test_a_prompt_is_always_of_one_model_and_seeds_give_other_ones() -> None:
    once, again, other = (list(map(Popularity(MODELS, 0.0, seed).of, PROMPTS)) for seed in (0, 0, 1))
    assert once == again
    assert sum(one == two for one, two in zip(once, other, strict=True)) < 400  # of 200 that are expected


@pytest.mark.parametrize("wrong", [{"models": ()}, {"skew": -1.0}, {"skew": math.nan}])
def test_popularities_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        Popularity(**{"models": ("a",), **wrong})


@pytest.mark.parametrize(
    "wrong", [{"num_requests": 0}, {"max_tokens": 0}, {"rate_per_s": 0.0}, {"rate_per_s": math.inf}]
)
def test_traffic_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        Traffic("http://127.0.0.1:1", Popularity(("a",)), **wrong)


def test_a_scenario_has_what_is_asked_for() -> None:
    traffic = Traffic("http://x", Popularity(("a", "b")), "key", 7, 2.5, 3, prompt_words=5, max_tokens=6)
    found = traffic.scenario("kind")
    assert found["profile"] == {"kind": "poisson", "rate": 2.5, "max_concurrency": 3}
    assert found["constraints"] == [{"kind": "max_requests", "count": 7}]
    rows = found["data"][0]["data"]
    assert ([len(prompt.split()) for prompt in rows["prompt"]], rows["output_tokens_count"]) == ([5] * 7, [6] * 7)
    assert (found["backend"]["models"], found["backend"]["api_key"]) == (["a", "b"], "key")
    assert Traffic("http://x", Popularity(("a",)), concurrency=9).scenario("kind")["profile"]["streams"] == 9
    left = traffic.scenario("kind", ["--profile", "kind=sweep", "--constraint=kind=max_duration,seconds=5"])
    assert set(left) == {"backend", "data", "seed"}


def answered(model: str, first_ms: float, between_ms: float | None = 5.0) -> dict[str, Any]:
    arguments = json.dumps({"body": {"model": model}})
    times = {
        "time_to_first_token_ms": first_ms,
        "inter_token_latency_ms": between_ms,
        "request_latency": first_ms / 500,
    }
    return {"request_args": arguments, "output_tokens": 2, **times}


def report(*requests: dict[str, Any], failed: int = 0) -> dict[str, Any]:
    strategy = {"type_": "poisson", "rate": 4.0}
    asked = {"successful": list(requests), "errored": [{}] * failed, "incomplete": []}
    return {"benchmarks": [{"config": {"strategy": strategy}, "requests": asked}]}


def test_each_model_has_its_own_times_and_those_asked_for_most_come_first() -> None:
    times = [answered("b", float(ms)) for ms in range(100, 0, -1)]
    (found,) = by_model(report(answered("a", 7.0, None), *times, failed=3))
    assert [*found.models] == ["b", "a"]
    b = found.models["b"]
    assert (b.requests, b.tokens, b.first_token_ms, b.first_token_p99_ms, b.whole_ms) == (100, 200, 50.0, 99.0, 100.0)
    assert (found.title, found.failed) == ("poisson 4.0", 3)
    assert found.as_json()["models"]["a"]["between_tokens_ms"] is None
    assert "2 models" in found.text()


def test_fairness_is_one_where_all_wait_alike_and_falls_where_one_waits() -> None:
    def fairness(*means: float) -> float:
        return by_model(report(*(answered(f"m{place}", mean) for place, mean in enumerate(means))))[0].fairness

    assert fairness(5.0, 5.0, 5.0) == pytest.approx(1.0)
    assert fairness(1.0, 1.0, 4.0) == pytest.approx(36 / (3 * 18))
    assert fairness(*[1e-9] * 3, 1.0) == pytest.approx(1 / 4)


def test_a_long_table_is_cut() -> None:
    (found,) = by_model(report(*(answered(f"m{place}", 1.0) for place in range(30))))
    assert found.text().splitlines()[-1] == "and 18 more"
    assert len(found.as_json()["models"]) == 30


def test_the_models_of_a_server_are_its_adapters() -> None:
    with running(FakeEngine(), keys=KEYS) as server:
        assert models_of(f"{server.url}/v1/", LEGAL_KEY) == ("legal",)
        with pytest.raises(ServingError, match="status 401"):
            models_of(server.url)
    with pytest.raises(ServingError, match="got no answer"):
        models_of(f"http://127.0.0.1:{free_port()}")


@pytest.mark.skipif(importlib.util.find_spec("guidellm") is not None, reason="guidellm is installed")
def test_without_guidellm_the_verb_says_what_to_install() -> None:
    with running(FakeEngine()) as server:
        done = CliRunner().invoke(app, ["bench-serve", server.url])
    assert (done.exit_code, "roadie[measure]" in done.stderr) == (2, True)


@pytest.mark.slow
def test_guidellm_asks_for_many_adapters_and_its_own_options_go_first(tmp_path: Path) -> None:
    pytest.importorskip("guidellm")
    key, told = tmp_path / "key", tmp_path / "told.json"
    key.write_text(LEGAL_KEY + "\n")
    options = ["-n", "12", "-c", "2", "--tokens", "5", "--key-file", str(key), "--json", str(told)]
    with running(FakeEngine(step_s=0.002), keys=KEYS) as server:
        done = CliRunner().invoke(app, ["bench-serve", server.url, *options])
        assert done.exit_code == 0, done.output
        (found,) = json.loads(told.read_text())
        assert (found["title"], found["models"]["legal"]["requests"], found["models"]["legal"]["tokens"]) == (
            "concurrent 2",
            12,
            60,
        )
    with running(FakeEngine(step_s=0.002, broken=("terse",))) as server:
        profile = ["--", "--profile", "kind=synchronous", "--disable-console"]
        done = CliRunner().invoke(
            app, ["bench-serve", server.url, "--skew", "0", "--json", str(told), *options[:6], *profile]
        )
        (found,) = json.loads(told.read_text())
    asked = {name: each["requests"] for name, each in found["models"].items()}
    assert set(asked) <= {"legal", "pirate"}
    assert (done.exit_code, found["failed"] + sum(asked.values()), found["title"]) == (1, 12, "synchronous 1")
    assert 0 < found["failed"] < 12
