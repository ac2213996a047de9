"""`roadie bench-serve`: a server driven with a workload of many adapters, and measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from roadie.errors import ConfigError
from roadie.extras import need

if TYPE_CHECKING:
    from roadie.traffic.client import Answer

KEY_VARIABLE = "ROADIE_API_KEY"
SOME_FAILED = 1
LINES_OF_A_RUN = 10


def bench_serve(
    url: Annotated[str, typer.Argument(help="The server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="What to ask for; several times.", show_default="the server's adapters"),
    ] = None,
    popularity: Annotated[
        str, typer.Option(help="identical, uniform, zipf or distinct: who is asked for how often.")
    ] = "uniform",
    skew: Annotated[float, typer.Option(help="Of zipf: the k-th model has weight 1 / k^skew.")] = 1.0,
    requests: Annotated[int, typer.Option("--requests", "-n", help="How many.")] = 100,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, at random times.", show_default="as fast as there is room")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", help="Requests in flight, at most.")] = 64,
    prompt_words: Annotated[int, typer.Option(help="Words of a prompt.")] = 32,
    shared_words: Annotated[int, typer.Option(help="Of these, words that all prompts begin with.")] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    spread: Annotated[float, typer.Option(help="Lengths are drawn from 1 - spread to 1 + spread times these.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests.")] = 0,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", help="File with the API key.", show_default=f"the variable {KEY_VARIABLE}"),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Send only what OpenAI's API has: no ignore_eos.")] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (SVG) to this file.", show_default=False)] = None,
) -> None:
    """Drive a server with requests for many adapters, and measure throughput, time to first token and time between tokens.

    Any server with OpenAI's /v1/completions will do. Times count from when a request was due, with --rate at its random time.

    \b
    Examples:
      roadie bench-serve --popularity zipf --rate 20 --requests 500 --plot zipf.svg
      roadie bench-serve http://127.0.0.1:8001 --model meta-llama/Llama-3.2-1B --plain
    """
    import asyncio

    need("serve", "httpx2")
    from roadie.traffic import Popularity, Target, Workload, drive, models_of, plan, summarise
    from roadie.traffic.chart import chart
    from roadie.training.folders import check_file

    for file in (as_json, plot):
        if file is not None:
            check_file(file)
    kinds = [kind.value for kind in Popularity]
    if popularity not in kinds:
        raise ConfigError(f"got popularity {popularity!r}; wanted one of {', '.join(kinds)}")
    key = key_file.read_text(encoding="utf-8").strip() if key_file else os.environ.get(KEY_VARIABLE)
    target = Target(url, key, has_extras=not plain, max_at_once=concurrency)
    base, adapters = asyncio.run(models_of(target)) if not model else ((), tuple(model))
    workload = Workload(
        models=adapters or base,
        popularity=Popularity(popularity),
        num_requests=requests,
        rate_per_s=rate,
        prompt_words=prompt_words,
        shared_words=shared_words,
        max_tokens=tokens,
        spread=spread,
        skew=skew,
        seed=seed,
    )
    summary = summarise(asyncio.run(drive(target, plan(workload), _progress(requests))))
    typer.echo(summary.text())
    title = f"{requests} requests, {popularity}, {len(workload.models)} models"
    if as_json:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(summary.as_json(), indent=2) + "\n", encoding="utf-8")
    if plot:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_text(chart(summary, title), encoding="utf-8")
    if summary.num_failed:
        raise typer.Exit(SOME_FAILED)


def _progress(requests: int) -> Callable[[Answer], None]:
    """Says on standard error how many answers have come, every so many."""
    numbers, between = count(1), max(1, requests // LINES_OF_A_RUN)

    def say(answer: Answer) -> None:
        if (number := next(numbers)) % between == 0:
            typer.echo(f"answered {number}/{requests} requests in {answer.end_s:.1f} s", err=True)

    return say
