"""LAVIS' .pth files: their keys and shapes as published, not as in our own map."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    CLIPVisionModel,
)

from model import Blip2
from model.errors import CheckpointError
from tests.builders import (
    build_language_tokenizer,
    build_opt,
    build_text_tokenizer,
    build_vision_config,
    build_vit,
    random_pixels,
)
from tests.model.checkpoints.lavis.lavis_files import KEYS, Folder, build_tensors, of_stage1, of_stage2


def for_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same weights under the Hub's names, by the list in lavis_keys.txt."""
    named: dict[str, Tensor] = {}
    for name, _, hub in KEYS:
        if name not in tensors or hub == "-":
            continue
        if hub.endswith("]"):  # a part of a joint bias, whose rest is zero
            joint, _, part = hub.removesuffix("]").partition("[")
            first, end = (int(bound) for bound in part.split(":"))
            named.setdefault(joint, torch.zeros(144))[first:end] = tensors[name]
        else:
            named[hub] = tensors[name]
    return named


def hub_config(*, is_retrieval: bool = False) -> Blip2Config:
    qformer = {
        **{"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        **{"encoder_hidden_size": 48, "vocab_size": len(build_text_tokenizer())},
        **{"max_position_embeddings": 40, "use_qformer_text_input": is_retrieval},
    }
    return Blip2Config(
        vision_config=build_vision_config().to_dict(),
        qformer_config=qformer,
        text_config=build_opt().config.to_dict(),
        num_query_tokens=8,
        image_text_hidden_size=16,
        image_token_index=None if is_retrieval else 4,
    )


@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"model": tensors, "epoch": 3}])
@torch.inference_mode()
def test_a_stage_2_file_answers_as_the_same_weights_in_the_hub_format(
    folder: Folder, wrap: Callable[[dict[str, Tensor]], object]
) -> None:
    tensors = of_stage2(build_tensors())
    blip2 = Blip2.from_pretrained(folder.save(wrap(tensors)))
    reference = Blip2ForConditionalGeneration(hub_config()).eval()
    missing, unexpected = reference.load_state_dict(for_hub(tensors), strict=False)
    assert not unexpected
    assert all(name.startswith("language_model.") for name in missing)
    pixels = random_pixels(3)
    expected = reference.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    query_output = blip2.encode_queries(blip2.encode_images(pixels))
    torch.testing.assert_close(blip2.project_queries(query_output), expected, rtol=1e-5, atol=1e-5)
    assert blip2.language_model is not None
    assert torch.equal(blip2.language_model.llm.lm_head.weight, build_opt().lm_head.weight)


