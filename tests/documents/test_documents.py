"""What the documents say of files, commands, versions and figures is compared with what there is; README's code runs alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import HANG_S

import roadie

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
VERSIONS = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def section(text: str, title: str) -> str:
    """What stands below the heading `title`, down to the next heading of the same or a higher level."""
    marks, rest = re.search(rf"^(#+) {re.escape(title)}\n(.*)", text, flags=re.MULTILINE | re.DOTALL).groups()
    return re.split(rf"^#{{1,{len(marks)}}} ", rest, flags=re.MULTILINE)[0]


def test_the_code_of_the_readme_runs(tmp_path: Path) -> None:
    """All Python of the README, in order, as one program, in an empty folder."""
    blocks = code_blocks(README, "python")
    assert blocks
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr


PACKAGE = ROOT / "src" / "roadie"
MODULES = [path for path in PACKAGE.rglob("*.py") if path.stat().st_size]


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 600


def test_the_architecture_lists_the_files_and_packages_there_are() -> None:
    files = {path.name for path in MODULES if path.parent == PACKAGE}
    packages = {path.relative_to(PACKAGE).parts[0] + "/" for path in MODULES if path.parent != PACKAGE}
    listed = re.findall(r"^- `([^`]+)`: \S", section(ARCHITECTURE, "Files"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(files | packages)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_documents_name_exist(document: Path) -> None:
    named = re.findall(r"`((?:src|tests|scripts|examples|docs)/[\w./-]+)`", document.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


STANDING = [
    path for path in DOCUMENTS if path.parent.name != "decisions" and path.name != "CHANGELOG.md"
]  # not of the past


@pytest.mark.parametrize("document", STANDING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_that_documents_name_exist(document: Path) -> None:
    """As the rules name them, `package/module.py`, from the package on."""
    packages = "|".join(sorted({path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE}))
    named = re.findall(rf"`((?:{packages})/[\w/]+\.py)`", document.read_text(encoding="utf-8"))
    assert [name for name in named if not (PACKAGE / name).exists()] == []


def test_every_claim_about_peft_names_a_test_there_is() -> None:
    table = section((ROOT / "docs" / "migrating.md").read_text(encoding="utf-8"), "What changes")
    named = re.findall(r"^\|.*\| ([^|]+) \|$", table, flags=re.MULTILINE)[1:]  # without the heading
    assert len(named) > 10
    assert set(named) <= {f"`{path.name}`" for path in (ROOT / "tests" / "faults").glob("test_*.py")}


def test_targets_of_make_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {
        name
        for path in DOCUMENTS
        for name in re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= targets


def test_the_commands_of_the_command_line_are_listed() -> None:
    from roadie.cli.app import app

    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    listed = re.findall(r"^roadie ([a-z-]+) ", page, flags=re.MULTILINE)
    verbs = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    verbs |= {group.name for group in app.registered_groups}
    assert set(listed) == verbs
    assert len(listed) == len(verbs)
    named = set(re.findall(r"(?:^|`)roadie ([a-z][a-z-]+)", README, flags=re.MULTILINE))
    assert {"train", "merge", "serve"} <= named <= verbs


def test_names_that_the_documents_take_from_roadie_are_public() -> None:
    used = {name for path in DOCUMENTS for name in re.findall(r"`roadie\.(\w+)", path.read_text(encoding="utf-8"))}
    used |= set(re.findall(r"\broadie\.(\w+)", "\n".join(code_blocks(README, "python"))))
    modules = {path.stem for path in (ROOT / "src" / "roadie").iterdir()}
    assert used - {"__all__"} <= {*roadie.__all__, *modules}


def supported_versions() -> dict[str, tuple[str, str, str]]:
    """Row of the table of versions -> (range, oldest tested, newest tested)."""
    rows = re.findall(
        r"^\| (\w+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", section(VERSIONS, "Supported versions"), flags=re.MULTILINE
    )
    return {name: (wanted.strip().strip("`"), oldest.strip(), newest.strip()) for name, wanted, oldest, newest in rows}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.mark.parametrize("name", ["torch", "peft", "transformers", "accelerate", "bitsandbytes", "torchao", "trl"])
def test_supported_versions_are_those_that_are_installed_for_the_tests(name: str) -> None:
    extras = [item for extra in PROJECT["optional-dependencies"].values() for item in extra]
    wanted = next(item for item in [*PROJECT["dependencies"], *extras] if re.match(rf"{name}[<>=]", item))
    row = supported_versions()[name]
    assert row == (wanted.removeprefix(name), pins("constraints-lowest.txt")[name], pins("constraints.txt")[name])


def test_the_extras_are_listed() -> None:
    rows = re.findall(r"^\| (`.*`) \|", section(VERSIONS, "Extras"), flags=re.MULTILINE)
    assert sorted(re.findall(r"`([a-z-]+)`", " ".join(row.partition(" | ")[0] for row in rows))) == sorted(
        PROJECT["optional-dependencies"]
    )


def test_the_oldest_python_is_the_one_that_is_required() -> None:
    wanted, oldest, _ = supported_versions()["Python"]
    assert wanted == PROJECT["requires-python"] == f">={oldest}"


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([^\]]+)\]", changelog, flags=re.MULTILINE)[0] in ("Unreleased", roadie.__version__)


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(path.name for path in folder.glob("[0-9]*.md"))


TABLE = re.compile(r"<!-- table: which variant -->\n(.*?)<!-- end of table -->", flags=re.DOTALL)
MEASURED_AS = {"`road_1`, `stages=[2, 64]`": "road_1_stages_2", "`road_1`, `input_stages=[64]`": "road_1_input"}


def measured_losses(task: str) -> dict[str, str]:
    """Method -> mean test loss, from the generated page of a task."""
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section(page, task).splitlines()]
    heading = next(row for row in rows if row[0] == "method")
    where = heading.index("test loss")
    return {
        row[0]: f"{float(row[where].split()[0]):.3f}" for row in rows[rows.index(heading) + 2 :] if len(row) > where
    }


def test_the_figures_of_the_variants_are_those_that_were_measured() -> None:
    text = TABLE.search((ROOT / "docs" / "start.md").read_text(encoding="utf-8"))[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[3:]]
    steps = dict(
        re.findall(
            r"(\w+) (\d\.\d\d)", (ROOT / "docs" / "quality.md").read_text("utf-8").partition("own step:")[2][:400]
        )
    )
    prose, labels = measured_losses("language-topics"), measured_losses("docstring-package")
    served_as = {"road_1": "road", "road_2": "road", "road_4": "road", "road_1_stages_2": "road_stages_2"}
    assert len(rows) == 8
    for name, _, _, step, on_prose, on_labels in rows:
        method = MEASURED_AS.get(name, name.strip("`").lower().replace(" r=", "_r"))
        assert step == steps[served_as.get(method, method.replace("road_1_", "road_"))]
        assert on_prose == prose[method]
        assert on_labels in ("", labels.get(method))
