"""The bounds of request fields as JSON Schema, for the OpenAPI document.

Validation has them from `GenerationParams` and `check` in `schemas`. The name of a setting stands for its
value, which `openapi` fills in. Rules across fields are written out where JSON Schema can. A test generates
requests from the document, and compares what it allows with what is accepted.
"""

from collections.abc import Callable
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field

from model.generation import BOUNDS, MAX_BEAMS

Schema = dict[str, Any]
Change = Callable[[Schema], None]

# A character that is no white space, to Python and to ECMAScript alike.
NOT_BLANK: Final = r"[^\s\x1c-\x1f\x85\ufeff]"
# Exactly one {} somewhere: before and after it, no { is followed by }.
_ONE_PLACE: Final = r"^(?:[^{]|\{+[^{}])*\{+\}(?:[^{]|\{+[^{}])*\{*$"
_DEFAULT_BEAMS: Final = 5
SAMPLING_DEFAULTS: Final[dict[str, Any]] = {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "seed": None}
_CHARS: Final[Schema] = {"maxLength": "max_text_chars"}
_TEXT: Final[Schema] = {**_CHARS, "minLength": 1, "pattern": NOT_BLANK}


# A red square of 16 x 16 pixels: the examples can be sent as they are.
EXAMPLE_IMAGE: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAABlBMVEX////cHh7/Hx2WAAAAFElEQVR42mNgQAL8H5gYGDARMgAAI20B"
    "DofI/jkAAAAASUVORK5CYII="
)


def bound(**keywords: object) -> Change:
    """Return a function that adds keywords to the schema of a field, but not to its null."""

    def change(schema: Schema) -> None:
        _not_null(schema).update(keywords)

    return change


def bound_items(setting: str, *, least: int = 1, each: Schema | None = None) -> Change:
    """Return a function that bounds a list by a setting, and each of its items by `each`."""

    def change(schema: Schema) -> None:
        items = _not_null(schema)
        items.update(minItems=least, maxItems=setting)
        items["items"].update(each or {})

    return change


def _not_null(schema: Schema) -> Schema:
    options: list[Schema] = schema.get("anyOf", [schema])
    return next(option for option in options if option.get("type") != "null")


def _bound_as(name: str) -> Change:
    low, high = BOUNDS[name]
    return bound(minimum=low, maximum=high)


IMAGE: Final[Schema] = {
    "type": "string",
    "format": "image",
    "description": "a JPEG, PNG, WebP, GIF, TIFF, BMP, JPEG 2000, AVIF or HEIC file, as base64 or data: URI",
}
QUESTIONS: Final[Schema] = {
    "anyOf": [
        {"type": "string", **_TEXT},
        {"type": "array", "items": {"type": "string", **_TEXT}, "minItems": 1, "maxItems": "max_questions"},
    ]
}
CHARS: Final = bound(**_CHARS)
TEXT: Final = bound(**_TEXT)
TEMPLATE: Final = bound(**_CHARS, pattern=_ONE_PLACE)
IMAGES: Final = bound_items("max_images")
HISTORY: Final = bound_items("max_questions", least=0)
CANDIDATE_IMAGES: Final = bound_items("max_candidates")
CANDIDATE_TEXTS: Final = bound_items("max_candidates", each=_TEXT)


