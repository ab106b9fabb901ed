"""The admission classes that may send in more, by what is admitted already."""

from model import GenerationParams
from service.engine.image_pool import ImageInput
from service.engine.request import AdmissionClass, AnyRequest, GenerateInput, MatchInput, Mode, Request
from service.engine.scheduler import open_classes

IMAGE = ImageInput("digest", None, {})
ALL = frozenset(AdmissionClass)


def text(num_rows: int, *, is_long: bool = False, is_prefetched: bool = False) -> AnyRequest:
    params = GenerationParams(num_beams=1, max_new_tokens=100 if is_long else 10)
    prompts = ((1,),) * num_rows
    return Request(GenerateInput(IMAGE, prompts, params), holds_rows=not is_prefetched)


def match(num_rows: int) -> AnyRequest:
    return Request(MatchInput("a", ("b",) * num_rows, Mode.ITC, 1, 1))


def test_all_are_open_while_nothing_runs() -> None:
    assert open_classes([], 32) == ALL


def test_texts_never_keep_pairs_out_nor_pairs_texts() -> None:
    texts = [text(32), *(text(1, is_prefetched=True) for _ in range(8))]
    assert AdmissionClass.MATCH in open_classes(texts, 32)
    assert open_classes([match(32)], 32) == ALL - {AdmissionClass.MATCH}


def test_matches_of_many_candidates_keep_others_of_many_out_alone() -> None:
    assert open_classes([match(64)], 32) == ALL - {AdmissionClass.MATCH}
    assert open_classes([match(65)], 32) == ALL - {AdmissionClass.BULK_MATCH}


def test_long_texts_keep_short_ones_out_of_a_part_of_the_rows_alone() -> None:
    long = [text(24, is_long=True), *(text(1, is_long=True, is_prefetched=True) for _ in range(7))]
    assert AdmissionClass.LONG in open_classes(long, 32)
    long.append(text(1, is_long=True, is_prefetched=True))
    assert open_classes(long, 32) == ALL - {AdmissionClass.LONG}


def test_a_batch_of_images_is_prepared_ahead_when_the_rows_are_taken() -> None:
    full = [text(32)]
    assert AdmissionClass.SHORT in open_classes(full, 32)
    full += [text(5, is_prefetched=True) for _ in range(8)]
    assert AdmissionClass.SHORT not in open_classes(full, 32)
