"""Fair sharing of the device: nothing that is long or large keeps what is short or small from being answered.

The fake model takes no time worth measuring, so shares of time are tested in `test_weighted_fair_scheduler`;
here it is order, room, and what happens between two tokens.
"""

from functools import partial

from model import GenerationParams
from service.engine.image_pool import ImageInput
from service.engine.request import AnyRequest, Mode
from tests.service.fakes import TIMEOUT_S, FakeBackend, pixels
from tests.service.running import EngineHarness, running_engine, text_of, until

LONG = GenerationParams(num_beams=4, max_new_tokens=200)
SHORT = GenerationParams(num_beams=4, max_new_tokens=10)
STORY = " ".join(f"w{number}" for number in range(40))


def _append(order: list[str], name: str, _future: object) -> None:
    order.append(name)


def order_of_answers(harness: EngineHarness, **requests: AnyRequest) -> list[str]:
    """Start the engine and return the names of the requests in the order of their answers."""
    order: list[str] = []
    for name, request in requests.items():
        request.future.add_done_callback(partial(_append, order, name))
    harness.engine.start()
    for request in requests.values():
        request.future.result(TIMEOUT_S)
    return order


def test_a_short_question_is_answered_while_long_captions_hold_their_rows() -> None:
    with running_engine(max_rows=16, started=False) as harness:
        long = {f"long{index}": harness.caption(1, STORY, params=LONG) for index in range(6)}
        short = harness.caption(2, "what", params=SHORT)
        assert order_of_answers(harness, **long, short=short)[0] == "short"


def test_long_captions_never_hold_more_than_their_share_of_the_rows() -> None:
    with running_engine(max_rows=16, started=False) as harness:
        requests = [harness.caption(1, STORY, params=LONG) for _ in range(6)]
        harness.engine.start()
        for request in requests:
            text_of(request)
        assert max(harness.backend.decode_batches) == 3  # of four rows each


def test_a_long_caption_is_not_overtaken_for_ever_by_short_ones() -> None:
    with running_engine(max_rows=16, started=False) as harness:
        wide = GenerationParams(num_beams=16, max_new_tokens=200)
        shorts = [harness.caption(2, "a b", params=SHORT) for _ in range(4)]
        long = harness.caption(1, "a b", params=wide)
        later = [harness.caption(3, "a b", params=SHORT) for _ in range(8)]
        order = order_of_answers(
            harness,
            long=long,
            **{f"first{index}": request for index, request in enumerate(shorts)},
            **{f"later{index}": request for index, request in enumerate(later)},
        )
        assert order.index("long") == 4


def test_long_captions_do_not_pass_one_another() -> None:
    with running_engine(max_rows=16, started=False) as harness:
        wide = GenerationParams(num_beams=10, max_new_tokens=200)
        narrow = GenerationParams(num_beams=2, max_new_tokens=200)
        first = {f"first{index}": harness.caption(1, "a b", params=narrow) for index in range(6)}
        in_between = harness.caption(1, "a b", params=wide)
        later = {f"later{index}": harness.caption(1, "a b", params=narrow) for index in range(6)}
        order = order_of_answers(harness, **first, wide=in_between, **later)
        assert order.index("wide") == 6


def test_few_candidates_do_not_wait_for_those_of_many() -> None:
    with running_engine(max_rows=32, started=False) as harness:
        images = [ImageInput(f"image{index}", pixels(1), {}) for index in range(2000)]
        large = {f"large{index}": harness.match("a", *images[index::3]) for index in range(3)}
        texts = {
            f"texts{index}": harness.match(images[0], *(f"b{n}" for n in range(65))) for index in range(3)
        }
        small = harness.match("a", images[0], images[1])
        assert order_of_answers(harness, **large, **texts, small=small)[0] == "small"


def test_texts_without_room_for_their_keys_wait_outside_the_decoder_in_their_order() -> None:
    with running_engine(max_kv_bytes=2, started=False) as harness:
        requests = {f"request{index}": harness.caption(1, "a b", params=SHORT) for index in range(7)}
        assert order_of_answers(harness, **requests) == list(requests)
        assert harness.backend.decode_batches == [2, 2, 2, 2, 2, 2, 1, 1]


