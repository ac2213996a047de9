"""`roadie find-lr`: a learning rate for a training, by short runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from roadie.cli import options

if TYPE_CHECKING:
    from roadie.training.rates import RateSearch, Trial

SETTINGS = (
    *("variant", "group_size", "adapt_group_size", "target_modules", "exclude_modules", "learning_rate"),
    *("batch_size", "micro_batch_size", "max_length", "load_in_4bit", "precision", "seed"),
)


@options.takes_recipe(
    *SETTINGS,
    learning_rate=typer.Option("--first", help="The rate to start the search from.", show_default="as for train"),
)
def find_lr(
    data: options.Data,
    model: options.Model = None,
    *,
    steps: Annotated[int, typer.Option(help="Optimizer steps a rate.")] = 32,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    **settings: Any,
) -> None:
    """Search a learning rate for `roadie train`, by short trainings from the same start; nothing is written.

    Each rate gets STEPS steps with the schedule of the recipe and is measured on examples that were kept apart. From the
    first rate the search goes up and down in factors of about 3 until the best one has a worse one on both sides.
    It is said where chance may have chosen the rate: where differences lie within the noise between the held-out examples.

    \b
    Examples:
      roadie find-lr notes.txt
      roadie find-lr questions.jsonl --model meta-llama/Llama-3.2-1B --micro-batch-size 4
    """
    from roadie.cli.quiet import quiet_libraries

    recipe = options.recipe_of(settings)
    with quiet_libraries():
        from roadie.training.models import ModelSource
        from roadie.training.rates import find_learning_rate

        source = ModelSource(model, revision, trust_remote_code, allow_pickle)
        found = find_learning_rate(data, model=source, recipe=recipe, steps=steps, on_trial=_say)
    typer.echo(show(found))


def _say(trial: Trial) -> None:
    typer.echo(f"tried {trial.learning_rate:g}: held-out loss {trial.loss:.4f}", err=True)


def show(found: RateSearch) -> str:
    """The trials, and what to write behind `roadie train`."""
    from roadie.training.text_table import table

    best = found.learning_rate
    rows = [[f"{t.learning_rate:g}", f"{t.loss:.4f}", "best" if t.learning_rate == best else ""] for t in found.trials]
    lines = table(rows, head=["learning rate", f"held-out loss after {found.steps} steps", ""])
    if not found.improves:
        return f"{lines}\n\nloss before: {found.loss_before:.4f}; no rate made it smaller: give more steps or more data"
    verdict = f"{lines}\n\nloss before: {found.loss_before:.4f}; use --learning-rate {best:g}"
    if not found.doubts:
        return verdict
    doubts = "\n".join(f"  {doubt}" for doubt in found.doubts)
    advice = f"give more steps (--steps {4 * found.steps}) or more data"
    return f"{verdict}, but this search was too short to trust:\n{doubts}\n{advice}"
