"""The registry: what it knows survives, and what it is pointed at cannot hurt it."""

from __future__ import annotations

import errno
import json
import os
import re
import unicodedata
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
    (folder / "<no name>").mkdir()
    (folder / "<no name>" / "adapter_config.json").write_text("{}")
    registry = Registry.open(folder, allowed_roots=[tmp_path])
    assert registry.names() == ("good",)
    registry.remember("secret", Entry(str(tmp_path / "secret")))
    assert registry.names() == ("good", "secret")
    assert registry.read("secret").content_hash == content_hash(small(0.7)) != registry.read("good").content_hash
    for name in ("", "..", "/etc", "good/../good", "x" * 500, "a\0b", ".roadie-serving"):
        assert name not in registry
        with pytest.raises(UnknownAdapter):
            registry.read(name)


def test_adapters_that_are_lent_come_and_go_with_their_places_and_can_be_unloaded(folder: Path, tmp_path: Path) -> None:
    registry = Registry.open(folder, allowed_roots=[tmp_path / "secret"])
    places: dict[str, Path] = {}
    registry.lend(places)
    assert registry.names() == ("good",)
    checkpoint.save(small(0.9), tmp_path / "secret" / "inner")
    places["ft:a:b"] = tmp_path / "secret" / "inner"
    assert (registry.names(), "ft:a:b" in registry) == (("ft:a:b", "good"), True)
    assert registry.read("ft:a:b").content_hash == content_hash(small(0.9))
    assert not (folder / STATE_NAME).exists()
    registry.forget("ft:a:b")
    again = Registry.open(folder, allowed_roots=[tmp_path / "secret"])
    again.lend(places)
    for one in (registry, again):
        assert (one.names(), "ft:a:b" in one) == (("good",), False)
    del places["ft:a:b"]
    assert again.path_of("ft:a:b") == folder / "ft:a:b"
    places["elsewhere"] = tmp_path / "other"
    with pytest.raises(CheckpointError, match="wanted one within the folders"):
        again.read("elsewhere")


@pytest.mark.parametrize("path", ["../secret", "good/../../secret", "/etc", ".", "", "a\0b", "x" * 5000, "/"])
def test_paths_do_not_leave_the_allowed_folders(folder: Path, path: str) -> None:
    with pytest.raises(CheckpointError):
        Registry.open(folder).allowed_path(path)


def test_an_absolute_path_is_fine_where_it_is_allowed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not within"):
        Registry.open(folder).allowed_path(tmp_path / "secret")
    allowed = Registry.open(folder, allowed_roots=[tmp_path]).allowed_path(tmp_path / "secret")
    assert allowed == tmp_path / "secret"


def test_links_out_of_the_folders_are_not_followed(folder: Path, tmp_path: Path) -> None:
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


NAMES = (
    "v1.2",
    "team/legal",
    "a@b",
    "org:tag",
    "two words",
    "le\u0301gal",
    "\u6cd5\u5f8b",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "c++",
    "a=1",
    "deep/er/name",
)
BAD_NAMES = {
    "<b>": "not '<'",
    "a*": "not '*'",
    "tab\tname": r"not '\\t'",
    "-x": "hyphen",
    "end ": "space",
    "x" * 129: "128 characters",
    "__base__": "__base__",
    "cafe\u0301": "NFC",
    "emoji \U0001f422": "letters",
}


