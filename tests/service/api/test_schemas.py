"""Checks of request bodies that types cannot express, and the parameters built from them."""

import json

import pytest
from pydantic import ValidationError

from service.api.retrieve_schema import RetrieveRequest
from service.api.schemas import Body, CaptionRequest, VqaRequest
from service.engine.request import Mode
from service.errors import InvalidParamsError, InvalidRequestError, ServiceError, TooManyItemsError
from service.image_decoding import Upload
from service.runtime.settings import Settings

SETTINGS = Settings(max_images=2, max_questions=2, max_candidates=3, max_text_chars=20)


def refusal(schema: type[Body], **fields: object) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        schema.model_validate(fields).check(SETTINGS)
    return refused.value


def test_caption_defaults_are_those_of_the_reference() -> None:
    params = CaptionRequest(image=Upload("x")).generation_params("num_captions")
    assert (params.num_beams, params.max_new_tokens, params.min_new_tokens) == (5, 30, 1)
    assert (params.length_penalty, params.repetition_penalty) == (1.0, 1.0)


def test_vqa_defaults_are_those_of_the_paper() -> None:
    params = VqaRequest(image=Upload("x"), question=["y"]).generation_params("num_answers")
    assert (params.num_beams, params.max_new_tokens, params.length_penalty) == (5, 10, -1.0)


def test_every_generation_field_reaches_the_parameters() -> None:
    fields = {
        "num_beams": 4,
        "max_new_tokens": 7,
        "min_new_tokens": 2,
        "length_penalty": 0.5,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 3,
        "early_stopping": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 9,
        "seed": 11,
    }
    params = CaptionRequest.model_validate({"image": "x", "num_captions": 3, **fields}).generation_params(
        "num_captions"
    )
    assert params.num_return_sequences == 3
    assert {name: getattr(params, name) for name in fields} == fields


def test_sampling_uses_one_beam_unless_more_are_asked_for() -> None:
    assert CaptionRequest(image=Upload("x"), do_sample=True).generation_params("num_captions").num_beams == 1
    with pytest.raises(InvalidParamsError, match="num_beams is 5"):
        CaptionRequest(image=Upload("x"), do_sample=True, num_beams=5).generation_params("num_captions")


def test_sampling_may_return_more_answers_than_beams() -> None:
    params = CaptionRequest(image=Upload("x"), do_sample=True, num_captions=8).generation_params(
        "num_captions"
    )
    assert params.num_return_sequences == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 1000}, "num_beams is 1000.*16"),
        ({"num_captions": 6}, "num_captions is 6 and num_beams 5"),
        ({"num_captions": 0}, "num_captions is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_new_tokens": 31}, "min_new_tokens is 31"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_parameter_out_of_bounds_is_named_as_the_caller_knows_it(
    fields: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidParamsError, match=message):
        CaptionRequest.model_validate({"image": "x", **fields}).generation_params("num_captions")


@pytest.mark.parametrize("fields", [{}, {"image": "x", "images": ["y"]}])
def test_a_caption_needs_exactly_one_of_image_and_images(fields: dict[str, object]) -> None:
    refused = refusal(CaptionRequest, **fields)
    assert "send exactly one of them" in refused.detail
    assert refused.fields[0].field == "image"


@pytest.mark.parametrize(
    ("schema", "fields", "field"),
    [
        (CaptionRequest, {"images": []}, "images"),
        (CaptionRequest, {"image": "x", "prompt": "p" * 21}, "prompt"),
        (VqaRequest, {"image": "x", "question": []}, "question"),
        (VqaRequest, {"image": "x", "question": "  "}, "question.0"),
        (VqaRequest, {"image": "x", "question": ["good", ""]}, "question.1"),
        (VqaRequest, {"image": "x", "question": "q" * 21}, "question.0"),
        (VqaRequest, {"image": "x", "question": "q", "prompt_template": "{}" + "p" * 19}, "prompt_template"),
        (
            VqaRequest,
            {"image": "x", "question": "q", "history": [{"question": "", "answer": "a"}]},
            "history.0.question",
        ),
        (RetrieveRequest, {"candidates": {"texts": ["a"]}}, "text"),
        (RetrieveRequest, {"text": "a", "image": "x", "candidates": {"texts": ["a"]}}, "text"),
        (RetrieveRequest, {"text": " ", "candidates": {"texts": ["a"]}}, "text"),
        (RetrieveRequest, {"text": "a", "candidates": {}}, "candidates.images"),
        (RetrieveRequest, {"text": "a", "candidates": {"texts": []}}, "candidates.texts"),
        (RetrieveRequest, {"text": "a", "candidates": {"texts": ["a", ""]}}, "candidates.texts.1"),
        (
            RetrieveRequest,
            {"text": "a", "candidates": {"images": ["x"], "texts": ["a"]}},
            "candidates.images",
        ),
    ],
)
def test_a_field_that_makes_no_sense_is_named(
    schema: type[Body], fields: dict[str, object], field: str
) -> None:
    refused = refusal(schema, **fields)
    assert isinstance(refused, InvalidRequestError)
    assert [at.field for at in refused.fields] == [field]


@pytest.mark.parametrize(
    ("schema", "fields", "setting"),
    [
        (CaptionRequest, {"images": ["x"] * 3}, "BLIP2_MAX_IMAGES"),
        (VqaRequest, {"image": "x", "question": ["q"] * 3}, "BLIP2_MAX_QUESTIONS"),
        (RetrieveRequest, {"text": "a", "candidates": {"images": ["x"] * 4}}, "BLIP2_MAX_CANDIDATES"),
        (RetrieveRequest, {"text": "a", "candidates": {"texts": ["b"] * 4}}, "BLIP2_MAX_CANDIDATES"),
    ],
)
def test_too_many_items_are_refused_by_the_setting_that_says_so(
    schema: type[Body], fields: dict[str, object], setting: str
) -> None:
    refused = refusal(schema, **fields)
    assert isinstance(refused, TooManyItemsError)
    assert setting in refused.detail


