"""The public surface is a list. Whoever adds a name adds it here, to the changelog and to the documents."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import roadie

PUBLIC = [
    "Adapter",
    "AdapterBank",
    "LayerParameters",
    "Linear",
    "PeftModel",
    "RoadConfig",
    "RoadLayer",
    "RoadModel",
    "RoadieError",
    "Rotation",
    "Variant",
    "add_lora",
    "checkpoint",
    "compose",
    "convert",
    "distance",
    "embedded",
    "errors",
    "fit",
    "from_parameters",
    "get_peft_model",
    "identity",
    "inspect",
    "interpolate",
    "inverse",
    "load_together",
    "lora_rows",
    "mean",
    "power",
    "register",
    "rotate",
    "rotate_weight",
    "rows",
    "save_lora",
    "save_together",
    "shard",
    "subspaces",
    "subtract",
    "testing",
    "to_dense",
    "to_lora",
    "to_parameters",
    "train_only",
    "unregister",
]


def test_the_surface_is_this_list() -> None:
    assert roadie.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


def test_dir_shows_the_surface() -> None:
    assert dir(roadie) == sorted([*PUBLIC, "__version__"])


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_resolves(name: str) -> None:
    found = getattr(roadie, name)
    assert getattr(found, "__name__", "").rpartition(".")[2] == name


@pytest.mark.parametrize("name", ["RoadConfig", "PeftModel", "get_peft_model", "rotate"])
def test_names_are_not_kept(name: str) -> None:
    """A kept `roadie.PeftModel` would skip the routing of PEFT that each use of a tuner name implies."""
    getattr(roadie, name)
    assert name not in vars(roadie)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"roadie.*no attribute 'Roation'.*__all__"):
        roadie.Roation  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(roadie.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imported = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(imported) == PUBLIC


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.iter_modules(roadie.__path__)))
def test_lists_of_public_names_are_sorted_and_true(name: str) -> None:
    module = importlib.import_module(f"roadie.{name}")
    listed = list(getattr(module, "__all__", []))
    assert listed == sorted(set(listed))
    assert [public for public in listed if not hasattr(module, public)] == []
