"""`roadie info`: what is in an adapter file."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from roadie.cli.options import AllowPickle, Json

if TYPE_CHECKING:
    from roadie.training.summary import AdapterSummary, Range


def info(
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH", help="An adapter: a folder, or a repository of the hub.", show_default=False),
    ] = None,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Show which kernels rotate here, and why not others; no PATH then.")
    ] = False,
    as_json: Json = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Show what is in an adapter file: layers, sizes, settings, and how far it turns and scales. No model is loaded.

    Angles and scales are those of the rotation itself, an output each: 0 degrees and 1 change nothing.

    \b
    Examples:
      roadie info my-adapter
      roadie info my-adapter --json
      roadie info --runtime
    """
    if runtime == (path is not None):
        raise typer.BadParameter("wanted either the PATH of an adapter or --runtime")
    if path is None:
        print_runtime(as_json)
        return
    from roadie.training.adapters import adapter_folder
    from roadie.training.summary import summarise

    with adapter_folder(path, allow_pickle=allow_pickle) as folder:
        summary = summarise(folder)
    typer.echo(json.dumps(asdict(summary), indent=2) if as_json else show(summary, path))


def print_runtime(as_json: bool) -> None:
    """What computes here, as tables or JSON."""
    from roadie.training.runtime import inspect_runtime
    from roadie.training.text_table import pairs, table

    here = inspect_runtime()
    if as_json:
        typer.echo(json.dumps(asdict(here), indent=2))
        return
    facts = [("roadie", here.roadie), ("Python", here.python), ("threads", f"{here.threads}")]
    facts += [(name, version or "not installed") for name, version in here.versions.items()]
    rows = [(choice.device, choice.dtype, choice.used) for choice in here.choices]
    typer.echo(pairs(facts) + "\n\n" + table(rows, head=("device", "dtype", "kernel")))
    reasons = {(c.device, name, reason): None for c in here.choices for name, reason in c.refused.items()}
    typer.echo("")
    for device, name, reason in reasons:
        typer.echo(f"{name} on {device}: {reason}")


def show(summary: AdapterSummary, path: str) -> str:
    """The summary as two tables."""
    from roadie.training.text_table import pairs, size, table

    facts = [
        ("adapter", path),
        ("base model", summary.base_model or "not recorded"),
        ("variant", ", ".join(summary.variants)),
        ("group size", ", ".join(map(str, summary.group_sizes))),
        ("layers", f"{summary.layers}"),
        ("parameters", f"{summary.parameters:,} in {', '.join(summary.dtypes)}"),
        ("file", size(summary.file_bytes)),
        ("angle", f"{_range(summary.angle_degrees, 2)} degrees"),
        ("scale", _range(summary.scale, 4)),
        ("targets", ", ".join(summary.targets)),
        (
            "saved along",
            ", ".join((*summary.modules_to_save, *(f"{name} {list(shape)}" for name, shape in summary.other))),
        ),
        ("settings", ", ".join(f"{key}={value!r}" for key, value in summary.extras.items())),
    ]
    rows = [
        (
            kind.name,
            f"{kind.layers}",
            " ".join(map(str, kind.out_features)),
            " ".join(kind.variants),
            " ".join(map(str, kind.group_sizes)),
            f"{kind.parameters:,}",
            _range(kind.angle_degrees, 2),
            _range(kind.scale, 4),
        )
        for kind in summary.kinds
    ]
    head = ("modules", "layers", "outputs", "variant", "group", "parameters", "angle, degrees", "scale")
    return pairs([fact for fact in facts if fact[1]]) + "\n\n" + table(rows, head=head)


def _range(values: Range, digits: int) -> str:
    return f"{values.least:.{digits}f} to {values.most:.{digits}f}"
