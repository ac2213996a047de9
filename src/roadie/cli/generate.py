"""`roadie generate`: prompts continued, each in an adapter of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from roadie.cli import options

GUTTER = "  \u2502 "
"""Stands before each line of an answer, which tells it from its prompt."""


def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue.", show_default=False)
    ] = None,
    adapter: options.Adapters = None,
    use: Annotated[
        list[str] | None,
        typer.Option(
            "--use",
            "-u",
            metavar="NAME",
            help="The adapter of a prompt: once for all, or once for each in their order; __base__ is the base model.",
            show_default="the only adapter, or one a prompt, in their order",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSON lines {"prompt": ..., "adapter": ...} with more prompts.', show_default=False),
    ] = None,
    model: options.Model = None,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    beams: Annotated[int, typer.Option(help="Width of the beam search.")] = 1,
    seed: options.DrawSeed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Continue prompts in one batch, each with its own adapter or with the base model.

    \b
    Examples:
      roadie generate "def main(" "The turtle "
      roadie generate "The turtle " --adapter my-adapter --temperature 0.8 --seed 1
      roadie generate "import " "import " -a code=out/code -a prose=out/prose -u code -u prose
      roadie generate "import " "import " -a my-adapter -u my-adapter -u __base__ --json
    """
    from roadie.cli.quiet import quiet_libraries

    with quiet_libraries():
        from roadie.training.adapters import parse_adapters
        from roadie.training.generation import Decoding, continue_prompts
        from roadie.training.models import ModelSource
        from roadie.training.prompts import assign, read_prompts

        adapters = parse_adapters(adapter or [])
        names = [each.name for each in adapters]
        asked = assign(prompt, names, use or []) if prompt else []
        asked += read_prompts(prompts, names) if prompts else []
        texts = continue_prompts(
            asked,
            adapters,
            model=ModelSource(model, revision, trust_remote_code, allow_pickle),
            decoding=Decoding(max_new_tokens, temperature, top_p, beams, seed),
            chat=chat,
        )
    for number, (question, text) in enumerate(zip(asked, texts, strict=True)):
        if as_json:
            typer.echo(
                json.dumps({"prompt": question.text, "adapter": question.adapter, "text": text}, ensure_ascii=False)
            )
            continue
        if len(asked) > 1:
            typer.echo(("\n" if number else "") + f"[{question.adapter or 'base model'}]")
        typer.echo(question.text)
        typer.echo("\n".join(GUTTER + line for line in text.split("\n")))
