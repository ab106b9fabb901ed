"""Damaged directories in the Hub's format: errors name file, tensor and cure."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import Blip2ForConditionalGeneration

from model import Blip2, CheckpointError
from tests.model.checkpoints.damage import edit_config, edit_tensors

ONE_OF_EACH_PART = [
    "vision_model.encoder.layers.1.mlp.fc1.weight",
    "vision_model.embeddings.class_embedding",
    "vision_model.post_layernorm.bias",
    "qformer.encoder.layer.1.output_query.dense.weight",
    "query_tokens",
    "language_projection.weight",
    "language_model.model.decoder.layers.0.fc2.weight",
]


@pytest.fixture
def hub(hub_directory: Path, tmp_path: Path) -> Path:
    return copytree(hub_directory, tmp_path / "hub")


@pytest.fixture
def sharded(reference: Blip2ForConditionalGeneration, hub: Path) -> Path:
    reference.save_pretrained(hub, max_shard_size="100KB")
    (hub / "model.safetensors").unlink()
    assert len(list(hub.glob("*.safetensors"))) > 2
    return hub


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Blip2.from_pretrained(str(directory))
    return str(caught.value)


@pytest.mark.parametrize("name", ONE_OF_EACH_PART)
def test_a_missing_tensor_of_any_part_is_named(hub: Path, name: str) -> None:
    edit_tensors(hub / "model.safetensors", lambda tensors: tensors.pop(name))
    message = refusal(hub)
    assert "model.safetensors lacks the tensor" in message
    assert repr(_inside(name)) in message
    assert "save the checkpoint again" in message


@pytest.mark.parametrize("name", ONE_OF_EACH_PART)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(hub: Path, name: str) -> None:
    edit_tensors(
        hub / "model.safetensors", lambda tensors: tensors.update({name: tensors[name][..., :-1].clone()})
    )
    message = refusal(hub)
    assert repr(_inside(name)) in message
    assert "the configuration says" in message
    assert "use the config.json" in message


@pytest.mark.parametrize(
    "name", ["vision_model.encoder.layers.9.mlp.fc1.weight", "qformer.extra", "language_model.model.extra"]
)
def test_a_tensor_too_many_in_any_part_is_named(hub: Path, name: str) -> None:
    edit_tensors(hub / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(1)}))
    message = refusal(hub)
    assert f"holds the tensor {_inside(name)!r}, which this model has no place for" in message


def test_a_tensor_of_whole_numbers_is_refused(hub: Path) -> None:
    edit_tensors(
        hub / "model.safetensors",
        lambda tensors: tensors.update(query_tokens=tensors["query_tokens"].long()),
    )
    assert "'query_tokens' is of type torch.int64, torch.float32 is needed" in refusal(hub)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    message = refusal(sharded)
    assert f"cannot read {lost}" in message
    assert "copy or save it again" in message


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_a_shard_that_was_cut_is_named(sharded: Path, num_bytes: int) -> None:
    cut = sorted(sharded.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:num_bytes])
    assert f"cannot read {cut}" in refusal(sharded)


def test_a_damaged_header_is_refused(hub: Path) -> None:
    path = hub / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    assert f"cannot read {path}" in refusal(hub)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", json.dumps({"weight_map": {}}), json.dumps({"weight_map": {"a": 5}})]
)
def test_an_index_that_is_none_is_named(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(sharded)


def test_weights_that_are_pickles_are_refused_with_the_way_out(hub: Path) -> None:
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    message = refusal(hub)
    assert "pytorch_model.bin), which are not read, for they may run code" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "clip"}, "describes no BLIP-2 checkpoint"),
        ({"architectures": ["Blip2Model"]}, "is of architecture ['Blip2Model']"),
        ({"vision_config": {"hidden_size": "wide"}}, "is not a valid configuration"),
        ({"vision_config": {"num_attention_heads": 0}}, "sets 'num_attention_heads' to 0"),
        ({"vision_config": {"hidden_act": "foo"}}, "no model can be built"),
        ({"qformer_config": {"num_attention_heads": 5}}, "no model can be built"),
        ({"qformer_config": {"num_attention_heads": 0}}, "sets 'num_attention_heads' to 0"),
        ({"text_config": {"model_type": "opt", "num_attention_heads": 5}}, "no model can be built"),
        ({"text_config": {"model_type": "opt", "activation_function": "foo"}}, "no model can be built"),
        ({"text_config": {"model_type": "mamba"}}, "those that transformers has a causal"),
        ({"text_config": {"model_type": "opt", "bos_token_id": None}}, "does not set 'bos_token_id'"),
        (
            {"vision_config": {"num_hidden_layers": 10**9}},
            "sets 'num_hidden_layers' to 1000000000, it must be from 0 to 512",
        ),
        (
            {"qformer_config": {"num_hidden_layers": 10**9}},
            "sets 'num_hidden_layers' to 1000000000, it must be from 0 to 512",
        ),
        ({"text_config": {"model_type": "opt", "num_hidden_layers": 513}}, "sets 'num_hidden_layers' to 513"),
        (
            {"vision_config": {"image_size": 8 * 10**6}},
            "'embeddings.position_embedding' has shape [1, 17, 48]",
        ),
        ({"vision_config": {"patch_size": 10**6}}, "'embeddings.patch_embedding.weight' has shape"),
        (
            {"vision_config": {"num_attention_heads": -1}},
            "sets 'num_attention_heads' to -1, it must be from 1",
        ),
        (
            {"text_config": {"model_type": "opt", "dropout": 1.5}},
            "sets 'dropout' to 1.5, it must be from 0 to 1",
        ),
        ({"text_config": {"model_type": "opt", "pad_token_id": 10**9}}, "no model can be built"),
        ({"vision_config": {"model_type": ["x"]}}, "is of model type \"['x']\"; image encoders of"),
        ({"vision_config": {"model_type": "x"}}, "is of model type 'x'; image encoders of"),
        ({"model_type": ["blip-2"]}, "describes no BLIP-2 checkpoint"),
        ({"architectures": 5}, "is of architecture 5"),
        ({"num_query_tokens": 9}, "'query_tokens' has shape [1, 8, 32], the configuration says [1, 9, 32]"),
    ],
)
def test_a_configuration_of_something_else_is_named(
    hub: Path, fields: dict[str, object], complaint: str
) -> None:
    edit_config(hub, lambda config: config.update(_merged(config, fields)))
    message = refusal(hub)
    assert "config.json" in message
    assert complaint in message


def test_a_missing_tokenizer_is_named(hub: Path) -> None:
    for path in hub.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer (tokenizer.json, vocab.json" in refusal(hub)


def _merged(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {
        key: {**config[key], **value} if isinstance(value, dict) else value for key, value in fields.items()
    }


def _inside(name: str) -> str:
    """Return the name as in messages: that inside its component."""
    if name.startswith("vision_model.post_layernorm."):
        return name.replace("vision_model.post_layernorm", "ln_vision")
    return name.removeprefix("vision_model.").removeprefix("language_model.")
