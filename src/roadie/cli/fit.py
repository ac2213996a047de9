"""`roadie fit`: the adapter nearest to a fine-tuned model, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roadie.cli.options import AdaptGroupSize, Exclude, Json, Model, Overwrite, Revision, TrustRemoteCode, Variant

if TYPE_CHECKING:
    from roadie.fit import Fit, LayerReport
    from roadie.training.fitting import FitWritten


LAYERS_A_LINE = 10


class FitInputs(str, Enum):
    """What `--inputs` takes."""

    WANTED = "wanted"
    BASE = "base"
    ADAPTED = "adapted"


def fit(
    tuned: Annotated[
        str,
        typer.Argument(
            metavar="TUNED",
            help="A fully fine-tuned model or a LoRA adapter: a folder, or a repository of the hub.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter.", show_default=False)],
    model: Model = None,
    variant: Annotated[
        Variant, typer.Option(help="road_2 holds every 2 x 2 block; road_1 is half as large, road_4 twice.")
    ] = Variant.ROAD_2,
    group_size: Annotated[int, typer.Option(help="Outputs j and j + half of it are a pair.")] = 64,
    adapt_group_size: AdaptGroupSize = False,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="Name, or end of the path, of a linear layer; all without it. May be repeated."
        ),
    ] = None,
    exclude_modules: Exclude = None,
    minimum_share: Annotated[
        float, typer.Option(help="Leave layers out of which a smaller share of the change is explained.")
    ] = 0.0,
    ridge: Annotated[
        float, typer.Option(help="Prefer small rotations where rows are nearly parallel; try 0.001.")
    ] = 0.0,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Fit what the layers give on this text instead of their weights. May be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="At most so many tokens of the text.")] = 16384,
    inputs: Annotated[
        FitInputs,
        typer.Option(
            help="With a text, what goes into a layer: what the wanted model or the base model has there, or the base with all "
            "earlier layers adapted."
        ),
    ] = FitInputs.ADAPTED,
    as_json: Json = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the RoAd adapter that is nearest to a fine-tuned model or a LoRA adapter, in closed form, without training.

    Each linear layer is fitted by least squares, a pair of tensors at a time, so that the models may be larger than the
    memory (with --text they are loaded). The table says which share of the squared change of each layer is explained: what
    full fine-tuning does may be hardly a rotation, and then little is.

    \b
    Examples:
      roadie fit my-model --model meta-llama/Llama-3.2-1B --output my-adapter
      roadie fit my-lora --variant road_1 --target q_proj --target v_proj --output my-adapter
      roadie fit my-model --model my-base --text notes.txt --output my-adapter
    """
    from roadie.cli.quiet import quiet_libraries

    with quiet_libraries():
        from roadie.training.fitting import FitText, fit_to_disk
        from roadie.training.models import ModelSource

        chosen = FitText(tuple(map(str, text)), tokens, inputs.value) if text else None
        named = {"target_modules": target_modules, "exclude_modules": exclude_modules}
        settings: dict[str, Any] = {key: names for key, names in named.items() if names}
        written = fit_to_disk(
            tuned,
            output,
            model=ModelSource(model, revision, trust_remote_code),
            text=chosen,
            overwrite=overwrite,
            on_layer=_progress(as_json),
            variant=variant.value,
            group_size=group_size,
            adapt_group_size=adapt_group_size,
            minimum_share=minimum_share,
            ridge=ridge,
            **settings,
        )
    if as_json:
        typer.echo(json.dumps(written.to_mapping(), indent=2, allow_nan=False))
    else:
        show(written)


def _progress(silent: bool) -> Any:
    """Says which layer is done: on a terminal each in the place of the last, elsewhere every so many in a line of its own."""
    import sys
    from itertools import count

    numbers = count(1)
    if silent:
        return None
    if sys.stderr.isatty():
        return lambda report: typer.echo(f"\r\x1b[Kfitted {report.path}", nl=False, err=True)

    def say(report: LayerReport) -> None:
        if (number := next(numbers)) % LAYERS_A_LINE == 0:
            typer.echo(f"fitted {number} layers, the last of them {report.path}", err=True)

    return say


def show(written: FitWritten) -> None:
    """The layers as a table, then all of them together, and what was not fitted."""
    from rich.console import Console

    console = Console(soft_wrap=False, highlight=False)
    fitted = written.fit
    console.print(_table(list(fitted.layers.values())))
    console.print(f"\n[bold]{fitted.share_explained:.2%}[/] of the squared change of these layers is explained,")
    console.print(f"{fitted.share_of_everything:.2%} of that of the whole model.")
    _show_not_fitted(console, fitted)
    console.print(f"\nadapter     {written.output}, {fitted.adapter.num_parameters:,} parameters", soft_wrap=True)
    console.print(f"fitted to   {written.tuned} ({written.method})", soft_wrap=True)
    console.print(f"base model  {written.model}", soft_wrap=True)


def _table(layers: Sequence[LayerReport]) -> Any:
    from rich.table import Table

    table = Table("layer")
    for heading in ("change", "explained", "parameters"):
        table.add_column(heading, justify="right")
    for layer in layers:
        explained = f"{layer.share_explained:.2%}" if layer.change else "-"
        table.add_row(
            layer.path,
            f"{layer.relative_change:.3g}",
            explained,
            f"{layer.parameters:,}" if layer.kept else "left out",
        )
    table.caption = "change: |W' - W| / |W|; explained: the share of its square"
    return table


def _show_not_fitted(console: Any, fitted: Fit) -> None:
    if not fitted.not_fitted:
        return
    names = [f"{each.name} ({each.reason.value})" for each in fitted.not_fitted]
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    console.print(f"Not fitted: {shown}.")
