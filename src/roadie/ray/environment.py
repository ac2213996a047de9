"""What Ray reads from the environment when it is imported, for a Ray of this machine alone. Nothing here imports ray."""

from __future__ import annotations

import os

from roadie.ray.config import Deployment

_OF_ONE_MACHINE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's word for a cluster that others may join; without it: loopback
}


def address_of(deployment: Deployment) -> str | None:
    """Of the cluster that is meant; None: a Ray of its own on this machine."""
    return deployment.address or os.environ.get("RAY_ADDRESS") or None


def prepare(deployment: Deployment) -> None:
    """Before ray is imported: a Ray of this machine listens on loopback alone, and tells nobody that it runs."""
    if address_of(deployment) is None:
        for name, value in _OF_ONE_MACHINE.items():
            os.environ.setdefault(name, value)
