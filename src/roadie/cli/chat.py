"""`roadie chat`: a conversation with a model and its adapters."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from roadie.cli import options
from roadie.cli.refusals import in_options, options_of


def chat(
    ctx: typer.Context,
    adapter: options.Adapters = None,
    model: options.Model = None,
    system: Annotated[
        str | None, typer.Option(help="What the chat template is told first.", show_default=False)
    ] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.DrawSeed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Talk with a model and its adapters, a line at a time; answers appear as they are written. The first adapter answers.

    Turns go through the chat template of the model; without one it goes on with the text. Lines may also come from a file or
    a pipe.

    \b
    Commands:
      /adapter NAME    answer with this adapter; __base__ is the base model; without a name: which there are
      /strength 0.5    with half of it
      /reset           forget what was said
      /quit            end; Ctrl-D does too. Ctrl-C stops an answer

    \b
    Examples:
      roadie chat
      roadie chat --model meta-llama/Llama-3.2-1B-Instruct -a polite=out/polite -a french=out/french -t 0.7
    """
    from roadie.cli.quiet import quiet_libraries

    with quiet_libraries():
        from roadie.errors import RoadieError
        from roadie.training.adapters import parse_adapters
        from roadie.training.chat import Chat
        from roadie.training.generation import Decoding
        from roadie.training.models import ModelSource

        talk = Chat.open(
            parse_adapters(adapter or []),
            model=ModelSource(model, revision, trust_remote_code, allow_pickle),
            decoding=Decoding(max_new_tokens, temperature, top_p, seed=seed),
            system=system,
        )
        how = "its chat template" if talk.has_template else "no chat template: the model goes on with the text"
        typer.echo(f"{', '.join((*talk.names, '__base__'))}; {how}; /help shows the commands", err=True)
        goes_on = True
        while goes_on:
            try:
                line = _read(talk.speaker)
                goes_on = line is not None and talk.take(line, _show)
                _end_line(line)
            except RoadieError as error:
                typer.echo(f"roadie: {in_options(str(error), options_of(iter([ctx.command])))}", err=True)
            except KeyboardInterrupt:
                typer.echo("\n/quit or Ctrl-D ends", err=True)


def _read(speaker: str) -> str | None:
    """The next line, without its end; None at the end of them. A terminal shows who will answer."""
    import sys

    if sys.stdin.isatty():
        with suppress(ImportError):  # arrow keys move in the line, and bring back former ones
            import readline  # noqa: F401
        try:
            return input(f"{speaker}> ")
        except EOFError:
            return None
    return line.rstrip("\n") if (line := sys.stdin.readline()) else None


def _show(text: str) -> None:
    typer.echo(text, nl=False)


def _end_line(line: str | None) -> None:
    """An answer ends with its line."""
    if line is not None and line.strip() and (line.startswith("//") or not line.startswith("/")):
        typer.echo()
