"""LAVIS' .pth files: their keys and shapes as they are published, not as our own map has them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    IMAGE_SIZE,
    build_language_tokenizer,
    build_opt,
    build_text_tokenizer,
    build_vision_config,
    build_vit,
    random_pixels,
)
from tests.builders_t5 import build_t5, build_t5_tokenizer

KEYS = [line.split() for line in (Path(__file__).parent / "lavis_keys.txt").read_text().splitlines()]
NOT_IN_STAGE_2 = (
    *("Qformer.cls.", "Qformer.bert.embeddings.w", "Qformer.bert.embeddings.p"),
    *("vision_proj", "text_proj", "itm_head", "temp"),
)


def build_tensors(*, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor that LAVIS knows of a small BLIP-2, stage 1 and stage 2 together."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape, _ in KEYS:
        sizes = [] if shape == "scalar" else [int(size) for size in shape.split("x")]
        tensors[name] = torch.randn(sizes, generator=generator) * 0.2
        if "norm" in name.lower() and name.endswith("weight"):
            tensors[name] += 1
    tensors["Qformer.cls.predictions.decoder.weight"] = tensors[
        "Qformer.bert.embeddings.word_embeddings.weight"
    ]
    tensors["Qformer.cls.predictions.decoder.bias"] = tensors["Qformer.cls.predictions.bias"]
    tensors["temp"] = torch.tensor(0.05)
    return tensors


def of_stage1(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("opt_proj")}


def of_stage2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(NOT_IN_STAGE_2)}
    text_ffn = (".intermediate.dense", ".output.dense", ".output.LayerNorm")
    for name in list(kept):
        inside = name.removeprefix("Qformer.bert.encoder.layer.")[1:]
        if name.startswith("Qformer.bert.encoder") and inside.startswith(text_ffn):
            del kept[name]
    return kept


def for_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the Hub's names, as the list beside this file has them."""
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


