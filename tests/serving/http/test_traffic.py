"""`roadie bench-serve`: workloads that are what they say, and times that are right, against an engine whose times are known."""

from __future__ import annotations

import asyncio
import json
import math
import random
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.harness import KEYS, LEGAL_KEY, running
from typer.testing import CliRunner

from roadie.cli.app import app
from roadie.errors import ConfigError, ServingError
from roadie.traffic import Answer, Arrival, Popularity, Target, Workload, drive, models_of, plan, summarise
from roadie.traffic.chart import chart

MODELS = tuple(f"m{number}" for number in range(10))


def asked(popularity: Popularity, count: int = 2000) -> list[str]:
    return [arrival.model for arrival in plan(Workload(MODELS, popularity, count))]


def test_popularity_is_what_it_says() -> None:
    assert set(asked(Popularity.IDENTICAL)) == {"m0"}
    distinct = asked(Popularity.DISTINCT)
    assert all(len(set(distinct[start : start + 10])) == 10 for start in range(0, 2000, 10))
    uniform, zipf = Counter(asked(Popularity.UNIFORM)), Counter(asked(Popularity.ZIPF))
    weights = {Popularity.UNIFORM: [1.0] * 10, Popularity.ZIPF: [1 / rank for rank in range(1, 11)]}
    for counts, each in ((uniform, weights[Popularity.UNIFORM]), (zipf, weights[Popularity.ZIPF])):
        for name, weight in zip(MODELS, each, strict=True):
            share = weight / sum(each)
            assert abs(counts[name] - 2000 * share) < 5 * math.sqrt(
                2000 * share * (1 - share)
            )  # five standard deviations


def test_times_lengths_and_beginnings_are_as_asked_for() -> None:
    workload = Workload(
        ("a",), num_requests=2000, rate_per_s=50, prompt_words=20, shared_words=5, max_tokens=100, spread=0.5
    )
    arrivals = plan(workload)
    assert arrivals == plan(workload)
    times = [arrival.at_s for arrival in arrivals]
    assert times == sorted(times)
    assert abs(times[-1] - 2000 / 50) < 5 * math.sqrt(2000) / 50  # a sum of exponential gaps
    assert len({tuple(arrival.prompt.split()[:5]) for arrival in arrivals}) == 1
    assert len({tuple(arrival.prompt.split()[5:9]) for arrival in arrivals}) > 1900
    assert {min(lengths := [len(a.prompt.split()) for a in arrivals]), max(lengths)} == {10, 30}
    assert {min(tokens := [a.max_tokens for a in arrivals]), max(tokens)} == {50, 150}


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": ()},
        {"num_requests": 0},
        {"rate_per_s": 0.0},
        {"rate_per_s": math.inf},
        {"spread": 1.0},
        {"shared_words": 33},
    ],
)
def test_workloads_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        Workload(**{"models": ("a",), **wrong})  # type: ignore[arg-type]


def test_percentiles_are_nearest_ranks() -> None:
    times = [number / 1000 for number in range(1, 101)]
    random.Random(0).shuffle(times)
    arrival = Arrival(0.0, "a", "x", 2)
    summary = summarise([Answer(arrival, 1.0, 1.0, 2.0 + value, (1.0 + value, 1.5 + value), 3, 2) for value in times])
    assert [round(summary.first_token.percentile(percent)) for percent in (50, 90, 99, 100, 0.5)] == [
        50,
        90,
        99,
        100,
        1,
    ]
    assert round(summary.first_token.mean, 6) == 50.5
    assert {round(value) for value in summary.between_tokens.values_ms} == {500}
    assert summary.seconds == pytest.approx(1.1)
    assert summary.tokens_per_s == pytest.approx(200 / 1.1)


