"""Compares a checkpoint with `transformers`' BLIP-2 on images, component by component."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    PreTrainedModel,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from model.blip2 import Blip2
from model.checkpoints.hub import save_hub
from model.generation import GenerationParams
from model.language import LanguageModel
from model.matching import Matcher

PARAMS = GenerationParams(num_beams=5, max_new_tokens=20)


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference of one component from the reference, and its tolerance."""

    component: str
    largest: float
    tolerance: float

    @property
    def is_within(self) -> bool:
        return self.largest <= self.tolerance


@torch.inference_mode()
def verify(
    blip2: Blip2, images: Sequence[Image.Image], texts: Sequence[str], *, hub_directory: Path | None = None
) -> list[Difference]:
    """Run both implementations on the same weights, in float32 on the CPU, and return the differences.

    texts: prompts of a generation model (the empty one is added), or captions that a retrieval model scores.
    hub_directory: the checkpoint, where it is in the Hub's format, as transformers reads it. Any other is
    saved in that format first, in a temporary folder. Raises CheckpointError where the format does not
    support it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = hub_directory or Path(temporary)
        if hub_directory is None:
            save_hub(folder, blip2.components)
        processor = _load_processor(folder, blip2)
        reference_class = (
            Blip2ForConditionalGeneration if blip2.language_model is not None else Blip2ForImageTextRetrieval
        )
        reference = reference_class.from_pretrained(folder, dtype=torch.float32).eval()
        if blip2.language_model is not None:  # which old configurations leave out
            reference.config.image_token_index = blip2.language_model.image_token_id
        pixel_values = torch.stack([blip2.preprocess(image) for image in images])
        expected = processor(list(images), return_tensors="pt").pixel_values
        differences = [_difference("pixels", pixel_values, expected, 0.0)]
        features = blip2.encode_images(pixel_values)
        normed = reference.vision_model(pixel_values=pixel_values).last_hidden_state
        differences.append(_difference("image encoder, ln_vision", blip2.ln_vision(features), normed, 1e-4))
        if blip2.language_model is not None:
            differences += _compare_generation(
                blip2, blip2.language_model, reference, pixel_values, ["", *texts]
            )
        else:
            assert blip2.matcher is not None
            differences += _compare_retrieval(blip2.matcher, reference, features, pixel_values, texts)
    return differences


def _load_processor(folder: Path, blip2: Blip2) -> BlipImageProcessorPil:
    """Load the processor of the checkpoint, or BLIP-2's own at the size of the encoder."""
    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return BlipImageProcessorPil.from_pretrained(folder)
    return BlipImageProcessorPil(size={"height": blip2.image_size, "width": blip2.image_size})


def _compare_generation(
    blip2: Blip2,
    language_model: LanguageModel,
    reference: PreTrainedModel,
    pixel_values: Tensor,
    prompts: Sequence[str],
) -> list[Difference]:
    inputs = blip2.project_queries(blip2.encode_queries(blip2.encode_images(pixel_values)))
    expected = reference.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
    differences = [_difference("Q-Former, projection", inputs, expected, 1e-4)]
    differing = 0
    largest = 0.0
    image_tokens = [language_model.image_token_id] * inputs.shape[1]
    for prompt in prompts:
        prompt_ids = torch.tensor([[*image_tokens, *language_model.tokenize(prompt)]])
        logits, _ = language_model.prefill([inputs[0]], [language_model.tokenize(prompt)])
        answers = blip2.generate(inputs, [prompt] * len(inputs), PARAMS)
        for image, (answer, *_) in enumerate(answers):
            generated = reference.generate(
                pixel_values=pixel_values[image : image + 1],
                input_ids=prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                num_beams=PARAMS.num_beams,
                max_new_tokens=PARAMS.max_new_tokens,
                min_new_tokens=PARAMS.min_new_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
            start = 1 if reference.config.text_config.is_encoder_decoder else prompt_ids.shape[1]
            tokens = generated.sequences[0, start:].tolist()
            ends = [index for index, token in enumerate(tokens) if token in language_model.eos_token_ids]
            differing += list(answer.token_ids) != tokens[: ends[0] + 1 if ends else None]
            if image == 0:
                largest = max(largest, _largest(logits[0], generated.logits[0][0].float()))
    return [
        *differences,
        Difference("logits of the first token", largest, 1e-3),
        Difference(f"answers that differ, of {len(prompts) * len(inputs)}, beam 5", differing, 0),
    ]


def _compare_retrieval(
    matcher: Matcher,
    reference: PreTrainedModel,
    features: Tensor,
    pixel_values: Tensor,
    texts: Sequence[str],
) -> list[Difference]:
    image_embeds = matcher.embed_images(features)
    itc, itm = 0.0, 0.0
    image_token, num_image_tokens = reference.config.image_token_index, reference.config.num_query_tokens
    if image_token is None:  # as in old configurations: the reference expects the text alone
        image_token, num_image_tokens = 0, 0
    for text in texts:
        input_ids, mask = (each.expand(len(features), -1) for each in matcher.tokenize([text]))
        options = {
            "pixel_values": pixel_values,
            "input_ids": F.pad(input_ids, (num_image_tokens, 0), value=image_token),
            "attention_mask": F.pad(mask, (num_image_tokens, 0), value=1),
        }
        cosines = reference(**options, use_image_text_matching_head=False).logits_per_image
        logits = reference(**options, use_image_text_matching_head=True).logits_per_image
        ours = matcher.itc_scores(image_embeds, matcher.text_embeds(input_ids, mask))
        itc = max(itc, _largest(ours, cosines))
        probabilities = matcher.match_logits(features, input_ids, mask).softmax(dim=1)
        itm = max(itm, _largest(probabilities, logits.softmax(dim=1)))
    return [Difference("ITC cosines", itc, 1e-5), Difference("ITM probabilities", itm, 1e-5)]


def _difference(component: str, ours: Tensor, theirs: Tensor, tolerance: float) -> Difference:
    return Difference(component, _largest(ours, theirs), tolerance)


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max())
