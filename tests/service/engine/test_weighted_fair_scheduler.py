"""Device time is shared by weight among those who have work."""

from collections import Counter

import pytest

from service.engine.fair_queueing import WeightedFairScheduler


def serve(
    shares: WeightedFairScheduler[str], ready: list[str], piece_s: dict[str, float], total_s: float
) -> Counter[str]:
    """Return the seconds each had."""
    served: Counter[str] = Counter()
    while served.total() < total_s:
        name = shares.next(ready)
        shares.charge(name, piece_s[name])
        served[name] += piece_s[name]  # type: ignore[assignment]
    return served


def test_one_alone_gets_it_all() -> None:
    assert serve(WeightedFairScheduler({"a": 1, "b": 1}), ["a"], {"a": 0.1}, 1)["b"] == 0


@pytest.mark.parametrize(("weight", "piece_s"), [(1, 0.5), (1, 0.01), (3, 0.5), (3, 0.01)])
def test_shares_are_of_time_not_of_turns(weight: float, piece_s: float) -> None:
    served = serve(WeightedFairScheduler({"a": weight, "b": 1}), ["a", "b"], {"a": 0.1, "b": piece_s}, 100)
    assert served["a"] / served["b"] == pytest.approx(weight, rel=0.05)


def test_idle_time_is_not_saved_up() -> None:
    shares = WeightedFairScheduler({"a": 1, "b": 1})
    serve(shares, ["a"], {"a": 1.0}, 1000)
    assert serve(shares, ["a", "b"], {"a": 1.0, "b": 1.0}, 10) == {"a": 5, "b": 5}


def test_time_that_nobody_else_wanted_is_not_held_against_anyone() -> None:
    shares = WeightedFairScheduler({"a": 1, "b": 1})
    serve(shares, ["b"], {"b": 1.0}, 1000)
    serve(shares, ["a"], {"a": 1.0}, 1)
    assert serve(shares, ["a", "b"], {"a": 1.0, "b": 1.0}, 10) == {"a": 5, "b": 5}


def test_between_two_pieces_of_one_the_others_get_a_bounded_time() -> None:
    shares = WeightedFairScheduler({"a": 3, "b": 1, "c": 1})
    since_b = longest = 0.0
    for _ in range(1000):
        name = shares.next(["a", "b", "c"])
        shares.charge(name, 0.1)
        since_b = 0.0 if name == "b" else since_b + 0.1
        longest = max(longest, since_b)
    assert longest <= (3 + 1) * 0.1 + 2 * 0.1 + 1e-9  # their shares of one piece, and a piece each


def test_a_stream_of_new_names_does_not_keep_an_old_one_waiting() -> None:
    shares = WeightedFairScheduler[str]()
    num_others, num_served = 0, 0
    while num_served < 20:
        new = [f"new{num_others}", f"new{num_others + 1}"]  # two, of which at most one is served a turn
        name = shares.next(["old", *new])
        shares.charge(name, 1.0)
        num_served += name == "old"
        num_others += 2
    assert num_others <= 2 * 3 * 20 + 4


def test_who_has_had_much_does_not_start_anew_by_leaving_for_a_moment() -> None:
    shares = WeightedFairScheduler[str]()
    assert shares.next(["a", "b"]) == "a"
    shares.charge("a", 100.0)
    assert shares.next(["b"]) == "b"
    shares.charge("b", 1.0)
    assert shares.next(["a", "b"]) == "b"
