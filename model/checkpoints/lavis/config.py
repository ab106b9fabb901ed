"""The configuration of a LAVIS checkpoint, <name>.json beside <name>.pth.

It says what the .pth file alone does not:

    arch            "blip2" (stage 1: retrieval), "blip2_opt" or "blip2_t5" (stage 2: generation)
    image_size      of the images to read, in pixels
    vision_model    "eva_clip_g" or "clip_L", whose weights the .pth then holds; or an encoder's directory
    language_model  the directory of an OPT or T5 with its tokenizer; its weights unless the .pth holds them
    tokenizer       the directory of BERT's tokenizer with "[DEC]" as its bos token; of "blip2"
    num_attention_heads  of the Q-Former; BERT's heads, 64 wide, unless given
    eos_token_ids   those that end an answer of an OPT; LAVIS' own, the newline, unless given
    dense_act_fn    the activation of a T5; LAVIS' own, "gelu", unless given

Directories are relative to the .json. A directory may be a whole checkpoint in the Hub's format, of which the
needed model is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import Blip2VisionConfig, CLIPVisionConfig, PreTrainedConfig

from model.checkpoints.json_records import build_record, read_json
from model.errors import CheckpointError

ENCODERS: Mapping[str, PreTrainedConfig] = {
    "eva_clip_g": Blip2VisionConfig(
        hidden_size=1408,
        intermediate_size=6144,
        num_hidden_layers=39,
        num_attention_heads=16,
        patch_size=14,
        layer_norm_eps=1e-6,
    ),
    "clip_L": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        patch_size=14,
        layer_norm_eps=1e-5,
    ),
}


@dataclass(frozen=True, slots=True)
class LavisConfig:
    """The fields of <name>.json; see above."""

    arch: Literal["blip2", "blip2_opt", "blip2_t5"]
    image_size: int
    vision_model: str
    language_model: str | None = None
    tokenizer: str | None = None
    num_attention_heads: int | None = None
    eos_token_ids: tuple[int, ...] | None = None
    dense_act_fn: str | None = None

    @classmethod
    def read(cls, path: Path) -> "LavisConfig":
        """Read <name>.json. Raises CheckpointError naming the key that is unknown, missing or wrong."""
        config = build_record(cls, read_json(path), where=str(path))
        required = "tokenizer" if config.arch == "blip2" else "language_model"
        if getattr(config, required) is None:
            raise CheckpointError(f"{path}: {config.arch!r} needs a {required!r}, the directory of one")
        return config
