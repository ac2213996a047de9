"""docs/combining-results.md and its picture, made from a record of `benchmarks.combining` and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown

Record = Mapping[str, Any]
PICTURE = "combining-power.png"
BOUND = 1e-6
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito

_HEAD = """# What combinations of adapters are worth

This file is made by `python -m benchmarks.combining --report` from the newest record in `benchmarks/results`; it is never
written by hand. `python -m benchmarks.combining` measures anew.

Losses are nats per token on held-out text, lower is better. In each column * is the best of its table; a loss in italics is
above that of the base model: there the combination does harm.
"""

_SHOWN = f"""![Held-out loss of each adapter's powers from 0 to 2, on each kind of text](images/{PICTURE})

The powers of each adapter on every kind of text; dotted: the base model.
"""

_SECTIONS = {
    "alone": ("Each alone", "Each adapter was trained on the kind it is named after."),
    "composed": ("Each pair composed", "Both adapters in full, one after the other, as one adapter."),
    "interpolated": (
        "Interpolated",
        "The way from one adapter to another, a quarter, a half and three quarters of it.",
    ),
    "averaged": (
        "All three averaged",
        "On the group of rotations, without and with the magnitude correction of OrthoMerge.",
    ),
}


def write(record: Record, folder: Path) -> Path:
    """Write the document and its picture into `folder`; needs matplotlib."""
    path = folder / "combining-results.md"
    path.write_text(text_of(record), encoding="utf-8")
    (folder / "images").mkdir(exist_ok=True)
    draw(record, folder / "images" / PICTURE)
    return path


def text_of(record: Record) -> str:
    """The document; equal for equal records."""
    sections = [_HEAD, _provenance(record), _summary(record), _SHOWN]
    for variant, found in record["variants"].items():
        sections += [f"## {variant}\n", *_of_variant(variant, found)]
    return "\n".join(section.rstrip() + "\n" for section in sections)


def _provenance(record: Record) -> str:
    settings, machine = record["settings"], record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    rows = f"{settings['rows']} rows of {settings['row_tokens']} tokens"
    return (
        f"Trained as in `roadie demo`: {settings['steps']} steps of {rows}, learning rate {settings['learning_rate']}, seed "
        f"{settings['seed']};\nmeasured on {settings['measured_rows']} held-out rows of each kind. One seed and one small model: "
        f"the tables show how combinations behave,\nnot how large models do. {record['date'][:10]}, {machine['processor']}, "
        f"{machine['cores']} cores, {versions}."
    )


def _summary(record: Record) -> str:
    lines = [line for variant, found in record["variants"].items() for line in _findings(variant, found["losses"])]
    return "## In short\n\n" + "\n".join(lines)


def _findings(variant: str, losses: Record) -> Iterator[str]:
    base = losses["base"]
    worst = max(undone_by(losses).values())
    said = f"({BOUND:.0e}: {'met' if worst <= BOUND else '**NOT MET**'})"
    yield f"- {variant}: an adapter composed with its inverse has the base's losses but for {worst:.1e} of them {said}."
    own = sum(losses["alone"][kind][kind] for kind in base) / len(base)
    yield f"- {variant}: mean loss over the three kinds: base {mean(base):.3f}, the adapter of each row's kind {own:.3f}."
    for section in ("composed", "interpolated", "averaged"):
        measured = {name: kinds for name, kinds in losses[section].items() if "refused" not in kinds}
        refused = len(losses[section]) - len(measured)
        best = min(measured, key=lambda name: mean(measured[name]))
        harm = sum(kinds[kind] > base[kind] for kinds in measured.values() for kind in base)
        said = f"- {variant}, {section}: best mean {mean(measured[best]):.3f} ({best}); above the base's loss in {harm} of "
        yield said + f"{len(measured) * len(base)} places" + (f"; {refused} refused." if refused else ".")
    yield _best_powers(variant, losses)


def _best_powers(variant: str, losses: Record) -> str:
    best = []
    for kind in losses["base"]:
        curve = power_curve(losses, kind)
        exponent, loss = min(((s, kinds[kind]) for s, kinds in curve), key=lambda point: point[1])
        best.append(f"{kind} {exponent:g} ({loss:.3f})")
    return f"- {variant}, power: each adapter is best on its own kind at {', '.join(best)}."


def undone_by(losses: Record) -> dict[str, float]:
    """Name -> the largest relative difference from the base's loss of the adapter composed with its inverse."""
    base = losses["base"]
    return {name: max(abs(kinds[k] - base[k]) / base[k] for k in base) for name, kinds in losses["undone"].items()}


def power_curve(losses: Record, name: str) -> list[tuple[float, Mapping[str, float]]]:
    """Exponents and losses of the powers of one adapter, those left out that were refused."""
    points = [(key.rpartition(" "), kinds) for key, kinds in losses["power"].items() if "refused" not in kinds]
    return [(float(exponent), kinds) for (adapter, _, exponent), kinds in points if adapter == name]


def mean(kinds: Mapping[str, float]) -> float:
    """The mean loss over the kinds of text."""
    return sum(kinds.values()) / len(kinds)


def _of_variant(variant: str, found: Record) -> Iterator[str]:
    losses = found["losses"]
    for section, (title, about) in _SECTIONS.items():
        yield f"### {variant}: {title.lower()}\n\n{about}\n"
        yield _table({"base": losses["base"], **losses[section]}, losses["base"])
    distances = ", ".join(f"{names} {value:.3f}" for names, value in found["distances"].items())
    yield f"How far the adapters are apart (chordal, 0 is the same): {distances}."
    yield f"### {variant}: composed with its inverse\n"
    yield markdown(["adapter", "largest relative difference from the base's loss"], _undone_rows(losses))
    yield f"### {variant}: powers from 0 to 2\n"
    yield _powers(losses)
    yield f"### {variant}: converted\n\n{_CONVERTED}\n"
    yield _conversions(found)


_CONVERTED = (
    "Each adapter on its own kind after a conversion: the part of its change (in squares) that is lost, and its parameters, are\n"
    "means over the three. For road_1 the change is R - I, for LoRA (R - I) W."
)


def _undone_rows(losses: Record) -> list[list[str]]:
    return [[name, f"{worst:.1e}"] for name, worst in undone_by(losses).items()]


def _table(rows: Mapping[str, Mapping[str, Any]], base: Mapping[str, float]) -> str:
    kinds = list(base)
    measured = [row for row in rows.values() if "refused" not in row]
    best = {kind: min(row[kind] for row in measured) for kind in kinds}
    best_mean = min(map(mean, measured))
    lines = []
    for name, row in rows.items():
        if "refused" in row:
            lines.append([name, *["refused"] * (len(kinds) + 1)])
            continue
        cells = [_cell(row[kind], best[kind], base[kind]) for kind in kinds]
        lines.append([name, *cells, _cell(mean(row), best_mean, mean(base))])
    return markdown(["adapter", *(f"on {kind}" for kind in kinds), "mean"], lines)


def _cell(loss: float, best: float, base: float) -> str:
    text = f"{loss:.3f}"
    if loss == best:
        return f"{text}*"
    return f"_{text}_" if loss > base else text


def _powers(losses: Record) -> str:
    curves = {name: dict(power_curve(losses, name)) for name in losses["base"]}
    exponents = sorted({exponent for curve in curves.values() for exponent in curve})
    rows = []
    for exponent in exponents:
        cells = [f"{curve[exponent][name]:.3f}" if exponent in curve else "refused" for name, curve in curves.items()]
        rows.append([f"{exponent:g}", *cells])
    return markdown(["exponent", *(f"{name} on {name}" for name in curves)], rows)


def _conversions(found: Record) -> str:
    losses, kinds = found["losses"], list(found["losses"]["base"])
    rows = [
        ["base", "", "", *(f"{losses['base'][kind]:.3f}" for kind in kinds)],
        [
            "as trained",
            "0 %",
            f"{found['road_parameters']:,}",
            *(f"{losses['alone'][kind][kind]:.3f}" for kind in kinds),
        ],
    ]
    for name, by_kind in found["conversions"].items():
        lost, parameters = (sum(by_kind[k][key] for k in kinds) / len(kinds) for key in ("share_lost", "parameters"))
        rows.append([name, f"{lost:.0%}", f"{parameters:,.0f}", *(f"{by_kind[kind]['loss']:.3f}" for kind in kinds)])
    return markdown(["converted to", "lost", "parameters", *(f"{kind} on {kind}" for kind in kinds)], rows)


def draw(record: Record, path: Path) -> None:
    """The loss of each power of each adapter on each kind: a row a variant, a column an adapter."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    variants = record["variants"]
    kinds = list(next(iter(variants.values()))["losses"]["base"])
    figure, grid = plt.subplots(
        len(variants), len(kinds), figsize=(10, 3.2 * len(variants)), sharey=True, squeeze=False
    )
    for row, (variant, found) in zip(grid, variants.items(), strict=True):
        for axes, name in zip(row, kinds, strict=True):
            _curves(axes, found["losses"], name, kinds)
            axes.set_title(f"{variant}, {name}", fontsize=9)
            axes.set_xlabel("exponent", fontsize=8)
    grid[0][0].set_ylabel("held-out loss, nats per token", fontsize=8)
    grid[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _curves(axes: Any, losses: Record, name: str, kinds: Sequence[str]) -> None:
    curve = power_curve(losses, name)
    for kind, colour, marker in zip(kinds, COLOURS, "os^", strict=True):
        points = [loss[kind] for _, loss in curve]
        axes.plot(
            [exponent for exponent, _ in curve], points, color=colour, marker=marker, markersize=3, label=f"on {kind}"
        )
        axes.axhline(losses["base"][kind], color=colour, linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
