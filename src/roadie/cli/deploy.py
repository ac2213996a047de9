"""`roadie deploy`: replicas of an engine with many adapters on Ray Serve, on this machine or a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from roadie.extras import need

if TYPE_CHECKING:
    from roadie.ray.config import Deployment

NOT_THERE = 1


def deploy(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="What to deploy; see below.", show_default=False)
    ],
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster; 'auto': the one of this machine.", show_default="as in CONFIG.yaml, or RAY_ADDRESS"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file, show what would be deployed, and end.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Show how the deployment on the cluster stands.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Take the deployment on the cluster down.")] = False,
) -> None:
    """Deploy replicas of roadie's server with Ray Serve: the same API, over as many machines as a cluster has.

    Without an address it starts a Ray on this machine, serves until SIGTERM or Ctrl-C, and ends it. With one it deploys to that
    cluster and returns; deploying again replaces what runs, replica by replica.

    \b
    CONFIG.yaml:
      model: meta-llama/Llama-3.2-1B     # left out: the small model that comes with roadie
      adapters: s3://bucket/adapters     # a folder or URI that all machines reach
      replicas: 2                        # or autoscaling: {min_replicas: 1, max_replicas: 8}
      resources: {num_gpus: 1}           # of one replica
      api_keys: keys.yaml                # roadie api-key makes it
      limits: {num_slots: 64}
    Also: address, host, port, route_prefix, name, allow_from, fronts, scratch, http,
    health_check_period_s, health_check_timeout_s, revision, trust_remote_code, allow_pickle.

    \b
    Examples:
      roadie deploy deploy.yaml
      roadie deploy deploy.yaml --address auto
      roadie deploy deploy.yaml --address auto --stop
      serve run roadie.ray:app config=deploy.yaml

    All of it: docs/ray.md.
    """
    need("ray")
    from roadie.ray.config import prepare, read

    deployment = read(config)
    if address is not None:
        deployment = replace(deployment, address=address)
    prepare(deployment)
    if dry_run:
        typer.echo(_shown(deployment))
    elif status or stop:
        _look_at(deployment, is_end=stop)
    else:
        _deploy(deployment)


def _shown(deployment: Deployment) -> str:
    from roadie.ray.config import address_of, url_of

    count = f"{deployment.replicas}" if deployment.autoscaling is None else f"{deployment.autoscaling}"
    return "\n".join(
        (
            f"{deployment.name}: {deployment.http.model_name}",
            f"  on:        {address_of(deployment) or 'a Ray of its own on this machine'}",
            f"  replicas:  {count}, each {deployment.resources}; fronts: {deployment.fronts}",
            f"  adapters:  {deployment.adapters or 'a new folder on this machine'}",
            f"  keys:      {deployment.api_keys or 'none'}",
            f"  at:        {url_of(deployment)}",
        )
    )


def _look_at(deployment: Deployment, *, is_end: bool) -> None:
    from roadie.errors import ConfigError
    from roadie.ray import launch
    from roadie.ray.config import address_of

    if address_of(deployment) is None:
        raise ConfigError(
            "got no address of a cluster; wanted one; say --address auto. A deployment on a Ray of its own ends with "
            "Ctrl-C where it was started"
        )
    with launch.connected(deployment):
        lines = launch.standing(deployment)
        if is_end and lines:
            launch.stop(deployment)
            lines = ["is down"]
    typer.echo("\n  ".join((f"{deployment.name}: {(lines or ['not there'])[0]}", *lines[1:])))
    if not lines:
        raise typer.Exit(NOT_THERE)


def _deploy(deployment: Deployment) -> None:
    from roadie.ray import launch
    from roadie.ray.config import url_of

    with launch.connected(deployment) as is_local:
        over = launch.end_signals() if is_local else None
        launch.start(deployment)
        typer.echo(f"roadie serves {deployment.http.model_name} at {url_of(deployment)}")
        if over is not None:
            over.wait()
            launch.stop(deployment)
