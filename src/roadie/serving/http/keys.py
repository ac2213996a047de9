"""API keys: a file of hashes, each with a name, the adapters it may use, and whether it may administer.

    keys:
      - name: alice                  # the tenant: limits and fairness count by it
        sha256: 9f86d08...           # of the key; the key itself is nowhere
        adapters: [legal, "team-*"]  # left out: all; []: the base model alone
      - name: operator
        sha256: 60303ae...
        admin: true                  # may load, unload and pin, and sees every adapter

`roadie api-key NAME` makes a key and its line. A key has 256 random bits: nobody can go through the keys, so that one round of
SHA-256 is enough to keep it. Whoever brings a key of their own needs 32 characters at least.

Keys are compared in constant time, and with all lines of the file, whichever matches.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from roadie.checkpoint.replacement import replace_file
from roadie.errors import ConfigError, StateNotWritten

PREFIX = "rk-"
MIN_KEY_CHARS, MAX_KEY_CHARS = 32, 512
MAX_FILE_BYTES = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Caller:
    """Who sent a request. adapters: patterns of those it may use (`*` stands for any characters); None: all."""

    name: str
    adapters: tuple[str, ...] | None = None
    is_admin: bool = False

    def may_use(self, adapter: str) -> bool:
        """Whether this caller may ask for an adapter, and see it."""
        return self.adapters is None or any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


ANONYMOUS = Caller("default")
"""Everybody, where a server has no keys: all adapters, nothing to administer."""


@dataclass(frozen=True)
class Keys:
    """The keys of a server: hashes (hex) and whose they are."""

    entries: tuple[tuple[str, Caller], ...]

    def caller(self, key: str) -> Caller | None:
        """Whose key this is; as long in coming for a wrong key as for a right one."""
        got, found = hash_key(key), None
        for wanted, caller in self.entries:
            if hmac.compare_digest(got, wanted):
                found = caller
        return found


def hash_key(key: str) -> str:
    """SHA-256 of a key, hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def make_key(prefix: str = PREFIX) -> str:
    """A new key of 256 random bits; prefix: for clients that take only keys that begin so."""
    return prefix + secrets.token_urlsafe(32)


def check_key(key: str) -> None:
    """Raise `ConfigError` for a key that could be guessed, or that no header can carry."""
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"got a key of {len(key)} characters; wanted {MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable ASCII characters without "
            "spaces; leave it out to have one made"
        )


def read_keys(file: str | os.PathLike[str]) -> Keys:
    """The keys of a file (YAML, or JSON, which is YAML). Raises `ConfigError` for a file that is not as above."""
    path = Path(file)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: got {error.strerror}; wanted a file of API keys; make one with roadie api-key"
        ) from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: got more than {MAX_FILE_BYTES} bytes; wanted a file of API keys")
    try:
        return _parsed(yaml.safe_load(content))
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"{path}: got no YAML{'' if where is None else f' in line {where.line + 1}'}; wanted keys"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: got no UTF-8; wanted a file of API keys") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parsed(content: Any) -> Keys:
    if not isinstance(content, dict) or set(content) != {"keys"} or not isinstance(content["keys"], list):
        raise ConfigError("got something else; wanted one word, keys, with a list of entries")
    entries = tuple(_entry(number, entry) for number, entry in enumerate(content["keys"], 1))
    if not entries:
        raise ConfigError("got no keys; wanted one at least; make one with roadie api-key")
    for what, values in (("name", [caller.name for _, caller in entries]), ("sha256", [key for key, _ in entries])):
        if len(set(values)) < len(values):
            raise ConfigError(f"got a {what} twice; wanted each once")
    return Keys(entries)


def _entry(number: int, entry: Any) -> tuple[str, Caller]:
    if not isinstance(entry, dict) or not {"name", "sha256"} <= set(entry) <= {"name", "sha256", "adapters", "admin"}:
        raise ConfigError(f"got entry {number}; wanted name and sha256, and adapters and admin where they are needed")
    name, hashed, admin = entry["name"], entry["sha256"], entry.get("admin", False)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"got name {name!r} in entry {number}; wanted 1 to 64 characters A-Z a-z 0-9 _ . @ -")
    if not isinstance(hashed, str) or not _HASH.fullmatch(hashed):
        raise ConfigError(f"got sha256 of {name!r}; wanted 64 characters 0-9 a-f; the key itself does not belong here")
    if not isinstance(admin, bool):
        raise ConfigError(f"got admin={admin!r} for {name!r}; wanted true or false")
    return hashed, Caller(name, _patterns(name, entry.get("adapters")), admin)


def _patterns(name: str, patterns: Any) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError(f"got adapters={patterns!r} for {name!r}; wanted a list of names")
    return tuple(patterns)


def entry_of(name: str, key: str, adapters: Iterable[str] | None, *, is_admin: bool) -> dict[str, Any]:
    """The entry of a key for the file."""
    check_key(key)
    entry: dict[str, Any] = {"name": name, "sha256": hash_key(key)}
    if adapters is not None:
        entry["adapters"] = list(adapters)
    if is_admin:
        entry["admin"] = True
    _entry(1, entry)
    return entry


def add_to_file(file: Path, entry: dict[str, Any]) -> None:
    """Put an entry into a file, which is made where there is none; the file is replaced whole, and only its owner may read it.

    Raises `ConfigError` where the name is taken, and `StateNotWritten`.
    """
    before = read_keys(file).entries if file.exists() else ()
    if entry["name"] in [caller.name for _, caller in before]:
        raise ConfigError(
            f"{file}: got the name {entry['name']!r}, which has a key; wanted another; take its entry out first"
        )
    entries = [_as_entry(hashed, caller) for hashed, caller in before]
    _replace(file, yaml.safe_dump({"keys": [*entries, entry]}, sort_keys=False))


def _as_entry(hashed: str, caller: Caller) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": caller.name, "sha256": hashed}
    if caller.adapters is not None:
        entry["adapters"] = list(caller.adapters)
    return entry | ({"admin": True} if caller.is_admin else {})


def _replace(file: Path, text: str) -> None:
    try:
        replace_file(file, text, mode=0o600)
    except OSError as error:
        raise StateNotWritten(f"{file}: got {error.strerror} when it was written; nothing has changed") from None
