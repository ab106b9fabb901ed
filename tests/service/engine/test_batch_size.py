"""How many go to the device at once: by time, and by what its memory has held."""

from service.engine.batch_size import BatchSize


def full_batches(size: BatchSize, count: int) -> None:
    for _ in range(count):
        size.went_well(size.limit, 0.0, was_cut=True)


def test_without_experience_it_is_the_most() -> None:
    assert BatchSize(8, turn_s=0.1).limit == 8


def test_as_many_as_a_turn_has_time_for() -> None:
    size = BatchSize(8, turn_s=0.1)
    size.went_well(8, 0.4, was_cut=True)
    assert size.limit == 2


def test_one_at_least_however_slow() -> None:
    size = BatchSize(8, turn_s=0.1)
    size.went_well(1, 60.0, was_cut=True)
    assert size.limit == 1


def test_what_becomes_faster_grows_again() -> None:
    size = BatchSize(8, turn_s=0.1)
    size.went_well(8, 8.0, was_cut=True)
    for _ in range(7):
        size.went_well(size.limit, 0.001, was_cut=True)
    assert size.limit == 8


def test_half_is_tried_where_nothing_smaller_is_known_to_fit() -> None:
    size = BatchSize(32)
    size.ran_out(32)
    assert size.limit == 16
    size.ran_out(16)
    assert size.limit == 8


def test_what_is_known_to_fit_is_kept() -> None:
    size = BatchSize(32)
    size.went_well(12, 0.0, was_cut=False)
    size.ran_out(15)
    assert size.limit == 12


def test_what_once_fitted_and_no_longer_does_is_halved() -> None:
    size = BatchSize(32)
    size.went_well(32, 0.0, was_cut=False)
    size.ran_out(20)
    assert size.limit == 10


def test_one_is_the_least() -> None:
    size = BatchSize(32)
    size.ran_out(1)
    assert size.limit == 1


def test_after_32_full_batches_more_is_tried_up_to_the_most() -> None:
    size = BatchSize(8)
    size.ran_out(8)
    full_batches(size, 31)
    assert size.limit == 4
    full_batches(size, 1)
    assert size.limit == 6
    full_batches(size, 32)
    assert size.limit == 8


def test_batches_that_wanted_no_more_prove_nothing() -> None:
    size = BatchSize(32)
    size.ran_out(32)
    for _ in range(100):
        size.went_well(5, 0.0, was_cut=False)
    assert size.limit == 16


def test_rows_that_come_in_steps_find_their_way_back_too() -> None:
    size = BatchSize(128)
    size.ran_out(5)
    for _ in range(1000):
        count = max(1, size.limit // 5) * 5  # texts of five rows, one of them always
        size.went_well(count, 0.0, was_cut=count + 5 > size.limit)
    assert size.limit >= 125


def test_a_fixed_cost_does_not_hold_it_at_one() -> None:
    size = BatchSize(8, turn_s=0.5)
    size.went_well(8, 60.0, was_cut=True)  # the first is slow
    assert size.limit == 1
    for _ in range(10):
        size.went_well(size.limit, 0.28 + 0.02 * size.limit, was_cut=True)
    assert size.limit == 8


def test_each_try_that_fails_doubles_the_wait_for_the_next() -> None:
    size = BatchSize(8)
    size.ran_out(8)
    full_batches(size, 32)
    assert size.limit == 6
    size.ran_out(6)
    assert size.limit == 4
    full_batches(size, 63)
    assert size.limit == 4
    full_batches(size, 1)
    assert size.limit == 6
