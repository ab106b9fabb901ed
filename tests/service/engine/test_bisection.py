"""The one that makes a batch fail is found by halves."""

import pytest

from service.engine.isolation import Suspects


def test_one_alone_is_the_culprit() -> None:
    assert Suspects[str]().accuse(["a"]) == "a"


@pytest.mark.parametrize("culprits", [{0}, {3}, {7}, {1, 6}, set(range(8)), set()])
def test_exactly_the_culprits_are_found_and_all_others_pass(culprits: set[int]) -> None:
    suspects = Suspects[int]()
    assert suspects.accuse(range(8)) is None
    found, passed, num_tries = set(), set(), 1
    while suspects:
        group = suspects.next_group()
        num_tries += 1
        if culprits.isdisjoint(group):
            passed |= set(group)
        elif (culprit := suspects.accuse(group)) is not None:
            found.add(culprit)
    assert found == culprits
    assert passed == set(range(8)) - culprits
    if len(culprits) == 1:
        assert num_tries == 7  # the whole, then two at each of three levels
