"""The decoder's limits: rows, and bytes of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import InvalidParamsError, InvalidPromptError
from model.generation.params import GenerationParams
from model.generation.request import memory_requirement
from model.language import LanguageModel, MemoryRequirement


@dataclass(frozen=True, slots=True)
class DecoderLimits:
    """The most that may run at once. max_rows: beams and samples. max_kv_bytes: their keys and values.

    max_prefix_tokens: image tokens and prompt of one sequence, which are prefilled in one step.
    """

    max_rows: int = 2**31
    max_kv_bytes: int = 2**63
    max_prefix_tokens: int = 2**31

    def are_exceeded(self, requirements: Sequence[MemoryRequirement], language_model: LanguageModel) -> bool:
        """Return whether sequences of these requirements exceed a limit together."""
        num_rows = sum(one.num_rows for one in requirements)
        return num_rows > self.max_rows or language_model.kv_bytes(requirements) > self.max_kv_bytes

    def check(self, requirement: MemoryRequirement, language_model: LanguageModel) -> None:
        """Raise InvalidParamsError where one sequence alone exceeds a limit, or InvalidPromptError."""
        if requirement.num_prefix_tokens > self.max_prefix_tokens:
            raise InvalidPromptError(
                f"image and prompt have {requirement.num_prefix_tokens} tokens, the limit is "
                f"{self.max_prefix_tokens}; shorten the prompt, or raise the limit"
            )
        if requirement.num_rows > self.max_rows:
            raise InvalidParamsError(
                f"the request works on {requirement.num_rows} beams or samples at once, the limit is "
                f"{self.max_rows}; lower num_beams or the number of answers"
            )
        num_bytes = language_model.kv_bytes([requirement])
        if num_bytes > self.max_kv_bytes:
            raise InvalidParamsError(
                f"{requirement.num_rows} beams of up to {requirement.max_new_tokens} new tokens on a "
                f"prefix of {requirement.num_prefix_tokens} take up to {num_bytes} bytes of keys and values, "
                f"the limit is {self.max_kv_bytes}; lower max_new_tokens or num_beams, or raise the limit"
            )


def check_fits(
    language_model: LanguageModel,
    limits: DecoderLimits,
    *,
    num_prompt_tokens: int,
    num_soft_tokens: int,
    params: GenerationParams,
) -> None:
    """Raise what `Decoder.add` raises for a request that could never run; thread-safe.

    InvalidPromptError where image tokens, prompt and answer exceed the positions of the language model, or
    the first two their limit. InvalidParamsError where the request alone exceeds the other limits.
    """
    language_model.check_length(
        num_prompt_tokens=num_prompt_tokens,
        num_soft_tokens=num_soft_tokens,
        max_new_tokens=params.max_new_tokens,
    )
    limits.check(memory_requirement(num_prompt_tokens + num_soft_tokens, params), language_model)
