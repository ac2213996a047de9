"""deploy.yaml: which model and adapters, on which Ray, in how many replicas, and within which limits.

    model: meta-llama/Llama-3.2-1B     # left out: the small model that comes with roadie
    adapters: s3://bucket/adapters     # a folder, or a URI that fsspec knows, which all machines reach
    replicas: 2                        # or autoscaling: {min_replicas: 1, max_replicas: 8, target_ongoing_requests: 16}
    resources: {num_gpus: 1}           # of one replica, as Ray has them
    limits: {num_slots: 64}            # fields of `EngineSettings`
    http: {max_body_bytes: 1000000}    # fields of `HttpSettings`

Relative paths are relative to the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from roadie.errors import ConfigError
from roadie.serving.engine import EngineSettings
from roadie.serving.http.settings import LOOPBACK, HttpSettings, url_at
from roadie.training.recipe import check_known
from roadie.training.settings_file import read_yaml

_MAPPINGS = {"autoscaling": dict, "resources": dict, "limits": EngineSettings, "http": HttpSettings}


@dataclass(frozen=True)
class Deployment:
    """Everything that a deployment is. Raises `ConfigError` for what cannot work.

    adapters: a folder or URI, absolute; None: a folder of the machine that deploys, for one machine. allow_from: more of them,
    from which adapters may be loaded. address: of a Ray cluster; None: the one that RAY_ADDRESS names, else one of its own on
    this machine. replicas: of the engine, unless `autoscaling` says how many (Serve's settings, passed through). fronts: how
    many processes read and answer HTTP. resources: num_cpus, num_gpus and others of one replica. api_keys: file of keys, read
    when it is deployed. scratch: folder on each machine for copies of adapters. Times in seconds.
    """

    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    adapters: str | None = None
    allow_from: tuple[str, ...] = ()
    name: str = "roadie"
    address: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    route_prefix: str = "/"
    api_keys: str | None = None
    anonymous: bool = False
    replicas: int = 1
    autoscaling: Mapping[str, Any] | None = None
    fronts: int = 1
    resources: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 1})
    scratch: str | None = None
    health_check_period_s: float = 5.0
    health_check_timeout_s: float = 30.0
    object_store_bytes: int | None = None
    limits: EngineSettings = field(default_factory=EngineSettings)
    http: HttpSettings = field(default_factory=HttpSettings)

    def __post_init__(self) -> None:
        self._check_place()
        self._check_numbers()
        if self.autoscaling is not None and self.autoscaling.get("min_replicas", 1) < 1:
            raise ConfigError(
                "got autoscaling to no replica at all; wanted min_replicas of 1 at least: what a request may ask for is "
                "known from a replica that runs"
            )

    def _check_place(self) -> None:
        if not (self.host in LOOPBACK or self.api_keys or self.anonymous):
            raise ConfigError(
                f"got host {self.host!r} without API keys, which others could use; wanted api_keys: FILE; or say "
                "anonymous: true"
            )
        if not self.route_prefix.startswith("/") or (self.route_prefix != "/" and self.route_prefix.endswith("/")):
            raise ConfigError(f"got route_prefix {self.route_prefix!r}; wanted / or a path such as /llm")
        if not self.name:
            raise ConfigError("got an empty name; wanted one for the application")

    def _check_numbers(self) -> None:
        for name, lowest, highest in (("port", 0, 65535), ("replicas", 1, 10_000), ("fronts", 1, 1000)):
            if not lowest <= getattr(self, name) <= highest:
                raise ConfigError(f"got {name}={getattr(self, name)}; wanted {lowest} to {highest}")
        for name in ("health_check_period_s", "health_check_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"got {name}={getattr(self, name)}; wanted a number above 0")
        if self.object_store_bytes is not None and self.object_store_bytes < 75 << 20:
            raise ConfigError(
                f"got object_store_bytes={self.object_store_bytes}; wanted {75 << 20} at least, as Ray does"
            )

    @classmethod
    def from_mapping(cls, content: Any, folder: Path) -> Deployment:
        """The deployment that a file holds; folder: what relative paths are relative to. Raises `ConfigError`."""
        if not isinstance(content, Mapping):
            raise ConfigError(f"got {type(content).__name__}; wanted a mapping; see roadie deploy --help")
        values = _checked(content, cls, "")
        for name in ("adapters", "api_keys"):
            if name in values:
                values[name] = _absolute(values[name], folder)
        values["allow_from"] = tuple(_absolute(place, folder) for place in values.get("allow_from", ()))
        return _named(cls(**values), is_named="model_name" in (content.get("http") or {}), folder=folder)


def read(path: str | Path) -> Deployment:
    """The deployment in a file; raises `ConfigError`, naming the file, where it cannot be used."""
    path = Path(path)
    try:
        content = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: got {error.strerror}; wanted a file that says what to deploy") from None
    try:
        return Deployment.from_mapping({} if content is None else content, path.resolve().parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def url_of(deployment: Deployment) -> str:
    """Where it is reached, on the machine of a proxy."""
    return url_at(deployment.host, deployment.port) + deployment.route_prefix.rstrip("/")


def address_of(deployment: Deployment) -> str | None:
    """Of the cluster that is meant; None: a Ray of its own on this machine."""
    return deployment.address or os.environ.get("RAY_ADDRESS") or None


def prepare(deployment: Deployment) -> None:
    """Before ray is imported: a Ray of this machine listens on loopback alone, and tells nobody that it runs."""
    if address_of(deployment) is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's word for a cluster that others may join


def _named(deployment: Deployment, *, is_named: bool, folder: Path) -> Deployment:
    """With a path of the model that every process understands, and a name for it."""
    model, http = deployment.model, deployment.http
    if model is not None and (folder / model).is_dir():
        model = str((folder / model).resolve())
    if not is_named:
        shown = "roadie-tiny" if model is None else (Path(model).name if Path(model).is_absolute() else model)
        http = replace(http, model_name=shown, model_aliases=(*http.model_aliases, *([model] if model else [])))
    return replace(deployment, model=model, http=http.at(deployment.host))


def _absolute(place: str, folder: Path) -> str:
    return place if "://" in place else str((folder / place).resolve())


def _checked(content: Mapping[Any, Any], kind: type, where: str) -> dict[str, Any]:
    """The values of a mapping, each of the type of its field; raises `ConfigError` for unknown ones and for other types."""
    check_known([f"{where}{key}" for key in content], [f"{where}{entry.name}" for entry in fields(kind)])
    hints = get_type_hints(kind)
    return {key: _value(f"{where}{key}", value, hints[key], _MAPPINGS.get(key)) for key, value in content.items()}


def _value(name: str, value: Any, hint: Any, mapping: Any) -> Any:
    if mapping is not None:
        if not isinstance(value, Mapping):
            raise ConfigError(f"got {name}={value!r}; wanted a mapping of settings")
        return dict(value) if mapping is dict else mapping(**_checked(value, mapping, f"{name}."))
    return _plain(name, value, str(getattr(hint, "__name__", None) if isinstance(hint, type) else hint))


_KINDS: dict[str, tuple[Any, str]] = {
    "Mapping": (Mapping, "a mapping"),  # first, as the next: others may be a part of their hints
    "tuple": (list, "a list of texts"),
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text; quote it"),
}


def _plain(name: str, value: Any, hint: str) -> Any:
    if value is None and "None" in hint:
        return None
    for word, (types, wanted) in _KINDS.items():
        if word in hint:
            is_fit = isinstance(value, types) and (word == "bool" or not isinstance(value, bool))
            if not is_fit or (word == "tuple" and not all(isinstance(item, str) for item in value)):
                raise ConfigError(f"got {name}={value!r}; wanted {wanted}")
            return tuple(value) if word == "tuple" else value
    return value
