"""The schemas of request bodies; those of responses are in `responses`.

Parsing checks types; `check` then checks what types cannot express, and the limits the operator set. The
bounds of the generation fields are those of `GenerationParams`, which checks them.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
)

from model import GenerationParams
from model.errors import InvalidParamsError as ModelParamsError
from model.generation import MAX_BEAMS
from service.engine.request import Mode
from service.errors import InvalidParamsError, InvalidRequestError, TooManyItemsError
from service.runtime.settings import Settings

_IMAGE_SCHEMA: Final = {
    "type": "string",
    "description": "a JPEG, PNG, WebP, GIF, TIFF or BMP file, in base64 or as a data: URI",
}
_BEAMS: Final[dict[str, Any]] = {"minimum": 1, "maximum": MAX_BEAMS}


def _check_image(value: object) -> str | bytes:
    if not isinstance(value, str | bytes):
        raise ValueError("is not a string; send the file in base64")
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _parse_object(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str) or info.mode != "python":
        return value
    try:
        return pydantic_core.from_json(value)  # in a form, an object is a string of JSON
    except ValueError as error:
        raise ValueError(
            f"{value[:40]!r} is not JSON ({error}); send an object in {{ and }}, "
            "and repeat the field for a list"
        ) from error


ImageField = Annotated[str | bytes, PlainValidator(_check_image), WithJsonSchema(_IMAGE_SCHEMA)]
TextsField = Annotated[
    list[str],
    BeforeValidator(_as_list),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]


class Body(BaseModel):
    """A request body. lists: the fields that a form may repeat."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    lists: ClassVar[frozenset[str]] = frozenset()


class GenerationFields(Body):
    """Generation parameters; their meaning is that of `generate` in transformers."""

    num_beams: int = Field(
        default=5, description="with do_sample it is 1 unless given", json_schema_extra=_BEAMS
    )
    max_new_tokens: int = Field(default=30, description="of each answer, its end token included")
    min_new_tokens: int = 1
    length_penalty: float = Field(default=1.0, description="above 0 favours long answers, below 0 short ones")
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = Field(default=0, description="0: off")
    early_stopping: bool = False
    do_sample: bool = Field(default=False, description="draws answers at random; needs num_beams 1")
    temperature: float = 1.0
    top_p: float = Field(default=0.9, description="nucleus sampling: the least likely tokens are left out")
    top_k: int = Field(default=0, description="0: off")
    seed: int | None = Field(default=None, description="equal seeds give equal samples")
    logprobs: bool = Field(default=False, description="return each token with its log-probability")

    def generation_params(self, count_field: str) -> GenerationParams:
        """Build the parameters for the number of answers in the named field.

        Raises InvalidParamsError where one is out of its bounds, or two contradict each other.
        """
        shared = {name: getattr(self, name) for name in GenerationFields.model_fields if name != "logprobs"}
        if self.do_sample and "num_beams" not in self.model_fields_set:
            shared["num_beams"] = 1
        params = GenerationParams(num_return_sequences=getattr(self, count_field), **shared)
        try:
            params.validate()
        except ModelParamsError as exc:
            raise InvalidParamsError(str(exc).replace("num_return_sequences", count_field)) from exc
        return params


class CaptionRequest(GenerationFields):
    """One image, or several that are answered one by one."""

    lists: ClassVar[frozenset[str]] = frozenset({"images"})
    image: ImageField | None = None
    images: list[ImageField] | None = None
    prompt: str | None = Field(default=None, description="the beginning of the caption; unset: the model's")
    num_captions: int = Field(default=1, json_schema_extra=_BEAMS)

    def check(self, settings: Settings) -> None:
        """Raise InvalidRequestError or TooManyItemsError where a limit is exceeded."""
        _check_one_of(image=self.image, images=self.images)
        if self.images is not None:
            _check_count("images", self.images, settings.max_images, "BLIP2_MAX_IMAGES")
        if self.prompt is not None:
            _check_length("prompt", self.prompt, settings.max_text_chars)


class Turn(Body):
    """An earlier question about the image, and its answer."""

    question: str
    answer: str


