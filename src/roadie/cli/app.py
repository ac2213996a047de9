"""`roadie`: the verbs, put together, and what happens when one of them fails."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from roadie.cli.bench_serve import bench_serve
from roadie.cli.chat import chat
from roadie.cli.combine import combine
from roadie.cli.compare import compare
from roadie.cli.demo import demo
from roadie.cli.deploy import deploy
from roadie.cli.evaluate import evaluate
from roadie.cli.find_lr import find_lr
from roadie.cli.fit import fit
from roadie.cli.generate import generate
from roadie.cli.info import info
from roadie.cli.inspect import inspect
from roadie.cli.merge import merge
from roadie.cli.refusals import in_options, message_of, options_of
from roadie.cli.serve import api_key, serve
from roadie.cli.train import train
from roadie.cli.train_many import train_many
from roadie.errors import TOLD_BY_ANOTHER_PROCESS
from roadie.version import __version__

FAILED = 2
INTERRUPTED = 130
WRITTEN = "roadie.written"


class Verbs(TyperGroup):
    """Prints what was refused as one line (`roadie.cli.refusals`); all else is a fault and keeps its traceback."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Remember the command as it was written."""
        written = shlex.join(["roadie", *args])
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[WRITTEN] = written
        return context

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; exit status 2 with a message where it was refused, 130 where it was interrupted."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            typer.echo(f"\nroadie: interrupted. {_what_is_saved(stop, ctx)}".rstrip(), err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            message = message_of(error)
            if message is None:
                raise
            if not getattr(error, TOLD_BY_ANOTHER_PROCESS, False):
                typer.echo(f"roadie: {in_options(message, options_of(_running(self, ctx)))}", err=True)
            raise typer.Exit(FAILED) from None


def _running(group: Any, ctx: Any) -> Iterator[Any]:
    """The command that was invoked; where it is a group, all of its commands."""
    command = group.get_command(ctx, ctx.invoked_subcommand or "")
    if command is not None:
        yield from getattr(command, "commands", {"": command}).values()


def _what_is_saved(stop: KeyboardInterrupt, ctx: Any) -> str:
    saved = getattr(stop, "saved", None)
    if saved is None:
        return "Nothing was written."
    if not saved.can_go_on:
        return str(saved.text)
    resumed = ctx.meta[WRITTEN].replace(" --overwrite", "")
    return f"{saved.text}\nGo on with: {resumed}{'' if ' --resume' in resumed else ' --resume'}"


app = typer.Typer(
    name="roadie",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    # Plain help: rich would take longer to import than everything else together.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)
app.command(short_help="Train three adapters, merge them, mix them in one batch; takes a minute.")(demo)
app.command(short_help="Fine-tune an adapter on texts, with the recipe of the paper.")(train)
app.command("find-lr", short_help="Search a learning rate for train, by short runs.")(find_lr)
app.command(short_help="Train many adapters of one base model at once.")(train_many)
app.command(short_help="Continue prompts in one batch, each with its own adapter.")(generate)
app.command(short_help="Talk with a model, switching adapters.")(chat)
app.command(short_help="Write a whole model with adapters merged into it.")(merge)
app.command(short_help="Show what is in an adapter file.")(info)
app.command(short_help="Fit an adapter to a fine-tuned model or a LoRA adapter, without training.")(fit)
app.command(short_help="Serve a base model and many adapters by OpenAI's API.")(serve)
app.command(short_help="Deploy replicas of the server with Ray Serve.")(deploy)
app.command("api-key", short_help="Make an API key for roadie serve.")(api_key)
app.command("eval", short_help="Evaluate many adapters on lm-eval's tasks, in one pass.")(evaluate)
app.command("bench-serve", short_help="Drive a server with many adapters, and measure it.")(bench_serve)
app.add_typer(combine, name="combine", short_help="Compose, invert, average, convert adapters.")
app.command(short_help="Show what adapters do to each layer: numbers, pictures, a report.")(inspect)
app.command(short_help="Show how far adapters are apart, and what two of them share.")(compare)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"roadie {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error instead of its message.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more about what is done, on standard error.")
    ] = False,
) -> None:
    """RoAd adapters: fine-tune a language model by rotating pairs of its activations.

    Every verb uses the small model that comes with roadie unless --model names another one, and none needs the network
    then. Start with:

    \b
      roadie demo                                     train, merge and mix three adapters, in about a minute
      roadie train notes.txt --output my-adapter      fine-tune on a text
      roadie generate "import " --adapter my-adapter  continue a prompt with it
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("roadie").setLevel(logging.INFO if verbose else logging.WARNING)
