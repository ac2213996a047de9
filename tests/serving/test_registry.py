"""The registry: what it knows survives, and what it is pointed at cannot hurt it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.errors import CheckpointError, ConfigError, StateNotWritten, UnknownAdapter, UnsafeCheckpointError
from roadie.serving import Registry
from roadie.serving.registry import STATE_NAME, Entry, content_hash


def small(value: float = 0.5, path: str = "layer") -> Adapter:
    theta = torch.full((4,), value)
    return Adapter({path: LayerParameters(theta, theta + 1, "road_1", 8)}, {"variant": "road_1", "group_size": 8})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    checkpoint.save(small(), root / "good")
    checkpoint.save(small(0.7), tmp_path / "secret")
    return root


def test_names_are_the_folders_and_what_was_loaded(folder: Path, tmp_path: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "a file").write_text("")
    (folder / "not.a.name").mkdir()
    (folder / "not.a.name" / "adapter_config.json").write_text("{}")
    registry = Registry.open(folder, allowed_roots=[tmp_path])
    assert registry.names() == ("good",)
    registry.remember("secret", Entry(str(tmp_path / "secret")))
    assert registry.names() == ("good", "secret")
    assert registry.read("secret").content_hash == content_hash(small(0.7)) != registry.read("good").content_hash
    for name in ("", "..", "/etc", "good/../good", "x" * 500, "a\0b", ".roadie-serving"):
        assert name not in registry
        with pytest.raises(UnknownAdapter):
            registry.read(name)


@pytest.mark.parametrize("path", ["../secret", "good/../../secret", "/etc", ".", "", "a\0b", "x" * 5000, "/"])
def test_paths_do_not_leave_the_allowed_folders(folder: Path, path: str) -> None:
    with pytest.raises(CheckpointError):
        Registry.open(folder).allowed_path(path)


def test_an_absolute_path_is_fine_where_it_is_allowed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not within"):
        Registry.open(folder).allowed_path(tmp_path / "secret")
    allowed = Registry.open(folder, allowed_roots=[tmp_path]).allowed_path(tmp_path / "secret")
    assert allowed == tmp_path / "secret"


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "linked").symlink_to(tmp_path / "secret")
    (folder / "inside").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "inside" / name).symlink_to(tmp_path / "secret" / name)
    (folder / "deep").symlink_to(tmp_path)
    registry = Registry.open(folder)
    assert registry.names() == ("good",)
    for path in ("linked", "inside", "deep/secret"):
        with pytest.raises(CheckpointError, match=r"link|Not a directory"):
            registry.read_folder(registry.allowed_path(path))


def test_the_root_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    assert Registry.open(tmp_path / "alias").read("good").path == str(folder / "good")


def test_sizes_are_limited_before_reading(folder: Path) -> None:
    registry = Registry.open(folder, max_adapter_bytes=100)
    with pytest.raises(CheckpointError, match="at most 100"):
        registry.read("good")
    with (folder / "good" / "adapter_config.json").open("ab") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="1073741824 bytes"):
        Registry.open(folder).read("good")


def test_pickles_devices_and_pipes_are_refused(folder: Path) -> None:
    (folder / "good" / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "good" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Registry.open(folder).read("good")
    (folder / "good" / "adapter_model.safetensors").unlink()
    (folder / "good" / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsafeCheckpointError, match=r"good.*adapter_model\.bin"):
        Registry.open(folder).read("good")


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_truncated_weights_are_refused_with_their_own_path(folder: Path, size: int) -> None:
    file = folder / "good" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=str(file)):
        Registry.open(folder).read("good")


def test_a_file_that_shrinks_while_it_is_read_is_refused(folder: Path, monkeypatch: Any) -> None:
    file, real = folder / "good" / "adapter_model.safetensors", os.fstat

    def shrinking(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        os.truncate(file, 20)
        return status

    monkeypatch.setattr("roadie.serving.registry.os.fstat", shrinking)
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        Registry.open(folder).read("good")


def test_nothing_stays_open_and_no_copy_stays_behind(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    registry, before = Registry.open(folder), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        registry.read("good")
        with pytest.raises(CheckpointError):
            registry.read_folder(folder / "nothing")
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(scratch.iterdir()) == []


def test_what_was_said_is_remembered(folder: Path) -> None:
    registry = Registry.open(folder)
    registry.pin("good", True)
    assert Registry.open(folder).entries == {"good": Entry(None, True, False)}
    registry.forget("good")
    again = Registry.open(folder)
    assert "good" not in again
    assert again.names() == ()
    again.remember("good", Entry())
    assert Registry.open(folder).names() == ("good",)
    assert Registry.open(folder).entries == {}


@pytest.mark.parametrize("step", ["roadie.serving.registry.os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_changes_nothing(folder: Path, monkeypatch: Any, step: str) -> None:
    registry = Registry.open(folder)
    registry.pin("good", True)
    before = (folder / STATE_NAME).read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(CheckpointError, match="No space left"):
        registry.pin("good", False)
    assert registry.entries["good"].is_pinned
    assert (folder / STATE_NAME).read_bytes() == before
    assert [file.name for file in folder.iterdir() if file.is_file()] == [STATE_NAME]


BAD_ENTRIES = [{"../x": {}}, {"x": 3}, {"x": {"path": 5}}, {"x": {"new": 1}}, {"x": {"is_pinned": 2}}]
BAD_STATES = ["", "{", "[]", '{"format": 2, "adapters": {}}']


@pytest.mark.parametrize("text", BAD_STATES + [json.dumps({"format": 1, "adapters": bad}) for bad in BAD_ENTRIES])
def test_a_state_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / STATE_NAME).write_text(text)
    with pytest.raises(ConfigError, match=STATE_NAME):
        Registry.open(folder)


def test_hashes_tell_adapters_apart() -> None:
    kinds = [small(), small(0.6), small(path="other")]
    kinds.append(Adapter({"layer": LayerParameters(torch.full((4,), 0.5), torch.full((4,), 1.5), "road_1", 4)}, {}))
    kinds.append(Adapter({"layer": LayerParameters(torch.full((4,), 0.5), torch.full((4,), 1.5), "road_2", 4)}, {}))
    assert len({content_hash(kind) for kind in kinds}) == len(kinds)
    assert content_hash(small()) == content_hash(small())


def test_no_room_for_the_private_copy_is_the_servers_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry.open(folder)

    def no_room(stream: object, target: object, num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("roadie.serving.registry._pour", no_room)
    with pytest.raises(StateNotWritten, match="No space left"):
        registry.read("good")
