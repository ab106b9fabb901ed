"""BLIP-2 as transformers runs it, for the servers that `serving.py` compares this project with.

    python -m benchmarks.serving.transformers_model DIRECTORY [--threads 2] [--batch 16] [--repeats 2]

prints which attention makes `generate` faster on a batch of captions: sdpa or eager.
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
    """What steers the search for an answer; the names are `generate`'s."""

    model_config = ConfigDict(frozen=True)

    num_beams: int = 5
    max_new_tokens: int = 30
    min_new_tokens: int = 1
    length_penalty: float = 1.0


class CaptionBody(Search):
    """image: in base64."""

    image: str


class QuestionBody(CaptionBody):
    """One question about one image."""

    question: str


class Caption(BaseModel):
    """num_tokens: the end token counts."""

    text: str
    num_tokens: int


class CaptionAnswer(BaseModel):
    """The one caption of an image."""

    captions: list[Caption]


class TransformersModel:
    """Preprocessing, `generate` and decoding of texts, in bfloat16, from a directory in the Hub's format."""

    def __init__(self, directory: Path, attention: str) -> None:
        self._processor = BlipImageProcessor.from_pretrained(directory)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = Blip2ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation=attention
        ).eval()
        config = self._model.config
        self._before_prompt = [config.image_token_index] * config.num_query_tokens
        self._before_prompt.append(config.text_config.bos_token_id)

    def read_image(self, image: str) -> Tensor:
        """Turns a file in base64 into [1, 3, S, S] pixel values."""
        picture = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
        pixel_values: Tensor = self._processor(picture, return_tensors="pt").pixel_values
        return pixel_values.to(torch.bfloat16)

    @torch.inference_mode()
    def generate(self, pixel_values: Tensor, prompt: str, search: Search) -> list[Caption]:
        """Gives one text for each of [B, 3, S, S] images, all with this prompt."""
        prompt_ids = self._before_prompt + self._tokenizer.encode(prompt, add_special_tokens=False)
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
    """Gives the options that all servers over this model take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", choices=ATTENTIONS, default="eager")
    return parser


def main() -> None:
    parser = argparse.ArgumentParser(description="Finds the attention that is faster for generate.")
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
