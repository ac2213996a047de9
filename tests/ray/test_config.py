"""deploy.yaml: what is taken, and what is refused, before Ray is asked for anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from roadie.errors import ConfigError
from roadie.ray.config import Deployment, address_of, prepare, read, url_of


def written(folder: Path, content: Any) -> Path:
    path = folder / "deploy.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_an_empty_file_is_the_small_model_on_this_machine(tmp_path: Path) -> None:
    deployment = read(written(tmp_path, ""))
    assert (deployment.model, deployment.adapters, deployment.replicas) == (None, None, 1)
    assert deployment.http.model_name == "roadie-tiny"
    assert deployment.http.allowed_hosts == ("localhost", "127.0.0.1", "[::1]")
    assert url_of(deployment) == "http://127.0.0.1:8000"


def test_everything_of_a_file_arrives(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    content = {
        "model": "model",
        "adapters": "adapters",
        "allow_from": ["other", "s3://bucket/more"],
        "autoscaling": {"min_replicas": 2, "max_replicas": 4},
        "resources": {"num_gpus": 1},
        "limits": {"num_slots": 3, "tenant_weights": {"alice": 2.0}},
        "http": {"max_tokens": 9, "request_timeout_s": 5},
        "route_prefix": "/llm",
    }
    deployment = read(written(tmp_path, content))
    assert deployment.model == str(tmp_path / "model")
    assert (deployment.http.model_name, deployment.http.model_aliases) == ("model", (str(tmp_path / "model"),))
    assert deployment.adapters == str(tmp_path / "adapters")
    assert deployment.allow_from == (str(tmp_path / "other"), "s3://bucket/more")
    assert deployment.autoscaling == {"min_replicas": 2, "max_replicas": 4}
    assert (deployment.limits.num_slots, deployment.http.max_tokens) == (3, 9)
    assert deployment.limits.tenant_weights == {"alice": 2.0}
    assert url_of(deployment) == "http://127.0.0.1:8000/llm"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"replica": 2}, r"unknown setting replica; did you mean replicas\?; wanted some of model"),
        ({"limits": {"slots": 2}}, "unknown setting limits.slots"),
        ({"replicas": "two"}, "got replicas='two'; wanted a whole number"),
        ({"replicas": True}, "got replicas=True; wanted a whole number"),
        ({"replicas": 0}, "got replicas=0; wanted 1 to"),
        ({"port": 70000}, "got port=70000"),
        ({"engine": "vllm"}, "unknown setting engine"),
        ({"host": "0.0.0.0"}, "without API keys"),
        ({"autoscaling": {"min_replicas": 0}}, "min_replicas of 1 at least"),
        ({"allow_from": "folder"}, "wanted a list of texts"),
        ({"http": {"max_tokens": 0}}, "got max_tokens=0"),
        ({"http": 3}, "wanted a mapping"),
        ({"route_prefix": "llm"}, "wanted / or a path"),
        ({"health_check_period_s": 0}, "wanted a number above 0"),
        ({"object_store_bytes": 1}, "as Ray does"),
        (["adapters"], "wanted a mapping"),
        ("{", "deploy.yaml"),
        ("replicas: 1\nreplicas: 2", "replicas twice"),
    ],
)
def test_what_cannot_work_is_refused_with_the_name_of_the_file(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refusal:
        read(written(tmp_path, content))
    assert str(tmp_path / "deploy.yaml") in str(refusal.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "nothing.yaml")


def test_a_ray_of_its_own_stays_on_loopback_and_a_cluster_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in ("RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    prepare(Deployment(address="auto"))
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ
    prepare(Deployment())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert address_of(Deployment()) == "10.0.0.1:6379"
    assert address_of(Deployment(address="auto")) == "auto"
