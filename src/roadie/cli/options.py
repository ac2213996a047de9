"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
