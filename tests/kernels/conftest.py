"""Triton's kernels run in its interpreter here, which must be asked for before triton is imported (see tests/conftest.py)."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
