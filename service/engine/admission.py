"""Who may come in from the line: each lane as long as it has room, so that none waits behind another's."""

from collections import Counter
from collections.abc import Iterable

from service.engine.decode_runner import LONG_SHARE
from service.engine.encoder_runner import MAX_IMAGES_PER_TURN
from service.engine.request import Lane
from service.engine.sequence import Running


def open_lanes(running: Iterable[Running], max_rows: int) -> frozenset[Lane]:
    """Gives the lanes that may send in one more.

    Texts together hold at most `max_rows` rows, long ones three quarters of them, and pairs as many again.
    For each lane of texts eight jobs are prepared ahead: their images are encoded while the rows are taken.
    """
    num_rows, num_ahead = Counter[Lane](), Counter[Lane]()
    for one in running:
        num_rows[one.lane] += one.num_rows
        num_ahead[one.lane] += one.is_ahead
    num_texts = num_rows[Lane.SHORT] + num_rows[Lane.LONG]
    is_open = {
        Lane.MATCH: num_rows[Lane.MATCH] < max_rows,
        Lane.SHORT: num_texts < max_rows or num_ahead[Lane.SHORT] < MAX_IMAGES_PER_TURN,
        Lane.LONG: (num_texts < max_rows and num_rows[Lane.LONG] < LONG_SHARE * max_rows)
        or num_ahead[Lane.LONG] < MAX_IMAGES_PER_TURN,
    }
    return frozenset(lane for lane in Lane if is_open[lane])
