"""What a server allows, and for how long it waits: every limit of the HTTP side in one frozen value."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace

from roadie.errors import ConfigError
from roadie.serving.http.tools import STYLES

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_CHOICES = 128
"""Choices of one request, over all its prompts: no server may allow more."""


@dataclass(frozen=True)
class HttpSettings:
    """Limits and waits of a server; times in seconds. Raises `ConfigError` for values that are not positive.

    model_name: what the base model is called; "base" always works, too. model_aliases: other names of it.
    max_body_bytes: of a request. max_prompt_chars: of one prompt or conversation. max_tokens: the most a request may ask for;
    None: what the context holds. max_choices: of a request, over all its prompts. max_concurrent_requests: generating at once,
    of all callers; max_concurrent_per_key: of one. max_connections: open at once.
    header_timeout_s, body_timeout_s: a client that has not sent them by then gets a 408. write_timeout_s: one that takes nothing
    of a stream for so long is cut off. request_timeout_s: from the first byte of an answer's making to its last.
    drain_timeout_s: how long accepted requests may go on after SIGTERM.
    allowed_hosts: values of the Host header, without a port; empty: any. allowed_origins: pages of other servers that a browser
    may let in, as "https://example.org", or "*" for all. max_labelled_adapters: those with a label of their own
    in /metrics. is_metrics_open: adapters are named in /metrics without an admin's key, too.
    use_adapter_templates: a chat with an adapter that brings a chat template uses it. tool_format: how models write calls of
    tools, one of `tools.STYLES`; None: by their chat template.
    """

    model_name: str = "base"
    model_aliases: tuple[str, ...] = ()
    max_body_bytes: int = 2 << 20
    max_prompt_chars: int = 400_000
    max_tokens: int | None = None
    max_choices: int = 32
    max_concurrent_requests: int = 2048
    max_concurrent_per_key: int = 2048
    max_connections: int = 4096
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    keep_alive_s: float = 30.0
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 60.0
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_labelled_adapters: int = 100
    is_metrics_open: bool = False
    use_adapter_templates: bool = True
    tool_format: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < math.inf:
                raise ConfigError(f"got {field.name}={value!r}; wanted a number above 0")
        if self.tool_format not in (None, *STYLES):
            raise ConfigError(f"got tool_format={self.tool_format!r}; wanted one of {', '.join(STYLES)}")
        if self.max_choices > MAX_CHOICES:
            raise ConfigError(f"got max_choices={self.max_choices}; wanted at most {MAX_CHOICES}")
        for origin in self.allowed_origins:
            if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
                raise ConfigError(f"got origin {origin!r}; wanted one as browsers send it, https://example.org, or *")
        for name in (self.model_name, *self.model_aliases):
            if not name or len(name) > 1024 or not name.isprintable():
                raise ConfigError(f"got model name {name!r}; wanted 1 to 1024 printable characters")

    def at(self, host: str) -> HttpSettings:
        """For a server at this address: on loopback other names are those of pages that try to get in by a browser here."""
        if self.allowed_hosts or host not in LOOPBACK:
            return self
        return replace(self, allowed_hosts=("localhost", "127.0.0.1", "[::1]"))


def url_at(host: str, port: int) -> str:
    """Where such a server is found."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
