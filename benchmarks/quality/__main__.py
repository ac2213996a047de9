"""`python -m benchmarks.quality run | quick | real | reward | tenants | recipe | report`."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.quality import records
from benchmarks.quality.hub import command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="train what the records lack")
    run.add_argument("--task", action="append", default=[], help="only this task (may be given several times)")
    run.add_argument("--records", type=Path, default=None, help="folder of the records")
    run.add_argument(
        "--until", default=None, help="HH:MM in UTC: start no run after that; taken as the nearest such time"
    )
    run.add_argument("--threads", type=int, default=1)
    command.add_arguments(run)
    quick = verbs.add_parser("quick", help="repeat two rows of the records, and compare")
    quick.add_argument("--real", action="store_true", help="instead one row of a real language model, under 10 minutes")
    real = verbs.add_parser("real", help="train what the records of real language models lack; needs no network")
    real.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="the data, as real.yaml names its files"
    )
    real.add_argument(
        "--models", type=Path, default=None, metavar="FOLDER", help="where python -m benchmarks.models put them"
    )
    real.add_argument("--records", type=Path, default=None, help="folder of the records")
    real.add_argument("--task", action="append", default=[], help="only this task (may be given several times)")
    real.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1")
    real.add_argument("--threads", type=int, default=1)
    real.add_argument("--until", default=None, help="HH:MM in UTC: start no run after that")
    reward = verbs.add_parser("reward", help="train what the records of learning by reward lack; needs no network")
    reward.add_argument(
        "--model", type=Path, required=True, metavar="FOLDER", help="a checkpoint that transformers loads"
    )
    reward.add_argument("--records", type=Path, default=None, help="folder of the records")
    reward.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1")
    reward.add_argument("--threads", type=int, default=1)
    reward.add_argument("--until", default=None, help="HH:MM in UTC: start no run after that")
    tenants = verbs.add_parser("tenants", help="what a step of decoding costs with an adapter for each of 32 rows")
    tenants.add_argument(
        "--model", type=Path, required=True, metavar="FOLDER", help="a checkpoint that transformers loads"
    )
    tenants.add_argument("--records", type=Path, default=None, help="folder of the records")
    recipe = verbs.add_parser("recipe", help="train what the records of docs/recipe.md lack, and make it")
    recipe.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no run after so many; 0: only the document"
    )
    report = verbs.add_parser("report", help="make docs/quality.md and docs/recipe.md of the records")
    report.add_argument("--records", type=Path, default=None, help="print a report of what run --config wrote there")
    options = parser.parse_args(arguments)
    return VERBS[options.verb](options)


def _run(options: argparse.Namespace) -> int:
    from benchmarks.quality.sweep import sweep

    torch.set_num_threads(options.threads)
    if command.is_meant(options):
        return command.run(options, _stop_at(options.until))
    count = sweep(options.records or records.folder(), _stop_at(options.until), options.task)
    print(f"{count} runs")
    return 0


def _quick(options: argparse.Namespace) -> int:
    from benchmarks.quality.quick import repeat, repeat_real

    if options.real:
        return repeat_real()
    torch.set_num_threads(1)
    return repeat()


def _real(options: argparse.Namespace) -> int:
    from benchmarks.quality import real

    torch.set_num_threads(options.threads)
    folder = options.records or records.real_folder(device=options.device)
    stop = _stop_at(options.until)
    return command.explained(
        lambda: print(real.sweep_all(options.data, options.models, folder, options.device, stop, options.task), "runs")
    )


def _reward(options: argparse.Namespace) -> int:
    from benchmarks.quality import reward

    torch.set_num_threads(options.threads)
    folder = options.records or reward.records_folder(device=options.device)
    stop = _stop_at(options.until)
    return command.explained(lambda: print(reward.sweep(options.model, folder, options.device, stop), "runs"))


def _tenants(options: argparse.Namespace) -> int:
    from benchmarks.quality import tenants

    print(tenants.record(options.model, options.records or records.real_folder()))
    return 0


def _recipe(options: argparse.Namespace) -> int:
    from benchmarks.quality import recipe, recipe_report

    torch.set_num_threads(1)
    end = time.monotonic() + 60 * options.minutes
    print(f"{recipe.train_missing(recipe.records_path(), lambda: time.monotonic() >= end)} runs")
    return recipe_report.main()


def _report(options: argparse.Namespace) -> int:
    from benchmarks.quality import recipe_report, report

    if options.records is not None:
        return command.report(options.records)
    return report.main() or recipe_report.main()


def _stop_at(clock: str | None) -> Callable[[], bool]:
    """A question with the answer yes from that time of day (UTC) on; None: never."""
    if clock is None:
        return lambda: False
    end = nearest(clock, datetime.datetime.now(datetime.timezone.utc))
    return lambda: datetime.datetime.now(datetime.timezone.utc) >= end


def nearest(clock: str, now: datetime.datetime) -> datetime.datetime:
    """When it is HH:MM, less than 12 hours before `now` or at most 12 hours after it."""
    hour, minute = (int(part) for part in clock.split(":"))
    half_a_day = datetime.timedelta(hours=12)
    end = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    if end <= now - half_a_day:
        return end + 2 * half_a_day
    return end - 2 * half_a_day if end > now + half_a_day else end


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "quick": _quick,
    "real": _real,
    "reward": _reward,
    "tenants": _tenants,
    "recipe": _recipe,
    "report": _report,
}

if __name__ == "__main__":
    sys.exit(main())
