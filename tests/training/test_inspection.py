"""Looking at what is on the disk, with a model and a text: hidden states of a RoAd adapter, a LoRA, and whole models."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.errors import CheckpointError, ConfigError, UnsafeCheckpointError
from roadie.inspect import change_of_states, report
from roadie.training.adapters import PICKLE_NAME
from roadie.training.folders import OutputExists
from roadie.training.inspection import Kind, TextSettings, find_subjects, gather, write
from roadie.training.merging import merge_to_disk


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_path):
    """Two RoAd adapters of the tiny model, a LoRA, and each of them merged; text to look at them with."""
    folder = tmp_path_factory.mktemp("looked-at")
    for seed, (name, merged) in enumerate((("road", "merged"), ("turn", "turn-merged"))):
        checkpoint.save(drawn(seed, tiny_path), folder / name)
        merge_to_disk([str(folder / name)], folder / merged)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    lora.save_pretrained(folder / "lora")
    lora.merge_and_unload().save_pretrained(folder / "lora-merged")
    (folder / "text.txt").write_text("A turtle walks. " * 20)
    return folder


def drawn(seed, base):
    """An adapter of the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        f"model.layers.{depth}.self_attn.{name}": LayerParameters(
            0.3 * torch.randn(32, generator=generator), 1 + 0.1 * torch.randn(32, generator=generator), "road_1", 16
        )
        for depth in (0, 1)
        for name in ("q_proj", "v_proj", "o_proj")
    }
    config = {"variant": "road_1", "group_size": 16, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    return Adapter(layers, {**config, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)})


def measured(places, *names, tokens=100, model=None):
    subjects = find_subjects([f"{name.replace('-', '_')}={places / name}" for name in names])
    return gather(subjects, text=TextSettings((str(places / "text.txt"),), tokens), model=model), subjects


def test_each_place_is_known_by_its_files(places):
    found = find_subjects([str(places / name) for name in ("road", "lora", "merged")])
    assert [(each.name, each.kind) for each in found] == [
        *(("road", Kind.ROAD), ("lora", Kind.PEFT), ("merged", Kind.MODEL))
    ]
    assert find_subjects(["owner/name"])[0].kind is Kind.ROAD
    with pytest.raises(CheckpointError, match=r"neither adapter_config\.json nor config\.json"):
        find_subjects([str(places)])


def test_without_a_text_rotations_alone_are_looked_at(places):
    gathered = gather(find_subjects([str(places / "road")]))
    assert list(gathered.adapters) == ["road"]
    assert gathered.states == ()
    with pytest.raises(ConfigError, match=r"lora, a PEFT adapter, and no text; wanted a RoAd adapter, or a text"):
        gather(find_subjects([str(places / "road"), str(places / "lora")]))


def test_an_adapter_moves_states_as_the_model_does_that_it_is_merged_into(places):
    gathered, subjects = measured(places, "road", "lora", "merged", "turn", "lora-merged", "turn-merged")
    road, lora, merged, turn, lora_merged, turn_merged = gathered.states
    assert [each.name for each in gathered.states] == [each.name for each in subjects]
    assert list(gathered.adapters) == ["road", "turn"]
    for ours, whole in ((road, merged), (lora, lora_merged), (turn, turn_merged)):
        assert (ours.tokens, len(ours.places)) == (whole.tokens, len(whole.places)) == (100, 3)
        for one, other in zip(ours.places, whole.places, strict=True):
            assert one.length == pytest.approx(other.length, abs=1e-5)  # float32 weights, merged with one rounding
            assert one.direction == pytest.approx(other.direction, abs=1e-5)
    assert (road.places[0].length, road.places[0].direction) == (0, 1)
    assert road.places[1].direction < 0.999
    assert abs(road.places[1].direction - lora.places[1].direction) > 1e-3
    assert abs(road.places[1].direction - turn.places[1].direction) > 1e-3


