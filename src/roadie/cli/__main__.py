"""`python -m roadie.cli`."""

from __future__ import annotations

from roadie.cli import main

if __name__ == "__main__":
    main()
