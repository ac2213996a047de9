"""The command line: one file per verb, which reads arguments, calls roadie, and prints. No logic is here.

Nothing heavy is imported until a verb runs.
"""

from __future__ import annotations

from roadie.cli.app import main

__all__ = ["main"]
