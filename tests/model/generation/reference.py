"""Our model and transformers' own with the same weights."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration
from transformers.utils import ModelOutput

from model import Blip2, DecodeRequest, GenerationParams
from model.language import LanguageModel
from tests.builders import NUM_QUERY_TOKENS

PROMPTS = ("", "a photo of", "question : what color is the small circle left of the star ? answer :")


@dataclass(frozen=True, slots=True)
class Pair:
    """Our model, the reference, and images encoded by both."""

    blip2: Blip2
    reference: Blip2ForConditionalGeneration
    pixel_values: Tensor
    language_model_inputs: Tensor

    @property
    def language_model(self) -> LanguageModel:
        assert self.blip2.language_model is not None
        return self.blip2.language_model

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.reference.language_model.config.is_encoder_decoder)

    def request(self, image: int, prompt: str, params: GenerationParams) -> DecodeRequest:
        return DecodeRequest(self.language_model_inputs[image], self.language_model.tokenize(prompt), params)

    def reference_generate(self, image: int, prompt: str, params: GenerationParams) -> ModelOutput:
        """Run transformers' `generate` alone, as its BLIP-2 calls it; return its whole output."""
        context = [self.language_model.image_token_id] * NUM_QUERY_TOKENS
        input_ids = torch.tensor([[*context, *self.language_model.tokenize(prompt)]])
        sampling = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
        searching = {"length_penalty": params.length_penalty, "early_stopping": params.early_stopping}
        return self.reference.generate(
            self.pixel_values[[image]],
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            num_beams=params.num_beams,
            num_return_sequences=params.num_return_sequences,
            max_new_tokens=params.max_new_tokens,
            min_new_tokens=params.min_new_tokens,
            repetition_penalty=params.repetition_penalty,
            no_repeat_ngram_size=params.no_repeat_ngram_size,
            do_sample=params.do_sample,
            return_dict_in_generate=True,
            output_scores=True,
            **(sampling if params.do_sample else {}),
            **(searching if params.num_beams > 1 else {}),
        )

    @torch.inference_mode()
    def log_probability(self, image: int, prompt: str, token_ids: tuple[int, ...]) -> float:
        """Return the natural log-probability of an answer under the bare reference model."""
        context = self.language_model_inputs[image], self.language_model.tokenize(prompt)
        score = self._logits_of_decoded if self.is_encoder_decoder else self._logits_of_continued
        log_probs = score(*context, token_ids).log_softmax(dim=-1)  # [T, N]
        return log_probs[torch.arange(len(token_ids)), list(token_ids)].sum().item()

    def new_tokens(self, output: ModelOutput, prompt: str) -> list[tuple[int, ...]]:
        """Return the new tokens of each of the reference's answers, end token included, padding not."""
        prompt_ids = self.language_model.tokenize(prompt)
        start = 1 if self.is_encoder_decoder else NUM_QUERY_TOKENS + len(prompt_ids)
        return [self._until_end(row) for row in output.sequences[:, start:].tolist()]

    def _logits_of_continued(
        self, soft_tokens: Tensor, prompt_ids: tuple[int, ...], token_ids: tuple[int, ...]
    ) -> Tensor:
        """Compute the [T, N] logits of an answer behind its prompt."""
        logits: Tensor = self._run_llm(soft_tokens, (*prompt_ids, *token_ids)).logits[0]
        return logits[-len(token_ids) - 1 : -1]

    def _logits_of_decoded(
        self, soft_tokens: Tensor, prompt_ids: tuple[int, ...], token_ids: tuple[int, ...]
    ) -> Tensor:
        """Compute the [T, N] logits of an answer in the decoder, with its prompt in the encoder."""
        logits: Tensor = self._run_llm(soft_tokens, prompt_ids, labels=torch.tensor([token_ids])).logits[0]
        return logits

    def _run_llm(self, soft_tokens: Tensor, text: tuple[int, ...], **inputs: Tensor) -> ModelOutput:
        llm = self.reference.language_model
        inputs_embeds = torch.cat([soft_tokens, llm.get_input_embeddings()(torch.tensor(text))])
        return llm(inputs_embeds=inputs_embeds[None], **inputs)

    def _until_end(self, token_ids: list[int]) -> tuple[int, ...]:
        ends = [index for index, token in enumerate(token_ids) if token in self.language_model.eos_token_ids]
        return tuple(token_ids[: ends[0] + 1] if ends else token_ids)


def label(params: GenerationParams) -> str:
    """Name a test case by its differences from the defaults."""
    fields = dataclasses.asdict(params).items()
    defaults = dataclasses.asdict(GenerationParams())
    return " ".join(f"{name}={value}" for name, value in fields if value != defaults[name]) or "defaults"
