"""`roadie bench-serve`: a server driven with requests for many adapters by guidellm, and how each adapter fared."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

KEY_VARIABLE = "ROADIE_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
SOME_FAILED = 1


def bench_serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[URL] [-- GUIDELLM...]",
            help="The server, without /v1; after --, options of `guidellm run`.",
            show_default=DEFAULT_URL,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="What to ask for; several times.", show_default="the server's adapters"),
    ] = None,
    skew: Annotated[
        float, typer.Option(help="The k-th model is asked for with weight 1 / k^skew (Zipf); 0: all alike.")
    ] = 1.0,
    requests: Annotated[int, typer.Option("--requests", "-n", help="How many.")] = 100,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, at random times.", show_default="as fast as there is room")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", help="Requests in flight, at most.")] = 64,
    prompt_words: Annotated[int, typer.Option(help="Words of a prompt.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests.")] = 0,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", help="File with the API key.", show_default=f"the variable {KEY_VARIABLE}"),
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers by model to this file.", show_default=False)
    ] = None,
) -> None:
    """Drive a server with requests for many adapters, and show how each of them fared: guidellm sends and measures.

    Any server with OpenAI's API will do. guidellm's own options go first: other loads, data, and reports.

    \b
    Examples:
      roadie bench-serve --rate 20 --requests 500
      roadie bench-serve http://127.0.0.1:8001 -m legal -m terse -- --profile kind=sweep --output kind=html,path=sweep.html
    """
    from roadie.traffic import Popularity, Traffic, by_model, drive, models_of
    from roadie.training.folders import check_file

    if as_json is not None:
        check_file(as_json)
    options = list(arguments or ())
    url = options.pop(0) if options and not options[0].startswith("-") else DEFAULT_URL
    key = key_file.read_text(encoding="utf-8").strip() if key_file else os.environ.get(KEY_VARIABLE)
    there = models_of(url, key)
    popularity = Popularity(tuple(model or there), skew, seed)
    traffic = Traffic(url, popularity, key, requests, rate, concurrency, prompt_words, tokens)
    found = by_model(drive(traffic, [*options, *([] if sys.stdout.isatty() else ["--disable-progress"])]))
    for each in found:
        typer.echo(each.text())
    if as_json:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps([each.as_json() for each in found], indent=2) + "\n", encoding="utf-8")
    if any(each.failed for each in found):
        raise typer.Exit(SOME_FAILED)
