"""The rows of a task: read with `datasets`, checked for their columns, and divided into parts that share no row.

of the hub   datasets.load_dataset(hub, config, split=split, revision=revision)
files        datasets.load_dataset(format, data_files={split: [...]}, split=split)
made         rows of our own (`style.py`)
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from benchmarks.quality.hub import choices, style
from benchmarks.quality.hub.settings import Part, Source, TaskSettings
from roadie.errors import ConfigError

Raw = Mapping[str, Any]
MADE = {"style": style.rows}
FORMS = {"multiple-choice": choices.of_dataset}
UNREACHABLE = (OSError, ValueError, DatasetsError)


class Table(Sequence[Raw]):
    """Some rows of a data set, under the names the configuration gives its columns; read when they are asked for."""

    def __init__(self, rows: Any, indices: Sequence[int], columns: Mapping[str, str]) -> None:
        self.rows, self.indices, self.columns = rows, indices, columns

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Raw:  # type: ignore[override]
        row = self.rows[self.indices[index]]
        return {name: row[column] for name, column in self.columns.items()}


def read_parts(settings: TaskSettings, root: Path) -> dict[str, Table]:
    """The rows of all parts by name ("train", "validation", "tests.NAME"); files are relative to `root`.

    Raises `ConfigError` where a data set cannot be read, lacks a column, or has not enough rows.
    """
    asked = dict.fromkeys((part.source, part.split) for part in settings.parts.values())
    loaded = {(source, split): load(settings.sources[source], split, root) for source, split in asked}
    chosen: dict[str, list[int]] = {}
    tables: dict[str, Table] = {}
    for name in sorted(settings.parts, key=lambda name: (name != "validation", name != "train")):
        part = settings.parts[name]
        rows = loaded[part.source, part.split]
        columns = _columns(settings, part, rows)
        taken = {index for other in part.without if _same(settings, part, other) for index in chosen[other]}
        chosen[name] = _chosen(rows, part, taken, list(columns.values()), name)
        tables[name] = Table(rows, chosen[name], columns)
    return {name: tables[name] for name in settings.parts}


def load(source: Source, split: str, root: Path) -> Any:
    """One split of a source, a `datasets.Dataset`."""
    if source.made is not None:
        return datasets.Dataset.from_list(MADE[source.made](split))
    name = source.hub or f"{source.format} files {source.files[split]}"
    try:
        if source.hub is not None:
            rows = datasets.load_dataset(source.hub, source.config, split=split, revision=source.revision)
        else:
            rows = datasets.load_dataset(source.format, data_files=_files(source.files[split], root), split="train")
        return rows if source.form is None else FORMS[source.form](rows)
    except ConfigError:
        raise
    except UNREACHABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"got no split {split!r} of {name}: {reason}; wanted a data set that can be read; check its name, config "
            "and split, and that the hub can be reached (or that it is in the cache already)"
        ) from error


def _files(names: str | Sequence[str], root: Path) -> list[str]:
    listed = [names] if isinstance(names, str) else list(names)
    paths = [name if "://" in name else str(root / name) for name in listed]
    lacking = [path for path in paths if "://" not in path and not Path(path).is_file()]
    if lacking:
        raise ConfigError(
            f"got no file {', '.join(lacking)}; wanted the data there; fetch it, or say with --data where the paths of "
            "the configuration begin"
        )
    return paths


def _columns(settings: TaskSettings, part: Part, rows: Any) -> dict[str, str]:
    """Our name to the data set's, for all columns that a row needs."""
    renamed = settings.sources[part.source].columns
    columns = {name: renamed.get(name, name) for name in settings.rows.names}
    lacking = [column for column in columns.values() if column not in rows.column_names]
    if lacking:
        raise ConfigError(
            f"got {part.source}, split {part.split}, with the columns {', '.join(rows.column_names)}; wanted "
            f"{', '.join(lacking)} too; correct rows, or map the names under columns"
        )
    return columns


def _same(settings: TaskSettings, part: Part, other: str) -> bool:
    """Whether another part is of the same rows."""
    there = settings.parts[other]
    return (there.source, there.split) == (part.source, part.split)


def _chosen(rows: Any, part: Part, taken: set[int], columns: Sequence[str], name: str) -> list[int]:
    """The numbers of the rows of a part, in the order of the data set."""
    left = [index for index in _short_enough(rows, part, columns) if index not in taken]
    wanted = part.rows if part.rows is not None else len(left) if part.share is None else round(part.share * len(left))
    if not left or not 0 < wanted <= len(left):
        raise ConfigError(f"{name}: got {len(left)} rows; wanted {wanted or 'some'}; lower rows, or correct without")
    if part.pick == "random":
        return sorted(random.Random(part.pick_seed).sample(left, wanted))
    return left[:wanted] if part.pick == "first" else left[len(left) - wanted :]


def _short_enough(rows: Any, part: Part, columns: Sequence[str]) -> Iterable[int]:
    """All rows, or those whose columns have no more characters together than they may."""
    if part.longest_characters is None:
        return range(len(rows))
    lengths = [0] * len(rows)
    for column in dict.fromkeys(columns):
        for index, value in enumerate(rows[column]):
            lengths[index] += len(str(value))
    return [index for index, length in enumerate(lengths) if length <= part.longest_characters]
