"""Which version each adapter has, as one value: replaced as a whole, written to shared storage, followed by all processes.

Every change has a number, the revision. Whoever has followed up to a revision knows all entries up to it. An adapter that
was unloaded keeps its entry, hidden, so that those who follow hear of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from roadie.adapter import check_adapter_name
from roadie.errors import ConfigError

FORMAT = 1
MAX_TEXT_BYTES = 1 << 30


@dataclass(frozen=True)
class Entry:
    """One adapter. revision: of its last change; digest: of its version (`storage`); None where it never was read.

    is_loaded: an operator asked for it, so that every replica loads it at once; others load it when it is asked for.
    source: where it was loaded from, None for the folder of its name.
    """

    revision: int
    digest: str | None
    is_pinned: bool = False
    is_hidden: bool = False
    is_loaded: bool = False
    source: str | None = None


@dataclass(frozen=True)
class Catalogue:
    """All entries by name, and the number of the last change."""

    revision: int = 0
    entries: Mapping[str, Entry] = field(default_factory=lambda: MappingProxyType({}))

    def changed(self, name: str, **values: Any) -> Catalogue:
        """With some values of one entry changed, one revision on."""
        revision = self.revision + 1
        before = self.entries.get(name, Entry(0, None))
        entry = Entry(**{**asdict(before), **values, "revision": revision})
        return Catalogue(revision, MappingProxyType({**self.entries, name: entry}))

    def since(self, revision: int) -> dict[str, Entry]:
        """What has changed after a revision."""
        return {name: entry for name, entry in self.entries.items() if entry.revision > revision}

    def current(self, name: str) -> Entry | None:
        """The entry of an adapter that may be asked for; None where it was unloaded, or is not known."""
        entry = self.entries.get(name)
        return None if entry is None or entry.is_hidden or entry.digest is None else entry

    def as_bytes(self) -> bytes:
        """As JSON."""
        adapters = {name: asdict(entry) for name, entry in sorted(self.entries.items())}
        return json.dumps({"format": FORMAT, "revision": self.revision, "adapters": adapters}, indent=1).encode()


def parse(content: bytes | None) -> Catalogue:
    """The catalogue of a text; an empty one for None. Raises `ConfigError` for what is none."""
    if content is None:
        return Catalogue()
    try:
        state = json.loads(content)
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}, not {FORMAT}")
        entries = {str(name): Entry(**entry) for name, entry in state["adapters"].items()}
        for name in entries:
            check_adapter_name(name)
        return Catalogue(int(state["revision"]), MappingProxyType(entries))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"got a catalogue that cannot be read ({error}); wanted what roadie wrote; move .roadie/catalogue.json away to "
            "start with the adapters of the folder"
        ) from None
