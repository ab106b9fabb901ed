"""Bisection finds the items that make a batch fail."""

import pytest

from service.engine.isolation import Bisection


def test_one_alone_is_the_item_at_fault() -> None:
    assert Bisection[str]().split(["a"]) == "a"


@pytest.mark.parametrize("poisonous", [{0}, {3}, {7}, {1, 6}, set(range(8)), set()])
def test_exactly_the_poisonous_items_are_found_and_all_others_pass(poisonous: set[int]) -> None:
    bisection = Bisection[int]()
    assert bisection.split(range(8)) is None
    found, passed, num_tries = set(), set(), 1
    while group := bisection.next_group(range(8)):
        num_tries += 1
        if poisonous.isdisjoint(group):
            passed |= set(group)
        elif (poison := bisection.split(group)) is not None:
            found.add(poison)
    assert found == poisonous
    assert passed == set(range(8)) - poisonous
    if len(poisonous) == 1:
        assert num_tries == 7  # the whole, then two at each of three levels
