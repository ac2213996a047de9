"""From a model, a folder of adapters and a file of keys to a server that runs.

Without a folder of adapters there is an empty one, or, for the embedded model, the three that come with roadie; what is loaded or
pinned then is forgotten when the server ends.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from roadie import embedded
from roadie.engine import TrainingSettings
from roadie.errors import ConfigError
from roadie.serving.batch_engine import ContinuousBatchingEngine
from roadie.serving.engine import EngineSettings
from roadie.serving.http.adapters import left_out_of
from roadie.serving.http.app import make_service
from roadie.serving.http.extensions import Extension
from roadie.serving.http.keys import read_keys
from roadie.serving.http.server import bind, serve
from roadie.serving.http.settings import LOOPBACK, HttpSettings, url_at
from roadie.serving.places import LeftOut
from roadie.serving.registry import Registry

_log = logging.getLogger("roadie")
MAX_WARNINGS = 20


@dataclass(frozen=True)
class Endpoint:
    """Where a server is found, and who may come. Raises `ConfigError` for one that everybody could use without a key.

    port 0: any free one. keys_file: see `keys`. is_anonymous: no keys are meant, whoever can reach the host.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys_file: Path | None = None
    is_anonymous: bool = False

    def __post_init__(self) -> None:
        if not (self.is_loopback or self.keys_file or self.is_anonymous):
            raise ConfigError(
                f"got host {self.host!r} without API keys, which others could use; wanted --api-keys FILE; or say --anonymous"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK


@dataclass(frozen=True)
class Folders:
    """adapters: None: see the module. others: more folders that adapters may be loaded from. state_file: None: in `adapters`."""

    adapters: Path | None = None
    others: tuple[Path, ...] = ()
    state_file: Path | None = None


@dataclass(frozen=True)
class Launch:
    """Everything but the model. training: where tenants train beside the requests."""

    endpoint: Endpoint = field(default_factory=Endpoint)
    folders: Folders = field(default_factory=Folders)
    engine: EngineSettings = field(default_factory=EngineSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    training: TrainingSettings | None = None


@dataclass(frozen=True, eq=False)
class Ground:
    """What extensions of a server stand on; names: of the base model. The engine has not been started."""

    engine: ContinuousBatchingEngine
    model: Any
    tokenizer: Any
    registry: Registry
    names: tuple[str, ...]


@dataclass(frozen=True)
class Started:
    """A server that takes requests: where, and what it serves."""

    url: str
    model_name: str
    adapter_names: tuple[str, ...]


def run(
    launch: Launch,
    load: Callable[[], tuple[Any, Any]],
    *,
    is_embedded: bool,
    on_started: Callable[[Started], None] = lambda started: None,
    extend: Callable[[Ground], Sequence[Extension]] = lambda ground: (),
) -> bool:
    """Serve until a signal ends it; whether every accepted request was answered. load: the model and its tokenizer.

    The address, the keys and the folders are looked at first, since loading a model takes a while.
    """
    endpoint = launch.endpoint
    keys = read_keys(endpoint.keys_file) if endpoint.keys_file else None
    bound = bind(endpoint.host, endpoint.port)
    with contextlib.closing(bound), open_registry(launch, is_embedded=is_embedded) as registry:
        model, tokenizer = load()
        names = _names(launch.http)
        engine = ContinuousBatchingEngine(model, tokenizer, registry, launch.engine, names, launch.training)
        extensions = extend(Ground(engine, model, tokenizer, registry, names))
        service = make_service(engine, tokenizer, launch.http.at(endpoint.host), keys, extensions)
        service.start()
        _say_what_is_left_out(left_out_of(service))
        started = Started(
            url_at(endpoint.host, bound.getsockname()[1]),
            launch.http.model_name,
            tuple(name for name in registry.names() if name not in service.names.base),
        )
        again = partial(read_keys, endpoint.keys_file) if endpoint.keys_file else None
        return serve(service, bound, read_keys_again=again, on_ready=partial(on_started, started))


def _say_what_is_left_out(left_out: Sequence[LeftOut]) -> None:
    for each in left_out[:MAX_WARNINGS]:
        _log.warning("%s is not served: %s", each.path, each.reason)
    if len(left_out) > MAX_WARNINGS:
        _log.warning("%d more folders are not served; GET /v1/adapters says why", len(left_out) - MAX_WARNINGS)


def _names(settings: HttpSettings) -> tuple[str, ...]:
    return (settings.model_name, *settings.model_aliases)


@contextlib.contextmanager
def open_registry(launch: Launch, *, is_embedded: bool) -> Iterator[Registry]:
    """The registry of a server's folders."""
    folders = launch.folders
    open_folder = partial(
        Registry.open, allowed_roots=folders.others, max_adapter_bytes=launch.engine.max_adapter_bytes
    )
    if folders.adapters is not None:
        yield open_folder(folders.adapters, state_file=folders.state_file)
        return
    with tempfile.TemporaryDirectory(prefix="roadie-serve-") as scratch:
        root = embedded.adapters_path() if is_embedded else Path(scratch)
        yield open_folder(root, state_file=folders.state_file or Path(scratch) / "state.json")