@pytest.mark.parametrize("name", [unicodedata.normalize("NFC", name) for name in NAMES])
def test_a_folder_is_served_by_its_name(folder: Path, name: str) -> None:
    checkpoint.save(small(0.3), folder / name)
    registry = Registry.open(folder)
    assert registry.names() == tuple(sorted(("good", name)))
    assert name in registry
    assert registry.read(name).content_hash == content_hash(small(0.3))
    assert registry.left_out() == ()
    registry.pin(name, True)
    assert Registry.open(folder).entries[name].is_pinned
    registry.forget(name)
    assert Registry.open(folder).names() == ("good",)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_why_a_folder_is_left_out_is_said(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    for file in (folder / "good").iterdir():
        (folder / name / file.name).write_bytes(file.read_bytes())
    registry = Registry.open(folder)
    assert registry.names() == ("good",)
    assert name not in registry
    (left_out,) = registry.left_out()
    assert left_out.path == str(folder / name)
    assert re.search(BAD_NAMES[name], left_out.reason)
    with pytest.raises(ConfigError, match="adapter name"):
        registry.remember(name, Entry(is_pinned=True))


def test_names_that_are_no_unicode_can_be_shown(folder: Path) -> None:
    where = os.fsencode(folder) + b"/caf\xe9"
    os.mkdir(where)
    Path(os.fsdecode(where), "adapter_config.json").write_text("{}")
    (left_out,) = Registry.open(folder).left_out()
    assert left_out.path.encode("utf-8").endswith(rb"caf\udce9")


def test_folders_without_an_adapter_and_adapters_within_adapters(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "team" / "notes").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a file").write_text("")
    checkpoint.save(small(), folder / "good" / "checkpoint-5")
    checkpoint.save(small(), folder / "1" / "2" / "3" / "4")
    registry = Registry.open(folder)
    assert registry.names() == ("good",)
    assert {Path(each.path).name for each in registry.left_out()} == {"1", "empty", "team"}
    assert {each.reason for each in registry.left_out()} == {"it has no adapter_config.json"}
    for name in ("good/checkpoint-5", "1/2/3/4", "empty", "team/notes"):
        assert name not in registry


def test_a_volume_of_kubernetes_is_served_and_changes_at_once(tmp_path: Path) -> None:
    """The files lie in a hidden folder, to which ..data leads, and names lead through it; an update moves ..data."""
    root = tmp_path / "volume"
    for number in (1, 2):
        checkpoint.save(small(number / 4), root / f"..2026_0{number}" / "legal")
        checkpoint.save(small(number / 8), root / f"..2026_0{number}" / "team" / "terse")
    (root / "..data").symlink_to("..2026_01")
    for name in ("legal", "team"):
        (root / name).symlink_to(f"..data/{name}")
    registry = Registry.open(root)
    assert registry.names() == ("legal", "team/terse")
    assert registry.left_out() == ()
    first = registry.read("legal")
    assert first.content_hash == content_hash(small(0.25))
    (root / "..new").symlink_to("..2026_02")
    (root / "..new").replace(root / "..data")
    assert registry.read("legal").content_hash == content_hash(small(0.5))
    assert registry.read("team/terse").content_hash == content_hash(small(0.25))
    assert registry.stamp(root / "legal") != first.stamp


def test_a_snapshot_of_the_hub_is_served(tmp_path: Path) -> None:
    """Its files lead to the blobs of its repository, and nowhere else."""
    repository = tmp_path / "hub" / "models--me--adapters"
    snapshot = repository / "snapshots" / ("ab" * 20)
    (repository / "blobs").mkdir(parents=True)
    checkpoint.save(small(0.3), tmp_path / "made")
    for name in ("legal", "stolen"):
        (snapshot / name).mkdir(parents=True)
        for file in (tmp_path / "made").iterdir():
            blob = repository / "blobs" / f"{file.name}-hash"
            blob.write_bytes(file.read_bytes())
            target = Path("../../../blobs") / blob.name if name == "legal" else tmp_path / "made" / file.name
            (snapshot / name / file.name).symlink_to(target)
    registry = Registry.open(snapshot)
    assert registry.names() == ("legal",)
    assert registry.read("legal").content_hash == content_hash(small(0.3))
    (left_out,) = registry.left_out()
    assert (Path(left_out.path).name, "link out" in left_out.reason) == ("stolen", True)
    whole = Registry.open(tmp_path / "hub")
    assert whole.names() == (f"models--me--adapters/snapshots/{'ab' * 20}/legal",)[:0]  # four folders deep
    one = Registry.open(repository / "snapshots")
    assert one.names() == (f"{'ab' * 20}/legal",)
    assert one.read(one.names()[0]).content_hash == content_hash(small(0.3))
    allowed = Registry.open(snapshot, allowed_roots=[tmp_path / "made"])
    assert allowed.names() == ("legal", "stolen")
    assert allowed.read("stolen").content_hash == content_hash(small(0.3))


def test_links_that_lead_up_or_nowhere_do_no_harm(folder: Path, tmp_path: Path) -> None:
    (folder / "self").symlink_to(".")
    (folder / "dangling").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
    (folder / "alias").symlink_to("good")
    (folder / "weights").mkdir()
    (folder / "weights" / "adapter_config.json").symlink_to("../good/adapter_config.json")
    (folder / "weights" / "adapter_model.safetensors").symlink_to(tmp_path / "secret" / "adapter_model.safetensors")
    registry = Registry.open(folder)
    assert registry.names() == ("alias", "good", "weights")
    assert {Path(each.path).name: each.reason.split()[-1] for each in registry.left_out()} == {
        "dangling": "nowhere",
        "loop": "nowhere",
        "self": "adapter_config.json",
    }
    assert registry.read("alias").content_hash == registry.read("good").content_hash
    with pytest.raises(CheckpointError, match="symbolic link out of"):
        registry.read("weights")


def test_a_link_that_is_put_there_while_an_adapter_is_read_is_not_followed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found to lead inside is opened without following anything that has come since."""
    registry, real = Registry.open(folder), Registry.stamp

    def swapped(self: Registry, path: Path) -> Any:
        found = real(self, path)
        (folder / "good").rename(folder / "moved")
        (folder / "good").symlink_to(tmp_path / "secret")
        return found

    monkeypatch.setattr(Registry, "stamp", swapped)
    with pytest.raises(CheckpointError, match=r"link|Not a directory"):
        registry.read("good")


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
