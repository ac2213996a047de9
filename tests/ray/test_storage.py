"""Shared storage and the catalogue: copies that do not change, hashes that are checked, changes that are whole."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import fsspec
import pytest

from roadie.errors import CheckpointError, ConfigError, StateNotWritten
from roadie.ray.catalogue import Catalogue, Entry, parse
from roadie.ray.storage import OWN_FOLDER, SharedAdapters, digest_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, embedded_adapters: Path) -> str:
    """Three adapters, in a folder or in an object store (fsspec's, in memory)."""
    if request.param == "folder":
        shutil.copytree(embedded_adapters, tmp_path / "adapters")
        return str(tmp_path / "adapters")
    fs = fsspec.filesystem("memory")
    root = f"/{uuid.uuid4().hex}"
    for folder in embedded_adapters.iterdir():
        for name in (CONFIG, WEIGHTS):
            fs.pipe_file(f"{root}/{folder.name}/{name}", (folder / name).read_bytes())
    return f"memory:/{root}"


def write(place: str, path: str, content: bytes) -> None:
    fs, root = fsspec.core.url_to_fs(place)
    fs.pipe_file(f"{root}/{path}", content)


def test_a_version_is_what_was_there_when_it_was_published(place: str, tmp_path: Path, embedded_adapters: Path) -> None:
    shared = SharedAdapters(place)
    assert shared.names() == ("asyncio", "topics", "turtle")
    digest = shared.publish("turtle")
    before = [(embedded_adapters / "turtle" / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    assert digest == digest_of(*before) == shared.publish("turtle")
    write(place, f"turtle/{WEIGHTS}", (embedded_adapters / "topics" / WEIGHTS).read_bytes())
    folder = shared.fetch(digest, tmp_path / "local")
    assert [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)] == before
    assert shared.publish("turtle") != digest
    assert shared.names() == ("asyncio", "topics", "turtle")  # what is ours is no adapter
    assert sorted(path.name for path in (tmp_path / "local").iterdir()) == [digest]


def test_other_bytes_than_those_that_were_published_are_an_error(place: str, tmp_path: Path) -> None:
    shared = SharedAdapters(place)
    digest = shared.publish("turtle")
    write(place, f"{OWN_FOLDER}/versions/{digest}/{WEIGHTS}", b"damaged")
    with pytest.raises(CheckpointError, match="other bytes"):
        shared.fetch(digest, tmp_path / "local")
    assert not (tmp_path / "local").exists()
    with pytest.raises(CheckpointError, match="other bytes"):
        shared.fetch("0" * 64, tmp_path / "local")


@pytest.mark.parametrize(
    "path", ["", "..", "../other", "turtle/..", "/etc", "file:///etc", f"{OWN_FOLDER}/versions", "\0"]
)
def test_adapters_come_from_allowed_places_alone(place: str, path: str) -> None:
    with pytest.raises(CheckpointError):
        SharedAdapters(place).publish(path)


def test_a_link_is_not_followed_and_another_place_may_be_allowed(tmp_path: Path, embedded_adapters: Path) -> None:
    for name in ("adapters", "other"):
        shutil.copytree(embedded_adapters, tmp_path / name)
    (tmp_path / "adapters" / "linked").symlink_to(tmp_path / "other" / "turtle")
    shared = SharedAdapters(str(tmp_path / "adapters"))
    assert not shared.has("linked")
    for path in ("linked", str(tmp_path / "other" / "turtle")):
        with pytest.raises(CheckpointError):
            shared.publish(path)
    allowed = SharedAdapters(str(tmp_path / "adapters"), (str(tmp_path / "other"),))
    assert allowed.publish(str(tmp_path / "other" / "turtle")) == allowed.publish("turtle")


def test_a_bad_adapter_is_not_published(place: str) -> None:
    write(place, f"turtle/{WEIGHTS}", b"rubbish")
    shared = SharedAdapters(place)
    with pytest.raises(CheckpointError, match="turtle"):
        shared.publish("turtle")
    with pytest.raises(CheckpointError, match="nothing"):
        shared.publish("nothing")
    with pytest.raises(CheckpointError, match="more than 1000 bytes"):
        SharedAdapters(place, max_bytes=1000).publish("topics")


def test_a_place_that_is_not_there_and_one_that_cannot_be_written(tmp_path: Path, embedded_adapters: Path) -> None:
    for uri in (str(tmp_path / "nothing"), "nosuch://bucket"):
        with pytest.raises(ConfigError, match="wanted one that exists"):
            SharedAdapters(uri)
    shutil.copytree(embedded_adapters, tmp_path / "adapters")
    (tmp_path / "adapters" / OWN_FOLDER).write_text("a file where a folder is to be")
    shared = SharedAdapters(str(tmp_path / "adapters"))
    with pytest.raises(StateNotWritten):
        shared.publish("turtle")
    with pytest.raises(StateNotWritten):
        shared.write_catalogue(b"{}")


def test_a_catalogue_counts_its_changes_and_comes_back_as_it_was(place: str) -> None:
    shared = SharedAdapters(place)
    assert parse(shared.read_catalogue()) == Catalogue()
    first = Catalogue().changed("turtle", Entry("a", is_loaded=True))
    second = first.changed("topics", Entry("b", source="elsewhere")).changed("turtle", Entry("a", is_hidden=True))
    assert (first.revision, second.revision) == (1, 3)
    assert first.current("turtle") == Entry("a", is_loaded=True)
    assert second.current("turtle") is None
    assert second.current("nobody") is None
    assert second.changed("turtle", None).entries == {"topics": Entry("b", source="elsewhere")}
    shared.write_catalogue(second.as_bytes())
    again = parse(shared.read_catalogue())
    assert again == second


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"format": 1}', b'{"format": 2, "revision": 1, "adapters": {"a": {"x": 1}}}']
)
def test_a_text_that_is_no_catalogue_is_refused(text: bytes) -> None:
    with pytest.raises(ConfigError, match=r"move \.roadie/catalogue\.json away"):
        parse(text)
