"""Small random checkpoints: complete, and quick to run on a CPU."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from model.checkpoints import save_generation_adapter, save_retrieval_adapter
from model.components import Blip2Components
from model.config import QFormerConfig
from model.language import DecodeInput, DecodingState, LanguageModel
from model.matching import Matcher
from model.preprocess import ImagePreprocessor
from model.prompts import PromptTemplates
from model.qformer import QFormer, build_query_tokens
from model.vision import FAMILIES, VisionEncoder

IMAGE_SIZE = 32
NUM_QUERY_TOKENS = 8
QFORMER_WIDTH = 32
MAX_POSITIONS = 96
MAX_TEXT_TOKENS = 12
END = 3  # the id of the newline
WORDS = (
    *("a", "an", "the", "red", "green", "blue", "big", "small", "circle", "square", "star", "cross"),
    *("left", "right", "above", "below", "of", "and", "what", "color", "shape", "is", "there", "how", "many"),
    *("one", "two", "three", "yes", "no", "in", "on", "photo", "question", "answer", ":", "?", "."),
)


def build_language_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of words; as with OPT, padding is 1, texts begin with 2, a newline ends an answer."""
    vocabulary = ["<unk>", "<pad>", "</s>", "\n", "<image>", *WORDS]
    return build_word_tokenizer(
        vocabulary, bos_token="</s>", eos_token="</s>", additional_special_tokens=["<image>"]
    )


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of words, with the special tokens of the Q-Former's texts."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", *WORDS]
    return build_word_tokenizer(
        vocabulary,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[DEC]",
    )


def build_vision_config() -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=8,
        initializer_range=0.3,  # the default, 1e-10, makes all features equal
    )


def build_qformer_config(*, num_hidden_layers: int = 4) -> QFormerConfig:
    return QFormerConfig(
        hidden_size=QFORMER_WIDTH,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=48,
        num_query_tokens=NUM_QUERY_TOKENS,
        vocab_size=len(WORDS) + 5,
        max_position_embeddings=40,
        joint_size=16,
        initializer_range=0.3,
    )


def build_opt(*, seed: int = 0, eos_pull: float = 1.5) -> OPTForCausalLM:
    """Build a random OPT whose next token is neither certain nor uniform, and sometimes ends the answer.

    eos_pull: the shift of the final norm towards the end token; larger ones give shorter answers.
    """
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=len(WORDS) + 8,  # more rows than words, as in the released models
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        init_std=0.25,
        eos_token_id=END,
    )
    opt = OPTForCausalLM(config).eval()
    with torch.no_grad():
        decoder = opt.model.decoder
        decoder.embed_positions.weight.mul_(4)  # else each token mostly predicts itself
        end = decoder.embed_tokens.weight[END]
        decoder.final_layer_norm.bias.add_(end, alpha=eos_pull / end.norm().item())
    return opt


def build_language_model(*, seed: int = 0, eos_pull: float = 1.5) -> LanguageModel:
    return LanguageModel(build_opt(seed=seed, eos_pull=eos_pull), build_language_tokenizer()).eval()


def decode_step(state: DecodingState, token_ids: Sequence[int]) -> torch.Tensor:
    """Append one token to each sequence, of one row each; return [J, N] logits."""
    beams = [(sequence, [0], [token_id]) for sequence, token_id in enumerate(token_ids)]
    return state.decode_step(build_decode_input(*beams)).float()


def build_decode_input(*beams: tuple[int, Sequence[int], Sequence[int]]) -> DecodeInput:
    """Build the input of (sequence, parents, token_ids), sequences ascending."""
    return DecodeInput(
        np.concatenate([np.full(len(token_ids), sequence) for sequence, _, token_ids in beams]),
        np.concatenate([np.array(parents) for _, parents, _ in beams]),
        np.concatenate([np.array(token_ids) for _, _, token_ids in beams]),
    )


def build_matcher(*, seed: int = 0, num_hidden_layers: int = 4) -> Matcher:
    torch.manual_seed(seed)
    config = build_qformer_config(num_hidden_layers=num_hidden_layers)
    return Matcher(config, build_text_tokenizer(), max_text_tokens=MAX_TEXT_TOKENS).eval()


