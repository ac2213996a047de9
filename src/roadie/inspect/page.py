"""A report as one HTML page: no script, nothing fetched, colours by `prefers-color-scheme`.

Whatever comes from outside (names, paths, configs) is escaped where it is put in; a policy in the page forbids it to load
anything at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from roadie.inspect.comparison import Comparison, LayerSharing, Sharing
from roadie.inspect.portrait import LayerPortrait, Portrait
from roadie.inspect.rendering import Picture, Shape, to_svg
from roadie.inspect.report import Findings, Report, Section
from roadie.inspect.states import StateChange
from roadie.inspect.theme import DARK, LIGHT, style_variables
from roadie.version import __version__

MOST_CHANGED = 8
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_TERMS = (
    (
        "Block",
        "The adapter turns each layer's outputs in pairs. A pair's 2 x 2 block is all it does to it; R is all of them.",
    ),
    ("Angle", "By how much a block turns: the rotation of its polar decomposition. For road_1 it is theta."),
    (
        "Scale",
        "By how much a block stretches, over all directions (root mean square). For road_1 it is alpha. ln 1 = 0.",
    ),
    ("Mirrored", "A block of negative determinant: it turns the pair over. Angles leave such blocks out."),
    (
        "Change",
        "||R - I|| / √D, the Frobenius norm over D outputs: how much R changes an output of no preferred direction.",
    ),
    ("Beyond road_1", "The share of change² that no road_1 adapter could express."),
    ("Distance", "||Ra - Rb|| / √D. An adapter changes nothing in a layer that it lacks."),
    (
        "Alignment",
        "The cosine between what two adapters change, Ra - I and Rb - I: 1 alike, 0 nothing in common, -1 opposite.",
    ),
    (
        "dM, dD",
        "For a hidden state x0, now x: | ||x|| - ||x0|| | / ||x0|| and cos(x, x0), as in section 3.1 of arXiv 2409.00119.",
    ),
)


def to_html(report: Report) -> str:
    """The whole page; raises `ConfigError` where matplotlib is not installed."""
    title = escape(report.title)
    sections = "".join(_section(section, report.findings) for section in report.sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title} · roadie</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'
        f"<style>{_style()}</style></head>\n<body><header><h1>{title}</h1>{_lead(report)}</header>\n"
        f"<main>{sections}{_terms()}</main>\n<footer>roadie {escape(__version__)}</footer></body></html>\n"
    )


def _style() -> str:
    sheet = files("roadie.inspect").joinpath("report.css").read_text(encoding="utf-8")
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {style_variables(DARK)} }} }}"
    return f":root {{ {style_variables(LIGHT)} }}\n{dark}\n{sheet}"


def _lead(report: Report) -> str:
    warnings = "".join(f'<p class="warning" role="note">{escape(text)}</p>' for text in report.findings.warnings)
    links = [(section.key, section.title) for section in report.sections] + [("terms", "What the words mean")]
    items = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title in links)
    return f'{warnings}<nav aria-label="Sections"><ul>{items}</ul></nav>'


def _section(section: Section, findings: Findings) -> str:
    before, among, after = _tables(section, findings)
    figures = "".join(_figure(picture) for picture in section.pictures)
    return (
        f'<section aria-labelledby="{section.key}"><h2 id="{section.key}">{escape(section.title)}</h2>{before}'
        f'<div class="pictures">{figures}{among}</div>{after}</section>\n'
    )


def _figure(picture: Picture) -> str:
    title, caption, image = escape(picture.title), escape(picture.caption), to_svg(picture)
    kind = f' class="{picture.shape.value}"'
    if picture.shape is Shape.WIDE:
        image = f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">{image}</div>'
    return f"<figure{kind}><h3>{title}</h3>{image}<figcaption>{caption}</figcaption></figure>"


def _tables(section: Section, findings: Findings) -> tuple[str, str, str]:
    """What stands before the pictures of a section, among them, and after them."""
    if section.number is not None:
        portrait = findings.portraits[section.number]
        return _facts(portrait), _most_changed(portrait), _all_layers(portrait)
    if section.key == "overview":
        return "", "", _adapters(findings.portraits)
    if section.key == "states":
        return "", _last_states(findings.states), _states(findings.states)
    assert findings.comparison is not None
    if section.key == "sharing":
        sharing = findings.comparison.closest
        return _sharing_facts(sharing), _most_alike(sharing), _sharing_layers(sharing)
    return "", _distances(findings.comparison), ""


def _facts(portrait: Portrait) -> str:
    other = [("Other tensors", str(portrait.other_tensors))] if portrait.other_tensors else []
    return _definitions(
        [
            ("Base model", portrait.base_model or "not named"),
            ("Variant", ", ".join(portrait.variants)),
            ("Group size", ", ".join(map(str, portrait.group_sizes))),
            ("Layers", f"{len(portrait.layers):,}"),
            ("Parameters", f"{portrait.parameters:,}"),
            ("Size", size(portrait.num_bytes)),
            *other,
            ("Angle, rms", _number(portrait.angle_degrees, "°")),
            ("Mean ln(scale)", _number(portrait.log_scale)),
            ("Change", _number(portrait.change)),
            ("Beyond road_1", f"{portrait.beyond_road_1:.1%}"),
            ("Mirrored blocks", f"{portrait.mirrored:,} of {portrait.outputs // 2:,}"),
        ]
    )


def _definitions(rows: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{_breakable(value)}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{items}</dl>'


def _breakable(value: str) -> str:
    """Text that breaks after slashes first: paths of base models are long."""
    return escape(value).replace("/", "/<wbr>")


def _most_changed(portrait: Portrait) -> str:
    layers = portrait.most_changed[:MOST_CHANGED]
    most = layers[0].change or 1
    rows = [(_place(layer), _number(layer.change), _Bar(layer.change / most)) for layer in layers]
    table = _table(("Layer", "Change", ""), rows, f"Most changed layers of {portrait.name}")
    return f'<div class="card"><h3>Most changed layers</h3>{table}</div>'


def _place(layer: LayerPortrait | LayerSharing) -> str:
    return layer.kind if layer.depth is None else f"{layer.kind}, depth {layer.depth}"


def _all_layers(portrait: Portrait) -> str:
    table = _layer_table(portrait.layers, f"All layers of {portrait.name}")
    return f"<details><summary>All {len(portrait.layers)} layers in numbers</summary>{table}</details>"


def _layer_table(layers: Sequence[LayerPortrait], label: str) -> str:
    most = max((layer.change for layer in layers), default=0) or 1
    head = (
        *("Layer", "Change", "", "Angle, rms", "Mean ln(scale)", "Spread", "Beyond road_1", "Mirrored"),
        *("Outputs", "Parameters"),
    )
    rows = [
        (
            layer.path,
            _number(layer.change),
            _Bar(layer.change / most),
            _number(layer.angle_degrees, "°"),
            _number(layer.log_scale),
            _number(layer.log_scale_spread),
            f"{layer.beyond_road_1:.1%}",
            f"{layer.mirrored:,}",
            f"{layer.out_features:,}",
            f"{layer.parameters:,}",
        )
        for layer in layers
    ]
    return _table(head, rows, label)


def _adapters(portraits: Sequence[Portrait]) -> str:
    most = max(portrait.change for portrait in portraits) or 1
    head = (
        *("Adapter", "Change", "", "Angle, rms", "Mean ln(scale)", "Beyond road_1", "Mirrored"),
        *("Variant", "Layers", "Parameters", "Size"),
    )
    rows = [
        (
            portrait.name,
            _number(portrait.change),
            _Bar(portrait.change / most),
            _number(portrait.angle_degrees, "°"),
            _number(portrait.log_scale),
            f"{portrait.beyond_road_1:.1%}",
            f"{portrait.mirrored:,}",
            ", ".join(portrait.variants),
            f"{len(portrait.layers):,}",
            f"{portrait.parameters:,}",
            size(portrait.num_bytes),
        )
        for portrait in portraits
    ]
    table = _table(head, rows, "All adapters")
    if len(rows) > 12:
        return f"<details><summary>All {len(rows)} adapters in numbers</summary>{table}</details>"
    return f'<div class="card">{table}</div>'


def _distances(comparison: Comparison) -> str:
    """The pairs, from the closest on."""
    pairs = [
        (comparison.distance[a][b], a, b)
        for a in range(len(comparison.names))
        for b in range(a + 1, len(comparison.names))
    ]
    shown = sorted(pairs)[:MOST_CHANGED] + (sorted(pairs)[MOST_CHANGED:][-3:] if len(pairs) > MOST_CHANGED else [])
    rows = [
        (f"{comparison.names[a]} · {comparison.names[b]}", _number(distance), _number(comparison.alignment[a][b]))
        for distance, a, b in shown
    ]
    left_out = f"The closest pairs and the farthest, of {len(pairs):,}" if len(shown) < len(pairs) else "All pairs"
    table = _table(("Pair", "Distance", "Alignment"), rows, left_out)
    return f'<div class="card wide"><h3>{left_out}</h3>{table}</div>'


def _sharing_facts(sharing: Sharing) -> str:
    both = len(sharing.layers) - len(sharing.only_first) - len(sharing.only_second)
    return _definitions(
        [
            ("Distance", _number(sharing.distance)),
            ("Alignment", _number(sharing.alignment)),
            (
                "Same outputs among the tenth changed most (chance: 10%)",
                "-" if sharing.top_overlap is None else f"{sharing.top_overlap:.0%}",
            ),
            ("Layers both adapt", f"{both:,}"),
            (f"Only {sharing.first}", f"{len(sharing.only_first):,}"),
            (f"Only {sharing.second}", f"{len(sharing.only_second):,}"),
        ]
    )


def _most_alike(sharing: Sharing) -> str:
    """The layers that count most in what the two have in common: alignment times both changes."""
    known = [
        (layer, layer.alignment * layer.first_change * layer.second_change)
        for layer in sharing.layers
        if layer.alignment
    ]
    shown = sorted(known, key=lambda pair: -abs(pair[1]))[: 14 if len(sharing.layers) > 100 else 6]
    if not shown:
        return ""
    rows = [(_place(layer), _number(layer.alignment), _number(layer.distance)) for layer, _ in shown]
    table = _table(("Layer", "Alignment", "Distance"), rows, "Layers with most in common")
    return f'<div class="card"><h3>Most in common, or most opposed</h3>{table}</div>'


def _sharing_layers(sharing: Sharing) -> str:
    head = ("Layer", "Alignment", "Distance", f"Change, {sharing.first}", f"Change, {sharing.second}")
    rows = [
        (layer.path, *map(_number, (layer.alignment, layer.distance, layer.first_change, layer.second_change)))
        for layer in sharing.layers
    ]
    table = _table(head, rows, f"Layers of {sharing.first} and {sharing.second}")
    return f"<details><summary>All {len(rows)} layers in numbers</summary>{table}</details>"


def _last_states(changes: Sequence[StateChange]) -> str:
    rows = [
        (change.name, *(_number(v, digits=4) for v in (change.places[-1].length, change.places[-1].direction)))
        for change in changes
    ]
    table = _table(("After", "dM", "dD"), rows, "The last hidden state")
    return f'<div class="card"><h3>The last hidden state</h3>{table}</div>'


def _states(changes: Sequence[StateChange]) -> str:
    head = ("Place", *(f"{what}, {change.name}" for change in changes for what in ("dM", "dD")))
    rows = [
        (str(places[0].place), *(_number(v, digits=4) for place in places for v in (place.length, place.direction)))
        for places in zip(*(change.places for change in changes), strict=True)
    ]
    return f"<details><summary>All places in numbers</summary>{_table(head, rows, 'Hidden states')}</details>"


class _Bar(float):
    """A share that a table shows as a bar."""


def _table(head: Sequence[str], rows: Iterable[Sequence[str | _Bar]], label: str) -> str:
    """A table that scrolls sideways where it is too wide, by keyboard too; the first cell of a row names it."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' if cell else "<td></td>" for cell in head)
    body = "".join(f"<tr>{_row(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(cells: Sequence[str | _Bar]) -> str:
    first, *others = cells
    return f'<th scope="row">{escape(str(first))}</th>' + "".join(_cell(cell) for cell in others)


def _cell(cell: str | _Bar) -> str:
    if isinstance(cell, _Bar):
        return f'<td class="bar" aria-hidden="true"><span style="width:{100 * cell:.1f}%"></span></td>'
    return f"<td>{escape(cell)}</td>"


def _terms() -> str:
    items = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(meaning)}</dd></div>" for term, meaning in _TERMS)
    return f'<section aria-labelledby="terms"><h2 id="terms">What the words mean</h2><dl class="terms">{items}</dl></section>'


def _number(value: float | None, unit: str = "", digits: int = 3) -> str:
    if value is None:
        return "-"
    text = f"{value:#.{digits}g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.1e}"
    return text.rstrip(".") + unit


def size(num_bytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
