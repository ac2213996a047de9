"""Chains, rotations one after the other, and what the algebra makes of them.

A product of two chains is one after the other, and the inverse the inverses in reverse order: both exactly. What needs
logarithms is done rotation by rotation, between chains of the same group sizes in the same order: a chain has no logarithm that
is one.

    power(C, s)         each rotation to the power s; for s < 0 the inverse of power(C, -s), so that -1 is the inverse
    blend               each rotation the blend of those in its place, by weights of 0 or more

    mean                the same, with weights that add up to 1; its magnitude is corrected rotation by rotation
    interpolate         from each rotation to the one in its place

So ``power(C, 0)`` is the identity, ``power(C, 1)`` is C, and between them the adapter fades in; but ``power(C, 2)`` is not C
twice, which is ``compose(C, C)``. For a single rotation all of this is what it is without chains.
"""

from __future__ import annotations

from collections.abc import Sequence

from roadie.algebra.geometry import corrected_weights, interpolate
from roadie.algebra.powers import blend, power
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, compose, inverse


def compose_chains(outer: Sequence[Rotation], inner: Sequence[Rotation]) -> tuple[Rotation, ...]:
    """What applies `inner`, then `outer`; neighbours of one group size become one rotation."""
    result: list[Rotation] = []
    for rotation in (*inner, *outer):
        if result and result[-1].group_size == rotation.group_size:
            result[-1] = compose(rotation, result[-1])
        else:
            result.append(rotation)
    return tuple(result)


def inverse_chain(chain: Sequence[Rotation]) -> tuple[Rotation, ...]:
    """What undoes the chain: the inverses in reverse order; raises `AdapterError` where a block is singular."""
    return tuple(inverse(rotation) for rotation in reversed(chain))


def power_chain(chain: Sequence[Rotation], exponent: float) -> tuple[Rotation, ...]:
    """The chain at a strength; see the module. Raises `AdapterError` where a block has no logarithm, or no inverse."""
    turned = tuple(power(rotation, exponent) for rotation in chain)
    return turned if exponent >= 0 else tuple(reversed(turned))


def blend_chains(
    chains: Sequence[Sequence[Rotation]], weights: Sequence[float], *, names: Sequence[str] = ()
) -> tuple[Rotation, ...]:
    """The blend of chains, rotation by rotation; see the module and `roadie.algebra.blend`.

    Raises `ConfigError` where chains of several rotations differ in their group sizes, `AdapterError` for weights below 0 of
    several such chains, and where a block has no logarithm.
    """
    if all(len(chain) == 1 for chain in chains):
        return (blend([chain[0] for chain in chains], weights, names=names),)
    active = [index for index, weight in enumerate(weights) if weight != 0]
    if len(active) <= 1:
        return power_chain(chains[active[0]], weights[active[0]]) if active else power_chain(chains[0], 0.0)
    _check_alike([chains[index] for index in active])
    if any(weight < 0 for weight in weights):
        raise AdapterError(
            f"got weights {list(weights)} for adapters with several rotations in a row; wanted none below 0, because what takes "
            "one away has its rotations in reverse order; compose with the inverse instead"
        )
    chosen, weights = [chains[index] for index in active], [weights[index] for index in active]
    names = [names[index] for index in active] if names else names
    return tuple(blend(list(stage), weights, names=names) for stage in zip(*chosen, strict=True))


def mean_chains(
    chains: Sequence[Sequence[Rotation]],
    weights: Sequence[float],
    *,
    magnitude_corrected: bool,
    names: Sequence[str] = (),
) -> tuple[Rotation, ...]:
    """The mean of chains, rotation by rotation; weights: those of a mean. Raises as `blend_chains` does."""
    _check_alike(chains)
    stages = [list(stage) for stage in zip(*chains, strict=True)]
    return tuple(
        blend(stage, corrected_weights(stage, weights) if magnitude_corrected else weights, names=names)
        for stage in stages
    )


def interpolate_chains(start: Sequence[Rotation], end: Sequence[Rotation], t: float) -> tuple[Rotation, ...]:
    """From one chain to the other, rotation by rotation; see `roadie.algebra.interpolate`. Raises as `blend_chains` does."""
    _check_alike([start, end])
    return tuple(interpolate(first, last, t) for first, last in zip(start, end, strict=True))


def _check_alike(chains: Sequence[Sequence[Rotation]]) -> None:
    sizes = [[rotation.group_size for rotation in chain] for chain in chains]
    if any(other != sizes[0] for other in sizes):
        raise ConfigError(
            f"got adapters with group sizes {' and '.join(map(str, sizes))} in a row; wanted the same in the same order, because "
            "they blend rotation by rotation; blend adapters of the same stages"
        )
