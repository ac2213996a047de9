"""A run of guidellm: its scenario, made of what is asked for here, and whatever its own options say instead."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from roadie.errors import ConfigError
from roadie.extras import need
from roadie.traffic.models import Popularity

_TEXT = (
    "the turtle draws a line and turns left before it goes on to the next corner where an event loop waits for work that never "
    "comes so every reader of this text may ask what a list of names is for when nobody has called any of them yet"
)
WORDS = _TEXT.split()
MOST_PROMPTS = 10_000


@dataclass(frozen=True)
class Traffic:
    """What is sent. rate_per_s: at random times (Poisson); None: always `concurrency` at once. Raises `ConfigError`."""

    url: str
    popularity: Popularity
    key: str | None = None
    num_requests: int = 100
    rate_per_s: float | None = None
    concurrency: int = 64
    prompt_words: int = 32
    max_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("num_requests", "concurrency", "prompt_words", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"got {name}={getattr(self, name)}; wanted 1 or more")
        if self.rate_per_s is not None and not 0 < self.rate_per_s < 1e9:
            raise ConfigError(f"got rate_per_s={self.rate_per_s}; wanted a number above 0, or none")

    def scenario(self, kind: str, options: Sequence[str] = ()) -> dict[str, Any]:
        """As guidellm has it. kind: of the backend; options: those of guidellm, whose parts are left to it."""
        asked, draw = self.popularity, random.Random(self.popularity.seed)
        count = min(self.num_requests, MOST_PROMPTS)
        prompts = [" ".join(draw.choices(WORDS, k=self.prompt_words)) for _ in range(count)]
        backend: dict[str, Any] = {
            "kind": kind,
            "target": self.url,
            "model": asked.models[0],
            "models": list(asked.models),
        }
        backend |= {"skew": asked.skew, "popularity_seed": asked.seed, "request_format": "/v1/completions"}
        backend |= {"extras": {"body": {"temperature": 0}}} | ({"api_key": self.key} if self.key else {})
        profile: dict[str, Any] = {"kind": "concurrent", "streams": self.concurrency}
        if self.rate_per_s is not None:
            profile = {"kind": "poisson", "rate": self.rate_per_s, "max_concurrency": self.concurrency}
        parts = {
            "profile": profile,
            "constraints": [{"kind": "max_requests", "count": self.num_requests}],
            "data": [
                {
                    "kind": "in_memory_dict",
                    "data": {"prompt": prompts, "output_tokens_count": [self.max_tokens] * count},
                }
            ],
            "seed": {"kind": "static", "value": asked.seed},
        }
        given = {option.partition("=")[0].removeprefix("--") for option in options}
        return {"backend": backend} | {
            name: part for name, part in parts.items() if name.removesuffix("s") not in given
        }


def drive(traffic: Traffic, options: Sequence[str] = ()) -> dict[str, Any]:
    """Run guidellm, and give its report, as its JSON has it. options: of `guidellm run`, which go first.

    Raises `MissingExtra` without guidellm, and `ConfigError` for options that it does not take.
    """
    need("measure")
    import click

    from roadie.traffic.backend import KIND

    # after the backend, which is then one of those that the command knows
    run = import_module("guidellm.cli.run").run
    with tempfile.TemporaryDirectory() as folder:
        scenario, report = Path(folder) / "scenario.json", Path(folder) / "report.json"
        scenario.write_text(json.dumps({"spec": traffic.scenario(KIND, options)}), encoding="utf-8")
        arguments = ["--config", str(scenario), "--output", f"kind=json,path={report}", *options]
        try:
            run.main(arguments, prog_name="guidellm run", standalone_mode=False)
        except click.ClickException as error:
            raise ConfigError(f"got options that guidellm does not take: {error.format_message()}") from None
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found
