"""API keys: what a file of them may say, what `roadie api-key` writes, and a server that reads it again."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml
from tests.serving.http.harness import ADMIN_KEY, KEYS, USER_KEY, running
from typer.testing import CliRunner

from roadie.cli.app import app
from roadie.errors import ConfigError, StateNotWritten
from roadie.serving.http import keys
from roadie.serving.http.keys import Caller, add_to_file, entry_of, hash_key, make_key, read_keys

HASH = "a" * 64


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    key = make_key()
    add_to_file(file, entry_of("alice", key, ["legal"], is_admin=False))
    add_to_file(file, entry_of("operator", ADMIN_KEY, None, is_admin=True))
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = read_keys(file)
    assert found.caller(key) == Caller("alice", ("legal",))
    assert found.caller(ADMIN_KEY) == Caller("operator", None, is_admin=True)
    assert found.caller(key[:-1]) is found.caller("") is found.caller(hash_key(key)) is None


def test_every_entry_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda got, wanted: compared.append(wanted) or got == wanted)
    for key in (ADMIN_KEY, USER_KEY, "wrong"):
        compared.clear()
        KEYS.caller(key)
        assert compared == [wanted for wanted, _ in KEYS.entries]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "wanted one word, keys"),
        ("- name: a", "wanted one word, keys"),
        ("keys: []", "got no keys"),
        ("keys: [{name: a}]", "wanted name and sha256"),
        (f"keys: [{{name: a, sha256: {HASH}, role: x}}]", "wanted name and sha256"),
        (f"keys: [{{name: 'a b', sha256: {HASH}}}]", "got name 'a b'"),
        ("keys: [{name: a, sha256: my-own-key}]", "the key itself does not belong here"),
        (f"keys: [{{name: a, sha256: {HASH}, admin: 1}}]", "wanted true or false"),
        (f"keys: [{{name: a, sha256: {HASH}, adapters: legal}}]", "wanted a list of names"),
        (f"keys: [{{name: a, sha256: {HASH}}}, {{name: a, sha256: {'b' * 64}}}]", "a name twice"),
        (f"keys: [{{name: a, sha256: {HASH}}}, {{name: b, sha256: {HASH}}}]", "a sha256 twice"),
        ("keys: [", "got no YAML in line 1"),
        ("keys: !!python/object/apply:os.system [true]", "got no YAML"),
    ],
)
def test_files_that_are_no_keys_are_refused_with_the_reason(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem) as refused:
        read_keys(file)
    assert str(file) in str(refused.value)
    assert "my-own-key" not in str(refused.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="roadie api-key"):
        read_keys(tmp_path / "nothing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00keys")
    with pytest.raises(ConfigError, match="binary"):
        read_keys(tmp_path / "binary")


@pytest.mark.parametrize("key", ["short", "x" * 31, "x" * 513, "ä" * 40, "with space " * 5, "x" * 40 + "\n"])
def test_keys_that_could_be_guessed_or_sent_by_no_header_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="wanted 32 to 512"):
        entry_of("a", key, None, is_admin=False)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.yaml"
    add_to_file(file, entry_of("a", make_key(), None, is_admin=False))
    before = file.read_bytes()

    def no_room(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keys.os, "fsync", no_room)
    with pytest.raises(StateNotWritten, match="No space left"):
        add_to_file(file, entry_of("b", make_key(), None, is_admin=False))
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]


def test_the_verb_prints_a_key_once_and_keeps_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    run = CliRunner()
    made = run.invoke(app, ["api-key", "alice", "--file", str(file), "--adapter", "legal", "--adapter", "team-*"])
    assert made.exit_code == 0
    caller = read_keys(file).caller(made.output.strip())
    assert caller == Caller("alice", ("legal", "team-*"))
    again = run.invoke(app, ["api-key", "alice", "--file", str(file)])
    assert (again.exit_code, "has a key" in again.output) == (2, True)
    base = run.invoke(app, ["api-key", "bob", "--file", str(file), "--base-only"])
    assert read_keys(file).caller(base.output.strip()) == Caller("bob", ())
    own = run.invoke(app, ["api-key", "carol", "--stdin"], input=USER_KEY + "\n")
    assert yaml.safe_load(own.output) == [{"name": "carol", "sha256": hash_key(USER_KEY)}]
    assert run.invoke(app, ["api-key", "dave", "--base-only", "--adapter", "x"]).exit_code == 2


def test_keys_are_read_again_and_stay_where_they_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.yaml"
    add_to_file(file, entry_of("alice", USER_KEY, None, is_admin=False))
    with running(keys=read_keys(file)) as server:
        server.server._read_keys_again = lambda: read_keys(file)
        assert server.http(USER_KEY).get("/v1/models").status_code == 200
        file.write_text("rubbish")
        server.server.renew_keys()
        assert server.http(USER_KEY).get("/v1/models").status_code == 200
        assert "stay as they were" in caplog.text
        file.unlink()
        add_to_file(file, entry_of("operator", ADMIN_KEY, None, is_admin=True))
        server.server.renew_keys()
        assert server.http(USER_KEY).get("/v1/models").status_code == 401
        assert server.http(ADMIN_KEY).get("/v1/models").status_code == 200


def test_a_key_may_begin_as_a_client_wants_it(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    done = CliRunner().invoke(app, ["api-key", "alice", "--prefix", "tml-", "--file", str(file)])
    key = done.stdout.strip()
    assert key.startswith("tml-")
    assert read_keys(file).caller(key) == Caller("alice")


def test_a_key_may_come_in_a_header_of_its_own() -> None:
    with running(keys=KEYS) as server:
        http = server.http()
        assert http.get("/v1/models", headers={"x-api-key": USER_KEY}).status_code == 200
        for headers in (
            {"x-api-key": "wrong"},
            {"x-api-key": USER_KEY, "authorization": "Bearer wrong"},
            {"x-api-key": ""},
        ):
            assert http.get("/v1/models", headers=headers).status_code == 401
