"""An adapter's parameters on their way into a bank: the rotations of all its layers in a handful of operations.

An adapter has a hundred layers and more, and each of them is small: made one by one, their rotations cost what a hundred
small tensor operations cost. Layers of one kind are made as one long layer, which their groups allow: none crosses a border.

Legend: D out features of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from roadie.adapter import LayerParameters
from roadie.errors import AdapterError
from roadie.rotation import Rotation, Variant, from_parameters

Kind = tuple[Variant, int, torch.dtype, torch.dtype, torch.device, torch.device]


def rotations(
    name: str, layers: Mapping[str, LayerParameters], dtype: torch.dtype, device_of: Callable[[str], torch.device]
) -> dict[str, Rotation]:
    """The rotation ``[D]`` of each layer, in `dtype`, on the device that `device_of` names for its path.

    Raises `AdapterError` where one is not finite in `dtype`.
    """
    made: dict[str, Rotation] = {}
    for kind, paths in _by_kind(layers, device_of).items():
        made |= _of_one_kind(name, {path: layers[path] for path in paths}, kind, dtype)
    return {path: made[path] for path in layers}


def _by_kind(layers: Mapping[str, LayerParameters], device_of: Callable[[str], torch.device]) -> dict[Kind, list[str]]:
    kinds: dict[Kind, list[str]] = {}
    for path, layer in layers.items():
        theta = layer.theta
        kind = (layer.variant, layer.group_size, theta.dtype, layer.alpha.dtype, theta.device, device_of(path))
        kinds.setdefault(kind, []).append(path)
    return kinds


def _of_one_kind(
    name: str, layers: Mapping[str, LayerParameters], kind: Kind, dtype: torch.dtype
) -> dict[str, Rotation]:
    variant, group_size, *_, device = kind
    with torch.no_grad():
        theta = torch.cat([layer.theta for layer in layers.values()])
        alpha = torch.cat([layer.alpha for layer in layers.values()])
        whole = from_parameters(theta, alpha, variant, group_size)
        direct, cross = (vector.to(device, dtype) for vector in (whole.direct, whole.cross))
    widths = [layer.out_features for layer in layers.values()]
    parts = dict(zip(layers, zip(direct.split(widths), cross.split(widths), strict=True), strict=True))
    if not _are_finite((direct, cross)):
        path = next(path for path, pair in parts.items() if not _are_finite(pair))
        raise AdapterError(
            f"got adapter {name!r} with values that are not finite (in {dtype}) in {path!r}; wanted finite ones"
        )
    return {path: Rotation(*pair, group_size) for path, pair in parts.items()}


def _are_finite(vectors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(vector).all()) for vector in vectors)
