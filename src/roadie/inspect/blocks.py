"""The 2 x 2 blocks of an adapter as pairs of complex numbers, in which turn, scale and reflection can be read off.

A block acts on a pair of outputs, taken as the complex number z = h1 + i h2, as ``p z + q conj(z)``:

    [[a, b], [c, d]]     p = ((a + d) + i (c - b)) / 2      q = ((a - d) + i (c + b)) / 2

    p            the nearest scaled rotation; of a road_1 block alpha e^(i theta), with q = 0
    angle        arg p: the rotation of the block's polar decomposition
    scale        sqrt(|p|^2 + |q|^2): the root of the mean square by which it stretches, ||block||_F / sqrt 2
    mirrored     |q| > |p|: negative determinant, |p|^2 - |q|^2; the mirror's axis is at arg(q) / 2
    change       sqrt(|p - 1|^2 + |q|^2): ||block - I||_F / sqrt 2

Shapes: ``P`` pairs of one layer, ``N`` pairs of all layers of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from roadie.adapter import Adapter, LayerParameters, refuse_chains
from roadie.errors import AdapterError
from roadie.rotation import Rotation, from_parameters, to_blocks


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of some layers, one after the other.

    turning (p), mirroring (q): complex128 arrays ``[N]``; paths: the layers, in order; starts: where each begins,
    ``[layers]``; sizes: its pairs, ``[layers]``.
    """

    turning: Any
    mirroring: Any
    paths: tuple[str, ...]
    starts: Any
    sizes: Any

    @property
    def angle(self) -> Any:
        """Radians in (-pi, pi], ``[N]``; of a mirrored block it says little."""
        return np.angle(self.turning)

    @property
    def scale(self) -> Any:
        """Root mean square stretch, ``[N]``."""
        return np.sqrt(_square(self.turning) + _square(self.mirroring))

    @property
    def is_mirrored(self) -> Any:
        """Which blocks have a negative determinant, ``[N]``."""
        return _square(self.mirroring) > _square(self.turning)

    @property
    def squared_change(self) -> Any:
        """||block - I||_F^2 / 2, ``[N]``: its mean is the squared change of outputs in all directions alike."""
        return _square(self.turning - 1) + _square(self.mirroring)

    def of(self, paths: Iterable[str]) -> Blocks:
        """The blocks of some of the layers, in the order given."""
        numbers = [self.paths.index(path) for path in paths]
        sizes = self.sizes[numbers]
        ranges = [np.arange(self.starts[n], self.starts[n] + self.sizes[n]) for n in numbers]
        where = np.concatenate(ranges) if ranges else np.arange(0)
        chosen = tuple(self.paths[n] for n in numbers)
        return Blocks(self.turning[where], self.mirroring[where], chosen, _starts(sizes), sizes)


def blocks_of(adapter: Adapter, name: str = "the adapter") -> Blocks:
    """The blocks of every layer of `adapter`, in float64; `name` is what errors call it.

    Raises `AdapterError`, naming the layer, where parameters are not finite, or where a chain has several stages.
    """
    refuse_chains(adapter, f"{name}, looked at")
    parts = [_split(rotation_of(layer, f"{name}, layer {path}")) for path, layer in adapter.layers.items()]
    turning, mirroring = (np.concatenate(each) for each in zip(*parts, strict=True))
    sizes = np.array([len(p) for p, _ in parts])
    return Blocks(turning, mirroring, tuple(adapter.layers), _starts(sizes), sizes)


def rotation_of(layer: LayerParameters, where: str) -> Rotation:
    """The rotation of `layer` in float64 on the CPU; raises `AdapterError`, beginning with `where`, if it is not finite."""
    theta, alpha = (values.detach().cpu().double() for values in (layer.theta, layer.alpha))
    if not bool(torch.isfinite(theta).all() and torch.isfinite(alpha).all()):
        raise AdapterError(
            f"{where}: got theta or alpha that are not finite; wanted numbers; go back to an earlier checkpoint"
        )
    return from_parameters(theta, alpha, layer.variant, layer.group_size)


def _split(rotation: Rotation) -> tuple[Any, Any]:
    blocks = to_blocks(rotation).numpy()
    a, b, c, d = (blocks[:, row, column] for row in (0, 1) for column in (0, 1))
    return ((a + d) + 1j * (c - b)) / 2, ((a - d) + 1j * (c + b)) / 2


def _square(z: Any) -> Any:
    return z.real**2 + z.imag**2


def _starts(sizes: Any) -> Any:
    return np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(int)
