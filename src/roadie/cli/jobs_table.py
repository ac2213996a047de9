"""All jobs of a run at a glance: a table that is drawn again while they are trained; lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from roadie.training.many.job import Job
from roadie.training.many.observer import Observer, StepReport
from roadie.training.many.result import JobResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LINES_AROUND = 6
FEWEST_LINES = 5
JOBS_OF_A_LINE = 4


@dataclass
class Line:
    """What is known of one job."""

    steps: int = 0
    step: int = 0
    loss: float | None = None
    held_out: float | None = None
    learning_rate: float | None = None
    state: str = "waiting"

    @property
    def cells(self) -> list[str]:
        """The columns after the name."""
        done = f"{self.step:,}/{self.steps:,}" if self.steps else ""
        numbers = [_shown(self.loss, ".4f"), _shown(self.held_out, ".4f"), _shown(self.learning_rate, ".1e")]
        return [done, *numbers, self.state]


class JobsTable(Observer):
    """Listens to a run; `table` shows where it stands, the jobs in training first."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._seconds = 0.0
        self._tokens = 0

    def on_start(self, jobs: Sequence[Job], steps: Mapping[str, int]) -> None:
        """A line for each job."""
        self._lines = {job.name: Line(steps.get(job.name, 0)) for job in jobs}

    def on_join(self, name: str, step: int) -> None:
        """It is being trained."""
        self._lines[name].step, self._lines[name].state = step, "training"

    def on_step(self, reports: Sequence[StepReport], seconds: float) -> None:
        """New numbers for the jobs in training."""
        self._seconds = seconds
        self._tokens = sum(report.tokens for report in reports)
        for report in reports:
            line = self._lines[report.name]
            line.step, line.loss, line.learning_rate = report.step, report.loss, report.learning_rate

    def on_evaluation(self, name: str, step: int, loss: float) -> None:
        """A held-out loss."""
        self._lines[name].held_out = loss

    def on_end(self, result: JobResult) -> None:
        """How it ended."""
        line = self._lines[result.name]
        line.state, line.step = result.status.value, max(line.step, result.steps)

    def table(self, most_lines: int) -> Table:
        """At most so many jobs as a table."""
        from rich.table import Table

        order = sorted(self._lines.items(), key=lambda item: item[1].state != "training")
        table = Table(title=self._title(), title_justify="left", box=None, pad_edge=False)
        table.add_column("job", overflow="ellipsis", no_wrap=True)
        for name in ("step", "loss", "held-out", "rate", ""):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        for name, line in order[:most_lines]:
            table.add_row(name, *line.cells, style=_STYLES.get(line.state, ""))
        if len(order) > most_lines:
            table.caption = f"and {len(order) - most_lines:,} more"
        return table

    def _title(self) -> str:
        states = [line.state for line in self._lines.values()]
        counts = [f"{states.count(state):,} {state}" for state in dict.fromkeys(states)]
        speed = f"  {self._tokens / self._seconds:,.0f} tokens/s" if self._seconds else ""
        return ", ".join(counts) + speed


_STYLES = {"training": "bold", "failed": "red", "waiting": "dim"}


def _shown(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


class JobsLines(Observer):
    """Listens to a run, and says where it stands in a line now and then: the steps of the run, and the jobs in training."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._between, self._step = 1, 0

    def on_start(self, jobs: Sequence[Job], steps: Mapping[str, int]) -> None:
        """As many lines as for a training of the longest job."""
        from roadie.training.progress import steps_between_lines

        self._between = steps_between_lines(max(steps.values(), default=1))

    def on_step(self, reports: Sequence[StepReport], seconds: float) -> None:
        """The first step, and every so many."""
        self._step += 1
        if self._step == 1 or self._step % self._between == 0:
            jobs = [f"{each.name} {each.step}/{each.steps} loss={each.loss:.4f}" for each in reports[:JOBS_OF_A_LINE]]
            jobs += [f"and {len(reports) - JOBS_OF_A_LINE:,} more"] if len(reports) > JOBS_OF_A_LINE else []
            self._say(f"step {self._step}: {', '.join(jobs)}")

    def on_end(self, result: JobResult) -> None:
        """How a job ended."""
        losses = "" if result.last_loss is None else f", loss={result.last_loss:.4f}"
        losses += "" if result.eval_after is None else f", held-out={result.eval_after:.4f}"
        where = result.reason or result.output
        self._say(f"job {result.name}: {result.status.value} after {result.steps:,} steps{losses}: {where}")


@contextmanager
def live_table(console: Console, *, shown: bool) -> Iterator[list[Observer]]:
    """Observers for a run that show it within the block, if `shown`: as a table on a terminal, in lines elsewhere."""
    if not shown:
        yield []
        return
    if not console.is_terminal:
        yield [JobsLines(lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False))]
        return
    from rich.live import Live

    jobs = JobsTable()

    def drawn() -> Any:
        return jobs.table(max(FEWEST_LINES, console.height - LINES_AROUND))

    with Live(get_renderable=drawn, console=console, refresh_per_second=4):
        yield [jobs]