def build_vit(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """Build a random image encoder of transformers, with three layers, for images of 32 px."""
    vit_class = FAMILIES[model_type].vit_class
    config = vit_class.config_class(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    vit = vit_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in vit.parameters():
            weight.normal_(std=0.3, generator=generator)
    return vit


def build_vision_model(*, seed: int = 0) -> VisionEncoder:
    torch.manual_seed(seed)
    return VisionEncoder(Blip2VisionModel(build_vision_config()).eval())


def build_components(*, seed: int = 0, eos_pull: float = 1.5) -> Blip2Components:
    """Build a whole generation model in memory, without a matcher."""
    vision_model = build_vision_model(seed=seed)
    config = build_qformer_config()
    language_model = build_language_model(seed=seed, eos_pull=eos_pull)
    return Blip2Components(
        vision_model=vision_model,
        preprocess=ImagePreprocessor(IMAGE_SIZE),
        ln_vision=nn.LayerNorm(config.encoder_hidden_size, eps=vision_model.layer_norm_eps),
        query_tokens=build_query_tokens(config),
        qformer=QFormer(config, has_text_branch=False).eval(),
        language_projection=nn.Linear(config.hidden_size, language_model.hidden_size),
        language_model=language_model,
        prompts=PromptTemplates(caption="", question="question : {} ? answer :"),
    )


def save_random_checkpoint(root: Path, *, seed: int = 0) -> Path:
    """Save {vision_model, language_model, stage1, stage2} under `root`; return the directory of stage2."""
    components = build_components(seed=seed)
    assert components.language_model is not None
    components.vision_model.vit.save_pretrained(root / "vision_model")
    components.language_model.llm.save_pretrained(root / "language_model")
    components.language_model.tokenizer.save_pretrained(root / "language_model")
    save_retrieval_adapter(
        root / "stage1",
        build_matcher(seed=seed),
        components.preprocess,
        vision_directory=root / "vision_model",
    )
    save_generation_adapter(
        root / "stage2",
        components,
        vision_directory=root / "vision_model",
        language_directory=root / "language_model",
        retrieval_directory=root / "stage1",
    )
    return root / "stage2"


def build_retrieval_reference(matcher: Matcher, vision_model: VisionEncoder) -> Blip2ForImageTextRetrieval:
    """Build transformers' retrieval model with the same weights; it has no text head and no temperature."""
    fields = dataclasses.asdict(matcher.config)
    num_query_tokens, joint_size = fields.pop("num_query_tokens"), fields.pop("joint_size")
    config = Blip2Config(
        vision_config=vision_model.vit.config.to_dict(),
        qformer_config=Blip2QFormerConfig(**fields, use_qformer_text_input=True).to_dict(),
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=joint_size,
    )
    reference = Blip2ForImageTextRetrieval(config)
    tensors = {f"vision_model.{name}": value for name, value in vision_model.vit.state_dict().items()}
    for name, value in matcher.state_dict().items():
        if not name.startswith(("text_head.", "temperature")):
            tensors[name.replace("ln_vision.", "vision_model.post_layernorm.")] = value
    reference.load_state_dict(tensors)
    return reference.eval()


def random_picture(seed: int, *, width: int = 40, height: int = 30) -> Image.Image:
    """Return an RGB image of noise."""
    levels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def random_pixels(num_images: int, *, seed: int = 0) -> torch.Tensor:
    """Return [B, 3, S, S] noise that differs from image to image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def random_images(num_images: int) -> torch.Tensor:
    """Return [B, S, S, 3] uint8 noise that differs from image to image: pixels before they are normalised."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, IMAGE_SIZE, IMAGE_SIZE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def build_word_tokenizer(vocabulary: list[str], **special_tokens: object) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word; the vocabulary holds the padding and unknown tokens."""
    ids = {word: index for index, word in enumerate(vocabulary)}
    unknown = next(word for word in vocabulary if "unk" in word.lower())
    tokenizer = Tokenizer(WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    defaults = {"unk_token": unknown, "pad_token": next(word for word in vocabulary if "pad" in word.lower())}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(defaults | special_tokens))
