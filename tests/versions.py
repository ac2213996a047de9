"""What the oldest supported versions cannot do, with the reason: marks for tests."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

TORCH = Version(version("torch"))

needs_a_compiler_of_whole_models = pytest.mark.skipif(
    Version("2.7") > TORCH, reason="torch 2.6 cannot trace the context managers of PEFT's and transformers' forward"
)

OLD_TYPER = Version("0.20") > Version(version("typer"))
"""The oldest typer imports rich when it is imported itself."""

needs_torchao_018 = pytest.mark.skipif(
    Version("0.18") > Version(version("torchao")),
    reason="older torchao stores int8 in another way, which PEFT cannot merge into",
)
