"""A share of the pairs of every layer: what one task of several may change, so that the others are not touched.

A layer with P pairs is split into `count` shares by one rule, for every layer and every P:

    contiguous     share k of n has the pairs  floor((k-1) P / n) ... floor(k P / n) - 1     "1/2": the first half
    interleaved    share k of n has the pairs  k-1, k-1+n, k-1+2n, ...                       "1/2 interleaved": every other one

Pairs are counted from 0 in the order of their first members (`roadie.rotation.to_blocks`). The shares of one split are
disjoint and together are all pairs (Liao & Monz 2024, arXiv 2409.00119, section 4.3, where count is 2). Needs no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum

from roadie.errors import ConfigError

_TEXT = re.compile(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})(?:\s+([a-z]+))?\s*")


class Layout(str, Enum):
    """How the pairs of a layer are split; see the module."""

    CONTIGUOUS = "contiguous"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True)
class Share:
    """Share `index` (from 1) of `count` equal ones; raises `ConfigError` where there is no such share.

    As text "1/2", or "1/2 interleaved": `parse` reads what `str` writes.
    """

    index: int
    count: int
    layout: Layout | str = Layout.CONTIGUOUS

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.index, self.count))
        if not whole or not 1 <= self.index <= self.count:
            raise ConfigError(f"got share {self.index}/{self.count}; wanted 1 <= k <= n in k/n; try '1/2'")
        try:
            object.__setattr__(self, "layout", Layout(self.layout))
        except ValueError:
            raise _not_a_share(f"{self.index}/{self.count} {self.layout}") from None

    @classmethod
    def parse(cls, text: str | Share) -> Share:
        """The share that a text such as "1/2" or "2/3 interleaved" names; raises `ConfigError` for any other."""
        if isinstance(text, Share):
            return text
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise _not_a_share(text)
        index, count, layout = found.groups()
        return cls(int(index), int(count), layout or Layout.CONTIGUOUS)

    def __str__(self) -> str:
        layout = "" if self.layout is Layout.CONTIGUOUS else f" {Layout(self.layout).value}"
        return f"{self.index}/{self.count}{layout}"

    def pairs(self, num_pairs: int) -> range:
        """The pairs that the share has in a layer of `num_pairs` pairs, counted from 0; empty where they do not suffice."""
        if self.layout is Layout.INTERLEAVED:
            return range(self.index - 1, num_pairs, self.count)
        return range((self.index - 1) * num_pairs // self.count, self.index * num_pairs // self.count)


def shares(count: int, layout: Layout | str = Layout.CONTIGUOUS) -> tuple[Share, ...]:
    """All shares of a split into `count`; raises `ConfigError` for less than one, or an unknown layout."""
    first = Share(1, count, layout)
    return tuple(replace(first, index=index) for index in range(1, count + 1))


def _not_a_share(got: object) -> ConfigError:
    layouts = " or ".join(layout.value for layout in Layout)
    return ConfigError(
        f"got share {got!r}; wanted k/n, with {layouts} behind it where it is not the former; try '1/2' for the first half "
        "of the pairs of every layer"
    )
