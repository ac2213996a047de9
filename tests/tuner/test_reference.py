"""TRL's trainers keep a trained adapter as the reference "ref": it must be a true copy, and nothing else becomes one."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import roadie
from roadie.testing import randomise, tiny_llama

SETTINGS = {"target_modules": ["q_proj", "down_proj"], "group_size": 16, "task_type": "CAUSAL_LM"}


def parameters_of(model: torch.nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors by their names, without its own."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters() if adapter in name.split(".")}
    return {".".join(part for part in name.split(".") if part != adapter): tensor for name, tensor in found.items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"input_stages": [8]},
        {"stages": [2, 16], "variant": "road_4"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=str,
)
def test_ref_with_the_config_of_default_is_a_copy_in_every_tensor(settings, dtype, caplog):
    kwargs = {**SETTINGS, **settings}
    if "stages" in settings:
        del kwargs["group_size"]
    model = roadie.get_peft_model(tiny_llama(dtype=dtype), roadie.RoadConfig(**kwargs))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = {name: tensor.clone() for name, tensor in parameters_of(model, "default").items()}
    with caplog.at_level(logging.WARNING, logger="roadie"):
        model.add_adapter("ref", model.peft_config["default"])
    assert "'ref' starts as a copy of 'default'" in caplog.text
    assert_equal(parameters_of(model, "ref"), before)
    assert_equal(parameters_of(model, "default"), before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "ref" in name.split("."))
    assert model.active_adapter == "default"
    storages = {tensor.data_ptr() for tensor in parameters_of(model, "default").values()}
    assert storages.isdisjoint(tensor.data_ptr() for tensor in parameters_of(model, "ref").values())


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_a_copy_of_a_new_adapter_is_no_news(settings, caplog):
    """TRL copies whatever adapter it is given; where that is the identity, so would a new one be."""
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(**SETTINGS, **settings))
    with caplog.at_level(logging.WARNING, logger="roadie"):
        model.add_adapter("ref", model.peft_config["default"])
    assert not caplog.records


def test_any_other_adapter_starts_as_the_identity_as_with_peft():
    config = roadie.RoadConfig(**SETTINGS)
    model = randomise(roadie.get_peft_model(tiny_llama(), config))
    model.add_adapter("other", config)  # the very object, another name
    model.add_adapter("ref", roadie.RoadConfig(**SETTINGS))  # the name, another object
    for adapter in ("other", "ref"):
        for name, tensor in parameters_of(model, adapter).items():
            assert torch.equal(tensor, torch.full_like(tensor, float("road_alpha" in name))), name


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(roadie.embedded.model_path())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


ROWS = {
    "DPO": [{"prompt": "Hi", "chosen": " yes indeed", "rejected": " no"}] * 4,
    "KTO": [{"prompt": f"Hi {k}", "completion": f" yes {k}", "label": k % 2 == 0} for k in range(4)],
    "GRPO": [{"prompt": "Hi"}, {"prompt": "Ho"}],
    "RLOO": [{"prompt": "Hi"}, {"prompt": "Ho"}],
}
RL = {"num_generations": 2, "max_completion_length": 4, "beta": 0.5}
EXTRA: dict[str, dict[str, Any]] = {"DPO": {}, "KTO": {}, "GRPO": RL, "RLOO": RL}


@pytest.mark.slow
@pytest.mark.parametrize("method", list(ROWS))
def test_the_reference_of_trl_is_the_adapter_that_is_trained_on(method: str, tmp_path: Path):
    """At the first step policy and reference agree: DPO's loss is ln 2, KTO's is 1/2, and no divergence is seen by the others."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    if not hasattr(trl, f"{method}Trainer"):
        pytest.skip(f"this TRL has no {method}Trainer outside its experiments, where it makes no reference adapter")
    tokenizer = _tokenizer()
    base = tiny_llama(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=256)
    model = randomise(roadie.get_peft_model(base, roadie.RoadConfig(**SETTINGS)), scale=1.0)
    trained = {name: tensor.clone() for name, tensor in parameters_of(model, "default").items()}
    settings = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False, "max_steps": 1, "seed": 0}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 2}
    extra = {"reward_funcs": lambda completions, **_: [float(k) for k in range(len(completions))]}
    trainer = getattr(trl, f"{method}Trainer")(
        model=model,
        args=getattr(trl, f"{method}Config")(**settings, **EXTRA[method]),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(ROWS[method]),
        **(extra if EXTRA[method] else {}),
    )
    assert_equal(parameters_of(model, "ref"), trained)
    trainer.train()
    assert_equal(parameters_of(model, "ref"), trained)
    log = next(line for line in trainer.state.log_history if "loss" in line)
    # Both passes compute the same numbers in the same order; what is logged is rounded to 4 digits after the comma.
    if EXTRA[method]:
        assert log["kl"] == 0.0
    else:
        assert abs(log["loss"] - {"DPO": math.log(2), "KTO": 0.5}[method]) <= 1e-4
