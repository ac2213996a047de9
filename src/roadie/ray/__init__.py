"""Ray Serve: replicas of an engine with many adapters, on one machine or a cluster. Needs `roadie[ray]`.

application   the application of Serve: `app` is what an import path names
launch        starting it and taking it down: what `roadie deploy` does
front         takes HTTP, and asks a replica
replica       the whole server but its socket, over the adapters that all share (`shelf`)
directory     which version of an adapter is in force, for all (`catalogue`, `storage`)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from roadie.extras import need

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["app"]


def app(arguments: Mapping[str, Any]) -> Application:
    """The application: the import path `roadie.ray:app` of `serve run`, `serve build` and of Serve's config files.

    arguments: what a deploy.yaml says, or `config`, the path of one. Raises `ConfigError`.
    """
    need("ray")
    from roadie.ray.application import application

    return application(arguments)
