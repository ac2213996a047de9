"""The command line: one file per verb, which reads arguments, calls roadie, and prints. No logic is here.

Nothing heavy is imported until a verb runs.
"""

from __future__ import annotations

import sys

from roadie.errors import MissingExtra
from roadie.extras import need

__all__ = ["main"]


def main() -> None:
    """The console script; exit status 2 and one line where what it is made of is not installed."""
    try:
        need("cli")
    except MissingExtra as error:
        print(f"roadie: {error}", file=sys.stderr)
        sys.exit(2)
    from roadie.cli.app import app

    app(prog_name="roadie")
