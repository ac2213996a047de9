"""What each part of roadie loads, seen from a new process."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.patience import HANG_S
from tests.versions import OLD_TYPER

HEAVY = ("accelerate", "numpy", "peft", "safetensors", "torch", "transformers", "typer")
ROTATION_LEVEL = (
    *(
        "Adapter",
        "LayerParameters",
        "RoadieError",
        "Rotation",
        "Variant",
        "compose",
        "convert",
        "errors",
        "from_parameters",
    ),
    *("identity", "inverse", "rotate", "rotate_weight", "shard", "to_dense", "to_parameters"),
)


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that a new process has loaded after running `code`."""
    report = f"\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True, timeout=HANG_S
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_reader_sees_what_is_loaded() -> None:
    assert loaded_by("import safetensors") == {"safetensors"}


def test_import_roadie_loads_nothing_heavy() -> None:
    assert loaded_by("import roadie; dir(roadie); roadie.__version__; roadie.errors; roadie.RoadieError") == set()


def test_the_path_of_the_embedded_model_loads_nothing_heavy() -> None:
    assert loaded_by("import roadie; roadie.embedded.model_path()") == set()


def test_names_of_the_mathematics_load_torch_alone() -> None:
    code = "import roadie\n" + "\n".join(f"roadie.{name}" for name in ROTATION_LEVEL)
    assert loaded_by(code) - {"numpy"} == {"torch"}  # torch loads numpy where it finds it


def test_checkpoints_need_neither_peft_nor_transformers() -> None:
    assert loaded_by("import roadie; roadie.checkpoint") - {"numpy"} == {"safetensors", "torch"}


ROUTED = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING as tuners
from peft import PeftType
def routed():
    homes = {entries[PeftType.ROAD].__module__.split(".")[0] for entries in (configs, tuners)}
    assert len(homes) == 1
    return homes == {"roadie"}
"""


def test_using_the_tuner_routes_peft_each_time_and_importing_roadie_does_not() -> None:
    """One process: a new one for each use would spend its time on importing PEFT."""
    steps = ["import roadie, sys; roadie.rotate; assert 'roadie.tuner' not in sys.modules; assert not routed()"]
    for use in ("PeftModel", "RoadConfig()", "register()", "tuner.RoadConfig()"):
        steps += [f"roadie.{use}; assert routed(), {use!r}", "roadie.unregister(); assert not routed()"]
    steps += ["roadie.PeftModel; assert routed()", "assert 'roadie.training' not in sys.modules"]
    assert "peft" in loaded_by(ROUTED + "\n".join(steps))


HELP = """
import sys
before = set(sys.modules)
from roadie.cli import main
sys.argv = ["roadie", "--help"]
try:
    main()
except SystemExit:
    print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)))
"""
# What typer is made of, by version: click until it had a copy of its own, rich where it imported it at once.
OF_TYPER = {"annotated_doc", "click", "shellingham", "typer", "typing_extensions"}
OF_OLD_TYPER = {"markdown_it", "mdurl", "pygments", "rich"}


def test_help_of_the_command_line_loads_roadie_and_typer_alone() -> None:
    """So it is there in a moment: what makes a start slow is what is imported, and that can be told without a clock."""
    code = "import json\n" + HELP
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_S)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"roadie", "typer"} <= loaded <= {"roadie", *OF_TYPER, *(OF_OLD_TYPER if OLD_TYPER else ())}


def test_help_of_the_command_line_loads_nothing_heavy() -> None:
    run = "import sys; from roadie.cli import main; sys.argv = ['roadie', '--help']"
    assert loaded_by(f"{run}\ntry:\n    main()\nexcept SystemExit:\n    pass") == {"typer"}
