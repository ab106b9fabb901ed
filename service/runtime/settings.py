"""The settings of a deployment: environment variables with the prefix BLIP2_, read once, then frozen."""

import difflib
import os
import re
from typing import Annotated, Final, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "BLIP2_"
_ROOT_PATH: Final = re.compile(r"(/[A-Za-z0-9._~-]+)*", re.ASCII)
_ORIGIN: Final = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#@*\s]+", re.ASCII)
_CPU_KV_BYTES, _GPU_KV_BYTES = 256 * 2**20, 4 * 2**30


class SettingsError(Exception):
    """A setting is unknown or out of its bounds; the message is one line for the operator."""


class Settings(BaseSettings):
    """Each field is the variable BLIP2_<NAME>; limits are inclusive."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    model: str = Field(
        default="tiny",
        min_length=1,
        description='"tiny", "tiny-t5", a directory or .pth file, or an id of the Hub',
    )
    retrieval_model: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="a checkpoint whose heads answer /retrieve; unset: the model's own"
    )
    revision: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="branch, tag or commit of a model of the Hub; unset: its main branch"
    )
    retrieval_revision: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="the same for BLIP2_RETRIEVAL_MODEL"
    )
    image_size: Annotated[int, Field(ge=16, le=2048)] | None = Field(
        default=None,
        description="side of the images the encoder reads, to which its positions are interpolated; unset: "
        "the checkpoint's",
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of the image encoder and the language model",
    )
    qformer_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the Q-Former's matrix products; bfloat16 halves their time, on a CPU",
    )
    quantize: Literal["none", "int8"] = Field(
        default="none", description="int8 holds the language model's linear layers in 8 bits (needs torchao)"
    )
    spread: bool = Field(default=False, description="lay the language model over all GPUs (needs accelerate)")
    num_threads: int = Field(
        default=0, ge=0, le=1024, description="torch's CPU threads; 0: torch's own choice"
    )
    preprocess_threads: int = Field(
        default=4,
        ge=1,
        le=64,
        description="images decoded at once, each in a process; as many large ones",
    )
    decode_bytes: int = Field(
        default=528 * 2**20,
        ge=32 * 2**20,
        description="memory to decode large images in, together and one alone; small ones take 32 MiB each",
    )
    decode_timeout_ms: int = Field(
        default=10_000,
        ge=100,
        le=600_000,
        description="CPU time to decode one image; then its process is killed",
    )

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535, description="0: any free port")
    probe_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None, description="a second port, for probes, /version and /metrics alone; unset: none"
    )
    root_path: str | None = Field(
        default=None, description="the prefix that a proxy puts before all paths, such as /blip2; unset: none"
    )
    cors_origins: str | None = Field(
        default=None,
        description="origins whose pages may call the service from a browser, such as https://a.example, "
        "with commas between them; * for all; unset: none",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    redis_url: SecretStr | None = Field(default=None, description="unset: the in-process cache only")
    redis_ttl_s: int = Field(default=604_800, ge=1, description="how long Redis keeps an embedding")
    cache_bytes: int = Field(default=256 * 2**20, ge=0, description="of the in-process cache; 0: none")

    max_body_bytes: int = Field(default=64 * 2**20, ge=1024)
    max_upload_bytes: int = Field(
        default=128 * 2**20,
        ge=1024,
        description="of all request bodies in flight, each until its images are decoded; more get 429",
    )
    upload_timeout_ms: int = Field(
        default=60_000, ge=100, description="for one request body to arrive; a slower one gets 408"
    )
    max_connections: int = Field(
        default=1000, ge=16, description="open at once; fewer where the limit of open files asks for it"
    )
    max_image_bytes: int = Field(default=20 * 2**20, ge=64, description="of one image file")
    max_image_pixels: int = Field(default=40_000_000, ge=1, description="width times height of one image")
    max_images: int = Field(default=32, ge=1, description="in one request to /caption")
    max_questions: int = Field(default=32, ge=1, description="in one request to /vqa")
    max_candidates: int = Field(default=1000, ge=1, description="in one request to /retrieve")
    max_text_chars: int = Field(default=2000, ge=1, description="of one prompt, question or text")

    max_new_tokens: int = Field(
        default=8192, ge=1, le=2**20, description="of one answer; the language model may allow fewer"
    )

    max_waiting: int = Field(
        default=2048,
        ge=1,
        description="captions, questions and candidates in the request queue; more are rejected with 429",
    )
    max_waiting_bytes: int = Field(
        default=96 * 2**20,
        ge=2**20,
        description="of decoded images in the request queue, and half as many of bulk requests; more are "
        "rejected with 429, but for a request that is alone",
    )
    max_rows: int = Field(
        default=128, ge=16, description="rows (beams, pairs) that run on the device at once"
    )
    kv_bytes: Annotated[int, Field(ge=2**20)] | None = Field(
        default=None,
        description="of the KV cache of running sequences; others wait, one that could never fit is "
        "rejected; unset: 4 GiB on a GPU, 256 MiB on a CPU",
    )
    max_prompt_tokens: int = Field(
        default=2048,
        ge=64,
        description="of one prompt, image tokens included; it is prefilled in one step",
    )
    stall_timeout_ms: Annotated[int, Field(ge=100)] | None = Field(
        default=None,
        description="without progress for so long /livez turns red and the process ends; unset: the larger "
        "of 5000 and four times the longest step at warm-up",
    )
    drain_timeout_ms: int = Field(default=30_000, ge=0, description="for running work after SIGTERM")

    def kv_bytes_on(self, device: str) -> int:
        """Return the limit of the KV cache on a device such as "cpu" or "cuda:0"."""
        return self.kv_bytes or (_CPU_KV_BYTES if device == "cpu" else _GPU_KV_BYTES)

    @property
    def allowed_origins(self) -> list[str]:
        """The origins of `cors_origins`."""
        return [origin.strip() for origin in (self.cors_origins or "").split(",") if origin.strip()]

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, path: str | None) -> str | None:
        path = (path or "").rstrip("/")
        if not _ROOT_PATH.fullmatch(path):
            raise ValueError("a root path begins with / and has letters, digits, dots, dashes and _ only")
        return path or None

    @model_validator(mode="after")
    def _check_origins(self) -> Self:
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{_variable('cors_origins')} holds {origin!r}, which is no origin; write "
                    "https://host or https://host:port, without a path, or * for all"
                )
        return self

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            from service.cache.redis_store import check_redis_url  # imports the client, which takes a moment

            check_redis_url(url.get_secret_value())
        return url

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for name in ("max_images", "max_questions", "max_candidates"):
            if getattr(self, name) > self.max_waiting:
                raise ValueError(
                    f"{_variable(name)} is {getattr(self, name)} and {_variable('max_waiting')} is "
                    f"{self.max_waiting}: such a request could never be admitted; raise the latter"
                )
        if self.retrieval_revision is not None and self.retrieval_model is None:
            raise ValueError(
                f"{_variable('retrieval_revision')} is {self.retrieval_revision!r} and "
                f"{_variable('retrieval_model')} is not set; set both, or neither"
            )
        if self.max_body_bytes > self.max_upload_bytes:
            raise ValueError(
                f"{_variable('max_body_bytes')} is {self.max_body_bytes} and {_variable('max_upload_bytes')} "
                f"is {self.max_upload_bytes}: such a body could never arrive; raise the latter"
            )
        if self.max_image_bytes > self.max_body_bytes:
            raise ValueError(
                f"{_variable('max_image_bytes')} is {self.max_image_bytes} and {_variable('max_body_bytes')} "
                f"is {self.max_body_bytes}: such an image could never arrive; raise the latter"
            )
        return self


def load_settings() -> Settings:
    """Load the settings from the environment.

    Raises SettingsError for a value out of bounds, and for a variable with the prefix that is no setting:
    pydantic-settings would ignore a misspelt one in silence.
    """
    _refuse_unknown_variables()
    try:
        return Settings()
    except ValidationError as exc:
        raise SettingsError("; ".join(_problems(exc))) from None


def _variable(field: str) -> str:
    return PREFIX + field.upper()


def _refuse_unknown_variables() -> None:
    known = [_variable(name) for name in Settings.model_fields]
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{name} is not a setting; the nearest is {nearest}")


def _problems(exc: ValidationError) -> list[str]:
    problems = []
    for error in exc.errors(include_url=False):
        message = error["msg"].removeprefix("Value error, ")
        if not error["loc"]:
            problems.append(message)
        elif error["loc"][0] == "redis_url":
            problems.append(f"{_variable('redis_url')} {message}")
        else:
            problems.append(f"{_variable(str(error['loc'][0]))} is {error['input']!r}: {message}")
    return problems
