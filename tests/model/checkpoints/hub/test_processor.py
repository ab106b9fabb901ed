"""A checkpoint saved for the Hub answers in transformers, by processor and `generate`, as it does here."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from model import Blip2, CheckpointError, GenerationParams
from model.checkpoints import load_blip2, save_hub
from model.checkpoints.convert import Format, convert
from model.components import Blip2Components
from model.language import LanguageModel
from tests.builders import (
    WORDS,
    build_components,
    build_language_tokenizer,
    build_matcher,
    build_opt,
    build_vision_model,
    build_word_tokenizer,
    random_picture,
)
from tests.builders_t5 import build_t5_components

PARAMS = GenerationParams(num_beams=3, max_new_tokens=7, length_penalty=-1.0)
PROMPTS = ("a photo of", "question : what is left of the star ? answer :", "two")
PICTURES = tuple(random_picture(seed) for seed in range(3))


def build_tokenizer_without_image_token() -> PreTrainedTokenizerFast:
    """Build the tokenizer of `build_language_tokenizer` as its authors published it: without "<image>"."""
    vocabulary = ["<unk>", "<pad>", "</s>", "\n", "a", *WORDS[1:]]
    return build_word_tokenizer(vocabulary, bos_token="</s>", eos_token="</s>")


def with_language_model(language_model: LanguageModel) -> Blip2Components:
    components = build_components(seed=4)
    projection = torch.nn.Linear(components.qformer.config.hidden_size, language_model.hidden_size)
    return dataclasses.replace(components, language_model=language_model, language_projection=projection)


def build_opt_components() -> Blip2Components:
    return build_components(seed=4)


def build_opt_without_image_token() -> Blip2Components:
    return with_language_model(LanguageModel(build_opt(seed=4), build_tokenizer_without_image_token()))


def build_opt_of_many_ends() -> Blip2Components:
    """Build an OPT whose end tokens stand in its generation config."""
    opt = build_opt(seed=4)
    assert opt.generation_config is not None
    opt.generation_config.eos_token_id = [2, 3]
    return with_language_model(LanguageModel(opt, build_language_tokenizer()))


def build_llama_components() -> Blip2Components:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.4,
    )
    return with_language_model(LanguageModel(LlamaForCausalLM(config).eval(), build_language_tokenizer()))


KINDS: dict[str, Callable[[], Blip2Components]] = {
    "opt": build_opt_components,
    "opt without <image>": build_opt_without_image_token,
    "opt of many ends": build_opt_of_many_ends,
    "t5, tied": lambda: build_t5_components("tied", seed=4),
    "t5, untied": lambda: build_t5_components("untied", seed=4),
    "llama": build_llama_components,
}


def answers_here(path: Path, prompts: Sequence[str]) -> list[str]:
    blip2 = Blip2.from_pretrained(str(path))
    pixel_values = torch.stack([blip2.preprocess(picture) for picture in PICTURES])
    with torch.inference_mode():
        inputs = blip2.project_queries(blip2.encode_queries(blip2.encode_images(pixel_values)))
        return [
            blip2.require_language_model().decode_tokens(answer.token_ids)
            for prompt in prompts
            for answer, *_ in blip2.generate(inputs, [prompt] * len(inputs), PARAMS)
        ]


class Reference:
    """A generation model as transformers' documentation loads and asks it."""

    def __init__(self, directory: Path) -> None:
        self.model = Blip2ForConditionalGeneration.from_pretrained(directory).eval()
        self.processor = Blip2Processor.from_pretrained(directory)

    def answers(self, prompt: str | None) -> list[str]:
        return [text for picture in PICTURES for text in self.ask(picture, prompt)]

    def ask(self, images: object, text: object) -> list[str]:
        inputs = self.processor(images=images, text=text, padding=True, return_tensors="pt")
        is_encoder_decoder = self.model.config.text_config.is_encoder_decoder
        tokens = self.model.generate(
            **inputs,
            num_beams=PARAMS.num_beams,
            max_new_tokens=PARAMS.max_new_tokens,
            min_new_tokens=PARAMS.min_new_tokens,
            length_penalty=PARAMS.length_penalty,
        )
        start = 0 if is_encoder_decoder else self.num_prefix_tokens(inputs)
        texts = self.processor.batch_decode(tokens[:, start:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def num_prefix_tokens(self, inputs: dict[str, Tensor]) -> int:
        if "input_ids" in inputs:
            return inputs["input_ids"].shape[1]
        return int(self.model.config.num_query_tokens) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_answers_in_transformers_are_those_of_the_service(kind: str, tmp_path: Path) -> None:
    convert(KINDS[kind](), tmp_path / "adapter", "adapter")
    convert(load_blip2(str(tmp_path / "adapter")).components, tmp_path / "hub", "hub")
    expected = answers_here(tmp_path / "adapter", PROMPTS)
    assert answers_here(tmp_path / "hub", PROMPTS) == expected
    reference = Reference(tmp_path / "hub")
    assert [answer for prompt in PROMPTS for answer in reference.answers(prompt)] == expected
    assert len(set(expected[: len(PICTURES)])) > 1, "every picture has the same answer: the model is blind"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama"])
def test_captions_without_a_text_are_those_of_an_empty_prompt(kind: str, tmp_path: Path) -> None:
    save_hub(tmp_path, KINDS[kind]())
    assert Reference(tmp_path).answers(None) == answers_here(tmp_path, [""])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_unequal_length_are_padded_on_the_right_side(kind: str, tmp_path: Path) -> None:
    save_hub(tmp_path, KINDS[kind]())
    reference = Reference(tmp_path)
    expected = [reference.answers(prompt)[index] for index, prompt in enumerate(PROMPTS)]
    assert reference.ask(list(PICTURES), list(PROMPTS)) == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama"])  # which LAVIS does not have
@pytest.mark.parametrize("way", [["hub", "adapter", "hub"], ["lavis", "hub"]])
def test_every_way_to_the_hub_answers_the_same(kind: str, way: list[Format], tmp_path: Path) -> None:
    components = KINDS[kind]()
    with torch.no_grad():
        for layer in components.vision_model.vit.encoder.layers:
            layer.self_attn.qkv.bias.zero_()  # LAVIS' encoder has none for the keys
    save_hub(tmp_path / "first", components)
    expected = Reference(tmp_path / "first").answers(PROMPTS[0])
    for number, target_format in enumerate(way):
        target = tmp_path / (f"{number}.pth" if target_format == "lavis" else str(number))
        convert(components, target, target_format)
        components = load_blip2(str(target)).components
    assert Reference(target).answers(PROMPTS[0]) == expected


def build_retrieval() -> Blip2Components:
    vision_model, matcher = build_vision_model(seed=4), build_matcher(seed=4)
    return Blip2Components(
        vision_model=vision_model,
        preprocess=build_components().preprocess,
        ln_vision=matcher.ln_vision,
        query_tokens=matcher.query_tokens,
        qformer=matcher.qformer,
        matcher=matcher,
    )


@torch.inference_mode()
def test_a_retrieval_model_scores_in_transformers_as_here(tmp_path: Path) -> None:
    save_hub(tmp_path, build_retrieval())
    matcher = Blip2.from_pretrained(str(tmp_path)).require_matcher()
    blip2 = Blip2.from_pretrained(str(tmp_path))
    reference = Blip2ForImageTextRetrieval.from_pretrained(tmp_path).eval()
    processor = Blip2Processor.from_pretrained(tmp_path)
    texts = ["a red circle", "what is left of the star", "two"]
    inputs = processor(images=list(PICTURES), text=texts, padding=True, return_tensors="pt")
    features = blip2.encode_images(torch.stack([blip2.preprocess(picture) for picture in PICTURES]))
    itm = reference(**inputs, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(matcher.match_logits(features, *matcher.tokenize(texts)), itm)
    itc = reference(**inputs, use_image_text_matching_head=False).logits_per_image
    image_embeds = matcher.embed_images(features)
    torch.testing.assert_close(matcher.itc_scores(image_embeds, matcher.embed_texts(texts)), itc)


def test_the_processor_counts_the_image_tokens_that_the_model_replaces(tmp_path: Path) -> None:
    for name, components in {"generation": build_components(), "retrieval": build_retrieval()}.items():
        save_hub(tmp_path / name, components)
        config = json.loads((tmp_path / name / "config.json").read_text())
        processor = Blip2Processor.from_pretrained(tmp_path / name)
        assert processor.num_query_tokens == config["num_query_tokens"] == 8
        image = Image.new("RGB", (9, 9))
        input_ids = processor(images=image, text="a", return_tensors="pt").input_ids[0].tolist()
        assert input_ids.count(config["image_token_index"]) == 8


def test_saving_leaves_the_model_in_memory_as_it_was(tmp_path: Path) -> None:
    components = build_opt_without_image_token()
    language_model = components.language_model
    assert language_model is not None
    tokenizer = language_model.tokenizer
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.init_kwargs.copy(), language_model.llm.config
    save_hub(tmp_path, components)
    after = tokenizer.backend_tokenizer.to_str(), tokenizer.init_kwargs, language_model.llm.config
    assert after == before


def test_generation_fields_of_an_old_configuration_are_not_handed_on(tmp_path: Path) -> None:
    save_hub(tmp_path / "old", build_opt_components())
    path = tmp_path / "old" / "config.json"
    fields = json.loads(path.read_text())
    fields["text_config"] |= {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "forced_eos_token_id": 7}
    path.write_text(json.dumps(fields))
    convert(load_blip2(str(tmp_path / "old")).components, tmp_path / "new", "hub")
    assert Reference(tmp_path / "new").answers(PROMPTS[1]) == answers_here(tmp_path / "old", PROMPTS[1:2])


def test_a_language_model_without_room_for_the_image_token_is_refused(tmp_path: Path) -> None:
    opt = build_opt()
    opt.resize_token_embeddings(len(build_tokenizer_without_image_token()))
    components = with_language_model(LanguageModel(opt, build_tokenizer_without_image_token()))
    with pytest.raises(CheckpointError, match=r"would have the id 42, and the language model has 42 word"):
        save_hub(tmp_path / "hub", components)
    assert not (tmp_path / "hub").exists()
