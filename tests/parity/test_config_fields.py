"""Fields in which published configurations differ: each is read as transformers reads it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from model import Blip2, CheckpointError
from model.checkpoints.__main__ import main
from tests.builders import build_language_tokenizer, build_text_tokenizer
from tests.model.checkpoints.damage import edit_tensors
from tests.parity.test_transformers import (
    SIZES,
    Size,
    build_config,
    opt_config,
    random_pixels,
    randomize,
    save_generation,
)

SIZE = SIZES[1]
FAINT = 1e-4  # features of such a size have a variance that an epsilon of 1e-5 changes


@dataclasses.dataclass(frozen=True, slots=True)
class Outputs:
    features: Tensor
    soft_tokens: Tensor
    expected_features: Tensor
    expected_soft_tokens: Tensor


def save_with_epsilon(directory: Path, size: Size, layer_norm_eps: float) -> None:
    config = build_config(size, opt_config(size))
    config.vision_config.layer_norm_eps = layer_norm_eps
    model = Blip2ForConditionalGeneration(config)
    randomize(model, seed=0)
    with torch.no_grad():
        for name, weight in model.vision_model.named_parameters():
            if "norm" not in name:
                weight.mul_(FAINT)
    model.save_pretrained(directory)
    build_language_tokenizer().save_pretrained(directory)
    assert (
        json.loads((directory / "config.json").read_text())["vision_config"]["layer_norm_eps"]
        == layer_norm_eps
    )


@torch.inference_mode()
def compute(directory: Path) -> Outputs:
    blip2 = Blip2.from_pretrained(str(directory))
    reference = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    pixels = random_pixels(2, SIZE)
    features = blip2.encode_images(pixels)
    return Outputs(
        blip2.ln_vision(features),
        blip2.project_queries(blip2.encode_queries(features)),
        reference.vision_model(pixel_values=pixels).last_hidden_state,
        reference.get_image_features(pixel_values=pixels, return_dict=True).pooler_output,
    )


def test_both_epsilons_of_the_encoder_are_computed_as_in_transformers(tmp_path: Path) -> None:
    outputs = {}
    for layer_norm_eps in (1e-5, 1e-6):
        directory = tmp_path / str(layer_norm_eps)
        save_with_epsilon(directory, SIZE, layer_norm_eps)
        outputs[layer_norm_eps] = one = compute(directory)
        torch.testing.assert_close(one.features, one.expected_features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.soft_tokens, one.expected_soft_tokens, rtol=1e-4, atol=1e-4)
    assert (outputs[1e-5].features - outputs[1e-6].features).abs().max() > 0.1


def save_with_text_branch(directory: Path) -> Blip2ForConditionalGeneration:
    config = build_config(SIZE, opt_config(SIZE))
    config.qformer_config.use_qformer_text_input = True
    model = Blip2ForConditionalGeneration(config)
    randomize(model, seed=1)
    model.save_pretrained(directory)
    build_language_tokenizer().save_pretrained(directory)
    return model.eval()


def test_a_generation_checkpoint_with_a_text_branch_is_read_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_with_text_branch(tmp_path / "hub")
    assert any(".intermediate.dense" in name for name in load_file(tmp_path / "hub" / "model.safetensors"))
    outputs = compute(tmp_path / "hub")
    torch.testing.assert_close(outputs.soft_tokens, outputs.expected_soft_tokens, rtol=1e-4, atol=1e-5)
    assert main(["convert", str(tmp_path / "hub"), str(tmp_path / "again"), "--to", "hub"]) == 0
    assert torch.equal(compute(tmp_path / "again").soft_tokens, outputs.soft_tokens)
    capsys.readouterr()


def test_a_text_branch_that_the_configuration_does_not_name_is_refused(tmp_path: Path) -> None:
    save_with_text_branch(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["qformer_config"]["use_qformer_text_input"] = False
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"holds the tensor 'qformer\.encoder\.layer\.0\.intermediate"):
        Blip2.from_pretrained(str(tmp_path))


def test_a_query_branch_that_is_missing_is_refused_beside_a_text_branch(tmp_path: Path) -> None:
    save_with_text_branch(tmp_path)
    name = "qformer.encoder.layer.0.intermediate_query.dense.weight"
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"lacks the tensor '{name}'"):
        Blip2.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("language_family", ["opt", "t5", "itm"])
def test_verify_finds_a_checkpoint_of_transformers_equal(
    language_family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its texts stand behind image tokens, wherever the configuration names one."""
    if language_family == "itm":
        config = build_config(SIZE, None)
        config.image_token_index = config.qformer_config.vocab_size  # as published: past the embeddings
        model = Blip2ForImageTextRetrieval(config)
        randomize(model, seed=2)
        model.save_pretrained(tmp_path)
        build_text_tokenizer().save_pretrained(tmp_path)
    else:
        save_generation(tmp_path, SIZE, language_family, seed=2)
    image = Path(__file__).parents[2] / "samples" / "star.png"
    status = main(["verify", str(tmp_path), str(image), "--text", "a red circle", "--text", "what is it ?"])
    assert status == 0, capsys.readouterr().out
