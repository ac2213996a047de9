"""What is measured beside another library is measured of so many tenants, on the same rows, and told as it was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import tenants_beside, tenants_skyrl
from tests.versions import NO_ENGINE
from transformers import AutoModelForCausalLM

if NO_ENGINE:
    pytest.skip("the server's engine needs newer transformers", allow_module_level=True)


def test_rows_are_shared_out_in_equal_parts() -> None:
    assert tenants_skyrl.shares(6, 3) == [0, 0, 1, 1, 2, 2]
    assert tenants_skyrl.shares(3, 1) == [0, 0, 0]


def test_our_side_measures_every_number_of_tenants(tmp_path: Path) -> None:
    tenants_beside.make_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rows = torch.arange(6 * 9).view(6, 9).tolist()
    found = tenants_beside.ours({"model": tmp_path, "rows": rows, "prompt": rows[0], "tenants": (1, 3), "repeats": 1})

    given = torch.tensor(rows)
    with torch.no_grad():
        logits = model(given[:, :-1]).logits  # new adapters turn nothing, and the rows are one batch here and there
        logprobs = logits.gather(-1, given[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    assert torch.equal(torch.tensor(found["logprobs"]), logprobs)
    adapted = [each for name, each in model.named_modules() if name.endswith("_proj")]
    outputs = sum(layer.out_features for layer in adapted)
    for tenants, case in found["cases"].items():
        assert case["state_bytes"] == tenants * 4 * 4 * outputs  # parameters, two moments, gradients
        assert all(len(case[name]) == 1 for name in ("forward_backward_s", "steps_s", "new_s", "old_s"))


def test_the_table_has_medians_and_spread_of_both() -> None:
    case: dict[str, Any] = {"forward_backward_s": [1.0, 2.0, 4.0], "steps_s": [0.001], "state_bytes": [8 * 2**20]}
    case |= {"new_s": [0.03], "old_s": [0.02]}
    other = {**case, "new_s": [0.5]}
    printed = tenants_beside.told({"roadie": {"8": case}, "skyrl": {"8": other}}).splitlines()
    tokens = tenants_beside.NUM_ROWS * tenants_beside.NUM_TOKENS
    speed = f"{tokens // 2:,} ({tokens // 4:,} to {tokens:,})"
    assert printed[2] == f"| forward and backward, tokens a second | 8 | {speed} | {speed} |"
    assert "| state, MiB a tenant | 8 | 1 | 1 |" in printed
    assert "| from a step to a token by its weights, ms | 8 | 30 | 500 |" in printed
