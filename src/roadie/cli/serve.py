"""`roadie serve`: a base model and a folder of adapters as a service, and `roadie api-key`: a key for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roadie.cli.options import AllowPickle, Model, Revision, TrustRemoteCode
from roadie.extras import need

if TYPE_CHECKING:
    from roadie.serving.http.launch import Started

LOST_SOME = 1


def serve(
    model: Model = None,
    adapters: Annotated[
        Path | None,
        typer.Option(
            help="Folder of adapters, one folder each; looked at again when a name is asked for.", show_default=False
        ),
    ] = None,
    port: Annotated[int, typer.Option("--port", "-p", help="0: any free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", metavar="FILE", help="Who may come; see below.", show_default=False)
    ] = None,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="Serve other machines without keys: everybody who can reach the host.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            help="What the base model is called; 'base' works always.", show_default="the folder's or repository's"
        ),
    ] = None,
    allow_from: Annotated[
        list[Path] | None,
        typer.Option(help="One more folder that adapters may be loaded from; several times.", show_default=False),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="File that remembers what was loaded and pinned.", show_default="in --adapters")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Let tenants train adapters, too; they are served when they are done.")
    ] = False,
    train_state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of what tenants train, with --train.", show_default=False),
    ] = None,
    train_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of one pass of training, at most, and so of a row: memory grows with them."),
    ] = 4096,
    slots: Annotated[int, typer.Option(help="Adapters and blends in memory at once.")] = 64,
    table_dtype: Annotated[
        str, typer.Option(help="Of their vectors: float32, or bfloat16 or float16 for half the memory.")
    ] = "float32",
    cache_blocks: Annotated[int, typer.Option(help="Key-value cache, in blocks of 16 tokens.")] = 1024,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward, at most.")] = 512,
    context_tokens: Annotated[
        int | None, typer.Option(help="Prompt and completion together, at most.", show_default="the model's")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one completion, at most.", show_default="the context")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Requests in one forward, at most.")] = 64,
    max_queued: Annotated[int, typer.Option(help="Requests that wait, at most; more get a 429.")] = 1024,
    max_queued_per_key: Annotated[int, typer.Option(help="The same, of one key.")] = 1024,
    max_running_per_key: Annotated[int, typer.Option(help="Requests of one key in one forward, at most.")] = 64,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes of one request, at most.")] = 2 << 20,
    request_timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 600.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds to go on after SIGTERM with what was accepted.")] = 60.0,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Value of the Host header that is taken; several times.", show_default="any; on loopback its own"
        ),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of pages elsewhere that may ask (CORS), or *; several times.", show_default="none"),
    ] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="Name adapters in /metrics without an administrator's key, too.")
    ] = False,
    adapter_templates: Annotated[
        bool, typer.Option(help="Use the chat template that an adapter brings for its chats.")
    ] = True,
    tool_format: Annotated[
        str | None,
        typer.Option(
            help="How the model writes calls of tools: hermes, llama3 or mistral.", show_default="by its chat template"
        ),
    ] = None,
    share_prefixes: Annotated[bool, typer.Option(help="Compute beginnings that prompts have in common once.")] = True,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    allow_unknown_version: Annotated[
        bool, typer.Option("--allow-unknown-version", help="Run with a transformers that was not tested.")
    ] = False,
) -> None:
    """Serve a base model and many adapters by OpenAI's API; every request may use another adapter, or a blend.

    Without arguments: the small model that comes with roadie, with three adapters, on http://127.0.0.1:8000, which is also a page
    to try them. Without a file of API keys only this machine can come in, and nobody can load or unload adapters.

    \b
    The adapter is the model of a request:
      legal    legal=1.5    base:legal=0.7+terse=0.3    or "base" with {"adapters": {"legal": 0.7, "terse": 0.3}}

    \b
    Examples:
      roadie serve
      roadie api-key me --admin --file keys.yaml
      roadie serve --model meta-llama/Llama-3.2-1B --adapters adapters --port 8000 --api-keys keys.yaml
      roadie serve --model meta-llama/Llama-3.2-1B --train --train-state state --api-keys keys.yaml

    SIGTERM ends it when all that was accepted has been answered; SIGHUP reads the keys again. All of it: docs/serving.md.
    """
    from roadie.cli.quiet import quiet_libraries

    need("serve")
    _check_training(train, train_state)
    with quiet_libraries():
        from roadie import embedded
        from roadie.engine import TrainingSettings
        from roadie.serving.engine import EngineSettings
        from roadie.serving.http.launch import Endpoint, Folders, Launch, run
        from roadie.serving.http.settings import HttpSettings
        from roadie.serving.places import recorded_bases
        from roadie.train_service.launch import extensions, with_training
        from roadie.training.models import ModelSource, best_device, load_model, load_tokenizer

        endpoint = Endpoint(host, port, api_keys, anonymous)
        source = ModelSource(model, revision, trust_remote_code, allow_pickle)
        source = source.for_adapters(recorded_bases(adapters) if adapters is not None else [])
        is_embedded = source.place == embedded.name_here(embedded.NAME)
        launch = Launch(
            endpoint,
            Folders(adapters, tuple(allow_from or ()), state),
            EngineSettings(
                num_slots=slots,
                table_dtype=table_dtype,
                num_blocks=cache_blocks,
                max_batch_tokens=batch_tokens,
                max_running=max_running,
                max_queued=max_queued,
                max_queued_per_tenant=max_queued_per_key,
                max_running_per_tenant=max_running_per_key,
                max_context_tokens=context_tokens,
                share_prefixes=share_prefixes,
                allow_unknown_version=allow_unknown_version,
            ),
            HttpSettings(
                model_name=name or ("roadie-tiny" if is_embedded else _name_of(source.place)),
                model_aliases=(source.place,),
                max_body_bytes=max_body_bytes,
                max_tokens=max_tokens,
                request_timeout_s=request_timeout,
                drain_timeout_s=drain_timeout,
                allowed_hosts=tuple(allowed_host or ()),
                allowed_origins=tuple(allowed_origin or ()),
                is_metrics_open=open_metrics,
                use_adapter_templates=adapter_templates,
                tool_format=tool_format,
            ),
            training=TrainingSettings(max_tokens_per_pass=train_tokens) if train else None,
        )

        def load() -> tuple[Any, Any]:
            return load_model(source).to(best_device()), load_tokenizer(source)

        if train_state is not None:
            launch = with_training(launch, train_state)
        extend = extensions(train_state) if train_state is not None else lambda ground: ()
        has_answered_all = run(launch, load, is_embedded=is_embedded, on_started=_announce, extend=extend)
    if not has_answered_all:
        raise typer.Exit(LOST_SOME)


def _check_training(train: bool, state: Path | None) -> None:
    from roadie.errors import ConfigError

    if train != (state is not None):
        got, missing = ("--train", "--train-state DIR") if train else ("--train-state", "--train")
        raise ConfigError(f"got {got} alone; wanted {missing} with it")


def _name_of(place: str) -> str:
    """A folder's name, or a repository's whole name."""
    return Path(place).resolve().name if Path(place).exists() else place


def _announce(started: Started) -> None:
    shown = ", ".join(started.adapter_names[:10]) + (", ..." if len(started.adapter_names) > 10 else "")
    typer.echo(f"roadie serves {started.model_name} with {len(started.adapter_names)} adapters at {started.url}")
    typer.echo(f"  adapters: {shown or 'none yet'}")
    typer.echo(f"  a page to try them: {started.url}/    the API: {started.url}/openapi.json")


def api_key(
    name: Annotated[str, typer.Argument(help="Whose key it is: limits and fairness count by it.", show_default=False)],
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Add its hash to this file of keys.", show_default=False)
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "-a", help="An adapter it may use, * for any characters; several times.", show_default="all"
        ),
    ] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="It may use the base model alone.")] = False,
    admin: Annotated[bool, typer.Option("--admin", help="It may load, unload and pin adapters.")] = False,
    prefix: Annotated[str, typer.Option(help="What the key begins with; Tinker's clients want tml-.")] = "rk-",
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Hash the key on standard input instead of making one.")
    ] = False,
) -> None:
    """Make an API key for roadie serve; it is printed once, and only its hash is kept.

    \b
    Examples:
      roadie api-key operator --admin --file keys.yaml
      roadie api-key alice --adapter legal --adapter "team-*" --file keys.yaml
      roadie api-key bob < key.txt --stdin          # prints the entry for the file
      roadie api-key carol --prefix tml- --file keys.yaml
    """
    import sys

    import yaml

    from roadie.errors import ConfigError
    from roadie.serving.http.keys import add_to_file, entry_of, make_key

    if base_only and adapter:
        raise ConfigError("got --base-only and --adapter; wanted one of them")
    key = sys.stdin.readline().strip() if stdin else make_key(prefix)
    entry = entry_of(name, key, [] if base_only else adapter, is_admin=admin)
    if file is None:
        typer.echo(yaml.safe_dump([entry], sort_keys=False).rstrip(), err=not stdin)
    else:
        add_to_file(file, entry)
    if not stdin:
        typer.echo(key)