def test_a_rerank_of_many_pairs_and_a_caption_go_on_side_by_side() -> None:
    with running_engine(started=False) as harness:
        many = harness.match(harness.image(100), *map(str, range(128)), mode=Mode.ITM)
        caption = harness.caption(7, "a")
        few = harness.match(harness.image(100), "1", "2", mode=Mode.ITM)
        assert order_of_answers(harness, many=many, caption=caption, few=few)[-1] == "many"


def test_a_caption_does_not_wait_for_the_many_images_of_a_retrieval() -> None:
    with running_engine(started=False) as harness:
        many = harness.match("a", *(harness.image(red) for red in range(20, 220)))
        caption = harness.caption(7, "a")
        num_batches: list[int] = []
        caption.future.add_done_callback(lambda _: num_batches.append(len(harness.backend.vision_batches)))
        order_of_answers(harness, many=many, caption=caption)
        assert num_batches[0] < len(harness.backend.vision_batches) - 5


def test_pairs_are_not_kept_out_by_texts_that_hold_all_rows() -> None:
    with running_engine(max_rows=16, started=False) as harness:
        texts = {f"text{index}": harness.caption(1, STORY, params=SHORT) for index in range(40)}
        pairs = harness.match("1", "2", "3")
        order = order_of_answers(harness, **texts, pairs=pairs)
        assert order.index("pairs") < 20  # there are rows for four texts at once


def test_images_are_encoded_ahead_while_the_rows_are_taken() -> None:
    with running_engine(FakeBackend(), max_rows=16, started=False) as harness:
        requests = [harness.caption(red, "a b c d", params=SHORT) for red in range(20, 32)]
        harness.backend.decode_gate.clear()
        harness.engine.start()
        until(lambda: sum(map(len, harness.backend.vision_batches)) > 4)
        harness.backend.decode_gate.set()
        assert [text_of(request) for request in requests] == [f"{red} a b c d #0" for red in range(20, 32)]
        assert harness.backend.decode_batches == [4] * 12  # who leaves is replaced at the next step


def test_long_prompts_are_read_a_bounded_number_of_tokens_a_step() -> None:
    with running_engine(max_rows=128, started=False) as harness:
        prompt = " ".join(["word"] * 50)
        requests = [harness.caption(1, prompt) for _ in range(45)]  # of 51 tokens: 20 of them in a step
        harness.engine.start()
        for request in requests:
            text_of(request)
        assert harness.backend.decode_batches[:3] == [20, 40, 45]


def test_pairs_are_scored_beside_an_endless_stream_of_cosines() -> None:
    with running_engine(started=False) as harness:
        pairs = harness.match(harness.image(100), "1", "2", mode=Mode.ITM)
        num_cosines = 0

        def send_another(_: object) -> None:
            nonlocal num_cosines
            num_cosines += 1
            if not pairs.future.done():
                send()

        def send() -> None:
            harness.match(harness.image(100), "1", "2").future.add_done_callback(send_another)

        for _ in range(3):
            send()
        harness.engine.start()
        assert len(pairs.future.result(TIMEOUT_S).value) == 2
        assert num_cosines < 100


def test_a_short_caption_is_answered_before_any_request_of_many_rows() -> None:
    wide = GenerationParams(num_beams=4, max_new_tokens=32)
    with running_engine(max_rows=16, started=False) as harness:
        questions = [f"{STORY} {number}" for number in range(20)]  # 80 rows of 32 tokens: more than is short
        many = {f"many{index}": harness.caption(1, *questions, params=wide) for index in range(8)}
        short = harness.caption(2, "a b c", params=SHORT)
        assert order_of_answers(harness, **many, short=short)[0] == "short"
        assert max(harness.backend.decode_batches) == 4  # three of the many, and the short one


