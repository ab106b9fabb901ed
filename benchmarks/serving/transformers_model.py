"""BLIP-2 in transformers, for the servers that this project is compared with.

    python -m benchmarks.serving.transformers_model DIRECTORY [--threads 2] [--batch 16] [--repeats 2]

prints the attention that makes `generate` faster on a batch of captions: sdpa or eager.
"""

import argparse
import base64
import io
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, BlipImageProcessor

ATTENTIONS = ("sdpa", "eager")
QUESTION = "Question: {} Answer:"
_IMAGE_SIZE = 224


class Search(BaseModel):
    """Generation parameters, named as in `generate`."""

    model_config = ConfigDict(frozen=True)

    num_beams: int = 5
    max_new_tokens: int = 30
    min_new_tokens: int = 1
    length_penalty: float = 1.0


class CaptionBody(Search):
    """Request body of a caption; image: base64."""

    image: str


class QuestionBody(CaptionBody):
    """Request body of one question about one image."""

    question: str


class Caption(BaseModel):
    """A caption; num_tokens includes the end token."""

    text: str
    num_tokens: int


class CaptionAnswer(BaseModel):
    """Response body with one caption."""

    captions: list[Caption]


class TransformersModel:
    """Preprocessing, `generate` and detokenisation, in bfloat16, from a directory in the Hub's format."""

    def __init__(self, directory: Path, attention: str) -> None:
        self._processor = BlipImageProcessor.from_pretrained(directory)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = Blip2ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation=attention
        ).eval()
        config = self._model.config
        self._prefix_ids = [config.image_token_index] * config.num_query_tokens
        self._prefix_ids.append(config.text_config.bos_token_id)

    def decode_image(self, image: str) -> Tensor:
        """Decode a base64 image into [1, 3, S, S] pixel values."""
        pil_image = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
        pixel_values: Tensor = self._processor(pil_image, return_tensors="pt").pixel_values
        return pixel_values.to(torch.bfloat16)

    @torch.inference_mode()
    def generate(self, pixel_values: Tensor, prompt: str, search: Search) -> list[Caption]:
        """Generate one text for each of [B, 3, S, S] images, all with the same prompt."""
        prompt_ids = self._prefix_ids + self._tokenizer.encode(prompt, add_special_tokens=False)
        input_ids = torch.tensor([prompt_ids]).expand(len(pixel_values), -1)
        rows = self._model.generate(
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            **search.model_dump(include=set(Search.model_fields)),
        )
        return [self._to_caption(row[len(prompt_ids) :].tolist()) for row in rows]

    def _to_caption(self, token_ids: list[int]) -> Caption:
        end = self._model.config.text_config.eos_token_id
        num_tokens = token_ids.index(end) + 1 if end in token_ids else len(token_ids)
        kept = [token_id for token_id in token_ids[:num_tokens] if token_id != end]
        text = self._tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Caption(text=text, num_tokens=num_tokens)


def build_parser(description: str) -> argparse.ArgumentParser:
    """Build the parser of the options that both servers share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", choices=ATTENTIONS, default="eager")
    return parser


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the attention that is faster in generate.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds = {
        name: _caption_s(TransformersModel(arguments.directory, name), arguments.batch, arguments.repeats)
        for name in ATTENTIONS
    }
    print(min(ATTENTIONS, key=lambda name: seconds[name]))


def _caption_s(model: TransformersModel, batch: int, repeats: int) -> float:
    pixel_values = torch.randn(batch, 3, _IMAGE_SIZE, _IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    search = Search(max_new_tokens=20, min_new_tokens=20)
    return statistics.median(_seconds(model, pixel_values.bfloat16(), search) for _ in range(repeats))


def _seconds(model: TransformersModel, pixel_values: Tensor, search: Search) -> float:
    started = time.perf_counter()
    model.generate(pixel_values, "", search)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
