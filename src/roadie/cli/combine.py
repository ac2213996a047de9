"""`roadie combine`: adapters multiplied, inverted, averaged, compared and converted; one command an operation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roadie.cli.options import AllowPickle, Json, Model, Overwrite, Revision, TrustRemoteCode, Variant

if TYPE_CHECKING:
    from roadie.training.combining import Combined, Distances, LoraWritten

combine = typer.Typer(
    no_args_is_help=True,
    help="Make one adapter of several, or of one: multiplied, inverted, averaged, converted. No model is loaded but for to-lora.",
)


class Metric(str, Enum):
    """What `--metric` takes."""

    CHORDAL = "chordal"
    GEODESIC = "geodesic"


def _adapter(name: str, help_text: str) -> Any:
    return typer.Argument(metavar=name, help=help_text, show_default=False)


One = Annotated[str, _adapter("ADAPTER", "An adapter: a folder, or a repository of the hub.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter.", show_default=False)]


@combine.command(short_help="Adapters one after the other, as one.")
def compose(
    adapters: Annotated[list[str], _adapter("ADAPTER...", "Adapters, applied in this order.")],
    output: Output,
    as_json: Json = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """The product of adapters: one adapter that does what they do one after the other, in the order given.

    \b
    Example:
      roadie combine compose french polite --output polite-french
    """
    from roadie.training.combining import compose_to_disk

    _show(compose_to_disk(adapters, output, overwrite=overwrite, allow_pickle=allow_pickle), as_json)


@combine.command(short_help="What undoes an adapter.")
def inverse(
    adapter: One,
    output: Output,
    as_json: Json = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """The adapter that undoes another one.

    \b
    Example:
      roadie combine inverse french --output not-french
    """
    from roadie.training.combining import inverse_to_disk

    _show(inverse_to_disk(adapter, output, overwrite=overwrite, allow_pickle=allow_pickle), as_json)


@combine.command(short_help="An adapter made stronger or weaker.")
def power(
    adapter: One,
    exponent: Annotated[float, typer.Option("--exponent", "-e", help="0.5: half of it; 2: twice.", show_default=False)],
    output: Output,
    as_json: Json = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """An adapter at another strength. Whole numbers always work; others need a logarithm, which all road_1 blocks have.

    \b
    Example:
      roadie combine power french --exponent 0.5 --output half-french
    """
    from roadie.training.combining import power_to_disk

    _show(power_to_disk(adapter, exponent, output, overwrite=overwrite, allow_pickle=allow_pickle), as_json)


@combine.command(short_help="An adapter on the way from one to another.")
def interpolate(
    start: Annotated[str, _adapter("START", "The adapter at 0.")],
    end: Annotated[str, _adapter("END", "The adapter at 1.")],
    at: Annotated[float, typer.Option("--at", "-t", help="How far, from 0 to 1; may be beyond.", show_default=False)],
    output: Output,
    as_json: Json = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """The adapter on the way from one to another; for road_1 the way is a geodesic.

    \b
    Example:
      roadie combine interpolate french polite --at 0.25 --output a-quarter-polite
    """
    from roadie.training.combining import interpolate_to_disk

    _show(interpolate_to_disk(start, end, at, output, overwrite=overwrite, allow_pickle=allow_pickle), as_json)


@combine.command(short_help="The mean of adapters.")
def mean(
    adapters: Annotated[list[str], _adapter("ADAPTER...", "Adapters: folders, or repositories of the hub.")],
    output: Output,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="A weight for each adapter, in their order; equal ones without it."),
    ] = None,
    magnitude_corrected: Annotated[
        bool, typer.Option("--magnitude-corrected", help="Make the mean as strong as the adapters are on average.")
    ] = False,
    as_json: Json = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """The mean of adapters on the group of rotations; weights are made to add up to 1.

    \b
    Example:
      roadie combine mean french polite --weight 2 --weight 1 --output mostly-french
    """
    from roadie.training.combining import mean_to_disk

    how = {"overwrite": overwrite, "allow_pickle": allow_pickle}
    _show(mean_to_disk(adapters, weight, output, magnitude_corrected=magnitude_corrected, **how), as_json)


@combine.command(short_help="What one adapter does that another does not.")
def subtract(
    adapter: One,
    removed: Annotated[str, _adapter("REMOVED", "The adapter to take away.")],
    output: Output,
    as_json: Json = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """What one adapter does that another does not: composed after REMOVED, the result is ADAPTER.

    \b
    Example:
      roadie combine subtract polite-french french --output polite
    """
    from roadie.training.combining import subtract_to_disk

    _show(subtract_to_disk(adapter, removed, output, overwrite=overwrite, allow_pickle=allow_pickle), as_json)


@combine.command(short_help="An adapter as another variant.")
def convert(
    adapter: One,
    output: Output,
    variant: Annotated[Variant | None, typer.Option(help="The new variant.", show_default=False)] = None,
    group_size: Annotated[
        int | None, typer.Option(help="The new group size; only for adapters that turn nothing.", show_default=False)
    ] = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """An adapter as another variant: exact towards road_2 and road_4; to road_1 the nearest, and what is lost is printed.

    \b
    Example:
      roadie combine convert french --variant road_1 --output small-french
    """
    from roadie.training.combining import convert_to_disk

    how = {"overwrite": overwrite, "allow_pickle": allow_pickle}
    wanted = variant.value if variant else None
    converted = convert_to_disk(adapter, output, variant=wanted, group_size=group_size, **how)
    facts = [
        ("lost", "nothing" if converted.is_exact else f"{converted.share_lost:.2%} of the change"),
        ("distance", f"{converted.distance:.3g}"),
        ("mirrored", f"{converted.mirrored_pairs} pairs"),
    ]
    _show(converted, as_json, facts)


@combine.command(name="to-lora", short_help="An adapter as a LoRA adapter of some rank.")
def to_lora(
    adapter: One,
    output: Output,
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="The rank in every layer.", show_default=False)
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Instead: the part of each layer's change to keep, 0 to 1.", show_default=False),
    ] = None,
    model: Model = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """The LoRA adapter that is nearest to an adapter, as PEFT stores it. Rotations are of high rank: look at the error.

    \b
    Examples:
      roadie combine to-lora french --rank 16 --output french-lora
      roadie combine to-lora french --share 0.9 --output french-lora
    """
    if (rank is None) == (share is None):
        raise typer.BadParameter("wanted either --rank or --share")
    from roadie.cli.quiet import quiet_libraries

    with quiet_libraries():
        from roadie.training.combining import lora_to_disk
        from roadie.training.models import ModelSource

        wanted = rank if rank is not None else share
        assert wanted is not None
        source = ModelSource(model, revision, trust_remote_code, allow_pickle)
        written = lora_to_disk(adapter, output, wanted, model=source, overwrite=overwrite)
    typer.echo(json.dumps(asdict(written), indent=2) if as_json else _lora(written))


@combine.command(short_help="How far adapters are apart.")
def distance(
    adapters: Annotated[list[str], _adapter("ADAPTER...", "Adapters: folders, or repositories of the hub.")],
    metric: Annotated[
        Metric, typer.Option(help="chordal: of outputs; geodesic: in radians and nepers.")
    ] = Metric.CHORDAL,
    as_json: Json = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """How far adapters are from each other, and from the base model.

    \b
    Example:
      roadie combine distance french polite terse
    """
    from roadie.training.combining import distances

    found = distances(adapters, metric.value, allow_pickle=allow_pickle)
    typer.echo(json.dumps(asdict(found), indent=2) if as_json else _matrix(found))


def _show(written: Combined, as_json: bool, more: Sequence[tuple[str, str]] = ()) -> None:
    """What was written, as a table or as JSON."""
    if as_json:
        typer.echo(json.dumps(asdict(written), indent=2))
        return
    from roadie.training.text_table import pairs

    facts = [
        ("adapter", written.output),
        ("made of", ", ".join(written.adapters)),
        ("base model", written.base_model or "not recorded"),
        ("variant", written.variant),
        ("group size", ", ".join(map(str, written.group_sizes))),
        ("layers", f"{written.layers}"),
        ("parameters", f"{written.parameters:,}"),
    ]
    typer.echo(pairs([*facts, *more]))


def _lora(written: LoraWritten) -> str:
    from roadie.training.text_table import pairs, table

    ranks = sorted(set(written.ranks.values()))
    facts = [
        ("LoRA adapter", written.output),
        ("made of", written.adapter),
        ("base model", written.base_model),
        ("parameters", f"{written.parameters:,}"),
        ("rank", f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"),
        ("error", f"{written.relative_error:.2%} of the change"),
    ]
    rows = [(path, f"{written.ranks[path]}", f"{error:.2%}") for path, error in written.errors.items()]
    return pairs(facts) + "\n\n" + table(rows, head=("layer", "rank", "error"))


def _matrix(found: Distances) -> str:
    from roadie.training.text_table import table

    rows = [(name, *(f"{value:.4f}" for value in row)) for name, row in zip(found.names, found.distances, strict=True)]
    return table(rows, head=(found.metric, *found.names))
