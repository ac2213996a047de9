"""Answers of many replicas as one."""

from __future__ import annotations

import json
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from roadie.ray.messages import Answer, adapters, metrics, status


def answer(replica: str, body: bytes | dict[str, Any]) -> Answer:
    return Answer(replica, 200, (), body if isinstance(body, bytes) else json.dumps(body).encode())


def adapter(name: str, state: str, count: int, **more: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("running", "queued", "requests", "tokens"), count)
    return {"name": name, "state": state, "slot": 3, "error": None, **counts, **more}


def test_an_adapter_is_resident_where_it_is_so_in_one_and_counts_are_summed() -> None:
    one = {"object": "list", "data": [adapter("b", "known", 1), adapter("a", "known", 0)], "left_out": []}
    two = {"object": "list", "data": [adapter("b", "resident", 2, error="bad")], "left_out": []}
    found = json.loads(adapters([answer("1", one), answer("2", two)]))
    assert found == {
        "object": "list",
        "data": [adapter("a", "known", 0, slot=None), adapter("b", "resident", 3, slot=None, error="bad")],
        "left_out": [],
    }


def test_figures_are_summed_and_one_replica_that_is_ready_is_enough() -> None:
    parts = [
        {"ready": ready, "model": "m", "figures": {"slots": 8, "uptime_s": uptime_s}, "adapters": []}
        for ready, uptime_s in ((False, 3.0), (True, 5.0))
    ]
    found = json.loads(status([answer(str(number), part) for number, part in enumerate(parts)]))
    assert found == {"ready": True, "model": "m", "figures": {"slots": 16, "uptime_s": 5.0}, "adapters": []}


def test_samples_say_whose_they_are_and_each_family_is_in_one_piece() -> None:
    answers = []
    for number in (1, 2):
        registry = CollectorRegistry()
        Gauge("free", "Blocks: free", registry=registry).set(number)
        Counter("asked", "Requests", ["adapter"], registry=registry).labels("a b{c").inc(10 * number)
        answers.append(answer(f"r{number}", generate_latest(registry)))
    families = {family.name: family for family in text_string_to_metric_families(metrics(answers).decode())}
    assert (families["free"].documentation, families["free"].type) == ("Blocks: free", "gauge")
    assert [(dict(each.labels), each.value) for each in families["free"].samples] == [
        ({"replica": "r1"}, 1.0),
        ({"replica": "r2"}, 2.0),
    ]
    asked = [each for each in families["asked"].samples if each.name == "asked_total"]
    assert [(dict(each.labels), each.value) for each in asked] == [
        ({"replica": "r1", "adapter": "a b{c"}, 10.0),
        ({"replica": "r2", "adapter": "a b{c"}, 20.0),
    ]
