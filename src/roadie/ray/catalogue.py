"""Which version each adapter has, as one value: replaced as a whole, written to shared storage, followed by all replicas.

Every change has a number, the revision. An adapter that was unloaded keeps its entry, hidden, so that it is not found by its
name in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from roadie.adapter import check_adapter_name
from roadie.errors import ConfigError

FORMAT = 2


@dataclass(frozen=True)
class Entry:
    """One adapter. digest: of its version (`storage`). source: where it was loaded from, None for the folder of its name.

    is_loaded: an operator asked for it, so that every replica loads it at once; others load it when it is asked for.
    """

    digest: str
    is_pinned: bool = False
    is_hidden: bool = False
    is_loaded: bool = False
    source: str | None = None


@dataclass(frozen=True)
class Catalogue:
    """All entries by name, and the number of the last change."""

    revision: int = 0
    entries: Mapping[str, Entry] = field(default_factory=dict)

    def changed(self, name: str, entry: Entry | None) -> Catalogue:
        """With another entry, or none, one revision on."""
        entries = {**self.entries, **({name: entry} if entry else {})}
        return Catalogue(self.revision + 1, entries if entry else {key: entries[key] for key in entries if key != name})

    def current(self, name: str) -> Entry | None:
        """The entry of an adapter that may be asked for; None where it was unloaded, or is not known."""
        entry = self.entries.get(name)
        return None if entry is None or entry.is_hidden else entry

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
        return Catalogue(int(state["revision"]), entries)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"got a catalogue that cannot be read ({error}); wanted what roadie wrote; move .roadie/catalogue.json away to "
            "start with the adapters of the folder"
        ) from None
