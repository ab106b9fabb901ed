"""Adapters on image encoders of any kind, and encoders resized when they are loaded."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from model import Blip2
from model.checkpoints import LoadOptions, load_blip2, load_vision_model, save_generation_adapter
from model.checkpoints.convert import convert
from model.errors import CheckpointError
from model.vision import VisionEncoder, build_vision_encoder
from tests.builders import build_components, build_vit, random_pixels
from tests.model.checkpoints.damage import edit_config, edit_tensors

MODEL_TYPES = ["blip_2_vision_model", "clip_vision_model", "siglip_vision_model", "vit", "dinov2"]


def save_adapter_on(directory: Path, model_type: str, root: Path) -> Path:
    """Save an adapter on the second-last layer of a new encoder."""
    build_vit(model_type).save_pretrained(directory / "encoder")
    encoder = VisionEncoder(build_vit(model_type), feature_layer=-2)
    save_generation_adapter(
        directory / "adapter",
        dataclasses.replace(build_components(), vision_model=encoder),
        vision_directory=directory / "encoder",
        language_directory=root / "language_model",
        feature_layer=-2,
    )
    return directory / "adapter"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_an_adapter_reads_its_layer_of_any_encoder(model_type: str, checkpoint: Path, tmp_path: Path) -> None:
    blip2 = Blip2.from_pretrained(str(save_adapter_on(tmp_path, model_type, checkpoint.parent)))
    expected = VisionEncoder(build_vit(model_type), feature_layer=-2)(random_pixels(2))
    torch.testing.assert_close(blip2.encode_images(random_pixels(2)), expected, rtol=0, atol=0)
    assert not any(weight.requires_grad for weight in blip2.vision_model.parameters())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_a_checkpoint_is_loaded_for_images_of_another_size(
    model_type: str, checkpoint: Path, tmp_path: Path
) -> None:
    adapter = str(save_adapter_on(tmp_path, model_type, checkpoint.parent))
    blip2 = Blip2.from_pretrained(adapter, LoadOptions(image_size=48))
    encoder = VisionEncoder(build_vit(model_type), feature_layer=-2)
    encoder.resize(48)
    pixels = torch.randn(2, 3, 48, 48)
    assert blip2.image_size == blip2.preprocess.image_size == 48
    torch.testing.assert_close(blip2.encode_images(pixels), encoder(pixels), rtol=0, atol=0)
    assert blip2.fingerprint != Blip2.from_pretrained(adapter).fingerprint


@torch.inference_mode()
def test_of_a_model_with_two_encoders_the_image_encoder_is_loaded(tmp_path: Path) -> None:
    vit = build_vit("clip_vision_model")
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    clip = CLIPModel(CLIPConfig(vision_config=vit.config.to_dict(), text_config=text)).eval()
    clip.save_pretrained(tmp_path)
    expected = clip.vision_model(pixel_values=random_pixels(1)).last_hidden_state
    torch.testing.assert_close(load_vision_model(tmp_path)(random_pixels(1)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_missing_tensor_is_named(model_type: str, tmp_path: Path) -> None:
    build_vit(model_type).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    lost = next(name for name in load_file(weights) if "fc1" in name or "intermediate" in name)
    edit_tensors(weights, lambda tensors: tensors.pop(lost))
    with pytest.raises(CheckpointError, match=r"lacks the tensor '.*(fc1|intermediate).*' "):
        load_vision_model(tmp_path)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_tensor_of_another_shape_is_refused(model_type: str, tmp_path: Path) -> None:
    build_vit(model_type).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    cut = next(name for name in load_file(weights) if "fc1.weight" in name or "intermediate" in name)
    edit_tensors(weights, lambda tensors: tensors.update({cut: tensors[cut][:-1].clone()}))
    with pytest.raises(CheckpointError, match=r"shape|size"):
        load_vision_model(tmp_path)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model", "vit"])
def test_layers_that_the_configuration_forgets_are_refused(model_type: str, tmp_path: Path) -> None:
    build_vit(model_type).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda fields: fields.update(num_hidden_layers=2))
    with pytest.raises(CheckpointError, match="which its configuration has no place for"):
        load_vision_model(tmp_path)


@pytest.mark.parametrize("layer", [0, 1, -4])
def test_a_feature_layer_that_is_none_is_refused(layer: int, tmp_path: Path) -> None:
    build_vit("vit").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"feature layer {layer} is not between -3"):
        load_vision_model(tmp_path, feature_layer=layer)


def test_a_configuration_that_names_other_weights_is_refused(tmp_path: Path) -> None:
    build_vit("vit").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda fields: fields.update(transformers_weights="other.safetensors"))
    with pytest.raises(CheckpointError, match="transformers_weights"):
        load_vision_model(tmp_path)


def test_leftovers_in_a_configuration_make_no_other_encoder(tmp_path: Path) -> None:
    vit = build_vit("blip_2_vision_model")
    for name in ("one", "other"):
        vit.save_pretrained(tmp_path / name)
    edit_config(tmp_path / "other", lambda fields: fields.update(projection_dim=512, dropout=0.0))
    one, other = (load_vision_model(tmp_path / name) for name in ("one", "other"))
    assert one.is_equal(other)
    edit_config(tmp_path / "other", lambda fields: fields.update(layer_norm_eps=1e-3))
    assert not one.is_equal(load_vision_model(tmp_path / "other"))


def test_a_size_the_patches_do_not_divide_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="image size 50 is no multiple of the patch size 8"):
        Blip2.from_pretrained(str(checkpoint), LoadOptions(image_size=50))


@pytest.mark.parametrize(("model_type", "pooler"), [("vit", "pooler."), ("siglip_vision_model", "head.")])
@torch.inference_mode()
def test_poolers_are_neither_needed_nor_kept(model_type: str, pooler: str, tmp_path: Path) -> None:
    build_vit(model_type).save_pretrained(tmp_path)
    expected = load_vision_model(tmp_path)
    assert not any(pooler in name for name in expected.state_dict())
    edit_tensors(
        tmp_path / "model.safetensors",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if pooler in name],
    )
    once, again = load_vision_model(tmp_path), load_vision_model(tmp_path)
    assert once.is_equal(again)
    assert torch.equal(once(random_pixels(1)), expected(random_pixels(1)))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_an_encoder_that_was_cut_is_converted_and_loads_again(
    model_type: str, checkpoint: Path, tmp_path: Path
) -> None:
    adapter = save_adapter_on(tmp_path, model_type, checkpoint.parent)
    convert(load_blip2(str(adapter)).components, tmp_path / "copy", "adapter")
    pixels = random_pixels(2)
    ours, copy = (Blip2.from_pretrained(str(path)) for path in (adapter, tmp_path / "copy"))
    assert torch.equal(copy.encode_images(pixels), ours.encode_images(pixels))


def test_building_leaves_the_configuration_it_is_given_alone() -> None:
    config = build_vit("vit").config
    before = config.to_dict()
    build_vision_encoder(config).resize(64)
    assert config.to_dict() == before


@pytest.mark.parametrize("model_type", MODEL_TYPES[1:])
@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("num_channels", 10**7, "parameters, and the model of its configuration has"),
        ("image_size", 8 * 10**5, "parameters, and the model of its configuration has"),
        ("num_hidden_layers", 10**9, "sets 'num_hidden_layers' to 1000000000, it must be from 0 to 512"),
        ("hidden_size", 3 * 10**17, "no model can be built"),
    ],
)
def test_an_encoder_far_larger_than_its_file_is_refused_before_it_is_built(
    model_type: str, field: str, value: int, complaint: str, tmp_path: Path
) -> None:
    build_vit(model_type).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda fields: fields.update({field: value}))
    with pytest.raises(CheckpointError, match=complaint):
        load_vision_model(tmp_path)
