"""The engine of a replica: roadie's own, or vLLM with roadie's plug-in."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from roadie.errors import ConfigError
from roadie.ray.config import Deployment, EngineKind
from roadie.serving.engine import Engine
from roadie.serving.registry import Registry
from roadie.training.models import ModelSource, best_device, load_model, load_tokenizer


def source_of(deployment: Deployment) -> ModelSource:
    """Which base model."""
    return ModelSource(deployment.model, deployment.revision, deployment.trust_remote_code, deployment.allow_pickle)


def make_engine(deployment: Deployment, folder: Path) -> Engine:
    """An engine that is not started yet. folder: of this replica; adapters come from `folder/versions` alone."""
    if deployment.engine is EngineKind.VLLM:
        check_vllm()
        from roadie.ray.vllm_engine import VllmEngine

        return VllmEngine(source_of(deployment), deployment.limits, deployment.vllm)
    from roadie.serving.batch_engine import ContinuousBatchingEngine

    source = source_of(deployment)
    model: Any = load_model(source).to(best_device())
    return ContinuousBatchingEngine(model, load_tokenizer(source), _registry(deployment, folder), deployment.limits)


def _registry(deployment: Deployment, folder: Path) -> Registry:
    """One that finds nothing by itself: what there is comes from the directory."""
    root = folder / "none"
    root.mkdir(exist_ok=True)
    return Registry.open(
        root,
        state_file=folder / "state.json",
        allowed_roots=[folder / "versions"],
        max_adapter_bytes=deployment.limits.max_adapter_bytes,
    )


def check_vllm() -> None:
    """Raise `ConfigError` where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "got engine: vllm where vLLM is not installed; wanted it on every machine of the cluster; run: "
            "pip install 'roadie[ray,vllm]', or leave engine out"
        )
