"""Which lanes may send in more, by who is in already."""

from model import GenerationParams
from service.engine.admission import open_lanes
from service.engine.request import GenerateJob, ImageInput, Lane, MatchJob, Mode, Ticket
from service.engine.sequence import Running

IMAGE = ImageInput("digest", None, {})
ALL = frozenset(Lane)


def text(num_rows: int, *, is_long: bool = False, is_ahead: bool = False) -> Running:
    params = GenerationParams(num_beams=1, max_new_tokens=100 if is_long else 10)
    running = Running(GenerateJob(IMAGE, ((1,),), params, Ticket()), 1, num_rows)
    running.is_ahead = is_ahead
    return running


def match(num_rows: int) -> Running:
    return Running(MatchJob("a", ("b",), Mode.ITC, 1, 1, Ticket()), 1, num_rows)


def test_all_are_open_while_nothing_runs() -> None:
    assert open_lanes([], 32) == ALL


def test_texts_never_keep_pairs_out_nor_pairs_texts() -> None:
    texts = [text(32), *(text(1, is_ahead=True) for _ in range(8))]
    assert Lane.MATCH in open_lanes(texts, 32)
    assert open_lanes([match(32)], 32) == ALL - {Lane.MATCH}


def test_long_texts_keep_short_ones_out_of_a_part_of_the_rows_alone() -> None:
    long = [text(24, is_long=True), *(text(1, is_long=True, is_ahead=True) for _ in range(7))]
    assert Lane.LONG in open_lanes(long, 32)
    long.append(text(1, is_long=True, is_ahead=True))
    assert open_lanes(long, 32) == ALL - {Lane.LONG}


def test_a_batch_of_images_is_prepared_ahead_when_the_rows_are_taken() -> None:
    full = [text(32)]
    assert Lane.SHORT in open_lanes(full, 32)
    full += [text(5, is_ahead=True) for _ in range(8)]
    assert Lane.SHORT not in open_lanes(full, 32)
