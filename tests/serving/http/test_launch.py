"""From options to a server: what is refused before a model is loaded, and which folders and names there are."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from roadie import embedded
from roadie.cli.app import app
from roadie.errors import ConfigError
from roadie.serving.http.launch import Endpoint, Folders, Launch, open_registry, run
from roadie.serving.http.naming import ModelNames, parse_wish
from roadie.serving.http.server import bind
from roadie.serving.http.settings import HttpSettings
from roadie.serving.places import recorded_bases


def no_model() -> tuple[Any, Any]:
    raise AssertionError("a model was loaded before the options were looked at")


def test_other_machines_need_keys_or_a_word() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="--api-keys"):
            Endpoint(host)
        assert Endpoint(host, is_anonymous=True).host == host
    for host in ("127.0.0.1", "::1", "localhost"):
        assert Endpoint(host).is_loopback


def test_a_port_that_is_taken_and_keys_that_are_none_are_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="wanted an address that is free"):
            run(Launch(Endpoint(port=taken.getsockname()[1])), no_model, is_embedded=True)
    with pytest.raises(ConfigError, match="API keys"):
        run(Launch(Endpoint(keys_file=tmp_path / "nothing", port=0)), no_model, is_embedded=True)
    with pytest.raises(ConfigError, match="folder"):
        run(Launch(Endpoint(port=0), Folders(tmp_path / "nothing")), no_model, is_embedded=True)
    for port in (-1, 65536):
        with pytest.raises(ConfigError, match="wanted an address"):
            bind("127.0.0.1", port)


def test_small_answers_are_sent_at_once() -> None:
    """asyncio sets TCP_NODELAY where a socket says that it is TCP; without it a kept connection waits 40 ms for each answer."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def look(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        bound = bind("127.0.0.1", 0)
        async with await asyncio.start_server(look, sock=bound):
            with socket.create_connection(bound.getsockname()):
                return await found

    assert asyncio.run(accepted())


def test_the_verb_says_what_is_wrong() -> None:
    invoke = CliRunner().invoke
    for options, words in (
        (["--host", "0.0.0.0"], "--api-keys"),
        (["--port", "70000"], "wanted an address"),
        (["--slots", "0"], "num_slots"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--adapters", "/nowhere"], "folder"),
        (["--train"], "--train-state"),
        (["--train-state", "/nowhere"], "--train with it"),
    ):
        done = invoke(app, ["serve", "--port", "0", *options])
        assert done.exit_code == 2, done.output
        assert words in done.output


def test_without_what_a_server_needs_the_verb_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else found(name))
    done = CliRunner().invoke(app, ["serve"])
    assert done.exit_code == 2
    assert 'got no fastapi; wanted what a server needs; run: pip install "roadie[serve]"' in done.output


def test_the_embedded_model_has_adapters_and_its_package_is_left_as_it_is(tmp_path: Path) -> None:
    before = sorted(embedded.adapters_path().rglob("*"))
    with open_registry(Launch(), is_embedded=True) as registry:
        assert registry.names() == ("asyncio", "topics", "turtle")
        registry.pin("turtle", True)
        for name in registry.names():
            assert len(registry.read(name).adapter.layers) == 28
    assert sorted(embedded.adapters_path().rglob("*")) == before
    with open_registry(Launch(), is_embedded=False) as registry:
        assert registry.names() == ()
    launch = Launch(folders=Folders(embedded.adapters_path(), state_file=tmp_path / "state.json"))
    with open_registry(launch, is_embedded=False) as registry:
        registry.pin("turtle", True)
    assert (tmp_path / "state.json").exists()


def test_adapters_that_ship_name_their_base_in_a_way_that_is_true_everywhere() -> None:
    bases = recorded_bases(embedded.adapters_path())
    assert len(bases) == 3
    assert {embedded.name_here(base) for base in bases} == {str(embedded.model_path())}


def test_bases_are_read_from_what_can_be_read(tmp_path: Path) -> None:
    for name in ("good", "rubbish", "silent"):
        shutil.copytree(embedded.adapters_path() / "turtle", tmp_path / name)
    (tmp_path / "rubbish" / "adapter_config.json").write_text("{")
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    (tmp_path / "silent" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert recorded_bases(tmp_path) == ["roadie/embedded/model"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_choices": 129},
        {"drain_timeout_s": 0},
        {"model_name": ""},
        {"model_aliases": ("a\nb",)},
        {"allowed_origins": ("example.org",)},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        HttpSettings(**wrong)


def test_names_of_models() -> None:
    assert parse_wish("a") == "a"
    assert parse_wish("a=1+2b=3") == {
        "a": 1.0,
        "2b": 3.0,
    }  # a name may begin with a digit, and a weight have an exponent
    assert parse_wish("a=1e+1+e1=2") == {"a": 10.0, "e1": 2.0}
    assert parse_wish("a=-.5") == {"a": -0.5}
    names = ModelNames(("org/m:1", "base"))
    assert [names._without_base(model) for model in ("org/m:1", "base", "base:a=1", "org/m:1:a", "a")] == [
        None,
        None,
        "a=1",
        "a",
        "a",
    ]
