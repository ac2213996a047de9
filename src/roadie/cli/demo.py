"""`roadie demo`: three adapters trained, measured, merged and mixed in one batch, on text that is on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from roadie.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from roadie.training.demo import DemoResult, DemoSettings


LINES_OF_AN_ADAPTER = 4


def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the three adapters in this directory.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds of training, to see that everything works.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same numbers on the same machine.")] = 0,
) -> None:
    """Fine-tune three RoAd adapters on three kinds of text, then merge them and mix them in one batch.

    The model and the text come with roadie and with Python: no network is needed. Takes about a minute on two cores.
    """
    from dataclasses import replace

    from rich.console import Console

    from roadie.training.demo import FULL, QUICK

    console = Console(soft_wrap=False, highlight=False)
    settings = replace(QUICK if quick else FULL, seed=seed)
    with quiet_libraries():
        result = run_with_progress(console, settings, output)
    show_size(console, result)
    show_losses(console, result)
    show_exactness(console, result)
    show_continuations(console, result)
    console.print(f"\nAll of it took {result.seconds:.0f} s.")
    if result.saved_to is not None:
        console.print(f"The adapters are in {result.saved_to}; try: roadie info {result.saved_to / result.kinds[0]}")


def run_with_progress(console: Console, settings: DemoSettings, output: Path | None) -> DemoResult:
    """Run the demo with one progress bar for each adapter."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from roadie.training.demo import run_demo

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}
        between = max(1, settings.steps // LINES_OF_AN_ADAPTER)

        def on_step(kind: str, step: int, loss: float) -> None:
            if kind not in tasks:
                tasks[kind] = progress.add_task(kind, total=settings.steps)
            progress.update(tasks[kind], completed=step, description=f"training {kind:<10} loss {loss:.2f}")
            if not console.is_terminal and step % between == 0:
                console.print(f"training {kind}: {step}/{settings.steps} steps, loss={loss:.2f}")

        return run_demo(settings, output, on_step)


def show_size(console: Console, result: DemoResult) -> None:
    console.print(
        f"\n[bold]Size[/]  {result.trainable_parameters:,} trainable parameters an adapter, "
        f"{result.adapter_bytes / 1024:.1f} KiB a file;\n      {result.trainable_share:.2%} of the "
        f"{result.base_parameters:,} of the base model"
    )


def show_losses(console: Console, result: DemoResult) -> None:
    """The held-out losses, a row for each adapter; the best of every column is marked."""
    from rich.table import Table

    table = Table("adapter")
    for kind in result.kinds:
        table.add_column(f"on {kind}", justify="right")
    for adapter, losses in result.losses.items():
        cells = [f"{losses[kind]:.3f}{'*' if result.winners[kind] == adapter else ' '}" for kind in result.kinds]
        table.add_row(adapter, *cells)
    console.print("\n[bold]Held-out loss[/]  nats per token; lower is better, * is the best of its column")
    console.print(table)
    verdict = "every adapter wins on its own kind" if result.diagonal_wins else "NOT every adapter wins on its own kind"
    console.print(f"The diagonal: {verdict}.")


def show_exactness(console: Console, result: DemoResult) -> None:
    console.print(
        "\n[bold]Exactness[/]  largest difference of any logit"
        f"\n  merged into the weights   {result.merged_difference:.1e}"
        f"\n  unmerged again            {result.unmerged_difference:.1e}"
        f"\n  mixed batch, row by row   {result.mixed_difference:.1e}"
    )


def show_continuations(console: Console, result: DemoResult) -> None:
    """What every row of the mixed batch wrote, grouped by prompt."""
    from rich.text import Text

    console.print("\n[bold]One mixed batch[/]  one call of generate(); each row goes through its own adapter")
    prompt = None
    for row in result.continuations:
        if row.prompt != prompt:
            prompt = row.prompt
            console.print(Text(f"\n  {prompt!r}", style="bold"))
        lines = wrapped(row.text, console.width - len(gutter("")))
        for name, line in zip([row.adapter, *[""] * len(lines)], lines, strict=False):
            console.print(
                Text(gutter(name), style="cyan") + Text(line, style="default"), overflow="ignore", no_wrap=True
            )


def gutter(name: str) -> str:
    """What stands before a line of generated text: the adapter that wrote it, before its first line."""
    return f"  {name:>10} │ "


def wrapped(text: str, width: int) -> list[str]:
    """The lines of `text`, long ones broken at `width` columns; at least one."""
    import textwrap

    def pieces(line: str) -> list[str]:
        return textwrap.wrap(line, max(width, 20), drop_whitespace=False, replace_whitespace=False) or [""]

    return [piece.rstrip() for line in text.expandtabs(4).split("\n") for piece in pieces(line)]
