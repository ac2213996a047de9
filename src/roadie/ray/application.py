"""The application, as Serve has it: fronts that take HTTP, replicas of the server, and a directory of adapters.

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

from roadie.errors import ConfigError
from roadie.ray.config import Deployment, read
from roadie.ray.directory import Directory
from roadie.ray.front import Front
from roadie.ray.replica import Replica
from roadie.serving.http.keys import read_keys

DIRECTORY, REPLICA, FRONT = "directory", "replica", "front"
_BESIDE = 1000
"""Calls that a process takes beside those that generate, which the gate counts: whoever is too many is to be told so."""


def application(arguments: Mapping[str, Any]) -> Application:
    """See `roadie.ray.app`."""
    values = dict(arguments)
    path = values.pop("config", None)
    if path is not None and values:
        raise ConfigError(f"got config and {', '.join(values)}; wanted a file, or its content")
    return build(read(path) if path is not None else Deployment.from_mapping(values, Path.cwd()))


def build(deployment: Deployment) -> Application:
    """The application of a deployment; the files that it names are read here. Raises `ConfigError`."""
    if deployment.adapters is None:
        deployment = replace(deployment, adapters=tempfile.mkdtemp(prefix="roadie-adapters-"))
    keys = read_keys(deployment.api_keys) if deployment.api_keys else None
    most = deployment.http.max_concurrent_requests + _BESIDE
    looked_after = {
        "health_check_period_s": deployment.health_check_period_s,
        "health_check_timeout_s": deployment.health_check_timeout_s,
        "graceful_shutdown_timeout_s": deployment.http.drain_timeout_s,
        "max_ongoing_requests": most,
    }
    small = {"ray_actor_options": {"num_cpus": 0}}
    count: dict[str, Any] = {"num_replicas": deployment.replicas}
    if deployment.autoscaling is not None:
        count = {"autoscaling_config": dict(deployment.autoscaling)}
    directory = serve.deployment(name=DIRECTORY, num_replicas=1, max_ongoing_requests=100_000, **small)(Directory)
    replicas = serve.deployment(name=REPLICA, ray_actor_options=dict(deployment.resources), **looked_after, **count)(
        Replica
    )
    front = serve.deployment(name=FRONT, num_replicas=deployment.fronts, **looked_after, **small)(
        serve.ingress()(Front)
    )
    known = directory.bind(deployment.adapters, deployment.allow_from, deployment.limits.max_adapter_bytes, REPLICA)
    return front.bind(deployment.http, replicas.bind(deployment, keys, known))