def test_times_are_those_of_the_server() -> None:
    """An engine that takes 20 ms a token: no measured time is shorter than it can be, and the order is right."""
    with running(FakeEngine(step_s=0.02)) as server:
        arrivals = plan(Workload(("legal", "terse"), num_requests=8, max_tokens=6, rate_per_s=100))
        answers = asyncio.run(drive(Target(server.url), arrivals))
        summary = summarise(answers)
    assert (summary.num_failed, summary.completion_tokens, summary.num_models) == (0, 48, 2)
    for answer in answers:
        assert answer.due_s <= answer.sent_s <= answer.token_times_s[0] <= answer.end_s
        assert len(answer.token_times_s) == 6
        assert (
            answer.token_times_s[-1] - answer.sent_s > 5 * 0.02
        )  # the first may be read late, where a machine is busy
    assert summary.whole.values_ms[0] > 5 * 20


def test_a_client_that_falls_behind_does_not_make_a_server_look_better() -> None:
    with running(FakeEngine(step_s=0.01)) as server:
        arrivals = [Arrival(0.001, "base", "a", 10)] * 4
        answers = asyncio.run(drive(Target(server.url, max_at_once=1), arrivals))
    waits = sorted(answer.token_times_s[0] - answer.due_s for answer in answers)
    assert waits[-1] > 3 * 0.09  # behind three answers of 10 tokens


def test_failures_are_counted_and_told(tmp_path: Path) -> None:
    with running(FakeEngine(broken=("terse",))) as server:
        answers = asyncio.run(drive(Target(server.url), plan(Workload(("legal", "terse"), Popularity.DISTINCT, 10))))
        summary = summarise(answers)
        assert (summary.num_requests, summary.num_failed) == (10, 5)
        assert "status 400" in summary.errors[0]
        assert asyncio.run(models_of(Target(f"{server.url}/v1/"))) == (("base",), ("legal", "pirate", "terse"))
    with pytest.raises(ServingError, match="got no answer"):
        asyncio.run(models_of(Target(server.url)))


def test_the_picture_is_svg_and_its_title_text() -> None:
    arrival = Arrival(0.0, "a", "x", 2)
    summary = summarise([Answer(arrival, 0.0, 0.0, 1.0 + n, (0.5 + n, 1.0 + n), 3, 2) for n in range(1000)])
    picture = ElementTree.fromstring(chart(summary, "<script>&"))
    space = "{http://www.w3.org/2000/svg}"
    assert [element.tag for element in picture.iter() if element.tag == f"{space}script"] == []
    lines = picture.findall(f"{space}polyline")
    assert len(lines) == 3
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert points == sorted(points, key=lambda point: (point[0], -point[1]))
        assert len(points) <= 402


def test_the_verb_measures_a_server_and_writes_what_it_found(tmp_path: Path) -> None:
    with running(FakeEngine(), keys=KEYS) as server:
        (tmp_path / "key").write_text(LEGAL_KEY + "\n")
        places = [
            "--key-file",
            str(tmp_path / "key"),
            "--json",
            str(tmp_path / "out.json"),
            "--plot",
            str(tmp_path / "out.svg"),
        ]
        options = ["--requests", "12", "--tokens", "5", "--popularity", "zipf", *places]
        done = CliRunner().invoke(app, ["bench-serve", server.url, *options])
        assert done.exit_code == 0, done.output
        assert "12 requests of 1 models" in done.output
        lines = [line for line in done.stderr.splitlines() if line.startswith("answered ")]
        assert [line.split()[1] for line in lines] == [f"{number}/12" for number in range(1, 13)]
        found = json.loads((tmp_path / "out.json").read_text())
        assert (found["completion_tokens"], found["time_to_first_token_ms"]["count"]) == (60, 12)
        assert ElementTree.parse(tmp_path / "out.svg")
        failed = CliRunner().invoke(app, ["bench-serve", server.url, "--model", "terse", *options])
        assert (failed.exit_code, "12 failed" in failed.output) == (1, True)
        ElementTree.parse(tmp_path / "out.svg")
