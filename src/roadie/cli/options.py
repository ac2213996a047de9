"""Options that several verbs share, and the recipe that options ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from roadie.errors import ConfigError
from roadie.training.recipe import PRECISIONS, VARIANTS, Recipe

Data = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA", help="Texts: files, folders, or hub data sets OWNER/NAME[:CONFIG].", show_default=False
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Base model: a folder, or a repository of the hub. Without it: the one the adapters were trained on, else "
        "the small one that comes with roadie.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="REV", help="Branch, tag or commit of the model on the hub.", show_default=False
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Never on by default.")
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Also read weights that are not safetensors. Pickled adapters are read without running their code "
        "(torch.load with weights_only) and converted on the way.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="[NAME=]PATH",
        help="An adapter, and what to call it; repeatable. A folder, or a repository of the hub.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens of an answer, at most.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this share.")]
DrawSeed = Annotated[int, typer.Option("--seed", help="Of what is drawn.")]
Variant = Annotated[str, typer.Option(help=f"{', '.join(VARIANTS)}: 1, 2 or 4 parameters an output.")]
GroupSize = Annotated[int, typer.Option(help="Outputs are paired inside groups of this size.")]
Target = Annotated[
    list[str] | None,
    typer.Option(
        "--target", help="Name of modules to adapt; repeatable.", show_default="all linear layers but the output"
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="NAME", help="Name of modules to leave out of the targets; repeatable.", show_default=False
    ),
]
AdaptGroupSize = Annotated[
    bool,
    typer.Option(
        "--adapt-group-size",
        help="Use a smaller group where the size does not divide a layer. Such an adapter cannot be blended with others in a "
        "row, and roadie alone reads it.",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Examples an optimizer step.")]
MicroBatchSize = Annotated[
    int | None, typer.Option(help="Examples a forward pass, to save memory.", show_default="batch size")
]
MaxLength = Annotated[int, typer.Option(help="Tokens an example, at most.")]
LoadIn4bit = Annotated[
    bool, typer.Option("--load-in-4bit", help="The base model in 4 bits (bitsandbytes, nf4), to save memory.")
]
Precision = Annotated[
    str, typer.Option(help=f"{', '.join(PRECISIONS)}; auto is bfloat16 on accelerators that have it.")
]
DataSeed = Annotated[int, typer.Option("--seed", help="Of the data's order and the held-out share.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]


def recipe_of(options: Mapping[str, Any]) -> Recipe:
    """The recipe of a verb's options (`typer.Context.params`), which have the names of its settings."""
    asked = {field.name: options[field.name] for field in fields(Recipe) if field.name in options}
    given = {name: value for name, value in asked.items() if value not in (None, (), [])}
    for name in {"stages", "input_stages"} & given.keys():
        given[name] = _sizes(name, given[name])
    return Recipe(**given)


def _sizes(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        option = f"--{name.replace('_', '-')}"
        raise ConfigError(f"got {option} {text!r}; wanted group sizes with commas between them; try 2,16,64") from None
