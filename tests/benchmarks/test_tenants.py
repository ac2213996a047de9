"""The benchmark of tenants runs, and says what it measures."""

from __future__ import annotations

import re

import pytest
from benchmarks.tenants import main
from tests.versions import NO_ENGINE

if NO_ENGINE:
    pytest.skip("the server's engine needs newer transformers", allow_module_level=True)


def test_all_parts_say_what_they_measured(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tenants", "3", "--tokens", "8", "--rounds", "1", "--seconds", "0.1"]
    assert main(["steps", "fresh", "agree", "shares", *sizes]) == 0
    printed = capsys.readouterr().out
    assert "3 tenants of 3 kinds: " in printed
    assert "those of the step: " in printed
    agreed = re.search(r"72 tokens of 6 adapters in one batch, torch.float32\n  median (\S+), largest (\S+)\n", printed)
    assert agreed is not None
    assert float(agreed[1]) <= 1e-5
    assert float(agreed[2]) <= 1e-4
    had = [float(share) for share in re.findall(r"training had (\S+) of the time", printed)]
    assert len(had) == 3
    assert had[0] == 0.0
