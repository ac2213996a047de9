"""One job from its file to its model, as a generator: it yields the futures that it waits for, and is sent what came of them.

So one thread (`runner`) has many jobs under way, and what they ask of the engine at the same time is one pass over rows of all.

Kept, in DIR/jobs/ID, is the state of the adapter and its optimiser: at the end of each epoch, every `Limits.keep_every` steps,
and when the job is paused. A job that is taken up again does the steps after that again, with the same rows, rates and losses.

In preference training (Rafailov et al. 2023, arXiv 2305.18290), with the logprobs of the better and the worse answer, and r those
of the model with which the job began:

    z = beta ((better - r_better) - (worse - r_worse));  loss = -ln sigmoid(z);  d loss / d better = -beta sigmoid(-z)
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import secrets
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from roadie import checkpoint
from roadie.engine import ForwardResult, TenantState, TrainingEngine, TrainingRow
from roadie.errors import RoadieError
from roadie.learning_rate import default_learning_rate
from roadie.train_service.fine_tuning.data import BadFile, Reader, Rows
from roadie.train_service.fine_tuning.files import Files
from roadie.train_service.fine_tuning.jobs import Job, Jobs, Model
from roadie.train_service.fine_tuning.limits import Limits
from roadie.train_service.fine_tuning.plan import Plan, adapter_config, checkpoint_name, decided, model_name
from roadie.train_service.progress import Progress

Course: TypeAlias = "Generator[Future[Any], Any, None]"


class JobFailed(RoadieError):
    """A job cannot go on: code, message and parameter as OpenAI's API has them; faults: an event each."""

    def __init__(self, code: str, message: str, param: str | None = None, faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.code, self.param, self.faults = code, param, faults


@dataclass(frozen=True, eq=False)
class Bench:
    """What jobs are made with.

    base: names of the base model, its own first; states, models: folders; others: for what takes long; progress: told how
    jobs go on.
    """

    engine: TrainingEngine
    reader: Reader
    files: Files
    jobs: Jobs
    limits: Limits
    base: tuple[str, ...]
    states: Path
    models: Path
    others: Executor
    progress: Progress

    def read(self, job: Job, param: str) -> Future[list[Rows]]:
        """The rows of a job's file."""

        def is_wanted() -> bool:
            return self.jobs.status(job.id) in ("validating_files", "running")

        path = self.files.folder / str(getattr(job, param))
        return self.others.submit(self.reader.read, path, job.method, is_wanted)

    def beginning(self, job: Job) -> Any:
        """What a job begins with: a model that was made here, or the settings in its metadata."""
        if job.model in self.base:
            return adapter_config(job.metadata or {})
        if job.model not in self.jobs.places:
            raise JobFailed("model_not_found", f"The model {job.model} does not exist any more.", "model")
        return self.jobs.places[job.model]


def validate(bench: Bench, job: Job) -> Course:
    """Look at the files of a job, and decide what it is to do; it waits for its turn then."""
    rows = yield from _read(bench, job, "training_file")
    if job.validation_file is not None:
        yield from _read(bench, job, "validation_file")
    hyperparameters = decided(job.hyperparameters, len(rows))
    message = "Files validated, moving job to queued state"
    num_cut = sum(any(row.was_cut for row in each) for each in rows)
    with bench.jobs.together():
        if num_cut:
            said = f"{num_cut} of {len(rows)} rows are longer than {bench.reader.max_tokens} tokens, and are cut"
            bench.jobs.say(job.id, [said], "warn")
        bench.jobs.move(
            job.id, ("validating_files",), "queued", message, hyperparameters=hyperparameters, is_validated=1
        )


def _read(bench: Bench, job: Job, param: str) -> Generator[Future[Any], Any, list[Rows]]:
    try:
        rows: list[Rows] = yield bench.read(job, param)
        return rows
    except BadFile as error:
        what = param.removesuffix("_file")
        message = f"The job failed due to an invalid {what} file. {error}"
        raise JobFailed(f"invalid_{param}", message, param, error.faults) from None
    except FileNotFoundError:
        raise JobFailed(f"invalid_{param}", f"The {param} does not exist any more.", param) from None


def train(bench: Bench, job: Job) -> Course:
    """Train a job to its end, or until it is paused or cancelled."""
    with _tenant(bench, job) as tenant:
        step = yield from _begin(bench, job, tenant)
        rows = yield from _read(bench, job, "training_file")
        held_out: list[Rows] = []
        if job.validation_file is not None:
            held_out = yield from _read(bench, job, "validation_file")
        width = getattr(bench.engine.model.config.get_text_config(), "hidden_size", None)
        passes, batch_size = float(job.hyperparameters["n_epochs"]), int(job.hyperparameters["batch_size"])
        rate = default_learning_rate(width, len(rows), passes, batch_size)
        plan = Plan(job.hyperparameters, len(rows), job.seed, rate)
        method = _Preferences if job.method == "dpo" else _Texts
        learner = method(bench, job, plan, tenant, rows, held_out)
        yield from learner.prepare()
        bench.progress.begin(job.tenant, job.id, "fine_tuning.job", plan.num_steps)
        bench.jobs.forget_steps(job.id, step)
        yield from _steps(learner, step)


@contextlib.contextmanager
def _tenant(bench: Bench, job: Job) -> Iterator[str]:
    """A name of its own in the engine, which whatever has it leaves at the end."""
    name = f"{job.id}/{secrets.token_hex(4)}"
    try:
        yield name
    finally:
        if name in bench.engine.tenants:
            with contextlib.suppress(RoadieError):
                bench.engine.remove(name)


def _begin(bench: Bench, job: Job, tenant: str) -> Generator[Future[Any], Any, int]:
    """The adapter as it was kept, or as the job begins; how many steps were done."""
    kept = bench.states / job.id
    source = TenantState.load(kept) if kept.exists() else bench.beginning(job)
    yield bench.engine.create(tenant, source, owner=job.tenant)
    return source.step if isinstance(source, TenantState) else 0


def _steps(learner: _Texts, step: int) -> Course:
    bench, job, plan = learner.bench, learner.job, learner.plan
    while step < plan.num_steps:
        if (status := bench.jobs.status(job.id)) != "running":
            if status != "cancelled":
                state = yield bench.engine.state(learner.tenant)
                yield from learner.keep_state(state)
            return
        loss = yield from learner.learn(step)
        step += 1
        bench.progress.stepped(job.id, step)
        is_epoch, is_end = plan.ends_epoch(step), step == plan.num_steps
        figures = {"step": step, "total_steps": plan.num_steps, "train_loss": loss}
        if is_epoch and learner.held_out:
            figures["valid_loss"] = figures["full_valid_loss"] = yield from learner.held_out_loss()
        bench.jobs.note_step(job.id, _told(figures), figures)
        if (is_epoch or step % bench.limits.keep_every == 0) and not is_end:
            yield from learner.keep(step, figures, is_checkpoint=is_epoch)
    yield from learner.finish()


def _told(figures: dict[str, Any]) -> str:
    held_out = f", full validation loss={figures['valid_loss']:.4f}" if "valid_loss" in figures else ""
    return f"Step {figures['step']}/{figures['total_steps']}: training loss={figures['train_loss']:.4f}{held_out}"


class _Texts:
    """How a job learns from what rows say: the mean loss of the learnt tokens of a batch."""

    def __init__(self, bench: Bench, job: Job, plan: Plan, tenant: str, rows: list[Rows], held_out: list[Rows]) -> None:
        self.bench, self.job, self.plan, self.tenant = bench, job, plan, tenant
        self.rows, self.held_out = rows, held_out

    def prepare(self) -> Course:
        """What is needed before the first step."""
        yield from ()

    def learn(self, step: int) -> Generator[Future[Any], Any, float]:
        """Make a step; its loss."""
        batch = [row for place in self.plan.rows(step) for row in self.rows[place]]
        weight = 1 / max(1, sum(row.num_learnt for row in batch))
        rows = [row.weighted(weight) for row in batch]
        done = self.bench.engine.forward_backward(self.tenant, rows, "cross_entropy")
        made = self.bench.engine.optim_step(self.tenant, self.plan.settings(step))
        result: ForwardResult = yield done
        yield made
        self.tell(rows, result.loss)
        return result.loss

    def tell(self, rows: Sequence[TrainingRow], loss: float, reward: float | None = None) -> None:
        """For who watches."""
        self.bench.progress.learnt(self.job.id, sum(len(row.tokens) for row in rows), loss, reward)

    def held_out_loss(self) -> Generator[Future[Any], Any, float]:
        """The mean loss of all learnt tokens that are not trained on."""
        losses = yield from self.losses(self.tenant, self.held_out)
        num_tokens = sum(row.num_learnt for rows in self.held_out for row in rows)
        return sum(loss for each in losses for loss in each) / max(1, num_tokens)

    def losses(self, tenant: str, rows: Sequence[Rows]) -> Generator[Future[Any], Any, list[tuple[float, ...]]]:
        """The losses of rows, summed over their learnt tokens, some rows at a time."""
        found: list[tuple[float, ...]] = []
        for first in range(0, len(rows), self.plan.batch_size):
            part = rows[first : first + self.plan.batch_size]
            asked = [row.weighted(1.0) for each in part for row in each]
            result: ForwardResult = yield self.bench.engine.forward(tenant, asked, "cross_entropy", all_logprobs=False)
            losses = iter(result.losses)
            found += [tuple(next(losses) for _ in each) for each in part]
        return found

    # What is kept.

    def keep_state(self, state: TenantState) -> Course:
        """A job that is taken up again goes on from here."""
        yield self.bench.others.submit(state.save, self.bench.states / self.job.id)

    def keep(self, step: int, figures: dict[str, Any], *, is_checkpoint: bool) -> Course:
        """Keep the state, and at the end of an epoch a model to chat with."""
        state = yield self.bench.engine.state(self.tenant)
        if is_checkpoint:
            model = yield from self._save(state, step, figures, is_last=False)
            self.bench.jobs.keep(model)
        yield from self.keep_state(state)

    def finish(self) -> Course:
        """The model is served, and its figures are a file."""
        bench, job, plan = self.bench, self.job, self.plan
        state = yield bench.engine.state(self.tenant)
        figures = bench.jobs.figures(job.id)
        last = figures[-1] if figures else {"step": plan.num_steps}
        model = yield from self._save(state, plan.num_steps, last, is_last=True)
        result = (job.tenant, "step_metrics.csv", "fine-tune-results", _as_csv(figures))
        add_result = partial(bench.files.add, *result)
        if not bench.jobs.succeed(
            job.id, model, add_result, self._num_tokens()
        ):  # paused or cancelled at the last moment
            yield from self.keep_state(state)
            return
        shutil.rmtree(bench.states / job.id, ignore_errors=True)

    def _save(
        self, state: TenantState, step: int, figures: dict[str, Any], *, is_last: bool
    ) -> Generator[Future[Any], Any, Model]:
        job = self.job
        name = model_name(self.bench.base[0], job.tenant, job.suffix, job.id)
        folder = self.bench.models / (job.id if is_last else f"{job.id}-ckpt-{step}")
        yield self.bench.others.submit(checkpoint.save, state.adapter, folder)
        metrics = {key: value for key, value in figures.items() if key != "total_steps"}
        name = name if is_last else checkpoint_name(name, step)
        checkpoint_id = f"ftckpt_{secrets.token_hex(12)}"
        return Model(checkpoint_id, name, job.tenant, job.id, step, folder, int(time.time()), metrics)

    def _num_tokens(self) -> int:
        plan = self.plan
        lengths = [sum(len(row.tokens) for row in rows) for rows in self.rows]
        return sum(lengths[place] for step in range(plan.num_steps) for place in plan.rows(step))


class _Preferences(_Texts):
    """How a job learns which of two answers is the better one: the mean of DPO's loss over the pairs of a batch."""

    def prepare(self) -> Course:
        """The losses of all answers by the model with which the job began; it is the frozen one as a rule."""
        with _tenant(self.bench, self.job) as reference:
            yield self.bench.engine.create(reference, self.bench.beginning(self.job), owner=self.job.tenant)
            self._before = yield from self.losses(reference, self.rows)
            self._held_out_before = yield from self.losses(reference, self.held_out)

    def learn(self, step: int) -> Generator[Future[Any], Any, float]:
        """See `_Texts.learn`: a pass for the logprobs, and one for the gradient that they give."""
        places, engine = self.plan.rows(step), self.bench.engine
        pairs = [self.rows[place] for place in places]
        now = yield from self.losses(self.tenant, pairs)
        margins = [self._margin(one, self._before[place]) for one, place in zip(now, places, strict=True)]
        size = self.plan.beta / len(pairs)
        rows = [
            row.given(sign * size * _sigmoid(-margin))
            for pair, margin in zip(pairs, margins, strict=True)
            for row, sign in zip(pair, (-1, 1), strict=True)
        ]
        done = engine.forward_backward(self.tenant, rows, "given")
        made = engine.optim_step(self.tenant, self.plan.settings(step))
        yield done
        yield made
        loss = _mean_loss(margins)
        self.tell(rows, loss, sum(margins) / len(margins))
        return loss

    def held_out_loss(self) -> Generator[Future[Any], Any, float]:
        """See `_Texts.held_out_loss`: the mean over pairs."""
        now = yield from self.losses(self.tenant, self.held_out)
        return _mean_loss([self._margin(*both) for both in zip(now, self._held_out_before, strict=True)])

    def _margin(self, now: Sequence[float], before: Sequence[float]) -> float:
        """z; a loss is a negative logprob."""
        return self.plan.beta * ((before[0] - now[0]) - (before[1] - now[1]))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _mean_loss(margins: Sequence[float]) -> float:
    losses = [math.log1p(math.exp(-abs(margin))) + max(0.0, -margin) for margin in margins]
    return sum(losses) / len(losses)


def _as_csv(figures: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ("step", "train_loss", "valid_loss"), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(figures)
    return text.getvalue().encode()
