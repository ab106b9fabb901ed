"""How many go to the device at once: by time, and by what its memory has held."""

from service.engine.step import BatchSizeLimit


def full_batches(size: BatchSizeLimit, count: int) -> None:
    for _ in range(count):
        size.observe_success(size.max_size, 0.0, is_cut=True)


def test_without_experience_it_is_the_most() -> None:
    assert BatchSizeLimit(8, max_seconds=0.1).max_size == 8


def test_as_many_as_a_turn_has_time_for() -> None:
    size = BatchSizeLimit(8, max_seconds=0.1)
    size.observe_success(8, 0.4, is_cut=True)
    assert size.max_size == 2


def test_one_at_least_however_slow() -> None:
    size = BatchSizeLimit(8, max_seconds=0.1)
    size.observe_success(1, 60.0, is_cut=True)
    assert size.max_size == 1


def test_what_becomes_faster_grows_again() -> None:
    size = BatchSizeLimit(8, max_seconds=0.1)
    size.observe_success(8, 8.0, is_cut=True)
    for _ in range(7):
        size.observe_success(size.max_size, 0.001, is_cut=True)
    assert size.max_size == 8


def test_half_is_tried_where_nothing_smaller_is_known_to_fit() -> None:
    size = BatchSizeLimit(32)
    size.observe_out_of_memory(32)
    assert size.max_size == 16
    size.observe_out_of_memory(16)
    assert size.max_size == 8


def test_what_is_known_to_fit_is_kept() -> None:
    size = BatchSizeLimit(32)
    size.observe_success(12, 0.0, is_cut=False)
    size.observe_out_of_memory(15)
    assert size.max_size == 12


def test_what_once_fitted_and_no_longer_does_is_halved() -> None:
    size = BatchSizeLimit(32)
    size.observe_success(32, 0.0, is_cut=False)
    size.observe_out_of_memory(20)
    assert size.max_size == 10


def test_one_is_the_least() -> None:
    size = BatchSizeLimit(32)
    size.observe_out_of_memory(1)
    assert size.max_size == 1


def test_after_32_full_batches_more_is_tried_up_to_the_most() -> None:
    size = BatchSizeLimit(8)
    size.observe_out_of_memory(8)
    full_batches(size, 31)
    assert size.max_size == 4
    full_batches(size, 1)
    assert size.max_size == 6
    full_batches(size, 32)
    assert size.max_size == 8


def test_batches_that_wanted_no_more_prove_nothing() -> None:
    size = BatchSizeLimit(32)
    size.observe_out_of_memory(32)
    for _ in range(100):
        size.observe_success(5, 0.0, is_cut=False)
    assert size.max_size == 16


def test_rows_that_come_in_steps_find_their_way_back_too() -> None:
    size = BatchSizeLimit(128)
    size.observe_out_of_memory(5)
    for _ in range(1000):
        count = max(1, size.max_size // 5) * 5  # texts of five rows, one of them always
        size.observe_success(count, 0.0, is_cut=count + 5 > size.max_size)
    assert size.max_size >= 125


def test_a_fixed_cost_does_not_hold_it_at_one() -> None:
    size = BatchSizeLimit(8, max_seconds=0.5)
    size.observe_success(8, 60.0, is_cut=True)  # the first is slow
    assert size.max_size == 1
    for _ in range(10):
        size.observe_success(size.max_size, 0.28 + 0.02 * size.max_size, is_cut=True)
    assert size.max_size == 8


def test_each_try_that_fails_doubles_the_wait_for_the_next() -> None:
    size = BatchSizeLimit(8)
    size.observe_out_of_memory(8)
    full_batches(size, 32)
    assert size.max_size == 6
    size.observe_out_of_memory(6)
    assert size.max_size == 4
    full_batches(size, 63)
    assert size.max_size == 4
    full_batches(size, 1)
    assert size.max_size == 6