def test_states_are_those_of_the_model_itself(places, tiny_path):
    """The first row of the text, through transformers alone."""
    gathered, _ = measured(places, "merged", tokens=20, model=str(tiny_path))
    from roadie.training.encoding import encode
    from roadie.training.models import ModelSource, load_tokenizer
    from roadie.training.text import read

    tokens = encode(read([str(places / "text.txt")]), load_tokenizer(ModelSource(str(tiny_path))), 128)[0].input_ids[
        :20
    ]
    with torch.no_grad():
        outputs = [
            AutoModelForCausalLM.from_pretrained(path)(torch.tensor([tokens]), output_hidden_states=True).hidden_states
            for path in (tiny_path, places / "merged")
        ]
    for place, before, after in zip(gathered.states[0].places, *outputs, strict=True):
        length, direction = change_of_states(before, after)
        assert place.length == pytest.approx(float(length.mean()), abs=1e-6)
        assert place.direction == pytest.approx(float(direction.mean()), abs=1e-6)
    assert gathered.states[0].tokens == 20


def test_tokens_are_counted_over_all_rows(places):
    gathered, _ = measured(places, "road", tokens=200)
    assert gathered.states[0].tokens == 200  # rows of the tiny model have 128
    with pytest.raises(ConfigError, match="got tokens=1"):
        TextSettings(("x",), 1)


def test_models_of_other_shapes_are_refused(places, tiny, tmp_path):
    tiny.model(hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path / "small")
    subjects = find_subjects([str(places / "road"), str(tmp_path / "small")])
    with pytest.raises(ConfigError, match=r"small: got a model with hidden_size=32 beside a base with 64"):
        gather(subjects, text=TextSettings((str(places / "text.txt"),)))


def test_a_whole_model_needs_a_base_with_a_name(places):
    with pytest.raises(ConfigError, match=r"merged, a whole model, and nothing that names its base.*--model NAME"):
        measured(places, "merged")


def test_adapters_of_different_base_models_are_refused_where_a_model_is_run(places, tmp_path):
    shutil.copytree(places / "lora", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    (tmp_path / "other" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "b/other"})
    )
    subjects = find_subjects([str(places / "road"), str(tmp_path / "other")])
    with pytest.raises(ConfigError, match=r"got adapters of different base models .*b/other"):
        gather(subjects, text=TextSettings((str(places / "text.txt"),)))


def test_pickles_are_refused(places, tmp_path):
    shutil.copytree(places / "lora", tmp_path / "pickled")
    (tmp_path / "pickled" / checkpoint.WEIGHTS_NAME).rename(tmp_path / "pickled" / PICKLE_NAME)
    with pytest.raises(UnsafeCheckpointError, match=r"pickled: got no adapter_model\.safetensors"):
        gather(find_subjects([str(tmp_path / "pickled")]), text=TextSettings((str(places / "text.txt"),)))


@pytest.fixture
def small(places):
    return report(gather(find_subjects([str(places / "road")])).adapters)


def test_page_and_pictures_are_written_together(small, tmp_path):
    write(small, page=tmp_path / "r.html", pngs=tmp_path / "figures")
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2 * len(small.pictures)


@pytest.mark.parametrize("page", ["r.txt", "folder.html"])
def test_where_the_page_cannot_be_written_the_pictures_are_not(small, tmp_path, page):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError):
        write(small, page=tmp_path / page, pngs=tmp_path / "figures")
    assert [each.name for each in tmp_path.iterdir()] == ["folder.html"]


def test_a_folder_with_something_in_it_is_replaced_only_when_asked(small, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists):
        write(small, page=tmp_path / "r.html", pngs=tmp_path / "figures")
    assert not (tmp_path / "r.html").exists()
    assert (tmp_path / "figures" / "mine.txt").exists()
    write(small, pngs=tmp_path / "figures", overwrite=True)
    assert not (tmp_path / "figures" / "mine.txt").exists()


def test_a_full_disk_leaves_nothing(small, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("roadie.inspect.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(small, page=tmp_path / "r.html", pngs=tmp_path / "figures")
    assert list(tmp_path.iterdir()) == []