@torch.inference_mode()
def test_a_stage_1_file_scores_as_the_same_weights_in_the_hub_format(folder: Folder) -> None:
    tensors = of_stage1(build_tensors())
    matcher = Blip2.from_pretrained(path := folder.save_stage1(tensors)).matcher
    assert matcher is not None
    reference = Blip2ForImageTextRetrieval(hub_config(is_retrieval=True)).eval()
    reference.load_state_dict(for_hub(tensors))
    pixels = random_pixels(3)
    input_ids, attention_mask = matcher.tokenize(["a red circle", "what is left of the star", "two"])
    options = {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": attention_mask}
    itm = reference(**options, use_image_text_matching_head=True).logits_per_image
    itc = reference(**options, use_image_text_matching_head=False).logits_per_image
    features = Blip2.from_pretrained(path).encode_images(pixels)
    torch.testing.assert_close(
        matcher.match_logits(features, input_ids, attention_mask), itm, rtol=1e-5, atol=1e-5
    )
    image_embeds = matcher.image_embeds(matcher.encode_image_queries(features).query_output)
    scores = matcher.itc_scores(image_embeds, matcher.text_embeds(input_ids, attention_mask))
    torch.testing.assert_close(scores, itc, rtol=1e-5, atol=1e-5)


def test_what_the_hub_format_drops_is_kept(folder: Folder) -> None:
    tensors = of_stage1(build_tensors())
    matcher = Blip2.from_pretrained(folder.save_stage1(tensors)).matcher
    assert matcher is not None
    assert matcher.text_head is not None
    assert matcher.temperature.item() == pytest.approx(0.05)
    head = matcher.text_head
    assert torch.equal(head.transform.dense.weight, tensors["Qformer.cls.predictions.transform.dense.weight"])
    assert torch.equal(head.bias, tensors["Qformer.cls.predictions.bias"])
    assert head.decoder.weight is matcher.embeddings.word_embeddings.weight


@torch.inference_mode()
def test_a_partial_file_takes_its_frozen_models_from_the_directories_it_names(folder: Folder) -> None:
    partial = {k: v for k, v in of_stage2(build_tensors()).items() if not k.startswith("visual_encoder.")}
    blip2 = Blip2.from_pretrained(folder.save(partial, vision_model="encoder"))
    expected = build_vit("blip_2_vision_model")(pixel_values=random_pixels(2), output_hidden_states=True)
    torch.testing.assert_close(blip2.encode_images(random_pixels(2)), expected.hidden_states[-1])


@torch.inference_mode()
def test_a_partial_file_takes_its_frozen_models_from_a_base_checkpoint(folder: Folder) -> None:
    base = Blip2ForConditionalGeneration(hub_config()).eval()
    base.save_pretrained(folder.path / "base")
    build_language_tokenizer().save_pretrained(folder.path / "base")
    partial = {k: v for k, v in of_stage2(build_tensors()).items() if not k.startswith("visual_encoder.")}
    blip2 = Blip2.from_pretrained(folder.save(partial, vision_model="base", language_model="base"))
    hidden_states = base.vision_model(pixel_values=random_pixels(2), output_hidden_states=True).hidden_states
    torch.testing.assert_close(blip2.encode_images(random_pixels(2)), hidden_states[-1])
    assert blip2.language_model is not None
    assert torch.equal(
        blip2.language_model.llm.model.decoder.layers[0].fc1.weight,
        base.language_model.model.decoder.layers[0].fc1.weight,
    )


def test_a_whole_file_brings_its_language_model_too(folder: Folder) -> None:
    other = {f"opt_model.{name}": value for name, value in build_opt(seed=7).state_dict().items()}
    blip2 = Blip2.from_pretrained(folder.save(of_stage2(build_tensors()) | other))
    assert blip2.language_model is not None
    fc1 = blip2.language_model.llm.model.decoder.layers[0].fc1.weight
    assert torch.equal(fc1, build_opt(seed=7).model.decoder.layers[0].fc1.weight)


@torch.inference_mode()
def test_clip_vit_l_is_the_second_last_layer_of_transformers(folder: Folder) -> None:
    vit = build_vit("clip_vision_model")
    assert isinstance(vit, CLIPVisionModel)
    clip = {
        "visual_encoder.class_embedding": vit.embeddings.class_embedding,
        "visual_encoder.positional_embedding": vit.embeddings.position_embedding.weight,
        "visual_encoder.conv1.weight": vit.embeddings.patch_embedding.weight,
        "visual_encoder.ln_pre.weight": vit.pre_layrnorm.weight,
        "visual_encoder.ln_pre.bias": vit.pre_layrnorm.bias,
    }
    for index, layer in enumerate(vit.encoder.layers[:-1]):  # LAVIS drops the last of them
        block = f"visual_encoder.transformer.resblocks.{index}"
        attention = layer.self_attn
        for kind in ("weight", "bias"):
            projections = [getattr(attention, f"{each}_proj") for each in "qkv"]
            clip[f"{block}.attn.in_proj_{kind}"] = torch.cat([getattr(each, kind) for each in projections])
            clip[f"{block}.attn.out_proj.{kind}"] = getattr(attention.out_proj, kind)
            clip[f"{block}.ln_1.{kind}"] = getattr(layer.layer_norm1, kind)
            clip[f"{block}.ln_2.{kind}"] = getattr(layer.layer_norm2, kind)
            clip[f"{block}.mlp.c_fc.{kind}"] = getattr(layer.mlp.fc1, kind)
            clip[f"{block}.mlp.c_proj.{kind}"] = getattr(layer.mlp.fc2, kind)
    config = vit.config.to_dict() | {"num_hidden_layers": 2}
    (folder.path / "vit" / "config.json").write_text(json.dumps(config))
    rest = {k: v for k, v in of_stage2(build_tensors()).items() if not k.startswith("visual_encoder.")}
    blip2 = Blip2.from_pretrained(folder.save(rest | clip))
    expected = vit(pixel_values=random_pixels(2), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(blip2.encode_images(random_pixels(2)), expected, rtol=0, atol=0)


@torch.inference_mode()
def test_positions_are_resized_from_the_size_the_file_was_trained_at(folder: Folder) -> None:
    tensors = of_stage2(build_tensors())
    blip2 = Blip2.from_pretrained(folder.save(tensors, image_size=48))
    assert blip2.image_size == blip2.preprocess.image_size == 48
    reference = Blip2Model(hub_config()).eval()
    reference.load_state_dict(for_hub(tensors), strict=False)
    pixels = torch.randn(2, 3, 48, 48)
    hidden_states = reference.vision_model(
        pixel_values=pixels, output_hidden_states=True, interpolate_pos_encoding=True
    ).hidden_states
    torch.testing.assert_close(blip2.encode_images(pixels), hidden_states[-1])


def test_a_key_bias_of_zero_is_nothing_and_any_other_is_refused(folder: Folder) -> None:
    tensors = of_stage2(build_tensors())
    name = "visual_encoder.blocks.1.attn.k_bias"
    Blip2.from_pretrained(folder.save(tensors | {name: torch.zeros(48)}))
    path = folder.save(tensors | {name: torch.full((48,), 1e-3)})
    with pytest.raises(
        CheckpointError, match=r"the key bias in 'visual_encoder\.blocks\.1\.attn\.k_bias' is not"
    ):
        Blip2.from_pretrained(path)
