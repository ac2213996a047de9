"""A bank over a model whose base layers are quantised: each row is what the same row is in a PEFT model with that adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import roadie
from roadie.bank.live import live_adapter
from roadie.testing import tiny_llama
from roadie.testing.models import randomise

pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:MatMul8bitLt:UserWarning")

IDS = torch.arange(3 * 5).reshape(3, 5) * 7 % 128
KINDS = {
    # With the default threshold columns that are large in ANY row are computed apart: rows would depend on each other.
    "8 bit": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


def _load(folder: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=KINDS[kind], dtype=torch.float32, device_map="cpu"
    )


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_rows_over_a_quantised_model(kind: str, tmp_path: Path) -> None:
    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path)
    config = roadie.RoadConfig(target_modules="all-linear", group_size=16, task_type="CAUSAL_LM")
    peft_model = roadie.get_peft_model(_load(tmp_path, kind), config)
    randomise(peft_model, seed=1)
    wanted = _logits(peft_model)
    with peft_model.disable_adapter():
        base = _logits(peft_model)
    model = _load(tmp_path, kind)
    with roadie.AdapterBank(model, slots=2) as bank:
        bank.admit("one", live_adapter(peft_model, "default"))
        with bank.rows(["one", None, "one"]):
            mixed = _logits(model)
    for row, alone in enumerate((wanted[0], base[1], wanted[2])):
        torch.testing.assert_close(mixed[row], alone)
    assert not torch.allclose(wanted[0], base[0])
    assert torch.equal(_logits(model)[1], base[1])