def _to_whole(value: object) -> object:
    """Return 5 for 5.0, which JSON Schema calls an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_to_whole)]
NumAnswers = Annotated[Integer, Field(json_schema_extra=_bound_as("num_return_sequences"))]
NumBeams = Annotated[
    Integer,
    Field(description="with do_sample it is 1 unless given", json_schema_extra=_bound_as("num_beams")),
]
MaxNewTokens = Annotated[
    Integer,
    Field(
        description="of each answer, its end token included",
        json_schema_extra=bound(minimum=1, maximum="max_new_tokens"),
    ),
]
MinNewTokens = Annotated[
    Integer,
    Field(description="at most max_new_tokens", json_schema_extra=bound(minimum=0, maximum="max_new_tokens")),
]
LengthPenalty = Annotated[
    float,
    Field(
        description="above 0 favours long answers, below 0 short ones",
        json_schema_extra=_bound_as("length_penalty"),
    ),
]
RepetitionPenalty = Annotated[float, Field(json_schema_extra=_bound_as("repetition_penalty"))]
NgramSize = Annotated[
    Integer, Field(description="0: off", json_schema_extra=_bound_as("no_repeat_ngram_size"))
]
Sampled = Annotated[bool, Field(description="draws answers at random; needs num_beams 1")]
Temperature = Annotated[float, Field(json_schema_extra=_bound_as("temperature"))]
TopP = Annotated[
    float,
    Field(
        description="nucleus sampling: the least likely tokens are left out",
        json_schema_extra=_bound_as("top_p"),
    ),
]
TopK = Annotated[Integer, Field(description="0: off", json_schema_extra=_bound_as("top_k"))]
Seed = Annotated[
    Integer | None, Field(description="equal seeds give equal samples", json_schema_extra=_bound_as("seed"))
]
Logprobs = Annotated[bool, Field(description="return each token with its log-probability")]


def caption_rules(schema: Schema) -> None:
    """Add the rules across the fields of /caption."""
    schema["allOf"] = [_exactly_one("image", "images"), _enough_beams("num_captions"), _SAMPLING_FIELDS]


def vqa_rules(schema: Schema) -> None:
    """Add the rules across the fields of /vqa."""
    schema["allOf"] = [_enough_beams("num_answers"), _SAMPLING_FIELDS]


def candidates_rules(schema: Schema) -> None:
    """Add the rules across the fields of the candidates of /retrieve."""
    schema.update(_exactly_one("images", "texts"))


def retrieve_rules(schema: Schema) -> None:
    """Add the rules across the fields of /retrieve: the matching head compares an image with a text."""
    across = [
        {
            "required": [query, "candidates"],
            "properties": {query: _GIVEN, "candidates": {"properties": {other: _GIVEN}, "required": [other]}},
        }
        for query, other in (("text", "images"), ("image", "texts"))
    ]
    by_cosine = {"properties": {"mode": {"enum": ["itc", None]}}}
    schema["allOf"] = [_exactly_one("text", "image"), {"anyOf": [by_cosine, *across]}]


_GIVEN: Final[Schema] = {"type": ["string", "array"]}
_ABSENT: Final[Schema] = {"type": "null"}
# Only samples depend on these fields.
_SAMPLING_FIELDS: Final[Schema] = {
    "anyOf": [
        {"required": ["do_sample"], "properties": {"do_sample": {"const": True}}},
        {
            "properties": {
                name: _ABSENT if default is None else {"enum": [default, None]}
                for name, default in SAMPLING_DEFAULTS.items()
            }
        },
    ]
}


def without_null(rule: Any) -> Any:
    """Return a rule for forms, where a field is given or absent, but never null."""
    if rule == _ABSENT:
        return False
    if isinstance(rule, dict):
        return {
            key: value if key == "candidates" else without_null(value)  # which is JSON in a form too
            for key, value in rule.items()
            if value != _GIVEN
        }
    return [without_null(each) for each in rule] if isinstance(rule, list) else rule


def _exactly_one(first: str, second: str) -> Schema:
    return {
        "oneOf": [
            {"required": [given], "properties": {given: _GIVEN, absent: _ABSENT}}
            for given, absent in ((first, second), (second, first))
        ]
    }


def _enough_beams(count: str) -> Schema:
    """Return the rule that there are as many beams as answers, or one beam and samples."""
    sampling = {
        "required": ["do_sample"],
        "properties": {"do_sample": {"const": True}, "num_beams": {"enum": [1, None]}},
    }
    searches = [
        {
            "required": ["num_beams"] if num_beams > _DEFAULT_BEAMS else [],
            "properties": {
                "do_sample": {"enum": [False, None]},
                "num_beams": {
                    "minimum": num_beams,
                    **({"type": "integer"} if num_beams > _DEFAULT_BEAMS else {}),
                },
                count: {"maximum": num_beams},
            },
        }
        for num_beams in range(1, MAX_BEAMS + 1)
    ]
    return {"anyOf": [sampling, *searches]}
