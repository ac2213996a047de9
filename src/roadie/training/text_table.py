"""Plain text tables for terminals."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, head: Sequence[str] = ()) -> str:
    """`rows` in aligned columns, the first one flush left and the others flush right, under `head` and a rule."""
    lines = [list(head), *rows] if head else list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    printed = [_line(line, widths) for line in lines]
    if head:
        printed.insert(1, "-" * len(printed[0]))
    return "\n".join(printed)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns, both flush left."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def size(num_bytes: float) -> str:
    """Bytes as people read them: "512 B", "12.3 KiB", "4.0 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (f"{cell:{'<' if column == 0 else '>'}{widths[column]}}" for column, cell in enumerate(cells))
    return "  ".join([first, *others]).rstrip()
