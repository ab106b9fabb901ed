"""The schema of the body of /retrieve."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import ConfigDict, Field

from service.api import documented
from service.api.schemas import (
    Body,
    ImageField,
    ImagesField,
    TextsField,
    check_count,
    check_one_of,
    check_text,
)
from service.engine.request import Mode
from service.errors import InvalidRequestError, echo_value
from service.image_decoding import Upload
from service.runtime.settings import Settings


class Candidates(Body):
    """The candidates to rank: images or texts."""

    model_config = ConfigDict(json_schema_extra=documented.candidates_rules)
    images: ImagesField = Field(default=None, json_schema_extra=documented.CANDIDATE_IMAGES)
    texts: TextsField = Field(default=None, json_schema_extra=documented.CANDIDATE_TEXTS)


class RetrieveRequest(Body):
    """One text or image, and the candidates to rank by it."""

    model_config = ConfigDict(json_schema_extra=documented.retrieve_rules)
    objects: ClassVar[frozenset[str]] = frozenset({"candidates"})
    nested: ClassVar[Mapping[str, tuple[str, str]]] = {
        "images": ("candidates", "images"),
        "candidates.images": ("candidates", "images"),
        "texts": ("candidates", "texts"),
        "candidates.texts": ("candidates", "texts"),
    }
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
    def texts(self) -> dict[str, str]:
        """The texts, by the paths of their fields."""
        query = {} if self.text is None else {"text": self.text}
        return query | {f"candidates.texts.{i}": text for i, text in enumerate(self.candidate_texts)}

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
        check_one_of(text=self.text, image=self.image)
        check_one_of("candidates.", images=self.candidates.images, texts=self.candidates.texts)
        name = "candidates.images" if self.candidates.texts is None else "candidates.texts"
        limit = settings.max_candidates
        check_count(name, self.candidate_images or self.candidate_texts, limit, "BLIP2_MAX_CANDIDATES")
        for field, text in self.texts.items():
            check_text(field, text, settings.max_text_chars)
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
