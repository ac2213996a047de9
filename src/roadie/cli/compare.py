"""`roadie compare`: how far adapters are apart, and what two of them share."""

from __future__ import annotations

from typing import Annotated

import typer

from roadie.cli.findings import AsJson, Output, Png, present
from roadie.cli.options import AllowPickle, Overwrite


def compare(
    path: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]PATH",
            help="Two adapters or more: folders, or repositories of the hub.",
            show_default=False,
        ),
    ],
    output: Output = None,
    png: Png = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Show how far adapters of one base model are apart, and what the closest two share. No model is loaded.

    Distance: how differently two adapters change an output, relative to it. Alignment: 1 if they change alike, 0 if they
    have nothing in common, -1 if each undoes the other. Variants and group sizes may differ.

    \b
    Examples:
      roadie compare polite french
      roadie compare adapters/* --output families.html
      roadie compare polite french --json
    """
    from roadie.training.inspection import check_outputs, find_subjects, gather
    from roadie.training.models import ModelSource

    if len(path) < 2:
        raise typer.BadParameter("wanted two adapters or more; roadie inspect shows one")
    check_outputs(output, png, overwrite=overwrite)
    gathered = gather(find_subjects(path), model=ModelSource(allow_pickle=allow_pickle))
    present(gathered, output=output, png=png, overwrite=overwrite, as_json=as_json, portraits=False, details=0)
