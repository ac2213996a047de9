"""Names of adapters with signs that mean something elsewhere: an exact name goes first, and blends reach the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.harness import ADMIN_KEY, KEYS, LEGAL_KEY, USER_KEY, Running, running

from roadie.serving.http.settings import HttpSettings
from roadie.serving.places import LeftOut

NAMES = (
    "legal",
    "v1.2",
    "team/legal",
    "a@b",
    "org:tag",
    "two words",
    "l\u00e9gal",
    "c++",
    "legal=1.5",
    "base:x",
    "base",
    "x=1+y",
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    left_out = (LeftOut("/srv/adapters/<b>", "a reason"),)
    with running(FakeEngine(adapter_names=NAMES, folders_left_out=left_out), keys=KEYS) as found:
        yield found


def ask(server: Running, model: str, key: str = USER_KEY, **fields: Any) -> Any:
    body = {"model": model, "prompt": "a", "max_tokens": 1, **fields}
    return server.http(key).post("/v1/completions", json=body)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "base"])
def test_an_exact_name_goes_first(server: Running, name: str) -> None:
    assert ask(server, name).json()["choices"][0]["text"] == f" {name}"
    assert ask(server, f"base:{name}").json()["choices"][0]["text"] == f" {name}"
    assert ask(server, "base", adapters={name: 0.5}).json()["choices"][0]["text"] == f" {name}*0.5"
    listed = server.http(USER_KEY).get("/v1/models").json()["data"]
    assert name in [model["id"] for model in listed]
    for path in (name, quote(name, safe="")):
        assert server.http(USER_KEY).get(f"/v1/models/{path}").json()["id"] == name


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("legal=2", "legal*2"),
        ("v1.2=0.5", "v1.2*0.5"),
        ("team/legal=0.7+two words=0.3", "team/legal*0.7+two words*0.3"),
        ("c++=0.5+a@b=1", "c++*0.5+a@b*1"),
        ("base:org:tag=0.5", "org:tag*0.5"),
        ("legal=1.5=0.5", "legal=1.5*0.5"),
        ("l\u00e9gal=-1", "l\u00e9gal*-1"),
        ("base:base:x=2", "base:x*2"),
    ],
)
def test_names_in_blends_end_where_a_weight_follows(server: Running, model: str, wanted: str) -> None:
    assert ask(server, model).json()["choices"][0]["text"] == f" {wanted}"


def test_a_key_reads_a_name_that_it_may_not_use_as_if_it_were_not_there(server: Running) -> None:
    assert ask(server, "legal=1.5", LEGAL_KEY).json()["choices"][0]["text"] == " legal*1.5"
    assert ask(server, "team/legal", LEGAL_KEY).status_code == 404


def test_the_name_of_the_base_model_is_its_own_and_this_is_said(server: Running) -> None:
    assert ask(server, "base").json()["choices"][0]["text"] == " base"
    listed = server.http(ADMIN_KEY).get("/v1/adapters").json()
    assert "base" not in [adapter["name"] for adapter in listed["data"]]
    assert listed["left_out"] == [
        {"path": "/srv/adapters/<b>", "reason": "a reason"},
        {"path": "/srv/adapters/base", "reason": "the base model has its name"},
    ]
    assert server.http(USER_KEY).get("/v1/adapters").json()["left_out"] == []


def test_a_base_model_of_a_repository_is_found_by_its_whole_name() -> None:
    with running(settings=HttpSettings(model_name="org/llama:7b")) as server:
        assert server.http().get("/v1/models/org/llama:7b").json()["id"] == "org/llama:7b"
        assert server.openai().models.retrieve("org/llama:7b").id == "org/llama:7b"


@pytest.mark.parametrize("name", ["v1.2", "team/legal", "two words", "l\u00e9gal"])
def test_operators_have_the_same_names(name: str) -> None:
    with running(FakeEngine(adapter_names=()), keys=KEYS) as server:
        http = server.http(ADMIN_KEY)
        assert http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "x"}).json()["name"] == name
        assert http.post("/v1/adapters/pin", json={"name": name}).json()["pinned"]
        assert http.post("/v1/adapters/unload", json={"name": name}).status_code == 200
        assert ask(server, name).status_code == 404
        refused = http.post("/v1/adapters/load", json={"name": "team/../legal"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "name")