IMAGES, TEXTS = {"images": ["x"]}, {"texts": ["a"]}


@pytest.mark.parametrize(
    ("query", "candidates", "mode"),
    [
        ({"text": "a"}, IMAGES, Mode.RERANK),
        ({"image": "x"}, TEXTS, Mode.RERANK),
        ({"text": "a"}, TEXTS, Mode.ITC),
        ({"image": "x"}, IMAGES, Mode.ITC),
    ],
)
def test_the_mode_follows_the_direction(
    query: dict[str, str], candidates: dict[str, list[str]], mode: Mode
) -> None:
    body = RetrieveRequest.model_validate({**query, "candidates": candidates})
    body.check(SETTINGS)
    assert body.chosen_mode is mode


@pytest.mark.parametrize("mode", ["itm", "rerank"])
def test_the_matching_head_compares_no_two_of_one_kind(mode: str) -> None:
    refused = refusal(RetrieveRequest, text="a", candidates=TEXTS, mode=mode)
    assert refused.detail == f"mode: {mode} compares an image with a text; use itc between two of one kind"


def test_top_k_beyond_rerank_k_is_refused_only_where_it_was_asked_for() -> None:
    assert (
        "top_k: 10 is more than rerank_k, 5"
        in refusal(RetrieveRequest, text="a", candidates=IMAGES, rerank_k=5, top_k=10).detail
    )
    body = RetrieveRequest.model_validate({"text": "a", "candidates": IMAGES, "rerank_k": 5})
    body.check(SETTINGS)
    assert body.num_results == 5


SAMPLING = {"temperature": 0.7, "top_p": 0.5, "top_k": 3, "seed": 1}


@pytest.mark.parametrize("schema", [CaptionRequest, VqaRequest])
@pytest.mark.parametrize("search", [{}, {"num_beams": 1}, {"num_beams": 3}, {"do_sample": False}])
@pytest.mark.parametrize("name", SAMPLING)
def test_a_sampling_field_without_sampling_is_refused(
    schema: type[Body], search: dict[str, object], name: str
) -> None:
    question = {"question": "q"} if schema is VqaRequest else {}
    fields = {"image": "x", **question, name: SAMPLING[name]}
    refused = refusal(schema, **fields, **search)
    assert isinstance(refused, InvalidParamsError)
    assert refused.detail.startswith(f"{name}: is {SAMPLING[name]}, which has no effect without sampling")
    assert [at.field for at in refused.fields] == [name]
    schema.model_validate({**fields, "do_sample": True}).check(SETTINGS)


def test_a_sampling_field_with_the_value_that_it_has_anyway_is_harmless() -> None:
    fields = {"image": "x", "temperature": 1, "top_p": 0.9, "top_k": 0, "seed": None}
    CaptionRequest.model_validate(fields).check(SETTINGS)


def optional_fields(schema: type[Body]) -> list[str]:
    return [name for name, field in schema.model_fields.items() if not field.is_required()]


WHOLE: dict[type[Body], dict[str, object]] = {
    CaptionRequest: {"image": "x"},
    VqaRequest: {"image": "x", "question": "q"},
    RetrieveRequest: {"text": "a", "candidates": {"texts": ["b"], "images": None}},
}


@pytest.mark.parametrize("schema", WHOLE)
def test_null_is_as_good_as_absent(schema: type[Body]) -> None:
    fields = WHOLE[schema]
    absent = schema.model_validate_json(json.dumps(fields), strict=True)
    nulls = {name: None for name in optional_fields(schema) if name not in fields}
    assert len(nulls) > 3
    with_nulls = schema.model_validate_json(json.dumps({**fields, **nulls}), strict=True)
    assert with_nulls == absent
    assert with_nulls.model_fields_set == absent.model_fields_set
    with_nulls.check(SETTINGS)


def test_a_null_number_of_beams_leaves_sampling_its_one_beam() -> None:
    body = CaptionRequest.model_validate({"image": "x", "do_sample": True, "num_beams": None})
    assert body.generation_params("num_captions").num_beams == 1
    ranked = RetrieveRequest.model_validate({"text": "a", "candidates": IMAGES, "rerank_k": 5, "top_k": None})
    ranked.check(SETTINGS)
    assert ranked.num_results == 5


@pytest.mark.parametrize(
    ("fields", "field", "kind"),
    [
        ({"image": None}, "image", "missing"),
        ({"image": "x", "question": None}, "question", "missing"),
        ({"image": "x", "question": ["q", None]}, "question", "string_type"),
        ({"image": "x", "question": "q", "nothing": None}, "nothing", "extra_forbidden"),
        ({"image": "x", "question": "q", "history": [None]}, "history", "model_type"),
        (
            {"image": "x", "question": "q", "history": [{"question": None, "answer": "a"}]},
            "history",
            "missing",
        ),
    ],
)
def test_null_is_no_value_where_one_is_required(fields: dict[str, object], field: str, kind: str) -> None:
    with pytest.raises(ValidationError) as refused:
        VqaRequest.model_validate_json(json.dumps(fields), strict=True)
    assert (field, kind) in [(error["loc"][0], error["type"]) for error in refused.value.errors()]
