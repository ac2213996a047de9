"""Copies of adapters under the hash of their content; needs no vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tests.patience import HANG_S

from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.errors import CheckpointError
from roadie.vllm.store import AdapterStore, content_hash, is_road


def an_adapter(*, seed: int = 0, dtype: torch.dtype = torch.float32, group_size: int = 4, layer: str = "q") -> Adapter:
    theta, alpha = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    parameters = LayerParameters(theta, alpha, "road_1", group_size)
    return Adapter({f"model.{layer}": parameters}, {"peft_type": "ROAD", "variant": "road_1", "group_size": group_size})


def test_equal_content_has_equal_hashes_and_any_change_another() -> None:
    others = [
        an_adapter(seed=1),
        an_adapter(dtype=torch.bfloat16),
        an_adapter(group_size=8),
        an_adapter(layer="k"),
        Adapter(an_adapter().layers, {**an_adapter().config, "task_type": "CAUSAL_LM"}),
        Adapter(an_adapter().layers, an_adapter().config, {"bias": torch.zeros(2)}),
        Adapter(an_adapter().layers, an_adapter().config, {"bias": torch.ones(2)}),
    ]
    hashes = {content_hash(adapter) for adapter in others}
    assert content_hash(an_adapter()) == content_hash(an_adapter())
    assert len(hashes | {content_hash(an_adapter())}) == len(others) + 1
    assert all(len(each) == 32 and set(each) <= set("0123456789abcdef") for each in hashes)


def test_a_copy_stays_as_it_was_when_the_files_change(tmp_path: Path) -> None:
    place, store = tmp_path / "place", AdapterStore(str(tmp_path / "store"))
    checkpoint.save(an_adapter(), place)
    first = store.add(place)
    assert store.add(place) == first
    checkpoint.save(an_adapter(seed=1), place)
    second = store.add(place)
    assert second != first
    assert content_hash(checkpoint.load(first)) == first.name == content_hash(an_adapter())
    assert content_hash(checkpoint.load(second)) == second.name == content_hash(an_adapter(seed=1))
    (place / checkpoint.WEIGHTS_NAME).unlink()
    assert content_hash(checkpoint.load(first)) == first.name


def test_what_is_not_a_sound_adapter_leaves_nothing_behind(tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    with pytest.raises(CheckpointError):
        store.add(tmp_path / "nowhere")
    assert list(store.folder.iterdir()) == []


def test_a_temporary_store_goes_with_its_object(tmp_path: Path) -> None:
    checkpoint.save(an_adapter(), tmp_path / "adapter")
    store = AdapterStore()
    folder = store.folder
    assert store.add(tmp_path / "adapter").parent == folder
    del store
    assert not folder.exists()


MAKE = (
    "from roadie.vllm.store import AdapterStore; import os, signal; s = AdapterStore(); print(s.folder, flush=True); {}"
)


def folder_of_a_process(then: str, temporary: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", MAKE.format(then)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    return Path(done.stdout.strip())


def test_a_temporary_store_goes_with_its_process_or_with_the_next_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not folder_of_a_process("", tmp_path).exists()
    killed = folder_of_a_process("os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert killed.parent == tmp_path
    assert killed.exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = AdapterStore()
    assert not killed.exists()
    second = AdapterStore()
    assert first.folder.exists()  # its process lives
    assert second.folder.exists()


def test_kinds_of_adapters_are_told_apart(tmp_path: Path) -> None:
    checkpoint.save(an_adapter(), tmp_path / "road")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / checkpoint.CONFIG_NAME).write_text('{"peft_type": "LORA", "r": 8}')
    assert is_road(str(tmp_path / "road"))
    assert not is_road(str(tmp_path / "lora"))
    assert not is_road(str(tmp_path / "nowhere"))


@pytest.mark.filterwarnings("ignore:this adapter")
def test_rotations_in_a_row_and_of_inputs_are_in_the_copy(tmp_path: Path) -> None:
    row = LayerParameters(torch.zeros(8), torch.ones(8), "road_1", [2, 8])
    one = LayerParameters(torch.ones(4), torch.ones(4), "road_1", 8)
    config = {"peft_type": "ROAD", "stages": [2, 8], "input_stages": [8]}
    checkpoint.save(Adapter({"model.q": row, "model.q.road_input": one}, config), tmp_path / "place")
    copy = checkpoint.load(AdapterStore(str(tmp_path / "store")).add(tmp_path / "place"))
    assert {path: layer.stages for path, layer in copy.layers.items()} == {
        "model.q": (2, 8),
        "model.q.road_input": (8,),
    }
    assert torch.equal(copy.layers["model.q.road_input"].theta, torch.ones(4))
