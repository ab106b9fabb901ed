"""The device is shared: nothing that is long or large keeps what is short or small from being answered.

The fake model takes no time worth measuring, so shares of time are tested in `stages/test_shares`; here it is
order, room, and what happens between two tokens.
"""

from model import GenerationParams
from service.engine.request import Job, Mode
from tests.service.fakes import TIMEOUT_S, FakeBackend
from tests.service.running import Workshop, text_of, until, workshop

LONG = GenerationParams(num_beams=4, max_new_tokens=200)
SHORT = GenerationParams(num_beams=4, max_new_tokens=10)
STORY = " ".join(f"w{number}" for number in range(40))


def order_of_answers(shop: Workshop, **jobs: Job) -> list[str]:
    """Starts the engine and gives the names of the jobs as they are answered."""
    order: list[str] = []
    for name, job in jobs.items():
        job.ticket.future.add_done_callback(lambda _, name=name: order.append(name))
    shop.engine.start()
    for job in jobs.values():
        job.ticket.future.result(TIMEOUT_S)
    return order


def test_a_short_question_is_answered_while_long_captions_hold_their_rows() -> None:
    with workshop(max_rows=16, started=False) as shop:
        long = {f"long{index}": shop.caption(1, STORY, params=LONG) for index in range(6)}
        short = shop.caption(2, "what", params=SHORT)
        assert order_of_answers(shop, **long, short=short)[0] == "short"


def test_long_captions_never_hold_more_than_their_share_of_the_rows() -> None:
    with workshop(max_rows=16, started=False) as shop:
        jobs = [shop.caption(1, STORY, params=LONG) for _ in range(6)]
        shop.engine.start()
        for job in jobs:
            text_of(job)
        assert max(shop.backend.decode_batches) == 3  # of four rows each


def test_a_long_caption_is_not_overtaken_for_ever_by_short_ones() -> None:
    with workshop(max_rows=16, started=False) as shop:
        wide = GenerationParams(num_beams=16, max_new_tokens=200)
        shorts = [shop.caption(2, "a b", params=SHORT) for _ in range(4)]
        long = shop.caption(1, "a b", params=wide)
        later = [shop.caption(3, "a b", params=SHORT) for _ in range(8)]
        order = order_of_answers(
            shop,
            long=long,
            **{f"first{index}": job for index, job in enumerate(shorts)},
            **{f"later{index}": job for index, job in enumerate(later)},
        )
        assert order.index("long") == 4


def test_long_captions_do_not_pass_one_another() -> None:
    with workshop(max_rows=16, started=False) as shop:
        wide = GenerationParams(num_beams=10, max_new_tokens=200)
        narrow = GenerationParams(num_beams=2, max_new_tokens=200)
        first = {f"first{index}": shop.caption(1, "a b", params=narrow) for index in range(6)}
        in_between = shop.caption(1, "a b", params=wide)
        later = {f"later{index}": shop.caption(1, "a b", params=narrow) for index in range(6)}
        order = order_of_answers(shop, **first, wide=in_between, **later)
        assert order.index("wide") == 6


def test_texts_without_room_for_their_keys_wait_outside_the_decoder_in_their_order() -> None:
    with workshop(FakeBackend(room=2), started=False) as shop:
        jobs = {f"job{index}": shop.caption(1, "a b", params=SHORT) for index in range(7)}
        assert order_of_answers(shop, **jobs) == list(jobs)
        assert shop.backend.decode_batches == [2, 2, 2, 2, 2, 2, 1, 1]


def test_a_rerank_of_many_pairs_and_a_caption_go_on_side_by_side() -> None:
    with workshop(started=False) as shop:
        many = shop.match(shop.image(100), *map(str, range(128)), mode=Mode.ITM)
        caption = shop.caption(7, "a")
        few = shop.match(shop.image(100), "1", "2", mode=Mode.ITM)
        assert order_of_answers(shop, many=many, caption=caption, few=few)[-1] == "many"


def test_a_caption_does_not_wait_for_the_many_images_of_a_retrieval() -> None:
    with workshop(started=False) as shop:
        many = shop.match("a", *(shop.image(red) for red in range(20, 220)))
        caption = shop.caption(7, "a")
        num_batches: list[int] = []
        caption.ticket.future.add_done_callback(
            lambda _: num_batches.append(len(shop.backend.vision_batches))
        )
        order_of_answers(shop, many=many, caption=caption)
        assert num_batches[0] < len(shop.backend.vision_batches) - 5


def test_pairs_are_not_kept_out_by_texts_that_hold_all_rows() -> None:
    with workshop(max_rows=16, started=False) as shop:
        texts = {f"text{index}": shop.caption(1, STORY, params=SHORT) for index in range(40)}
        pairs = shop.match("1", "2", "3")
        order = order_of_answers(shop, **texts, pairs=pairs)
        assert order.index("pairs") < 20  # there are rows for four texts at once


def test_images_are_encoded_ahead_while_the_rows_are_taken() -> None:
    with workshop(FakeBackend(), max_rows=16, started=False) as shop:
        jobs = [shop.caption(red, "a b c d", params=SHORT) for red in range(20, 32)]
        shop.backend.decode_gate.clear()
        shop.engine.start()
        until(lambda: sum(map(len, shop.backend.vision_batches)) > 4)
        shop.backend.decode_gate.set()
        assert [text_of(job) for job in jobs] == [f"{red} a b c d #0" for red in range(20, 32)]
        assert shop.backend.decode_batches == [4] * 12  # who leaves is replaced at the next step


def test_long_prompts_are_read_a_bounded_number_of_tokens_a_step() -> None:
    with workshop(max_rows=128, started=False) as shop:
        prompt = " ".join(["word"] * 50)
        jobs = [shop.caption(1, prompt) for _ in range(45)]  # of 51 tokens: 20 of them in a step
        shop.engine.start()
        for job in jobs:
            text_of(job)
        assert shop.backend.decode_batches[:3] == [20, 40, 45]
