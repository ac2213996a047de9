"""The logs of a run: one file of JSON lines a job, and TensorBoard where it is installed.

    WORK/logs/JOB.jsonl     {"step": 1, "loss": 3.21, "grad_norm": 0.8, "learning_rate": 0.0, "tokens": 63}
                            {"step": 50, "eval_loss": 2.95}
                            {"step": 60, "failed": "..."}  or  {"step": 100, "finished": "OUTPUT"}
    WORK/tensorboard/       scalars loss/JOB, learning_rate/JOB, eval_loss/JOB

Lines are written every `FLUSH_SECONDS`, and before a checkpoint or an output is; what was logged after the checkpoint that
a run goes on from is taken back, since it happens again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roadie.training.many.observer import Observer, StepReport
from roadie.training.many.result import JobResult, JobStatus

FLUSH_SECONDS = 2.0


class Logs(Observer):
    """Writes what it is told into the folder `work`."""

    def __init__(self, work: Path) -> None:
        self._folder = work / "logs"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lines: dict[str, list[str]] = {}
        self._flushed_at = time.monotonic()
        self._board = _board(work / "tensorboard")

    def on_step(self, reports: Sequence[StepReport], seconds: float) -> None:
        """A line for each job."""
        for report in reports:
            values = {key: getattr(report, key) for key in ("loss", "grad_norm", "learning_rate", "tokens")}
            self._note(report.name, {"step": report.step, **values})
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def on_evaluation(self, name: str, step: int, loss: float) -> None:
        """A line for the held-out loss."""
        self._note(name, {"step": step, "eval_loss": loss})

    def on_end(self, result: JobResult) -> None:
        """The last line."""
        ended = {"finished": str(result.output)} if result.status is JobStatus.FINISHED else {"failed": result.reason}
        if result.status is not JobStatus.BEFORE:
            self._note(result.name, {"step": result.steps, **ended})
        self.flush()

    def flush(self) -> None:
        """Write all lines that wait."""
        for name, lines in self._lines.items():
            with self._file(name).open("a", encoding="utf-8") as stream:
                stream.write("".join(f"{line}\n" for line in lines))
        self._lines = {}
        self._flushed_at = time.monotonic()

    def history(self, name: str) -> list[dict[str, float]]:
        """The losses of a job so far, in order."""
        self.flush()
        kept = ("step", "loss", "learning_rate", "eval_loss")
        lines = [{key: line[key] for key in kept if key in line} for line in _lines(self._file(name))]
        return [line for line in lines if "loss" in line or "eval_loss" in line]

    def rewind(self, steps: Mapping[str, int | None]) -> None:
        """Take back what each job logged after the step given; None: everything."""
        for name, step in steps.items():
            file = self._file(name)
            kept = [line for line in _lines(file) if step is not None and line["step"] <= step and "failed" not in line]
            file.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def close(self) -> None:
        """Write what waits, and end TensorBoard's files."""
        self.flush()
        if self._board is not None:
            self._board.close()

    def _note(self, name: str, line: Mapping[str, Any]) -> None:
        self._lines.setdefault(name, []).append(json.dumps(line))
        if self._board is not None:
            for key in ("loss", "learning_rate", "eval_loss"):
                if key in line:
                    self._board.add_scalar(f"{key}/{name}", line[key], line["step"])

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a line that an interruption cut short is left out."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