class VqaRequest(GenerationFields):
    """One image and a question about it, or several."""

    lists: ClassVar[frozenset[str]] = frozenset({"question", "history"})
    image: ImageField
    question: TextsField
    history: list[Annotated[Turn, BeforeValidator(_parse_object)]] = Field(
        default=[], description="the dialogue so far, oldest first"
    )
    prompt_template: str | None = Field(
        default=None,
        description="holds one {} for the question; unset: the model's",
        examples=["Question: {} Answer:"],
    )
    num_answers: int = Field(default=1, json_schema_extra=_BEAMS)
    max_new_tokens: int = Field(default=10, description="of each answer, its end token included")
    length_penalty: float = Field(
        default=-1.0, description="above 0 favours long answers, below 0 short ones"
    )

    def check(self, settings: Settings) -> None:
        """Raise InvalidRequestError or TooManyItemsError where a limit is exceeded."""
        _check_count("question", self.question, settings.max_questions, "BLIP2_MAX_QUESTIONS")
        if self.history:
            _check_count("history", self.history, settings.max_questions, "BLIP2_MAX_QUESTIONS")
        for index, question in enumerate(self.question):
            _check_text(f"question.{index}", question, settings.max_text_chars)
        for index, turn in enumerate(self.history):
            _check_text(f"history.{index}.question", turn.question, settings.max_text_chars)
            _check_length(f"history.{index}.answer", turn.answer, settings.max_text_chars)
        if self.prompt_template is not None:
            _check_length("prompt_template", self.prompt_template, settings.max_text_chars)


class Candidates(Body):
    """The candidates to rank: images or texts."""

    images: list[ImageField] | None = None
    texts: list[str] | None = None


class RetrieveRequest(Body):
    """One text or image, and the candidates to rank by it."""

    text: str | None = None
    image: ImageField | None = None
    candidates: Annotated[Candidates, BeforeValidator(_parse_object)]
    mode: Mode | None = Field(
        default=None,
        description="itc: cosines; itm: the matching head; rerank: the best rerank_k by itc, re-scored by "
        "itm. Unset: rerank between an image and texts or a text and images, else itc",
    )
    rerank_k: int = Field(default=128, ge=1)
    top_k: int = Field(default=10, ge=1, description="how many results; at most rerank_k in mode rerank")

    @property
    def candidate_images(self) -> list[str | bytes]:
        return self.candidates.images or []

    @property
    def candidate_texts(self) -> list[str]:
        return self.candidates.texts or []

    @property
    def is_cross_modal(self) -> bool:
        """Whether one side is images and the other texts, which is what the matching head compares."""
        return (self.text is None) == (self.candidates.images is None)

    @property
    def chosen_mode(self) -> Mode:
        return self.mode or (Mode.RERANK if self.is_cross_modal else Mode.ITC)

    @property
    def num_results(self) -> int:
        """Number of results: top_k, or a smaller rerank_k where top_k was not given."""
        return self.top_k if "top_k" in self.model_fields_set else min(self.top_k, self.rerank_k)

    def check(self, settings: Settings) -> None:
        """Raise InvalidRequestError or TooManyItemsError where a limit is exceeded."""
        _check_one_of(text=self.text, image=self.image)
        _check_one_of("candidates.", images=self.candidates.images, texts=self.candidates.texts)
        name = "candidates.images" if self.candidates.texts is None else "candidates.texts"
        limit = settings.max_candidates
        _check_count(name, self.candidate_images or self.candidate_texts, limit, "BLIP2_MAX_CANDIDATES")
        if self.text is not None:
            _check_text("text", self.text, settings.max_text_chars)
        for index, text in enumerate(self.candidate_texts):
            _check_text(f"candidates.texts.{index}", text, settings.max_text_chars)
        if self.chosen_mode is not Mode.ITC and not self.is_cross_modal:
            raise InvalidRequestError.of(
                "mode", f"{self.mode} compares an image with a text; use itc between two of one kind"
            )
        if self.chosen_mode is Mode.RERANK and self.num_results > self.rerank_k:
            raise InvalidRequestError.of(
                "top_k", f"{self.top_k} is more than rerank_k, {self.rerank_k}; raise rerank_k or lower top_k"
            )


def _check_one_of(prefix: str = "", **fields: object) -> None:
    """Raise InvalidRequestError unless exactly one of the named values is given. prefix: of their path."""
    given = [name for name, value in fields.items() if value is not None]
    names = " or ".join(prefix + name for name in fields)
    if len(given) != 1:
        raise InvalidRequestError.of(
            prefix + next(iter(fields)), f"{len(given)} of {names} are given; send exactly one of them"
        )


def _check_count(field: str, items: Sequence[object], limit: int, setting: str) -> None:
    """Raise InvalidRequestError for none, TooManyItemsError for more than the setting allows."""
    if not items:
        raise InvalidRequestError.of(field, "is an empty list; send at least one")
    if len(items) > limit:
        raise TooManyItemsError(
            f"{field} has {len(items)} items, the limit is {limit}; send fewer at once, or raise {setting}"
        )


def _check_text(field: str, text: str, max_chars: int) -> None:
    """Raise InvalidRequestError where a text is blank, or too long."""
    if not text.strip():
        raise InvalidRequestError.of(field, "is empty; send a text")
    _check_length(field, text, max_chars)


def _check_length(field: str, text: str, max_chars: int) -> None:
    """Raise InvalidRequestError where a text is too long."""
    if len(text) > max_chars:
        raise InvalidRequestError.of(
            field, f"has {len(text)} characters, the limit is {max_chars}; shorten it"
        )
