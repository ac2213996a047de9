"""Values worked out by hand: what no law can see, because a rotation by -theta obeys every law.

Each function raises AssertionError where a value is wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from roadie.rotation import Rotation, from_parameters, rotate

# Which element each one pairs with, for 8 outputs: (0, 1) (2, 3) ..., (0, 2) (1, 3) ..., (0, 4) (1, 5) ...
PARTNERS_OF_8 = {2: [1, 0, 3, 2, 5, 4, 7, 6], 4: [2, 3, 0, 1, 6, 7, 4, 5], 8: [4, 5, 6, 7, 0, 1, 2, 3]}

# Stored places of a quarter turn of ONE pair or row, and what becomes of h = (1, 2, 3, 4), G = 4: pairs (1, 3) and (2, 4).
# A quarter turn of a pair is (h1, h2) -> (-h2, h1); of its upper row alone (-h2, h2), of its lower row alone (h1, h1).
QUARTER_TURNS = {
    ("road_1", 0): [-3.0, 2.0, 1.0, 4.0],
    ("road_1", 1): [1.0, -4.0, 3.0, 2.0],
    ("road_2", 0): [-3.0, 2.0, 3.0, 4.0],
    ("road_2", 1): [1.0, -4.0, 3.0, 4.0],
    ("road_2", 2): [1.0, 2.0, 1.0, 4.0],
    ("road_2", 3): [1.0, 2.0, 3.0, 2.0],
    ("road_4", 0): [0.0, 2.0, 3.0, 4.0],  # the first four are the cosines of the rows 1 to 4 ...
    ("road_4", 1): [1.0, 0.0, 3.0, 4.0],
    ("road_4", 2): [1.0, 2.0, 0.0, 4.0],
    ("road_4", 3): [1.0, 2.0, 3.0, 0.0],
    ("road_4", 4): [-2.0, 2.0, 3.0, 4.0],  # ... the others their sines: z1 = h1 - h3
    ("road_4", 5): [1.0, -2.0, 3.0, 4.0],
    ("road_4", 6): [1.0, 2.0, 4.0, 4.0],  # z3 = h3 + h1
    ("road_4", 7): [1.0, 2.0, 3.0, 6.0],
}


def check_quarter_turn() -> None:
    """+90 degrees take (1, 0) to (0, 1) and (0, 1) to (-1, 0), in every variant."""
    for variant, size in (("road_1", 1), ("road_2", 2), ("road_4", 4)):
        turn = from_parameters(torch.full((size,), math.pi / 2), torch.ones(size), variant, 2)
        _assert_equal(rotate(torch.eye(2), turn), [[0.0, 1.0], [-1.0, 0.0]], f"{variant}: +90 degrees")


def check_pairs() -> None:
    """Which elements pair up, of 8, in groups of 2, 4 and 8: a quarter turn moves each to its partner's place."""
    for group_size, partners in PARTNERS_OF_8.items():
        turn = Rotation(torch.zeros(8), torch.ones(8), group_size)
        for element, partner in enumerate(partners):
            wanted = torch.zeros(8)
            wanted[partner] = 1.0 if partner > element else -1.0
            got = rotate(torch.eye(8)[element], turn)
            _assert_equal(got, wanted.tolist(), f"group_size={group_size}, element {element}")


def check_stored_layouts() -> None:
    """Which stored parameter does what: one at a time is turned by +90 degrees, the others stay at the identity."""
    for (variant, place), wanted in QUARTER_TURNS.items():
        theta = torch.zeros({"road_1": 2, "road_2": 4, "road_4": 8}[variant])
        theta[place] = math.pi / 2
        turn = from_parameters(theta, torch.ones_like(theta), variant, 4)
        _assert_equal(rotate(torch.tensor([1.0, 2.0, 3.0, 4.0]), turn), wanted, f"{variant}, parameter {place}")


def _assert_equal(got: Tensor, wanted: list[float] | list[list[float]], what: str) -> None:
    # cos(pi/2) is 4e-8 in float32, times numbers up to 4.
    difference = (got - torch.tensor(wanted)).abs().max()
    assert difference <= 1e-6, f"{what}: got {got.tolist()}; wanted {wanted}"
