"""Starting a deployment on a Ray of this machine or on a cluster, looking at it, and taking it down.

Call `config.prepare` before this is imported: Ray reads its environment then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from roadie.errors import ConfigError
from roadie.ray.application import build
from roadie.ray.config import Deployment, address_of

LOCAL_STORE_BYTES = 128 << 20
NAMESPACE = "serve"


@contextlib.contextmanager
def connected(deployment: Deployment) -> Iterator[bool]:
    """A connection to the cluster, or a Ray of this machine that ends with the block. Whether it is of this machine alone."""
    address = address_of(deployment)
    if address is None:
        _start_local(deployment)
    else:
        _connect(address)
    try:
        yield address is None
    finally:
        if address is None:
            with contextlib.suppress(Exception):
                serve.shutdown()
        ray.shutdown()


def _start_local(deployment: Deployment) -> None:
    ray.init(
        num_cpus=_num_cpus(deployment),
        include_dashboard=False,
        object_store_memory=deployment.object_store_bytes or LOCAL_STORE_BYTES,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level="warning",
        _node_ip_address="127.0.0.1",
    )


def _num_cpus(deployment: Deployment) -> int:
    """As many as the replicas are to have, or as there are: on one machine they may share."""
    autoscaling = deployment.autoscaling
    most = deployment.replicas if autoscaling is None else autoscaling.get("max_replicas", 1)
    wanted = most * float(deployment.resources.get("num_cpus", 1))
    return max(os.cpu_count() or 1, int(-(-wanted // 1)))


def _connect(address: str) -> None:
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"got address {address!r} ({error}); wanted that of a Ray cluster that runs; start one with ray start --head, or "
            "leave the address out"
        ) from None


def start(deployment: Deployment) -> None:
    """Deploy, and return when the application runs, or raise `ConfigError` where it cannot.

    One of that name that runs is replaced: new replicas first, the old ones when they have answered what they have.
    """
    application = build(deployment)
    serve.start(
        http_options=HTTPOptions(
            host=deployment.host,
            port=deployment.port,
            keep_alive_timeout_s=max(1, round(deployment.http.keep_alive_s)),
            request_timeout_s=deployment.http.request_timeout_s + 30,
        )
    )
    try:
        serve.run(application, name=deployment.name, route_prefix=deployment.route_prefix)
    except RuntimeError as error:
        raise ConfigError(f"got an application that does not start; wanted one that does: {error}") from None


def stop(deployment: Deployment) -> None:
    """Take the application down, when it has answered what it accepted."""
    serve.delete(deployment.name)


def standing(deployment: Deployment) -> list[str]:
    """How it stands, in Serve's words: all of it first, then each part; nothing where there is no such application."""
    found = serve.status().applications.get(deployment.name)
    if found is None:
        return []
    lines = [f"{found.status.value} {found.message}".rstrip()]
    for name, part in sorted(found.deployments.items()):
        states = ", ".join(f"{count} {state.lower()}" for state, count in part.replica_states.items())
        lines.append(f"{name}: {part.status.value.lower()} ({states}) {part.message}".rstrip())
    return lines


def end_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set from now on; made before `start`, no signal that comes meanwhile is lost."""
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    return over
