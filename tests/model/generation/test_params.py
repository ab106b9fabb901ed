"""Generation parameters: what is out of bounds is named with its limit."""

import math

import pytest

from model import GenerationParams, InvalidParamsError


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("num_beams", 17, "between 1 and 16"),
        ("num_beams", 0, "between 1 and 16"),
        ("num_return_sequences", 0, "between 1 and 16"),
        ("max_new_tokens", 0, "between 1"),
        ("min_new_tokens", 31, "between 0 and 30"),
        ("length_penalty", 5.1, "between -5.0 and 5.0"),
        ("length_penalty", math.nan, "between -5.0 and 5.0"),
        ("repetition_penalty", 0.0, "between 0.1 and 10.0"),
        ("no_repeat_ngram_size", -1, "between 0"),
        ("temperature", 0.0, "between 0.01 and 100.0"),
        ("top_p", 1.1, "between 0.01 and 1.0"),
        ("top_k", -1, "between 0"),
        ("seed", -1, "between 0"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_its_name_and_limit(
    field: str, value: float, limit: str
) -> None:
    with pytest.raises(InvalidParamsError, match=f"{field} is {value}; choose one {limit}"):
        GenerationParams(**{field: value}).validate()  # type: ignore[arg-type]


def test_sampling_with_several_beams_is_refused() -> None:
    with pytest.raises(InvalidParamsError, match="num_beams is 5; sampling needs num_beams 1"):
        GenerationParams(do_sample=True).validate()


def test_more_answers_than_beams_are_refused_unless_they_are_sampled() -> None:
    with pytest.raises(InvalidParamsError, match="num_return_sequences is 3 and num_beams 2"):
        GenerationParams(num_beams=2, num_return_sequences=3).validate()
    GenerationParams(num_beams=1, num_return_sequences=3, do_sample=True).validate()


def test_defaults_and_extremes_are_accepted() -> None:
    GenerationParams().validate()
    GenerationParams(num_beams=16, num_return_sequences=16, min_new_tokens=0, max_new_tokens=1).validate()
    GenerationParams(num_beams=1, do_sample=True, top_p=1.0, seed=2**63 - 1).validate()
