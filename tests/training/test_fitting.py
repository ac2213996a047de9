"""Fitting to models on the disk, of which only the class says which layers can be adapted."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from roadie.training.fitting import fit_to_disk, linear_places
from roadie.training.models import as_source


def _saved_mamba(folder: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "time_step_rank": 4, "num_hidden_layers": 1}
    transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, use_mambapy=False)).save_pretrained(folder)
    return folder


def test_layers_that_the_model_does_not_call_are_left_out(tmp_path: Any, caplog: Any) -> None:
    base, tuned = _saved_mamba(tmp_path / "base", 0), _saved_mamba(tmp_path / "tuned", 1)
    places = linear_places(base, as_source(str(base)))
    assert {place.path for place in places.values()} == {"backbone.layers.0.mixer.in_proj"}
    assert "backbone.layers.0.mixer.dt_proj" in caplog.text
    fitted = fit_to_disk(tuned, tmp_path / "fitted", model=str(base), group_size=4)
    assert set(fitted.fit.adapter.layers) == {"backbone.layers.0.mixer.in_proj"}
