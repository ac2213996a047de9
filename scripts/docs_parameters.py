"""What a docstring says of each parameter becomes a list: an extension of griffe, which reads the sources for the reference.

In the sources a parameter is described after its name, ``dtype: of the tables. wait_s: how long ...``, in one paragraph with
others; on a page that would be a wall of words.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection
from typing import Any

try:
    from griffe import Extension
except ImportError:  # tests read this module where there is no griffe
    Extension = object

NAMES = re.compile(r"(?:(?<=[.;] )|^)(\w+(?:, \w+)*): ", re.MULTILINE)
RAISES = re.compile(r"(?:(?<=[.;] )|^)(?=Raises )", re.MULTILINE)


class Parameters(Extension):
    """Writes the docstrings of a package, of its classes and functions, as `listed` has them."""

    def on_package(self, *, pkg: Any, **kwargs: Any) -> None:
        rewrite(pkg)


def rewrite(place: Any) -> None:
    """Rewrite the docstrings of all that is defined in a module or a class."""
    for member in place.members.values():
        if member.is_alias:
            continue
        if member.docstring is not None and (member.is_class or member.is_function):
            member.docstring.value = listed(member.docstring.value, described(member))
        if member.is_class or member.is_module:
            rewrite(member)


def described(member: Any) -> set[str]:
    """The names that a docstring may describe: parameters of a function; those of a class's constructor, and its attributes."""
    if member.is_function:
        return {parameter.name for parameter in member.parameters}
    attributes = {name for each in [*member.mro(), member] for name in each.members}
    return attributes | {parameter.name for parameter in member.parameters}


def listed(docstring: str, names: Collection[str]) -> str:
    """A docstring in Markdown, each description of some of `names` an item of a list, what is raised after it."""
    first, _, rest = docstring.partition("\n\n")
    paragraphs = [textwrap.dedent(paragraph.removeprefix("Args:\n")) for paragraph in rest.split("\n\n")]
    return "\n\n".join(part for part in [first, *(_items(paragraph, names) for paragraph in paragraphs)] if part)


def _items(paragraph: str, names: Collection[str]) -> str:
    """One paragraph, cut before each description, and before what is raised."""
    starts = [match for match in NAMES.finditer(paragraph) if set(match[1].split(", ")) <= set(names)]
    if not starts:
        return paragraph
    ends = [match.start() for match in starts[1:]] + [len(paragraph)]
    items = [_item(match[1], paragraph[match.end() : end]) for match, end in zip(starts, ends, strict=True)]
    return "\n\n".join(part for part in (paragraph[: starts[0].start()].strip(), "\n".join(items)) if part)


def _item(names: str, text: str) -> str:
    said, *raised = RAISES.split(text, maxsplit=1)
    marked = ", ".join(f"`{name}`" for name in names.split(", "))
    item = f"- {marked}: {' '.join(said.split()).rstrip(';')}"
    return "\n\n".join([item, *(f"{' '.join(each.split())}\n" for each in raised)])
