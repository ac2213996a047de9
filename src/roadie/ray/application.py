"""The application, as Serve has it: replicas of the engine, a directory, and fronts that take HTTP.

roadie deploy deploy.yaml                              on this machine, or on a cluster
serve run roadie.ray:app config=deploy.yaml            the same by Serve's own command line
import_path: roadie.ray:app, args: {model: ..., ...}   in a config file of Serve, for serve deploy and KubeRay
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from roadie.errors import ConfigError
from roadie.ray.config import Deployment, EngineKind, read
from roadie.ray.directory import Directory
from roadie.ray.engines import check_vllm
from roadie.ray.front import Front
from roadie.ray.replica import Replica
from roadie.serving.http.keys import Keys, read_keys

DIRECTORY, REPLICA, FRONT = "directory", "replica", "front"
STATS_PERIOD_S = 1.0
_MANY = 100_000


def application(arguments: Mapping[str, Any]) -> Application:
    """See `roadie.ray.app`."""
    values = dict(arguments)
    path = values.pop("config", None)
    if path is not None and values:
        raise ConfigError(f"got config and {', '.join(values)}; wanted a file, or its content")
    return build(read(path) if path is not None else Deployment.from_mapping(values, Path.cwd()))


def build(deployment: Deployment) -> Application:
    """The application of a deployment; the files that it names are read here. Raises `ConfigError`."""
    if deployment.engine is EngineKind.VLLM:
        check_vllm()
    deployment = with_adapters(deployment)
    keys = read_keys(deployment.api_keys) if deployment.api_keys else None
    directory = _directory(deployment)
    return _front(deployment, keys, directory, _replica(deployment).bind(deployment, directory))


def with_adapters(deployment: Deployment) -> Deployment:
    """A deployment with a folder of adapters: a new one on this machine where it names none."""
    if deployment.adapters is not None:
        return deployment
    return replace(deployment, adapters=tempfile.mkdtemp(prefix="roadie-adapters-"))


def _directory(deployment: Deployment) -> Any:
    options = serve.deployment(
        name=DIRECTORY, num_replicas=1, max_ongoing_requests=_MANY, ray_actor_options={"num_cpus": 0}
    )
    return options(Directory).bind(deployment.adapters, deployment.allow_from, deployment.limits.max_adapter_bytes)


def _replica(deployment: Deployment) -> Any:
    limits = deployment.limits
    count: dict[str, Any] = {"num_replicas": deployment.replicas}
    if deployment.autoscaling is not None:
        count = {"autoscaling_config": dict(deployment.autoscaling)}
    return serve.deployment(
        name=REPLICA,
        max_ongoing_requests=limits.max_running + limits.max_queued,
        ray_actor_options=dict(deployment.resources),
        health_check_period_s=deployment.health_check_period_s,
        health_check_timeout_s=deployment.health_check_timeout_s,
        graceful_shutdown_timeout_s=deployment.http.drain_timeout_s,
        request_router_config=RequestRouterConfig(
            request_router_class="roadie.ray.routing.AdapterRouter",
            request_routing_stats_period_s=STATS_PERIOD_S,
        ),
        **count,
    )(Replica)


def _front(deployment: Deployment, keys: Keys | None, directory: Any, replicas: Any) -> Application:
    front = serve.deployment(
        name=FRONT,
        num_replicas=deployment.fronts,
        max_ongoing_requests=deployment.http.max_concurrent_requests + 1000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=deployment.health_check_period_s,
        health_check_timeout_s=deployment.health_check_timeout_s,
        graceful_shutdown_timeout_s=deployment.http.drain_timeout_s,
    )(serve.ingress()(Front))
    return front.bind(deployment, keys, directory, replicas)
