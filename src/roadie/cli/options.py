"""Options that several verbs share, and the recipe that options ask for."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any

import typer

from roadie.errors import ConfigError
from roadie.learning_rate import default_learning_rate
from roadie.training.recipe import DEFAULT_BETA, PRECISIONS, SCHEDULES, VARIANTS, Recipe


class Variant(str, Enum):
    """What `--variant` takes where it is no setting of the recipe."""

    ROAD_1 = "road_1"
    ROAD_2 = "road_2"
    ROAD_4 = "road_4"


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
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]


SETTINGS: dict[str, Any] = {
    "method": typer.Option(help="sft: learn what the rows say; dpo: learn which of two answers is preferred, by TRL."),
    "beta": typer.Option(
        help="Of dpo: how much a change of an answer's likelihood counts.", show_default=f"{DEFAULT_BETA:g}"
    ),
    "variant": typer.Option(help=f"{', '.join(VARIANTS)}: 1, 2 or 4 parameters an output."),
    "group_size": typer.Option(help="Outputs are paired inside groups of this size."),
    "adapt_group_size": typer.Option(
        "--adapt-group-size",
        help="Use a smaller group where the size does not divide a layer. Such an adapter cannot be blended with others in a "
        "row, and roadie alone reads it.",
    ),
    "stages": typer.Option(
        help="Several rotations in a row, by their group sizes: 2,16,64.", show_default="one rotation"
    ),
    "input_stages": typer.Option(
        help="Rotate the inputs of layers too, by these group sizes: 64, or 2,16,64.", show_default="outputs alone"
    ),
    "target_modules": typer.Option(
        "--target", help="Name of modules to adapt; repeatable.", show_default="all linear layers but the output"
    ),
    "target_experts": typer.Option(
        help="Rotate stacked experts of mixtures too: 'each' by its own rotation, or all by one 'shared'.",
        show_default="left alone",
    ),
    "exclude_modules": typer.Option(
        "--exclude", metavar="NAME", help="Name of modules to leave out of the targets; repeatable.", show_default=False
    ),
    "share": typer.Option(
        help="Train this share of the pairs of every layer: 1/2, or '1/2 interleaved'.", show_default="all"
    ),
    "learning_rate": typer.Option(
        "--learning-rate",
        "--lr",
        help="At its peak.",
        show_default="by the model's width, less for few rows: "
        + ", ".join(f"{default_learning_rate(width):g} at {width}" for width in (4096, 1024, 256)),
    ),
    "schedule": typer.Option(help=f"{', '.join(SCHEDULES)}."),
    "warmup_ratio": typer.Option(help="Share of the steps in which the rate rises."),
    "weight_decay": typer.Option(help="Of AdamW."),
    "epochs": typer.Option(help="Passes over the data."),
    "max_steps": typer.Option(help="Optimizer steps, instead of epochs.", show_default=False),
    "batch_size": typer.Option(help="Examples an optimizer step."),
    "micro_batch_size": typer.Option(help="Examples a forward pass, to save memory.", show_default="batch size"),
    "max_length": typer.Option(help="Tokens an example, at most."),
    "packing": typer.Option(
        "--packing", help="Lay several examples into a row, apart from each other; batches count rows."
    ),
    "load_in_4bit": typer.Option(
        "--load-in-4bit", help="The base model in 4 bits (bitsandbytes, nf4), to save memory."
    ),
    "precision": typer.Option(help=f"{', '.join(PRECISIONS)}; auto is bfloat16 on accelerators that have it."),
    "gradient_checkpointing": typer.Option("--gradient-checkpointing", help="Less memory, about a third slower."),
    "eval_share": typer.Option(help="Hold out this share of the data instead."),
    "patience": typer.Option(
        help="End after so many evaluations without a better held-out loss.", show_default="no early end"
    ),
    "checkpoint_steps": typer.Option(help="Steps between checkpoints and evaluations.", show_default="one epoch"),
    "seed": typer.Option("--seed", help="Of the data's order and the held-out share."),
}
"""What the command line says of the settings of `Recipe`, in the order of its help; types and defaults are the recipe's."""
_KINDS = dict.fromkeys(("target_modules", "exclude_modules"), list[str] | None) | dict.fromkeys(
    ("stages", "input_stages"), str | None
)
"""Types of options that are not those of the settings: sizes with commas between them, and names one by one."""

AdaptGroupSize = Annotated[bool, SETTINGS["adapt_group_size"]]
Exclude = Annotated[list[str] | None, SETTINGS["exclude_modules"]]


def takes_recipe(*names: str, **other: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb options for these settings of the recipe (default: all of `SETTINGS`), in the place of its ``**settings``.

    other: settings whose option is another than that of `SETTINGS`.
    """
    chosen = {name: option for name, option in (SETTINGS | other).items() if name in (names or SETTINGS)}
    kinds = {**typing.get_type_hints(Recipe), **_KINDS}
    defaults = Recipe()

    def give(verb: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(verb, include_extras=True)
        own = [
            each.replace(annotation=hints[each.name])
            for each in inspect.signature(verb).parameters.values()
            if each.kind is not each.VAR_KEYWORD
        ]
        first = [each for each in own if each.kind is not each.KEYWORD_ONLY]
        given = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if name in _KINDS else getattr(defaults, name),
                annotation=Annotated[kinds[name], option],
            )
            for name, option in chosen.items()
        ]
        parameters = [*first, *given, *own[len(first) :]]
        verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        verb.__annotations__ = {each.name: each.annotation for each in parameters}
        return verb

    return give


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """The recipe of a verb's options."""
    given = {name: value for name, value in settings.items() if value not in (None, (), [])}
    for name in {"stages", "input_stages"} & given.keys():
        given[name] = _sizes(name, given[name])
    return Recipe(**given)


def _sizes(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        option = f"--{name.replace('_', '-')}"
        raise ConfigError(f"got {option} {text!r}; wanted group sizes with commas between them; try 2,16,64") from None
