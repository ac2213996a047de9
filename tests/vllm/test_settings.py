"""What users may choose; needs no vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import roadie
from roadie.errors import ConfigError
from roadie.vllm import Settings, engine_arguments
from roadie.vllm.settings import Packing, settings_of


@pytest.mark.parametrize("value", [None, False])
def test_an_engine_that_is_not_asked_is_left_alone(value: object) -> None:
    assert settings_of({"roadie": value}) is None
    assert settings_of({}) is None
    assert settings_of(object()) is None  # vLLM allows other kinds of additional_config


def test_true_is_every_default() -> None:
    assert settings_of({"roadie": True, "other": 1}) == settings_of({"roadie": {}}) == Settings()


def test_what_the_front_end_writes_the_workers_read(tmp_path: Path) -> None:
    settings = Settings(
        adapters=str(tmp_path), store=str(tmp_path / "store"), packing="parts", stages=3, input_stages=0
    )
    assert settings.packing is Packing.PARTS
    assert settings_of({"roadie": settings.as_config()}) == settings


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "wanted true"),
        ({"adapter": "x"}, "roadie.adapter in additional_config; wanted one of adapters, store, packing"),
        ({"stages": 0}, "got roadie.stages=0; wanted how many rotations in a row, from 1"),
        ({"input_stages": -1}, "got roadie.input_stages=-1; wanted how many rotations in a row, from 0"),
        ({"stages": [2, 16]}, "wanted how many"),
        ({"stages": True}, "wanted how many"),
        ({"packing": "some"}, "'whole' or 'parts'"),
        ({"adapters": []}, "the path of a folder"),
        ({"store": ""}, "the path of a folder"),
        ({"store": 3}, "the path of a folder"),
        ({"version": "0.0.0"}, "install the same roadie"),
    ],
)
def test_bad_settings_are_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of({"roadie": value})


def test_engine_arguments_ask_for_slots_and_for_roadie() -> None:
    arguments: dict[str, Any] = engine_arguments(64, num_kept=1000, packing="parts")
    assert arguments == {
        "enable_lora": True,
        "max_loras": 64,
        "max_cpu_loras": 1000,
        "additional_config": {
            "roadie": {
                "adapters": None,
                "store": None,
                "packing": "parts",
                "stages": None,
                "input_stages": None,
                "version": roadie.__version__,
            }
        },
    }
    assert engine_arguments(64, num_kept=2)["max_cpu_loras"] == 64
    with pytest.raises(TypeError):
        engine_arguments(1, colour="red")
