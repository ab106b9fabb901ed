"""The circuit breaker, on a clock that the test sets."""

from service.cache.breaker import CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def breaker(clock: Clock | None = None) -> CircuitBreaker:
    return CircuitBreaker(clock=clock or Clock(), jitter=lambda: 0.0)


def test_five_failures_in_a_row_open_it_and_four_do_not() -> None:
    under_test = breaker()
    for _ in range(4):
        under_test.failed()
    assert under_test.allow()
    under_test.failed()
    assert under_test.is_open
    assert not under_test.allow()


def test_a_success_between_failures_starts_the_count_again() -> None:
    under_test = breaker()
    for _ in range(2):
        for _ in range(4):
            under_test.failed()
        under_test.succeeded()
    assert not under_test.is_open


def test_more_than_half_of_the_last_twenty_failing_opens_it() -> None:
    under_test = breaker()
    for _ in range(9):
        under_test.succeeded()
    for _ in range(3):
        for _ in range(3):
            under_test.failed()
        assert not under_test.is_open
        under_test.succeeded()
    under_test.failed()
    under_test.failed()
    assert under_test.is_open


def test_after_the_pause_one_probe_is_let_through() -> None:
    clock = Clock()
    under_test = breaker(clock)
    for _ in range(5):
        under_test.failed()
    clock.now = 0.99
    assert not under_test.allow()
    clock.now = 1.0
    assert under_test.allow()
    assert not under_test.allow()


def test_a_probe_that_succeeds_closes_it() -> None:
    clock = Clock()
    under_test = breaker(clock)
    for _ in range(5):
        under_test.failed()
    clock.now = 1.0
    assert under_test.allow()
    under_test.succeeded()
    assert not under_test.is_open
    assert under_test.allow()
    assert under_test.allow()


def test_the_pause_doubles_with_each_failed_probe_up_to_thirty_seconds() -> None:
    clock = Clock()
    under_test = breaker(clock)
    for _ in range(5):
        under_test.failed()
    pauses = []
    for _ in range(7):
        before = clock.now
        while not under_test.allow():
            clock.now += 0.5
        pauses.append(clock.now - before)
        under_test.failed()
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_an_abandoned_probe_lets_the_next_one_through() -> None:
    clock = Clock()
    under_test = breaker(clock)
    for _ in range(5):
        under_test.failed()
    clock.now = 1.0
    assert under_test.allow()
    under_test.abandoned()
    assert under_test.is_open
    assert under_test.allow()
