"""`roadie inspect`: what adapters do, in numbers and pictures."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import typer

from roadie.cli.findings import AsJson, Output, Png, present
from roadie.cli.options import AllowPickle, Model, Overwrite, Revision, TrustRemoteCode


def inspect(
    path: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]PATH",
            help="Adapters: folders, or repositories of the hub. With --text also LoRA and other PEFT adapters, and folders "
            "of whole models.",
            show_default=False,
        ),
    ],
    output: Output = None,
    png: Png = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Run the model on this text, and show how far its hidden states move; repeatable. Files and folders as "
            "roadie train reads them.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="How much of the text to read.")] = 4096,
    details: Annotated[
        int, typer.Option("--details", help="Adapters to show in full in the report: those that change most.", min=0)
    ] = 4,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    model: Model = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Show what adapters do to each layer, and how they stand to each other: tables here, pictures in a report.

    Angle and scale are those of the 2 x 2 blocks; the change is that of outputs, relative. No model is loaded unless there
    is a text. docs/inspecting.md explains the report.

    \b
    Examples:
      roadie inspect my-adapter --output report.html
      roadie inspect adapters/* -o all.html --png figures
      roadie inspect road=my-adapter lora=my-lora full=my-model --text notes.txt -o states.html
      roadie inspect my-adapter --json
    """
    from roadie.training.corpus import TextSettings
    from roadie.training.inspection import check_outputs, find_subjects, gather
    from roadie.training.models import ModelSource

    check_outputs(output, png, overwrite=overwrite)
    settings = TextSettings(tuple(text), tokens) if text else None
    source = ModelSource(model, revision, trust_remote_code, allow_pickle)
    with _quiet_where_needed(settings is not None):
        gathered = gather(find_subjects(path), text=settings, model=source)
    present(gathered, output=output, png=png, overwrite=overwrite, as_json=as_json, portraits=True, details=details)


def _quiet_where_needed(has_text: bool) -> AbstractContextManager[None]:
    """transformers is imported, and silenced, only where a model is run: that takes longer than all the rest."""
    if not has_text:
        return nullcontext()
    from roadie.cli.quiet import quiet_libraries

    return quiet_libraries()
