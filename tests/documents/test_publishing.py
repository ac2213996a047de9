"""What is published says one thing: versions, pins, supported Pythons, and the folders and targets that workflows name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

import roadie
from roadie.serving import continuous_batching

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DATA = tomllib.loads((ROOT / "packages" / "roadie-embedded-model" / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_version_is_one() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == roadie.__version__
    assert f"## [{roadie.__version__}]" in read("CHANGELOG.md")
    (wanted,) = PROJECT["optional-dependencies"]["demo"]
    lowest, below = re.fullmatch(rf"{DATA['name']}>=([\d.]+),<([\d.]+)", wanted).groups()
    first = [tuple(map(int, version.split("."))) for version in (lowest, DATA["version"], below)]
    assert first == sorted(first)


def test_who_made_it_and_the_licence_are_the_same_everywhere() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert PROJECT["authors"] == DATA["authors"] == citation["authors"] == [{"name": "The roadie developers"}]
    assert PROJECT["license"] == citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("extra", ["eval", "serve"])
def test_no_extra_brings_a_transformers_that_the_server_refuses(extra: str) -> None:
    major, minor = continuous_batching.NEWEST_TESTED
    assert f"transformers<{major}.{minor + 1}" in PROJECT["optional-dependencies"][extra]


def test_hooks_run_the_version_of_the_tests() -> None:
    pinned = re.search(r"^ruff==\S+$", read("constraints.txt"), re.MULTILINE)[0]
    hooks = [
        hook for repository in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repository["hooks"]
    ]
    assert [hook["additional_dependencies"] for hook in hooks if "ruff" in hook["id"]] == [[pinned], [pinned]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_runs_what_there_is(path: Path) -> None:
    text = read(path)
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert not re.findall(r"uses: (?!\./)\S+@(?![0-9a-f]{40} # v)", text)  # a tag can be moved, a commit cannot
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= targets
    assert [
        name
        for name in re.findall(r"constraints[\w-]*\.txt|packages/[\w-]+|\./\.github/\S+", text)
        if not (ROOT / name).exists()
    ] == []


def test_tests_run_on_the_oldest_and_the_newest_python() -> None:
    classified = {each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)}
    linux = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]["linux"]["strategy"]["matrix"]["include"]
    run = {row["python"]: row["constraints"] for row in linux}
    by_age = sorted(classified, key=lambda version: int(version.partition(".")[2]))
    assert PROJECT["requires-python"] == f">={by_age[0]}"
    assert (run[by_age[0]], run[by_age[-1]]) == ("constraints-lowest.txt", "constraints.txt")
    assert set(run) <= classified
