"""Run by torchrun: the examples as they stand, one after the other. Argument: a folder to run them in."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from roadie.distributed import joined

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "distributed"

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    with joined():  # once for all of them: torchrun's store does not like a second beginning
        for name in ("fsdp.py", "fsdp.py", "tensor_parallel.py", "trainer.py"):
            sys.argv = [name]
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
