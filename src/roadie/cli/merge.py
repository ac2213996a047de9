"""`roadie merge`: a whole model from adapters and their base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roadie.cli.options import AllowPickle, Model, Overwrite, Revision, TrustRemoteCode


def merge(
    adapter: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER",
            help="Adapters, applied in this order: folders, or repositories of the hub.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model.", show_default=False)],
    model: Model = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of the largest weights file.")] = "5GB",
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write the base model with adapters merged into its weights: a model like any other, which needs no roadie.

    The folder holds safetensors, config, generation config and tokenizer, in the dtype of the base model; transformers
    loads it with AutoModelForCausalLM.from_pretrained. It appears whole or not at all.

    \b
    Examples:
      roadie merge my-adapter --output my-model
      roadie merge polite french --output both --max-shard-size 2GB
    """
    from roadie.cli.quiet import quiet_libraries

    with quiet_libraries():
        from roadie.training.merging import merge_to_disk
        from roadie.training.models import ModelSource

        result = merge_to_disk(
            adapter,
            output,
            model=ModelSource(model, revision, trust_remote_code, allow_pickle),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    from roadie.training.text_table import pairs, size

    typer.echo(
        pairs(
            [
                ("model", str(result.output)),
                ("base model", result.model),
                ("adapters", ", ".join(result.adapters)),
                ("dtype", result.dtype),
                ("size", size(result.num_bytes)),
                *(
                    (("files" if number == 0 else ""), f"{name}  {size(n)}")
                    for number, (name, n) in enumerate(result.files)
                ),
            ]
        )
    )
