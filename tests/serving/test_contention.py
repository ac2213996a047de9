"""Who waits for a slot, and who gives one up."""

from __future__ import annotations

from roadie.serving.contention import SlotLine


def always(_: str) -> bool:
    return True


def test_as_many_drain_as_the_first_need_but_no_more_than_a_quarter() -> None:
    line: SlotLine[str] = SlotLine(8)
    assert line.plan("abcdef", always) == ()
    line.join("x", 1)
    assert line.plan("abcdef", always) == ("a",)
    line.join("y", 1)
    line.join("z", 1)
    assert line.plan("fedcba", always) == ("a", "f")  # who drains goes on draining
    assert line.is_draining("f")
    assert not line.is_draining("b")


def test_the_first_gets_what_it_needs_however_much_that_is() -> None:
    line: SlotLine[str] = SlotLine(8)
    line.join("blend", 5)
    line.join("y", 1)
    assert line.plan("abcdefgh", always) == tuple("abcde")


def test_those_who_left_their_slots_or_are_not_needed_drain_no_more() -> None:
    line: SlotLine[str] = SlotLine(12)
    for name in "xyz":
        line.join(name, 1)
    assert line.plan("abc", always) == tuple("abc")
    assert line.plan("defg", lambda key: key != "a") == ("b", "c", "d")
    line.leave("x")
    line.leave("y")
    assert line.plan("", always) == ("b",)
    line.leave("z")
    assert line.plan("abc", always) == ()


def test_the_line_is_in_order_and_places_are_kept() -> None:
    line: SlotLine[str] = SlotLine(4)
    for name in "xyz":
        line.join(name, 2)
    line.join("y", 1)
    assert (list(line), bool(line), "y" in line) == (["x", "y", "z"], True, True)
    line.leave("x")
    assert list(line) == ["y", "z"]
