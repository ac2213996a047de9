"""Everything of vLLM that is touched or relied on is there; and what happens where it is not."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

import logging
from pathlib import Path
from pkgutil import resolve_name

import vllm
from tests.vllm import cases
from vllm.lora.peft_helper import PEFTHelper

from roadie.errors import ConfigError
from roadie.vllm import contract, plugin, register
from roadie.vllm.contract import OVERRIDE, Symbol


@pytest.mark.smoke
def test_this_vllm_has_every_symbol() -> None:
    assert contract.missing() == []
    assert contract.refusal() is None


@pytest.mark.parametrize(
    ("symbol", "problem"),
    [
        (Symbol("vllm.lora.nothing", "Name"), "No module named"),
        (Symbol("vllm.lora.request", "Nothing"), "has no attribute 'Nothing'"),
        (Symbol("vllm.lora.request", "LoRARequest", takes=("colour",)), "takes no colour"),
        (Symbol("vllm.lora.model_manager", "LoRAModelManager", sets=("colour", "modules")), "sets no colour"),
        (Symbol("vllm.config", "VllmConfig.colour"), "has no attribute 'colour'"),
    ],
)
def test_what_is_missing_is_named(symbol: Symbol, problem: str) -> None:
    (found,) = contract.missing((symbol,))
    assert found.startswith(f"{symbol.module}:{symbol.name} (")
    assert problem in found


def test_the_touches_are_those_that_are_named() -> None:
    """What carries a wrapper of ours, or is ours, after `register`; each is in the list, and the list has nothing else."""
    register()
    register()  # processes may call it twice
    for symbol in contract.TOUCHED:
        value = resolve_name(f"{symbol.module}:{symbol.name}")
        if symbol.name == "_all_lora_classes":
            assert all(kind.__module__.startswith("vllm.") for kind in value)  # touched only while layers are made
        elif symbol.name == "LRUCacheWorkerLoRAManager":
            assert value.__module__ == "roadie.vllm.worker"
        else:
            assert value.__wrapped__.__module__.startswith("vllm.")
            assert not hasattr(value.__wrapped__, "__wrapped__") or "roadie" not in repr(value.__wrapped__)
    source = "".join(path.read_text() for path in Path(plugin.__file__).parent.glob("*.py"))
    assert source.count("    _replace(") == len(contract.TOUCHED) - 2
    assert source.count("lora_model_runner_mixin.LRUCacheWorkerLoRAManager =") == 1


@pytest.mark.parametrize("version", ["0.34.0", "0.31.1", "1.0", "unknown"])
def test_other_versions_are_refused_unless_they_are_allowed(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    assert f"got vLLM {version}; wanted >=0.32,<0.34" in (contract.refusal() or "")
    monkeypatch.setenv(OVERRIDE, "1")
    assert contract.refusal() is None


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.33.0rc1+cpu"])
def test_these_versions_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    assert contract.refusal() is None


def test_a_plugin_that_cannot_work_says_so_and_refuses_adapters_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    adapter = cases.write_adapter(tmp_path / "road", "road_1", 64, ("q_proj",))
    monkeypatch.setattr(vllm, "__version__", "0.99")
    monkeypatch.setattr(plugin, "_state", {})
    monkeypatch.setattr(PEFTHelper, "from_local_dir", PEFTHelper.__dict__["from_local_dir"])  # put back at the end
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR):
        register()
    assert "NOT active" in caplog.text
    with pytest.raises(ConfigError, match=r"plug-in is not active: got vLLM 0\.99"):
        PEFTHelper.from_local_dir(str(adapter), 128)
    with pytest.raises(FileNotFoundError):
        PEFTHelper.from_local_dir(str(tmp_path), 128)
