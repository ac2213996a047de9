"""A report: what was found out about some adapters, and which pictures and tables show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from roadie.adapter import Adapter
from roadie.errors import ConfigError
from roadie.inspect.blocks import blocks_of
from roadie.inspect.comparison import Comparison, compare, warnings_of
from roadie.inspect.comparison_figures import comparison_pictures, sharing_pictures, state_pictures
from roadie.inspect.portrait import Portrait, look
from roadie.inspect.portrait_figures import overview_pictures, portrait_pictures
from roadie.inspect.positions import positions_of
from roadie.inspect.rendering import Picture
from roadie.inspect.states import StateChange

MOST_DETAILED = 4


@dataclass(frozen=True)
class Findings:
    """What was found out: a portrait an adapter; comparison: None for one adapter; states: where a model was run."""

    portraits: tuple[Portrait, ...]
    comparison: Comparison | None
    states: tuple[StateChange, ...]
    warnings: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        comparison = asdict(self.comparison) if self.comparison else None
        if comparison:
            del comparison["warnings"]
        return {
            "adapters": [asdict(portrait) for portrait in self.portraits],
            "comparison": comparison,
            "states": [asdict(change) for change in self.states],
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Section:
    """A part of a report: pictures, and of which adapter or comparison; number: of the portrait, where it is one's."""

    key: str
    title: str
    pictures: tuple[Picture, ...]
    number: int | None = None


@dataclass(frozen=True)
class Report:
    """Findings, in sections with pictures; `roadie.inspect.to_html` and `to_pngs` write it."""

    title: str
    findings: Findings
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, in order; their keys differ."""
        return tuple(picture for section in self.sections for picture in section.pictures)


def examine(adapters: Mapping[str, Adapter], states: Sequence[StateChange] = ()) -> Findings:
    """What can be said of `adapters`, by name; needs neither a model nor a plotting library.

    states: measured with a model and a text (`roadie.training.inspection.measure_states`).
    Raises `ConfigError` where there is nothing to look at, `AdapterError`, naming adapter and layer, for parameters that
    are not finite and for adapters of base models of different shapes.
    """
    if not adapters and not states:
        raise ConfigError("got nothing to look at; wanted an adapter or measured states; name one")
    positions = positions_of(dict.fromkeys(path for adapter in adapters.values() for path in adapter.layers))
    comparison = compare(adapters, positions) if len(adapters) > 1 else None
    portraits = tuple(look(adapter, name, positions) for name, adapter in adapters.items())
    warnings = comparison.warnings if comparison else warnings_of(adapters) if adapters else ()
    return Findings(portraits, comparison, tuple(states), warnings)


def report(
    adapters: Mapping[str, Adapter],
    states: Sequence[StateChange] = (),
    *,
    portraits: bool = True,
    detailed: int = MOST_DETAILED,
) -> Report:
    """A report on `adapters`, by name, on what they share where there are several, and on hidden states where measured.

    portraits: each adapter by itself too; detailed: at most so many adapters in full, those that change most.
    Raises as `examine` does.
    """
    findings = examine(adapters, states)
    sections = [*_overview(findings)] if portraits else []
    if findings.comparison:
        sections += _comparison(findings.comparison)
    if states:
        sections.append(Section("states", "Hidden states", tuple(state_pictures(states))))
    if portraits:
        sections += _portraits(findings, adapters, detailed)
    return Report(_title(findings), findings, tuple(sections))


def _title(findings: Findings) -> str:
    names = [portrait.name for portrait in findings.portraits] or [change.name for change in findings.states]
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} adapters"


def _overview(findings: Findings) -> list[Section]:
    if len(findings.portraits) < 2:
        return []
    return [Section("overview", "At a glance", tuple(overview_pictures(findings.portraits)))]


def _comparison(comparison: Comparison) -> list[Section]:
    closest = comparison.closest
    title = f"What {closest.first} and {closest.second} share"
    pictures = tuple(sharing_pictures(closest))
    if len(comparison.names) == 2:
        return [Section("sharing", title, pictures)]
    together = Section("comparison", "Beside each other", tuple(comparison_pictures(comparison)))
    return [together, Section("sharing", f"{title}, the closest two", pictures)]


def _portraits(findings: Findings, adapters: Mapping[str, Adapter], detailed: int) -> list[Section]:
    """The adapters that change most, in the order they were given."""
    portraits = findings.portraits
    numbers = sorted(sorted(range(len(portraits)), key=lambda n: -portraits[n].change)[:detailed])
    sections = []
    for number in numbers:
        portrait = portraits[number]
        blocks = blocks_of(adapters[portrait.name], portrait.name)
        pictures = tuple(portrait_pictures(portrait, blocks, f"adapter-{number + 1}"))
        title = portrait.name if len(portraits) > 1 else "What it does, layer by layer"
        sections.append(Section(f"adapter-{number + 1}", title, pictures, number))
    return sections
