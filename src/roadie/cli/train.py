"""`roadie train`: an adapter from texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roadie.cli import options
from roadie.cli.config_file import Config
from roadie.errors import ConfigError

if TYPE_CHECKING:
    from roadie.training.record import TrainingResult


@options.takes_recipe()
def train(
    data: options.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter.", show_default=False)],
    model: options.Model = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out texts; the adapter of the best checkpoint is kept. Repeatable.", show_default=False
        ),
    ] = None,
    *,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted training, or start where there is none.")
    ] = False,
    overwrite: options.Overwrite = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="Report losses to tensorboard, wandb, ... while training. Repeatable.", show_default=False),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload the adapter to this repository at the end.", show_default=False
        ),
    ] = None,
    hub_public: Annotated[
        bool, typer.Option("--hub-public", help="Where that repository is new: make it public, not private.")
    ] = False,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show a progress bar.")] = True,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    config: Config = None,
    **settings: Any,
) -> None:
    """Fine-tune a RoAd adapter with the recipe of the paper, and write it in PEFT's format.

    Plain text is cut into blocks. A .jsonl file holds one object a line: {"text": ...}; or {"prompt": ...,
    "completion": ...}, of which the completion is learnt; or {"messages": [...]}, of which the assistant's turns are
    learnt, written with the chat template of the model. Alpaca's rows {"instruction": ..., "input": ..., "output": ...}
    and ShareGPT's {"conversations": [{"from": ..., "value": ...}]} are read too. With --method dpo rows are preferences:
    {"prompt": ..., "chosen": ..., "rejected": ...}, texts or lists of messages. docs/training.md has all of it.

    The output appears at the end. Checkpoints are kept in OUTPUT.training until then, and --resume goes on from the
    last one to the same result as without the interruption. Ctrl-C ends after the step, with one more checkpoint.

    The learning rate is that of the paper, more where the model is narrower: 3e-3 * sqrt(4096 / width). A warning says
    when the loss shows that it is far off; roadie find-lr searches a better one.

    \b
    Examples:
      roadie train notes.txt --output notes-adapter
      roadie train questions.jsonl --eval-share 0.1 --output answers --model meta-llama/Llama-3.2-1B
      roadie train docs/ more.jsonl --output both --micro-batch-size 4 --gradient-checkpointing --resume
      accelerate launch --num_processes 2 -m roadie.cli train notes.txt --output notes-adapter
    """
    from roadie.cli.quiet import quiet_libraries
    from roadie.training.checkpoints import saved_in, work_path
    from roadie.training.interruption import told

    if hub_public and not push_to_hub:
        raise ConfigError("got --hub-public without --push-to-hub; wanted a repository that it is said of; name it")
    recipe = options.recipe_of(settings)
    with told(lambda: saved_in(work_path(output))), quiet_libraries():
        from roadie.distributed.processes import joined
        from roadie.training.hub import HubPlace
        from roadie.training.models import ModelSource
        from roadie.training.run import train as run

        with joined() as together:
            result = run(
                data,
                output,
                model=ModelSource(model, revision, trust_remote_code, allow_pickle),
                recipe=recipe,
                eval_data=eval_data or None,
                overwrite=overwrite,
                resume=resume,
                progress=progress,
                report_to=report_to or (),
                push_to_hub=HubPlace(push_to_hub, private=not hub_public) if push_to_hub else None,
            )
    if together.is_first:
        typer.echo(show(result))


def show(result: TrainingResult) -> str:
    """The final table."""
    from roadie.training.text_table import pairs, size

    examples = f"{result.train_examples:,}"
    if result.evaluation_examples:
        examples += f" and {result.evaluation_examples:,} held out"
    steps = f"{result.steps:,}"
    if result.best_step is not None:
        steps += f", best at {result.best_step:,}"
    if result.resumed_from_step:
        steps += f", resumed from {result.resumed_from_step:,}"
    return pairs(
        [
            ("adapter", str(result.output)),
            ("base model", result.model),
            ("examples", examples),
            ("steps", steps),
            ("learning rate", f"{result.learning_rate:g}"),
            ("loss on", result.loss_on),
            ("loss before", f"{result.loss_before:.4f}"),
            ("loss after", f"{result.loss_after:.4f}"),
            (
                "trainable",
                f"{result.trainable_parameters:,} parameters, {result.share:.4%} of {result.total_parameters:,}",
            ),
            ("file", size(result.adapter_bytes)),
            ("time", f"{result.seconds:.1f} s"),
            ("speed", f"{result.tokens_per_second:,.0f} tokens/s"),
        ]
    )
