"""Models that read pictures or sounds too: "all-linear" means their language model, `target_towers` all of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tests.laws.tuner import layers_of
from tests.versions import OLD_TRANSFORMERS
from torch import Tensor
from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration

import roadie
from roadie.engine.targets import adapted_layers
from roadie.errors import ConfigError
from roadie.linear import outside_language
from roadie.testing import stock_peft
from roadie.testing.accuracy import relative_error, unit_roundoff
from roadie.testing.models import randomise

LANGUAGE, TOWER, JOINT = "model.language_model.", "model.vision_tower.", "model.multi_modal_projector."
PICTURE = 63  # the token in whose place a part of a picture comes
BOUND = 2000 * unit_roundoff(torch.float32)  # as tests/families has it


def llava() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 64, **sizes}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sizes}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=PICTURE)
    return LlavaForConditionalGeneration(config).eval()


def adapted(**settings: Any) -> Any:
    return roadie.get_peft_model(llava(), roadie.RoadConfig(group_size=4, **settings))


def paths(model: Any) -> list[str]:
    return [path.removeprefix("base_model.model.") for path in layers_of(model)]


def captions(rows: int = 3) -> dict[str, Tensor]:
    """A picture of four parts in each row, and words around it."""
    generator = torch.Generator().manual_seed(rows)
    words = torch.randint(1, PICTURE, (rows, 5), generator=generator)
    tokens = torch.cat((words[:, :2], torch.full((rows, 4), PICTURE), words[:, 2:]), dim=1)
    return {"input_ids": tokens, "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}


def test_all_linear_is_the_language_model_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "roadie"):
        found = paths(adapted(target_modules="all-linear"))
    assert len(found) == 2 * 7
    assert all(path.startswith(LANGUAGE) for path in found)
    said = "model.vision_tower, model.multi_modal_projector: no part of the language model (target_towers adapts it)"
    assert said in caplog.text


def test_towers_are_adapted_where_they_are_asked_for() -> None:
    found = paths(adapted(target_modules="all-linear", target_towers=True))
    counts = [sum(path.startswith(part) for path in found) for part in (LANGUAGE, TOWER, JOINT)]
    assert counts == [2 * 7, 2 * 6, 2]
    assert sum(counts) == len(found)
    # Some of them by name, as of any layer.
    of_both = adapted(target_modules=r"model\.language_model\..*_proj|model\.vision_tower\..*\.fc[12]")
    assert [sum(path.startswith(part) for path in paths(of_both)) for part in (LANGUAGE, TOWER, JOINT)] == [14, 4, 0]
    with pytest.raises(ConfigError, match="got target_towers 'vision'; wanted True or False"):
        roadie.RoadConfig(target_towers="vision")


def test_the_training_engine_means_the_same() -> None:
    for with_towers in (False, True):
        config = {"target_modules": "all-linear", "target_towers": with_towers}
        found = adapted_layers(llava(), {**config, "group_size": 4})
        assert sorted(layer.path for layer in found) == sorted(paths(adapted(**config)))


def test_rows_with_pictures_have_adapters_of_their_own() -> None:
    model = adapted(target_modules="all-linear", target_towers=True)
    model.add_adapter("second", roadie.RoadConfig(group_size=8, variant="road_2", target_modules="all-linear"))
    randomise(model, scale=0.3)
    names = ["default", "second", "__base__"]
    with torch.no_grad():
        mixed = model(**captions(), adapter_names=names).logits
        for row, name in enumerate(names[:2]):
            model.set_adapter(name)
            alone = model(**captions()).logits
            assert relative_error(mixed[row], alone[row]) <= BOUND
            assert relative_error(mixed[2], alone[2]) > 100 * BOUND
        with model.disable_adapter():
            assert relative_error(mixed[2], model(**captions()).logits[2]) <= BOUND


def test_every_reader_knows_an_adapter_of_towers(tmp_path: Path) -> None:
    model = randomise(adapted(target_modules="all-linear", target_towers=True))
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].target_towers
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "target_towers" not in written
    assert written["variant"] == "road_1"
    again = roadie.PeftModel.from_pretrained(llava(), tmp_path)
    base = llava()
    with stock_peft():
        stock = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        wanted = model(**captions()).logits
        for loaded in (again, stock):
            assert relative_error(loaded(**captions()).logits, wanted) <= BOUND
    unused = roadie.RoadConfig(target_modules="all-linear", target_towers=True)  # of no model yet
    unused.save_pretrained(tmp_path / "config")
    assert roadie.RoadConfig.from_pretrained(tmp_path / "config").target_towers


@pytest.mark.skipif(OLD_TRANSFORMERS, reason="transformers 5.17 has other families, and puts parts elsewhere")
@pytest.mark.parametrize(
    ("kind", "cls", "outside"),
    [
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", ["model.visual"]),
        ("gemma3", "Gemma3ForConditionalGeneration", ["model.vision_tower"]),
        ("idefics3", "Idefics3ForConditionalGeneration", ["model.vision_model", "model.connector"]),
        ("blip-2", "Blip2ForConditionalGeneration", ["vision_model", "qformer", "language_projection"]),
        ("llama4", "Llama4ForConditionalGeneration", ["vision_model", "multi_modal_projector"]),
        ("qwen2_audio", "Qwen2AudioForConditionalGeneration", ["model.audio_tower", "model.multi_modal_projector"]),
        ("git", "GitForCausalLM", ["git.image_encoder"]),  # a tower inside the decoder
        ("clip", "CLIPModel", []),  # writes no text
        ("whisper", "WhisperForConditionalGeneration", []),
        ("llama", "LlamaForCausalLM", []),
    ],
)
def test_what_is_outside_of_the_language_model(kind: str, cls: str, outside: list[str]) -> None:
    config = CONFIG_MAPPING[kind]()
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name in ("num_hidden_layers", "depth", "encoder_layers", "decoder_layers"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 1)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:1]
    with torch.device("meta"):
        model = getattr(transformers, cls)(config)
    assert list(outside_language(model)) == outside
