"""What lies beside an adapter's weights: the base model that it was made for, and a chat template and tokenizer of its own.

A chat template is used for the adapter's chats, since it was trained on what that makes of a conversation; with it goes the
token that ends a turn, where the base model has one of that name. A tokenizer is not: the base model's embeddings are those of
its own, and an adapter brings none. Whatever is not as the base model has it is said (`notes`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATE_NAME, TOKENIZER_CONFIG, TOKENIZER_NAME = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"
MAX_BYTES: Mapping[str, int] = {TEMPLATE_NAME: 1 << 18, TOKENIZER_CONFIG: 4 << 20, TOKENIZER_NAME: 64 << 20}
_SNAPSHOT = re.compile(r"models--(?:.+?--)?([^/]+)/snapshots/[^/]+")


@dataclass(frozen=True)
class OwnChat:
    """A chat template (Jinja), and the token that ends a turn of it; None: the base model's."""

    template: str
    end_token: str | None = None


@dataclass(frozen=True)
class Belongings:
    """See the module. added_tokens: those of the tokenizer beside its vocabulary, by id; vocabulary: its `vocabulary_hash`."""

    base_model: str | None = None
    chat: OwnChat | None = None
    added_tokens: Mapping[int, str] = field(default_factory=dict)
    vocabulary: str | None = None


@dataclass(frozen=True)
class Base:
    """What an adapter's belongings are compared with. names: of the model, any of which an adapter may have been made for."""

    names: tuple[str, ...] = ()
    chat_template: str | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    vocabulary: str | None = None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, names: Iterable[str] = ()) -> Base:
        """That of a model and its tokenizer, which may also be called otherwise."""
        own = getattr(model.config, "_name_or_path", "")
        found = tuple(name for name in (*names, own) if name)
        if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
            return cls(found)
        tokens = dict(tokenizer.get_vocab())
        return cls(found, getattr(tokenizer, "chat_template", None), tokens, vocabulary_hash(tokens))


def belongings_in(folder: Path, base_model: Any, known: dict[str, str | None]) -> Belongings:
    """Those in a folder of copies of the files that there are. known: hashes of vocabularies, by those of their files."""
    config = _object(folder / TOKENIZER_CONFIG)
    template = _text(folder / TEMPLATE_NAME) or _default_template(config.get("chat_template"))
    end = config.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return Belongings(
        base_model if isinstance(base_model, str) and base_model else None,
        None if template is None else OwnChat(template, end if isinstance(end, str) else None),
        _added(config.get("added_tokens_decoder")),
        _vocabulary_in(folder / TOKENIZER_NAME, known),
    )


def notes(belongings: Belongings, base: Base) -> tuple[str, ...]:
    """What of an adapter is not as the base model has it, in sentences; nothing where all is."""
    found = []
    made_for = belongings.base_model
    if made_for and base.names and _last(made_for) not in {_last(name) for name in base.names}:
        found.append(f"it was made for the base model {made_for!r}, and this one is {base.names[0]!r}")
    if belongings.chat is not None and belongings.chat.template != base.chat_template:
        found.append("it has a chat template of its own, which its chats use")
    missing = [token for token in belongings.added_tokens.values() if base.tokens and token not in base.tokens]
    if missing:
        found.append(f"its tokenizer has tokens that the base model has not ({_listed(missing)}); they are not used")
    elif None not in (belongings.vocabulary, base.vocabulary) and belongings.vocabulary != base.vocabulary:
        found.append("it has a tokenizer of its own with another vocabulary, which is not used")
    return tuple(found)


def vocabulary_hash(tokens: Mapping[str, int]) -> str:
    """SHA-256 of tokens and their ids, hex."""
    return hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()


def _vocabulary_in(file: Path, known: dict[str, str | None]) -> str | None:
    """Of a tokenizer.json; one that many adapters have is parsed once."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    key = hashlib.sha256(content).hexdigest()
    if key not in known:
        known[key] = _vocabulary_of(_parsed(content))
    return known[key]


def _vocabulary_of(tokenizer: Mapping[str, Any]) -> str | None:
    try:
        vocabulary = tokenizer["model"]["vocab"]
        pairs = (
            vocabulary.items()
            if isinstance(vocabulary, dict)
            else ((entry[0], place) for place, entry in enumerate(vocabulary))
        )
        added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}
        return vocabulary_hash({**dict(pairs), **added})
    except (KeyError, TypeError, IndexError, AttributeError):
        return None


def _added(decoder: Any) -> dict[int, str]:
    if not isinstance(decoder, dict):
        return {}
    found = {key: entry.get("content") for key, entry in decoder.items() if isinstance(entry, dict)}
    return {int(key): text for key, text in found.items() if str(key).isdecimal() and isinstance(text, str)}


def _default_template(template: Any) -> str | None:
    """A template, or of several by name the one called default."""
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template and len(template) <= MAX_BYTES[TEMPLATE_NAME] else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8") or None
    except (OSError, UnicodeDecodeError):
        return None


def _object(file: Path) -> Mapping[str, Any]:
    try:
        return _parsed(file.read_bytes())
    except OSError:
        return {}


def _parsed(content: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _last(name: str) -> str:
    """The last part of a model's name, by which a copy in a folder and the repository are one; of a snapshot the repository's."""
    snapshot = _SNAPSHOT.search(name)
    return (snapshot[1] if snapshot else name.rstrip("/").rpartition("/")[2]).casefold()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