class Folder:
    """A folder with a .pth file, its .json, and the frozen parts that they may name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        build_opt().save_pretrained(path / "opt")
        build_language_tokenizer().save_pretrained(path / "opt")
        build_text_tokenizer().save_pretrained(path / "bert")
        build_vit("blip_2_vision_model").save_pretrained(path / "encoder")
        config = build_vision_config().to_dict()  # whose weights the .pth holds
        (path / "vit").mkdir()
        (path / "vit" / "config.json").write_text(json.dumps(config))

    def save(self, tensors: object, **fields: Any) -> str:
        torch.save(tensors, self.path / "blip2.pth")
        stage2 = {"arch": "blip2_opt", "language_model": "opt"}
        description = {"image_size": IMAGE_SIZE, "vision_model": "vit", **stage2, **fields}
        (self.path / "blip2.json").write_text(json.dumps(description))
        return str(self.path / "blip2.pth")

    def save_stage1(self, tensors: object, **fields: Any) -> str:
        return self.save(tensors, arch="blip2", language_model=None, tokenizer="bert", **fields)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


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
def test_a_partial_file_takes_its_frozen_parts_from_the_directories_it_names(folder: Folder) -> None:
    partial = {k: v for k, v in of_stage2(build_tensors()).items() if not k.startswith("visual_encoder.")}
    blip2 = Blip2.from_pretrained(folder.save(partial, vision_model="encoder"))
    expected = build_vit("blip_2_vision_model")(pixel_values=random_pixels(2), output_hidden_states=True)
    torch.testing.assert_close(blip2.encode_images(random_pixels(2)), expected.hidden_states[-1])


@torch.inference_mode()
def test_a_partial_file_takes_its_frozen_parts_from_a_base_checkpoint(folder: Folder) -> None:
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
    tower = build_vit("clip_vision_model")
    assert isinstance(tower, CLIPVisionModel)
    clip = {
        "visual_encoder.class_embedding": tower.embeddings.class_embedding,
        "visual_encoder.positional_embedding": tower.embeddings.position_embedding.weight,
        "visual_encoder.conv1.weight": tower.embeddings.patch_embedding.weight,
        "visual_encoder.ln_pre.weight": tower.pre_layrnorm.weight,
        "visual_encoder.ln_pre.bias": tower.pre_layrnorm.bias,
    }
    for index, layer in enumerate(tower.encoder.layers[:-1]):  # LAVIS drops the last of them
        block = f"visual_encoder.transformer.resblocks.{index}"
        attention = layer.self_attn
        for kind in ("weight", "bias"):
            parts = [getattr(attention, f"{part}_proj") for part in "qkv"]
            clip[f"{block}.attn.in_proj_{kind}"] = torch.cat([getattr(part, kind) for part in parts])
            clip[f"{block}.attn.out_proj.{kind}"] = getattr(attention.out_proj, kind)
            clip[f"{block}.ln_1.{kind}"] = getattr(layer.layer_norm1, kind)
            clip[f"{block}.ln_2.{kind}"] = getattr(layer.layer_norm2, kind)
            clip[f"{block}.mlp.c_fc.{kind}"] = getattr(layer.mlp.fc1, kind)
            clip[f"{block}.mlp.c_proj.{kind}"] = getattr(layer.mlp.fc2, kind)
    config = tower.config.to_dict() | {"num_hidden_layers": 2}
    (folder.path / "vit" / "config.json").write_text(json.dumps(config))
    rest = {k: v for k, v in of_stage2(build_tensors()).items() if not k.startswith("visual_encoder.")}
    blip2 = Blip2.from_pretrained(folder.save(rest | clip))
    expected = tower(pixel_values=random_pixels(2), output_hidden_states=True).hidden_states[-2]
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


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (print, ("this must not run",))


def refusal(path: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Blip2.from_pretrained(path)
    return str(caught.value)


def test_a_pickle_that_runs_code_is_refused(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(folder.save({"model": of_stage2(build_tensors()), "config": Bomb()}))
    assert "would run code" in message
    assert "this must not run" not in capsys.readouterr().out


def test_a_truncated_file_is_refused(folder: Folder) -> None:
    path = Path(folder.save(of_stage2(build_tensors())))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"cannot read {path}" in refusal(str(path))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"arch": "blip2_vicuna"},
            "'arch': Input should be 'blip2', 'blip2_opt' or 'blip2_t5'; it is 'blip2_vicuna'",
        ),
        ({"arch": "blip2"}, "needs a 'tokenizer'"),
        ({"language_model": None}, "needs a 'language_model'"),
        ({"lanugage_model": "opt"}, "unknown key 'lanugage_model'"),
        ({"vision_model": "nowhere"}, "cannot read"),
        ({"image_size": 50}, "image size 50 is no multiple of the patch size 8"),
        ({"arch": "blip2_t5"}, "arch is 'blip2_t5', the tensors of"),
        ({"num_attention_heads": 3}, "is not a multiple of num_attention_heads 3"),
    ],
)
def test_a_wrong_entry_in_the_json_is_named(folder: Folder, fields: dict[str, Any], complaint: str) -> None:
    assert complaint in refusal(folder.save(of_stage2(build_tensors()), **fields))


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda t: t.pop("query_tokens"), "holds no Q-Former"),
        (lambda t: t.pop("opt_proj.bias"), "lacks the tensor 'language_projection.bias'"),
        (
            lambda t: t.pop("visual_encoder.blocks.0.attn.v_bias"),
            "but no visual_encoder.blocks.0.attn.v_bias",
        ),
        (
            lambda t: t.update({"momentum.queue": torch.zeros(2)}),
            "the tensor 'momentum.queue', which no BLIP-2",
        ),
        (lambda t: t.update({"ln_vision.bias": torch.zeros(3)}), "'ln_vision.bias' has shape [3]"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("visual_")], "cannot read"),
        (lambda t: t.update(model=3), "holds no state dict"),
        (lambda t: t.pop("visual_encoder.pos_embed"), "has no position embeddings"),
    ],
)
def test_wrong_tensors_are_named(
    folder: Folder, edit: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    tensors: dict[str, Any] = of_stage2(build_tensors())
    edit(tensors)
    assert complaint in refusal(folder.save(tensors))


def test_a_text_head_that_is_not_tied_is_refused(folder: Folder) -> None:
    tensors = of_stage1(build_tensors())
    tensors["Qformer.cls.predictions.decoder.weight"] = torch.zeros_like(
        tensors["Qformer.cls.predictions.decoder.weight"]
    )
    assert "differs from the word embeddings" in refusal(folder.save_stage1(tensors))


def test_a_language_model_of_another_family_is_refused(folder: Folder) -> None:
    build_t5("untied").save_pretrained(folder.path / "t5")
    build_t5_tokenizer().save_pretrained(folder.path / "t5")
    message = refusal(folder.save(of_stage2(build_tensors()), language_model="t5"))
    assert "arch is 'blip2_opt', and 'language_model' is of type 't5'" in message


def test_a_file_of_torchs_first_format_is_read(folder: Folder) -> None:
    path = folder.save(of_stage2(build_tensors()))
    torch.save(of_stage2(build_tensors()), path, _use_new_zipfile_serialization=False)
    assert Blip2.from_pretrained(path).language_model is not None


def test_a_file_without_its_json_says_what_is_needed(folder: Folder) -> None:
    path = folder.save(of_stage2(build_tensors()))
    (folder.path / "blip2.json").unlink()
    assert "blip2.json" in refusal(path)


def test_an_encoder_named_by_kind_must_be_in_the_file(folder: Folder) -> None:
    partial = {k: v for k, v in of_stage2(build_tensors()).items() if not k.startswith("visual_encoder.")}
    assert "holds no image encoder (visual_encoder.*)" in refusal(
        folder.save(partial, vision_model="eva_clip_g")
    )
