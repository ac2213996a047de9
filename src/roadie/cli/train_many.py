"""`roadie train-many`: many adapters of one base model, trained at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from roadie.cli.options import AllowPickle, Model, Overwrite, Revision, TrustRemoteCode

if TYPE_CHECKING:
    from roadie.training.many.result import JobResult, ManyResult

SOME_FAILED = 1


def train_many(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS.yaml", help="What to train; see below.", show_default=False)],
    model: Model = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and logs.", show_default="JOBS.training beside the file"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, or start where there is none.")
    ] = False,
    overwrite: Overwrite = False,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show a table of all jobs.")] = True,
    spread: Annotated[
        str,
        typer.Option(help="Over several processes: jobs (each trains some), or rows (each takes some of every job)."),
    ] = "jobs",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Train many adapters at once: each step is one forward and one backward over rows of all jobs.

    Each job has its own data, learning rate, schedule, steps, seed, targets and variant, and ends as it would alone. Its
    adapter appears in its output folder as soon as it is done. A job whose data cannot be read or whose loss is not
    finite fails alone; the exit status is 1 then. Ctrl-C ends after the step, with a checkpoint for --resume.

    \b
    JOBS.yaml:
      model: meta-llama/Llama-3.2-1B     # left out: the small model that comes with roadie
      max_tokens_per_step: 8192          # also: max_active_jobs, checkpoint_steps, precision, keep
      defaults: {steps: 200, variant: road_1, output: "adapters/{name}"}
      jobs:
        - {name: french, data: french.jsonl, learning_rate: 3e-3}
        - {name: polite, data: [polite.jsonl, more.txt], targets: [q_proj, v_proj]}

    A job may say: name, data, output, steps (or epochs), learning_rate, schedule, warmup_ratio, weight_decay,
    max_grad_norm, batch_size, max_length, seed, variant, group_size, adapt_group_size, stages, input_stages, targets,
    target_experts, exclude, share, eval_data or eval_share, and eval_steps. What the words mean: see roadie train.

    \b
    Examples:
      roadie train-many jobs.yaml
      roadie train-many jobs.yaml --resume
      accelerate launch --num_processes 2 -m roadie.cli train-many jobs.yaml
    """
    from rich.console import Console

    from roadie.cli.jobs_table import live_table
    from roadie.cli.quiet import quiet_libraries
    from roadie.training.interruption import told
    from roadie.training.many.saved import saved_in

    with told(lambda: saved_in(work or jobs.with_suffix(".training"))), quiet_libraries():
        from roadie.distributed.processes import joined
        from roadie.training.many.run import train_many as run
        from roadie.training.models import ModelSource

        with joined() as together, live_table(Console(stderr=True), shown=progress and together.is_first) as observers:
            result = run(
                jobs,
                model=ModelSource(model, revision, trust_remote_code, allow_pickle),
                work=work,
                overwrite=overwrite,
                resume=resume,
                observers=observers,
                spread=spread,
            )
    if together.is_first:
        typer.echo(show(result))
        for job in result.failed:
            typer.echo(f"roadie: job {job.name} failed: {job.reason}", err=True)
    if result.failed:
        raise typer.Exit(SOME_FAILED)


def show(result: ManyResult) -> str:
    """The final table."""
    from roadie.training.text_table import table

    head = ["job", "status", "steps", "rate", "first loss", "last loss", "held-out", "adapter"]
    lines = table([_cells(job) for job in result.jobs], head=head)
    return f"{lines}\n\n{result.steps:,} steps in {result.seconds:.1f} s; logs in {result.work}"


def _cells(job: JobResult) -> list[str]:
    losses = ["" if loss is None else f"{loss:.4f}" for loss in (job.first_loss, job.last_loss, job.eval_after)]
    rate = "" if job.learning_rate is None else f"{job.learning_rate:g}"
    return [job.name, job.status.value, f"{job.steps:,}", rate, *losses, "" if job.reason else str(job.output)]
