"""The schemas of request bodies. That of /retrieve is in `retrieve_schema`, those of answers in `responses`.

Parsing checks types; `check` then checks what types cannot express, and the limits the operator set. The
bounds of the generation fields are those of `GenerationParams`, which checks them. `documented` adds both to
the JSON Schema of the fields; there, the name of a setting stands for its value.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from model import GenerationParams
from model.errors import InvalidParamsError as ModelParamsError
from service.api import documented
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
    """A request body.

    lists: the fields that a form may repeat. objects: those that are JSON in a form. nested: fields of a form
    that are a list inside an object, as its field and member.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    lists: ClassVar[frozenset[str]] = frozenset()
    objects: ClassVar[frozenset[str]] = frozenset()
    nested: ClassVar[Mapping[str, tuple[str, str]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        """Leave out the fields that are null: that is as good as absent."""
        if not isinstance(fields, dict):
            return fields
        known = cls.model_fields
        return {name: value for name, value in fields.items() if value is not None or name not in known}

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
    temperature: documented.Temperature = documented.SAMPLING_DEFAULTS["temperature"]
    top_p: documented.TopP = documented.SAMPLING_DEFAULTS["top_p"]
    top_k: documented.TopK = documented.SAMPLING_DEFAULTS["top_k"]
    seed: documented.Seed = documented.SAMPLING_DEFAULTS["seed"]
    logprobs: documented.Logprobs = False

    def check_generation(self, settings: Settings) -> None:
        """Raise InvalidParamsError for more tokens than the operator allows, or a field without effect."""
        if self.max_new_tokens > settings.max_new_tokens:
            raise InvalidParamsError(
                f"max_new_tokens is {echo_value(self.max_new_tokens)}, the limit is "
                f"{settings.max_new_tokens}; lower it, or raise BLIP2_MAX_NEW_TOKENS"
            )
        for name, default in documented.SAMPLING_DEFAULTS.items():
            if not self.do_sample and getattr(self, name) != default:
                raise InvalidParamsError.of(
                    name,
                    f"is {echo_value(getattr(self, name))}, which has no effect without sampling; set "
                    "do_sample to true, or leave it out",
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
        check_one_of(image=self.image, images=self.images)
        if self.images is not None:
            check_count("images", self.images, settings.max_images, "BLIP2_MAX_IMAGES")
        if self.prompt is not None:
            check_length("prompt", self.prompt, settings.max_text_chars)


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
        check_count("question", self.question, settings.max_questions, "BLIP2_MAX_QUESTIONS")
        if self.history:
            check_count("history", self.history, settings.max_questions, "BLIP2_MAX_QUESTIONS")
        for index, question in enumerate(self.question):
            check_text(f"question.{index}", question, settings.max_text_chars)
        for index, turn in enumerate(self.history):
            check_text(f"history.{index}.question", turn.question, settings.max_text_chars)
            check_length(f"history.{index}.answer", turn.answer, settings.max_text_chars)
        if self.prompt_template is not None:
            check_length("prompt_template", self.prompt_template, settings.max_text_chars)


def check_one_of(prefix: str = "", **fields: object) -> None:
    """Raise InvalidRequestError unless exactly one of the named values is given. prefix: of their path."""
    given = [name for name, value in fields.items() if value is not None]
    names = " or ".join(prefix + name for name in fields)
    if len(given) != 1:
        raise InvalidRequestError.of(
            prefix + next(iter(fields)), f"{len(given)} of {names} are given; send exactly one of them"
        )


def check_count(field: str, items: Sequence[object], limit: int, setting: str) -> None:
    """Raise InvalidRequestError for none, TooManyItemsError for more than the setting allows."""
    if not items:
        raise InvalidRequestError.of(field, "is an empty list; send at least one")
    if len(items) > limit:
        raise TooManyItemsError(
            f"{field} has {len(items)} items, the limit is {limit}; send fewer at once, or raise {setting}"
        )


def check_text(field: str, text: str, max_chars: int) -> None:
    """Raise InvalidRequestError where a text is blank, or too long."""
    if not _NOT_BLANK.search(text):
        raise InvalidRequestError.of(field, "is empty; send a text")
    check_length(field, text, max_chars)


def check_length(field: str, text: str, max_chars: int) -> None:
    """Raise InvalidRequestError where a text is too long."""
    if len(text) > max_chars:
        raise InvalidRequestError.of(
            field, f"has {len(text)} characters, the limit is {max_chars}; shorten it"
        )
