"""Checkpoints written as the public ones are, with random weights.

Configuration, names of tensors, shards, tokenizer and processor are those of the published files; the depth
is cut.
"""

import copy
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AddedToken, Blip2Config, PreTrainedModel, PreTrainedTokenizerFast

DEPTHS = {"vision_model": 2, "qformer": 3, "language_model": 1}
_LAYER = re.compile(r"\.(?:layers?|block)\.(\d+)\.")
_SHAPES = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def write_published(source: Path, directory: Path, model_class: type[PreTrainedModel]) -> None:
    """Write a checkpoint like the one whose files are in `source`, but for its weights."""
    directory.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in _SHAPES:
            shutil.copyfile(path, directory / path.name)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    write_weights(directory, cut_depth(json.loads((source / "config.json").read_text())), index, model_class)


def write_weights(
    directory: Path, fields: dict[str, Any], files: Mapping[str, str], model_class: type[PreTrainedModel]
) -> None:
    """Write a configuration, and random tensors of the names that are left of `files` in their shards.

    A layer is where the last of its kind was, or one shard alone would be left.
    """
    (directory / "config.json").write_text(json.dumps(fields, indent=2))
    with torch.device("meta"):
        shapes = model_class(Blip2Config.from_dict(fields)).state_dict()
    last = {_LAYER.sub(".layer.", name): files[name] for name in sorted(files, key=_layer_index)}
    kept = {name: last[_LAYER.sub(".layer.", name)] for name in files if _is_kept(name)}
    assert kept.keys() <= shapes.keys(), sorted(kept.keys() - shapes.keys())
    generator = torch.Generator().manual_seed(0)
    for file in sorted(set(kept.values())):
        names = [name for name in kept if kept[name] == file]
        tensors = {name: _random(name, tuple(shapes[name].shape), generator) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(set(kept.values())) > 1:
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": kept})
        )


def cut_depth(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json with fewer layers."""
    cut: dict[str, Any] = copy.deepcopy(fields)
    cut["vision_config"]["num_hidden_layers"] = DEPTHS["vision_model"]
    cut["qformer_config"]["num_hidden_layers"] = DEPTHS["qformer"]
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if name in cut["text_config"]:
            cut["text_config"][name] = DEPTHS["language_model"]
    return cut


def write_retrieval(
    source: Path, keys: Iterable[str], directory: Path, model_class: type[PreTrainedModel]
) -> None:
    """Write a retrieval checkpoint: its tensors' names are those of `keys`, its encoder that of `source`.

    Its tokenizer has BERT's ids and "<image>" at 30523, one past the word embeddings.
    """
    directory.mkdir(parents=True)
    fields = cut_depth(json.loads((source / "config.json").read_text()))
    fields |= {"architectures": [model_class.__name__], "image_token_index": 30523}
    fields["qformer_config"] = {
        **{"model_type": "blip_2_qformer", "vocab_size": 30523, "use_qformer_text_input": True},
        "num_hidden_layers": DEPTHS["qformer"],
    }
    write_weights(directory, fields, dict.fromkeys(keys, "model.safetensors"), model_class)
    for name in ("preprocessor_config.json", "processor_config.json"):
        shutil.copyfile(source / name, directory / name)
    build_bert_tokenizer().save_pretrained(directory)


def build_bert_tokenizer() -> PreTrainedTokenizerFast:
    words = [f"word{number}" for number in range(30522)]
    words[0], words[100], words[101], words[102] = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
    words[2000:2008] = ["two", "cats", "on", "a", "pink", "blanket", "dog", "."]
    vocabulary = {word: index for index, word in enumerate([*words, "[DEC]"])}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "bos": "[DEC]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in special.items()}
    )
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    return tokenizer


def _layer_index(name: str) -> int:
    layer = _LAYER.search(name)
    return int(layer[1]) if layer else -1


def _is_kept(name: str) -> bool:
    depth = next(depth for prefix, depth in {**DEPTHS, "": 1}.items() if name.startswith(prefix))
    return _layer_index(name) < depth


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    tensor = torch.randn(shape, generator=generator)
    if "norm" in name.lower():
        return tensor * 0.1 + (1 if name.endswith("weight") else 0)
    if name.endswith("bias"):
        return tensor * 0.1
    if "query_tokens" in name or "relative_attention_bias" in name or "position" in name:
        return tensor
    if "embed_tokens" in name or "shared" in name or "word_embeddings" in name:
        return tensor * 0.05
    gain = (
        0.1 if name.endswith((".q.weight", ".patch_embedding.weight")) else 1.5
    )  # T5 does not scale queries
    return tensor.mul_(gain / tensor[0].numel() ** 0.5)
