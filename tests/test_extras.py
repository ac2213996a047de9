"""The core works where nothing optional is installed, and each extra says what to install where it is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from tests.patience import HANG_S

from roadie.errors import ConfigError, MissingExtra
from roadie.extras import EXTRAS, need

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = sorted(
    {module for _, modules in EXTRAS.values() for module in modules} - {"yaml", "fsspec"}
)  # torch's, and PEFT's
DISTRIBUTIONS = {"yaml": "pyyaml"}
FOUR = ("torch", "transformers", "peft", "safetensors")


def named(requirements: list[str]) -> set[str]:
    """The distributions, those of roadie's own extras with them."""
    found = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w.-]+)(?:\[([^\]]*)\])?", requirement).groups()
        found |= {spelled(name)}
        if name == "roadie":
            found |= {each for extra in extras.split(",") for each in named(PROJECT["optional-dependencies"][extra])}
    return found - {"roadie"}


def spelled(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_core_is_four_libraries_and_what_they_bring() -> None:
    core = named(PROJECT["dependencies"])
    assert set(FOUR) <= core
    assert core <= {*FOUR, *named(requires("peft"))}


def test_an_extra_brings_what_it_says_is_missing() -> None:
    for extra, (_, modules) in EXTRAS.items():
        wanted = {spelled(DISTRIBUTIONS.get(module, module)) for module in modules}
        assert wanted <= named(PROJECT["optional-dependencies"][extra]), extra


@pytest.mark.parametrize(
    ("extra", "module"), [(extra, module) for extra, (_, modules) in EXTRAS.items() for module in modules]
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, extra: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as error:
        need(extra, module)
    assert re.fullmatch(rf'got no {module}; wanted \w.*; run: pip install "roadie\[{extra}\]"', str(error.value))
    assert isinstance(error.value, ModuleNotFoundError)


def test_what_is_there_is_not_missed() -> None:
    need("quant", "json", "xml.dom")
    with pytest.raises(MissingExtra, match=r"^got no nothing_of_this, xml\.nothing, nowhere\.at_all; "):
        need("quant", "json", "nothing_of_this", "xml.nothing", "nowhere.at_all")


def test_a_folder_of_its_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    with pytest.raises(MissingExtra, match="got no only_a_folder; "):
        need("ray", "only_a_folder")


WITHOUT = f"""
import sys
from importlib.machinery import PathFinder
class Without:  # neither modules of these names, nor that they were installed
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL!r} else PathFinder.find_spec(name, path, target)
    def find_distributions(self, *context):
        found = PathFinder.find_distributions(*context)
        return (each for each in found if each.metadata["Name"].lower().replace("-", "_") not in {OPTIONAL!r})
sys.meta_path[sys.meta_path.index(PathFinder)] = Without()
"""


def in_a_bare_environment(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=HANG_S)


THE_CORE = """
import torch, roadie
from roadie.testing import tiny_llama
from roadie.testing.accuracy import two_orders
for name in roadie.__all__:
    getattr(roadie, name)
config = roadie.RoadConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False, group_size=4)
model = roadie.get_peft_model(tiny_llama(), config)
tokens = torch.arange(8).view(2, 4)
model(input_ids=tokens, labels=tokens).loss.backward()
model.save_pretrained("saved")
adapter = roadie.checkpoint.load("saved")
neutral = roadie.compose(roadie.inverse(adapter), adapter)  # angles and scales of size 1, rounded twice each
rounded = 4 * torch.finfo(torch.float32).eps / 2
assert roadie.distance(neutral, roadie.power(adapter, 0)) <= rounded < roadie.distance(neutral, adapter)
bank = roadie.AdapterBank(tiny_llama(), slots=2)
bank.admit("saved", "saved")
with torch.no_grad(), bank.rows(["saved", None]):
    mixed = bank.model(input_ids=tokens).logits
with torch.no_grad():
    plain, adapted = tiny_llama()(input_ids=tokens).logits, model(input_ids=tokens).logits
    whole = model.merge_and_unload()(input_ids=tokens).logits
assert torch.equal(mixed[0], adapted[0]) and torch.equal(mixed[1], plain[1])
# A logit ends a chain of sums: in each of two layers over 64 inputs, 4 tokens, 64, 64 and 128 inputs, then 64 of the head;
# a merged weight is rounded three times, four of them in a row in each layer.
apart = two_orders(2 * (64 + 4 + 64 + 64 + 128 + 4 * 3) + 64, torch.float32) * adapted.abs().max()
assert (whole - adapted).abs().max() <= apart < (whole - plain).abs().max()
"""


@pytest.mark.slow
def test_the_core_works_without_anything_optional(tmp_path: Path) -> None:
    done = in_a_bare_environment(THE_CORE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


MODULES = """
import importlib, pathlib, roadie
from roadie.errors import MissingExtra
root = pathlib.Path(roadie.__file__).parent
for path in sorted(root.rglob("*.py")):
    name = ".".join(("roadie", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as lack:
        print(name, type(lack).__name__)
"""
OF_EXTRAS = (
    *("roadie.cli.", "roadie.evaluation.harness", "roadie.kernels.triton.", "roadie.ray.", "roadie.serving.http"),
    *("roadie.train_service.", "roadie.traffic.backend", "roadie.training.preference_trainer", "roadie.vllm."),
)


@pytest.mark.slow
def test_only_modules_of_extras_need_what_is_optional(tmp_path: Path) -> None:
    done = in_a_bare_environment(MODULES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lacking = dict(line.split() for line in done.stdout.splitlines())
    assert [name for name in lacking if not name.startswith(OF_EXTRAS)] == []
    assert lacking["roadie.serving.http.app"] == lacking["roadie.serving.http"] == "MissingExtra"


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", ["from roadie.cli import main; main()", "import runpy; runpy.run_module('roadie.cli')"]
)
def test_the_command_line_without_its_extra_is_one_line(tmp_path: Path, start: str) -> None:
    if "runpy" in start:
        start = start.replace("')", "', run_name='__main__')")
    done = in_a_bare_environment(start, "info", cwd=tmp_path)
    message = 'roadie: got no rich, typer; wanted what the command line is made of; run: pip install "roadie[cli]"\n'
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
