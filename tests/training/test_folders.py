"""Folders appear whole or not at all, and nothing is overwritten that was not meant to be."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from roadie.errors import RoadieError
from roadie.training.folders import OutputExists, check_free, whole_folder


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_appears_when_it_is_complete(tmp_path):
    output = tmp_path / "deep" / "output"
    with whole_folder(output) as folder:
        (folder / "a").write_text("1")
        assert not output.exists()
    assert content(output) == {"a": "1"}
    assert [path.name for path in output.parent.iterdir()] == ["output"]


def write_half(output, *, overwrite):
    with whole_folder(output, overwrite=overwrite) as folder:
        (folder / "a").write_text("1")
        raise KeyboardInterrupt


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, overwrite):
    output = tmp_path / "output"
    output.mkdir()
    if overwrite:
        (output / "old").write_text("0")
    with pytest.raises(KeyboardInterrupt):
        write_half(output, overwrite=overwrite)
    assert content(output) == ({"old": "0"} if overwrite else {})
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_overwriting_leaves_nothing_of_the_old(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").write_text("0")
    with whole_folder(output, overwrite=True) as folder:
        (folder / "a").write_text("1")
        assert content(output) == {"old": "0"}
    assert content(output) == {"a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "old").write_text("0")
    with pytest.raises(OutputExists, match=r"not empty.*--overwrite") as caught:
        check_free(tmp_path)
    assert isinstance(caught.value, (RoadieError, FileExistsError))
    check_free(tmp_path, overwrite=True)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_is_never_overwritten(tmp_path, kind):
    output, target = tmp_path / "output", tmp_path / "target"
    target.mkdir()
    if kind == "file":
        output.write_text("0")
    else:
        output.symlink_to(target)
    with pytest.raises(OutputExists, match="not a plain folder"):
        check_free(output, overwrite=True)


def test_a_process_that_is_told_to_terminate_leaves_nothing(tmp_path):
    script = f"""
        import os, signal
        from pathlib import Path
        from roadie.training.folders import whole_folder

        with whole_folder(Path({str(tmp_path)!r}) / "output") as folder:
            (folder / "half").write_text("written")
            os.kill(os.getpid(), signal.SIGTERM)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_comes_back_where_the_new_folder_cannot_take_its_name(tmp_path, monkeypatch):
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").write_text("0")
    rename = Path.rename

    def refused(self, target):
        if self.name == "new":
            raise OSError("no such luck")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="no such luck"), whole_folder(output, overwrite=True) as folder:
        (folder / "a").write_text("1")
    assert content(output) == {"old": "0"}
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
