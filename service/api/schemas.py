"""The schemas of request bodies; those of responses are in `responses`.

Parsing checks types; `check` then checks what types cannot express, and the limits the operator set. The
bounds of the generation fields are those of `GenerationParams`, which checks them. `documented` adds both to
the JSON Schema of the fields; there, the name of a setting stands for its value.
"""

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    WithJsonSchema,
)

from model import GenerationParams
from model.errors import InvalidParamsError as ModelParamsError
from service.api import documented
from service.engine.request import Mode
from service.errors import MAX_ECHOED, InvalidParamsError, InvalidRequestError, TooManyItemsError, echo_value
from service.image_decoding import Upload
from service.runtime.settings import Settings

_NOT_BLANK: Final = re.compile(documented.NOT_BLANK)


def _to_upload(value: object) -> Upload:
    if isinstance(value, Upload):
        return value
    if not isinstance(value, str | bytes):
        raise ValueError("is not a string; send the file in base64")
    if isinstance(value, str) and not value.isascii():
        value = value[:MAX_ECHOED]  # no base64; the whole may take four bytes a character
    return Upload(value)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


ImageField = Annotated[Upload, PlainValidator(_to_upload), WithJsonSchema(documented.IMAGE)]
# One wrong item is reported, not each: a list may have thousands.
ImagesField = Annotated[list[ImageField] | None, FailFast()]
TextsField = Annotated[list[str] | None, FailFast()]
QuestionsField = Annotated[
    list[str], FailFast(), BeforeValidator(_as_list), WithJsonSchema(documented.QUESTIONS)
]


class Body(BaseModel):
    """A request body. lists: the fields that a form may repeat. objects: those that are JSON in a form."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    lists: ClassVar[frozenset[str]] = frozenset()
    objects: ClassVar[frozenset[str]] = frozenset()

    def uploads(self) -> dict[str, Upload]:
        """Return the images, by the paths of their fields."""
        return {}

    def check(self, settings: Settings) -> None:
        """Raise InvalidRequestError or TooManyItemsError where a limit is exceeded."""


class GenerationFields(Body):
    """Generation parameters; their meaning is that of `generate` in transformers."""

    num_beams: documented.NumBeams = 5
    max_new_tokens: documented.MaxNewTokens = 30
    min_new_tokens: documented.MinNewTokens = 1
    length_penalty: documented.LengthPenalty = 1.0
    repetition_penalty: documented.RepetitionPenalty = 1.0
    no_repeat_ngram_size: documented.NgramSize = 0
    early_stopping: bool = False
    do_sample: documented.Sampled = False
    temperature: documented.Temperature = 1.0
    top_p: documented.TopP = 0.9
    top_k: documented.TopK = 0
    seed: documented.Seed = None
    logprobs: documented.Logprobs = False

    def check_generation(self, settings: Settings) -> None:
        """Raise InvalidParamsError where more tokens are asked for than the operator allows."""
        if self.max_new_tokens > settings.max_new_tokens:
            raise InvalidParamsError(
                f"max_new_tokens is {echo_value(self.max_new_tokens)}, the limit is "
                f"{settings.max_new_tokens}; lower it, or raise BLIP2_MAX_NEW_TOKENS"
            )

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

    model_config = ConfigDict(json_schema_extra=documented.caption_rules)
    lists: ClassVar[frozenset[str]] = frozenset({"images"})
    image: ImageField | None = None
    images: ImagesField = Field(default=None, json_schema_extra=documented.IMAGES)
    prompt: str | None = Field(
        default=None,
        description="the beginning of the caption; unset: the model's",
        json_schema_extra=documented.CHARS,
    )
    num_captions: documented.NumAnswers = 1

    def uploads(self) -> dict[str, Upload]:
        single = {} if self.image is None else {"image": self.image}
        return single | {f"images.{index}": image for index, image in enumerate(self.images or [])}

    def check(self, settings: Settings) -> None:
        """Raise InvalidRequestError or TooManyItemsError where a limit is exceeded."""
        self.check_generation(settings)
        _check_one_of(image=self.image, images=self.images)
        if self.images is not None:
            _check_count("images", self.images, settings.max_images, "BLIP2_MAX_IMAGES")
        if self.prompt is not None:
            _check_length("prompt", self.prompt, settings.max_text_chars)


class Turn(Body):
    """An earlier question about the image, and its answer."""

    question: str = Field(json_schema_extra=documented.TEXT)
    answer: str = Field(json_schema_extra=documented.CHARS)


class VqaRequest(GenerationFields):
    """One image and a question about it, or several."""

    model_config = ConfigDict(json_schema_extra=documented.vqa_rules)
    lists: ClassVar[frozenset[str]] = frozenset({"question", "history"})
    objects: ClassVar[frozenset[str]] = frozenset({"history"})
    image: ImageField
    question: QuestionsField
    history: Annotated[list[Turn], FailFast()] = Field(
        default=[],
        description="the dialogue so far, oldest first",
        json_schema_extra=documented.HISTORY,
    )
    prompt_template: str | None = Field(
        default=None,
        description="holds one {} for the question; unset: the model's",
        examples=["Question: {} Answer:"],
        json_schema_extra=documented.TEMPLATE,
    )
    num_answers: documented.NumAnswers = 1
    max_new_tokens: documented.MaxNewTokens = 10
    length_penalty: documented.LengthPenalty = -1.0

    def uploads(self) -> dict[str, Upload]:
        return {"image": self.image}

    def check(self, settings: Settings) -> None:
        """Raise InvalidRequestError or TooManyItemsError where a limit is exceeded."""
        self.check_generation(settings)
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

    model_config = ConfigDict(json_schema_extra=documented.candidates_rules)
    images: ImagesField = Field(default=None, json_schema_extra=documented.CANDIDATE_IMAGES)
    texts: TextsField = Field(default=None, json_schema_extra=documented.CANDIDATE_TEXTS)


class RetrieveRequest(Body):
    """One text or image, and the candidates to rank by it."""

    model_config = ConfigDict(json_schema_extra=documented.retrieve_rules)
    objects: ClassVar[frozenset[str]] = frozenset({"candidates"})
    text: str | None = Field(default=None, json_schema_extra=documented.TEXT)
    image: ImageField | None = None
    candidates: Candidates
    mode: Mode | None = Field(
        default=None,
        description="itc: cosines; itm: the matching head; rerank: the best rerank_k by itc, re-scored by "
        "itm. Unset: rerank between an image and texts or a text and images, else itc",
    )
    rerank_k: documented.Integer = Field(default=128, ge=1)
    top_k: documented.Integer = Field(
        default=10, ge=1, description="how many results; at most rerank_k in mode rerank"
    )

    def uploads(self) -> dict[str, Upload]:
        single = {} if self.image is None else {"image": self.image}
        return single | {f"candidates.images.{i}": image for i, image in enumerate(self.candidate_images)}

    @property
    def candidate_images(self) -> list[Upload]:
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
                "top_k",
                f"{echo_value(self.top_k)} is more than rerank_k, {self.rerank_k}; "
                "raise rerank_k or lower top_k",
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
    if not _NOT_BLANK.search(text):
        raise InvalidRequestError.of(field, "is empty; send a text")
    _check_length(field, text, max_chars)


def _check_length(field: str, text: str, max_chars: int) -> None:
    """Raise InvalidRequestError where a text is too long."""
    if len(text) > max_chars:
        raise InvalidRequestError.of(
            field, f"has {len(text)} characters, the limit is {max_chars}; shorten it"
        )