def test_a_request_of_one_question_overtakes_the_questions_of_an_older_one() -> None:
    with running_engine(max_rows=4, started=False) as harness:
        many = harness.caption(1, *(f"a {number}" for number in range(32)), params=SHORT)
        one = harness.caption(2, "a b", params=SHORT)
        num_steps: list[int] = []
        one.future.add_done_callback(lambda _: num_steps.append(len(harness.backend.decode_batches)))
        order_of_answers(harness, many=many, one=one)
        assert num_steps[0] <= 4  # one question before it, and its own two tokens


def test_many_questions_are_answered_beside_an_endless_stream_of_single_ones() -> None:
    with running_engine(max_rows=4, started=False) as harness:
        many = harness.caption(1, *(f"a {number}" for number in range(16)), params=SHORT)
        num_sent = 0

        def send(_: object = None) -> None:
            nonlocal num_sent
            num_sent += 1
            if not many.future.done():
                harness.caption(2, "a b", params=SHORT).future.add_done_callback(send)

        for _ in range(4):
            send()
        harness.engine.start()
        assert text_of(many, 15) == "1 a 15 #0"
        assert num_sent < 200


def test_who_sends_one_request_does_not_wait_for_all_of_who_sent_many() -> None:
    with running_engine(max_rows=4, started=False) as harness:
        many = {f"many{index}": harness.caption(1, "a b", params=SHORT, caller="many") for index in range(30)}
        one = harness.caption(2, "a b", params=SHORT, caller="one")
        assert order_of_answers(harness, **many, one=one).index("one") <= 2


def test_a_prompt_longer_than_the_limit_of_a_step_joins_alone_while_others_run() -> None:
    backend = FakeBackend(num_query_tokens=1000)
    with running_engine(backend, started=False) as harness:
        long = harness.caption(1, " ".join(["word"] * 40))  # 1,040 tokens, and the limit is 1,024
        first, second = harness.caption(2, "a b c"), harness.caption(3, "d e f")
        order = order_of_answers(harness, long=long, first=first, second=second)
        assert order == ["first", "second", "long"]
        assert harness.backend.decode_batches[:3] == [1, 2, 3]


def test_batches_of_texts_and_pairs_are_smaller_where_a_checkpoint_reads_long_texts() -> None:
    with running_engine(FakeBackend(max_text_tokens=512), started=False) as harness:
        request = harness.match(harness.image(100), *map(str, range(20)), mode=Mode.ITM)
        harness.engine.start()
        assert len(request.future.result(TIMEOUT_S).value) == 20
        assert harness.backend.text_batches == [5] * 4
        assert max(harness.backend.match_batches) == 4


def test_images_of_all_match_requests_together_are_bounded_and_a_larger_request_runs_alone() -> None:
    with running_engine(max_items=10_000, started=False) as harness:
        images = [ImageInput(f"digest-{index}", pixels(20 + index % 200), {}) for index in range(1500)]
        first = harness.match("1", *images[:600])
        second, third = harness.match("1", *images[600:1025]), harness.match("1", *images[:424])
        larger = harness.match("1", *images)
        num_images = list[int]()
        for request in (first, second, third, larger):
            request.future.add_done_callback(lambda _: num_images.append(harness.engine.num_images))
        harness.engine.start()
        for request in (first, second, third, larger):
            request.future.result(TIMEOUT_S)
        assert max(num_images[:-1]) <= 1024  # 600 + 425 are one too many
        assert num_images[-1] == 1500


def test_equal_requests_of_many_questions_are_answered_one_after_the_other() -> None:
    with running_engine(max_rows=8, started=False) as harness:
        requests = {
            f"request{index}": harness.caption(index, *(f"a {number}" for number in range(6)), params=SHORT)
            for index in range(5)
        }
        num_steps: list[int] = []
        for request in requests.values():
            request.future.add_done_callback(lambda _: num_steps.append(len(harness.backend.decode_batches)))
        assert order_of_answers(harness, **requests) == list(requests)
        assert num_steps[0] <= 7  # six questions of two tokens, two at once
