"""What `roadie inspect` and `roadie compare` print and write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from roadie.inspect import Comparison, Findings, Portrait, StateChange
    from roadie.training.inspection import Gathered

MOST_ROWS = 12

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.html",
        help="Write the report as one page, which needs no network. A page of that name is replaced.",
        show_default=False,
    ),
]
Png = Annotated[
    Path | None,
    typer.Option(
        "--png", metavar="FOLDER", help="Write every figure as a PNG, for light and for dark.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def present(
    gathered: Gathered,
    *,
    output: Path | None,
    png: Path | None,
    overwrite: bool,
    as_json: bool,
    portraits: bool,
    details: int,
) -> None:
    """Write what was asked for, then print the numbers."""
    from roadie.inspect import examine, report
    from roadie.training.inspection import write

    if output is None and png is None:
        findings = examine(gathered.adapters, gathered.states)
    else:
        made = report(gathered.adapters, gathered.states, portraits=portraits, detailed=details)
        write(made, page=output, pngs=png, overwrite=overwrite)
        findings = made.findings
    if as_json:
        typer.echo(json.dumps(findings.to_mapping(), indent=2, allow_nan=False))
        return
    for warning in findings.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo("\n\n".join(_parts(findings, portraits=portraits)))
    for path in (output, png):
        if path is not None:
            typer.echo(f"\nwritten: {path}")


def _parts(findings: Findings, *, portraits: bool) -> list[str]:
    parts = []
    if portraits and findings.portraits:
        parts.append(_adapters(findings.portraits))
    if portraits and len(findings.portraits) == 1:
        parts.append(_layers(findings.portraits[0]))
    if findings.comparison:
        parts.append(_pairs(findings.comparison))
    if findings.states:
        parts.append(_states(findings.states))
    return parts


def _adapters(portraits: Sequence[Portrait]) -> str:
    from roadie.training.text_table import size, table

    head = ("adapter", "variant", "layers", "parameters", "size", "angle, rms", "mean ln(scale)", "change", "mirrored")
    ordered = sorted(portraits, key=lambda portrait: -portrait.change)
    rows = [
        (
            portrait.name,
            " ".join(portrait.variants),
            f"{len(portrait.layers)}",
            f"{portrait.parameters:,}",
            size(portrait.num_bytes),
            _number(portrait.angle_degrees, 2),
            _number(portrait.log_scale, 4),
            _number(portrait.change, 4),
            f"{portrait.mirrored}",
        )
        for portrait in ordered[:MOST_ROWS]
    ]
    return table(rows, head=head) + _left_out(len(portraits), "adapters, which change less")


def _layers(portrait: Portrait) -> str:
    from roadie.training.text_table import table

    rows = [
        (
            layer.path,
            _number(layer.angle_degrees, 2),
            _number(layer.log_scale, 4),
            _number(layer.change, 4),
            f"{layer.mirrored}",
        )
        for layer in portrait.most_changed[:MOST_ROWS]
    ]
    head = ("most changed layers", "angle, rms", "mean ln(scale)", "change", "mirrored")
    return table(rows, head=head) + _left_out(len(portrait.layers), "layers, which change less")


def _pairs(comparison: Comparison) -> str:
    from roadie.training.text_table import table

    count = len(comparison.names)
    pairs = sorted((comparison.distance[a][b], a, b) for a in range(count) for b in range(a + 1, count))
    rows = [
        (
            f"{comparison.names[a]} and {comparison.names[b]}",
            _number(distance, 4),
            _number(comparison.alignment[a][b], 3),
        )
        for distance, a, b in pairs[:MOST_ROWS]
    ]
    return table(rows, head=("closest pairs", "distance", "alignment")) + _left_out(len(pairs), "pairs, farther apart")


def _states(changes: Sequence[StateChange]) -> str:
    from roadie.training.text_table import table

    head = ("hidden states after", *(f"{what} {change.name}" for change in changes for what in ("dM", "dD")))
    rows = [
        (
            "embeddings" if places[0].place == 0 else f"block {places[0].place}",
            *(f"{value:.4f}" for place in places for value in (place.length, place.direction)),
        )
        for places in zip(*(change.places for change in changes), strict=True)
    ]
    return table(rows, head=head)


def _left_out(count: int, what: str) -> str:
    return f"\nand {count - MOST_ROWS} more {what}" if count > MOST_ROWS else ""


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
