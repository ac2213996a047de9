"""`roadie eval`: lm-eval's tasks over many adapters in one pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from roadie.cli.options import AllowPickle, Model, Revision, TrustRemoteCode
from roadie.errors import ConfigError
from roadie.extras import need

BASE = "base"


def evaluate(
    task: Annotated[
        list[str], typer.Argument(metavar="TASK", help="Names of lm-eval's tasks, or of your own.", show_default=False)
    ],
    model: Model = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of adapters, one folder each.", show_default="those of the embedded model"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="NAME", help="One of them; several times.", show_default="all"),
    ] = None,
    base: Annotated[bool, typer.Option(help="Evaluate the base model, too.")] = True,
    include: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Folder with tasks of your own; several times.", show_default=False),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question.", show_default="the task's own")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-l", help="Documents of each task.", show_default="all")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write all of lm-eval's results to this file.", show_default=False)
    ] = None,
    cache_blocks: Annotated[int, typer.Option(help="Key-value cache, in blocks of 16 tokens.")] = 1024,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward, at most.")] = 512,
    context_tokens: Annotated[
        int | None, typer.Option(help="Tokens that the model reads, at most.", show_default="the model's")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    allow_unknown_version: Annotated[
        bool, typer.Option("--allow-unknown-version", help="Run with a transformers that was not tested.")
    ] = False,
) -> None:
    """Evaluate many adapters of one base model on lm-eval's tasks, all in one pass: rows of all adapters share each forward.

    \b
    Examples:
      roadie eval arc_easy boolq --model meta-llama/Llama-3.2-1B --adapters adapters
      roadie eval mine --include tasks --adapters adapters --adapter legal --adapter terse --limit 100
    """
    from roadie.cli.quiet import quiet_libraries
    from roadie.training.folders import check_file

    need("eval")
    if as_json is not None:
        check_file(as_json)
    with quiet_libraries():
        import tempfile

        from roadie import embedded
        from roadie.evaluation import Tasks
        from roadie.serving import EngineSettings, Registry
        from roadie.serving.places import recorded_bases
        from roadie.training.models import ModelSource

        root = embedded.adapters_path() if adapters is None else adapters
        with tempfile.TemporaryDirectory(prefix="roadie-eval-") as scratch:
            registry = Registry.open(root, state_file=Path(scratch) / "state.json")
            names = _names(registry.names(), adapter)
            source = ModelSource(model, revision, trust_remote_code, allow_pickle).for_adapters(recorded_bases(root))
            settings = EngineSettings(
                num_slots=max(1, len(names)),
                num_blocks=cache_blocks,
                max_batch_tokens=batch_tokens,
                max_context_tokens=context_tokens,
                allow_unknown_version=allow_unknown_version,
            )
            tasks = Tasks(tuple(task), tuple(include or ()), num_fewshot, limit, chat)
            wishes = ({BASE: None} if base else {}) | {name: name for name in names}
            results = _run(source, registry, settings, wishes, tasks)
    _print(results)
    if as_json is not None:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")


def _names(known: tuple[str, ...], wanted: list[str] | None) -> tuple[str, ...]:
    """The adapters to evaluate, in the order in which they were named."""
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise ConfigError(f"got adapter {unknown[0]!r}, which is not in the folder; wanted one of {shown or 'none'}")
    return tuple(dict.fromkeys(wanted)) if wanted else known


def _run(source: Any, registry: Any, settings: Any, wishes: dict[str, str | None], tasks: Any) -> dict[str, Any]:
    from roadie.evaluation import evaluate as evaluate_all
    from roadie.serving import ContinuousBatchingEngine
    from roadie.training.models import best_device, load_model, load_tokenizer

    model, tokenizer = load_model(source).to(best_device()), load_tokenizer(source)
    engine = ContinuousBatchingEngine(model, tokenizer, registry, settings)
    engine.start()
    try:
        return evaluate_all(engine, tokenizer, wishes, tasks, _progress())
    finally:
        engine.stop()


def _progress() -> Callable[[int], None]:
    """Says on standard error how many answers have come: every thousand."""

    def say(num_answers: int) -> None:
        if num_answers % 1000 == 0:
            typer.echo(f"answered {num_answers} requests", err=True)

    return say


def _print(results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    from roadie.evaluation.report import side_by_side
    from roadie.training.text_table import table

    for name, found in results.items():
        typer.echo(f"{name}\n{make_table(found)}")
        if found.get("groups"):
            typer.echo(make_table(found, "groups"))
    head, rows = side_by_side(results)
    typer.echo(table(rows, head=head))
