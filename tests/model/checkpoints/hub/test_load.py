"""The Hub's format: files of transformers load here, and files of ours load there."""

import json
import re
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Dinov2Config,
    OPTConfig,
)

from model import Blip2, CheckpointError, GenerationParams, TaskUnavailableError
from model.checkpoints import save_hub
from model.matching import Matcher
from model.preprocess import CLIP_MEAN, CLIP_STD
from model.vision import VisionEncoder
from tests.builders import (
    build_components,
    build_matcher,
    build_qformer_config,
    build_retrieval_reference,
    build_text_tokenizer,
    build_vision_config,
    build_vision_model,
    random_pixels,
)


def assert_same_answers(one: Blip2, other: Blip2) -> None:
    pixel_values = random_pixels(2)
    params = GenerationParams(num_beams=3, max_new_tokens=8)
    with torch.inference_mode():
        answers = [
            model.generate(
                model.project_queries(model.encode_queries(model.encode_images(pixel_values))),
                ["", "a photo of"],
                params,
            )
            for model in (one, other)
        ]
    assert answers[0] == answers[1]


def test_a_model_saved_for_the_hub_answers_the_same_when_loaded_from_there(
    blip2: Blip2, hub_directory: Path
) -> None:
    reloaded = Blip2.from_pretrained(str(hub_directory))
    assert_same_answers(blip2, reloaded)
    assert reloaded.language_model is not None
    assert blip2.language_model is not None
    assert reloaded.language_model.image_token_id == blip2.language_model.image_token_id
    assert (reloaded.preprocess.mean, reloaded.preprocess.std) == (
        blip2.preprocess.mean,
        blip2.preprocess.std,
    )


def test_shards_are_read_as_one_model(
    blip2: Blip2, hub_directory: Path, reference: Blip2ForConditionalGeneration, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((hub_directory / name).read_bytes())
    assert_same_answers(blip2, Blip2.from_pretrained(str(tmp_path)))
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="model-00002"):
        Blip2.from_pretrained(str(tmp_path))


def test_the_fingerprint_of_shards_covers_every_shard(
    hub_directory: Path, reference: Blip2ForConditionalGeneration, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((hub_directory / name).read_bytes())
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    before = Blip2.from_pretrained(str(tmp_path)).fingerprint
    last = max(tmp_path.glob("*.safetensors"))
    content = bytearray(last.read_bytes())
    content[-1] ^= 1  # the last byte of the last tensor
    last.write_bytes(content)
    assert Blip2.from_pretrained(str(tmp_path)).fingerprint != before


def test_mean_and_deviation_are_read_from_where_new_releases_put_them(
    hub_directory: Path, tmp_path: Path
) -> None:
    for path in hub_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").unlink()
    before = Blip2.from_pretrained(str(tmp_path))
    image = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": image}))
    after = Blip2.from_pretrained(str(tmp_path))
    assert before.preprocess.mean[0] == 0.48145466
    assert after.preprocess.mean == (0.1, 0.2, 0.3)
    assert after.fingerprint != before.fingerprint


@pytest.fixture
def retrieval_directory(tmp_path: Path) -> Path:
    matcher, vision_model = build_matcher(), build_vision_model()
    build_retrieval_reference(matcher, vision_model).save_pretrained(tmp_path)
    build_text_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@torch.inference_mode()
def test_a_retrieval_model_of_the_hub_compares_but_neither_speaks_nor_generates(
    retrieval_directory: Path,
) -> None:
    matcher: Matcher = build_matcher()
    vision_model: VisionEncoder = build_vision_model()
    reloaded = Blip2.from_pretrained(str(retrieval_directory))
    assert reloaded.matcher is not None
    assert reloaded.language_model is None
    features = reloaded.encode_images(random_pixels(2))
    tokens = matcher.tokenize(["a red circle", "no"])
    torch.testing.assert_close(features, vision_model(random_pixels(2)))
    torch.testing.assert_close(
        reloaded.matcher.match_logits(features, *tokens), matcher.match_logits(features, *tokens)
    )
    torch.testing.assert_close(reloaded.matcher.text_embeds(*tokens), matcher.text_embeds(*tokens))
    assert reloaded.matcher.temperature.item() == pytest.approx(0.07)
    states = reloaded.matcher.encode_image_queries(features)
    with pytest.raises(TaskUnavailableError, match="no text head"):
        reloaded.matcher.generation_logits(*tokens, states.keys_values)


def test_a_tensor_the_hub_format_does_not_know_is_named(hub_directory: Path, tmp_path: Path) -> None:
    for path in hub_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vision_model.embeddings.surprise"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds the tensor 'embeddings.surprise'"):
        Blip2.from_pretrained(str(tmp_path))


def save_config(directory: Path, *, text_config: object, architecture: str) -> None:
    fields = {"hidden_act": "gelu", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = Blip2Config(
        vision_config=build_vision_config().to_dict(),
        qformer_config=Blip2QFormerConfig(**fields).to_dict(),
        text_config=text_config,
        num_query_tokens=build_qformer_config().num_query_tokens,
    )
    config.architectures = [architecture]
    config.save_pretrained(directory)


def test_language_models_of_other_types_are_refused_honestly(hub_directory: Path, tmp_path: Path) -> None:
    save_config(tmp_path, text_config=Dinov2Config().to_dict(), architecture="Blip2ForConditionalGeneration")
    (tmp_path / "model.safetensors").write_bytes((hub_directory / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"type 'dinov2'; those that transformers has a causal"):
        Blip2.from_pretrained(str(tmp_path))


def test_the_question_template_is_the_one_its_language_model_answers_best_to(hub_directory: Path) -> None:
    assert Blip2.from_pretrained(str(hub_directory)).prompts.question == "Question: {} Answer:"


def test_an_opt_with_a_head_of_its_own_keeps_it_on_the_way_to_the_hub_and_back(tmp_path: Path) -> None:
    components = build_components()
    assert components.language_model is not None
    head = torch.randn_like(components.language_model.llm.lm_head.weight)
    components.language_model.llm.lm_head.weight = torch.nn.Parameter(head)
    save_hub(tmp_path, components)
    reloaded = Blip2.from_pretrained(str(tmp_path)).language_model
    assert reloaded is not None
    assert torch.equal(reloaded.llm.lm_head.weight, head)


def test_an_architecture_of_transformers_that_is_not_served_is_named(
    hub_directory: Path, tmp_path: Path
) -> None:
    save_config(tmp_path, text_config=OPTConfig().to_dict(), architecture="Blip2Model")
    (tmp_path / "model.safetensors").write_bytes((hub_directory / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"Blip2Model.*Blip2ForConditionalGeneration"):
        Blip2.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        ({"resample": 2}, "'resample' to 2; BLIP-2's images are made with 3"),
        ({"do_center_crop": True}, "'do_center_crop' to True"),
        ({"image_std": [0.5, 0.0, 0.5]}, "each must be above 0"),
        ({"rescale_factor": 1.0}, "'rescale_factor' to 1.0; it must be 1/255"),
        ({"image_mean": [0.5]}, "image_mean [0.5]"),
    ],
)
def test_a_processor_that_makes_other_pixels_is_refused(
    hub_directory: Path, tmp_path: Path, edit: dict[str, object], complaint: str
) -> None:
    copytree(hub_directory, tmp_path / "hub")
    path = tmp_path / "hub" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(CheckpointError, match=re.escape(complaint)):
        Blip2.from_pretrained(str(tmp_path / "hub"))


def test_what_a_processor_leaves_unset_is_no_difference(hub_directory: Path, tmp_path: Path) -> None:
    copytree(hub_directory, tmp_path / "hub")
    path = tmp_path / "hub" / "preprocessor_config.json"
    unset = {"do_center_crop": None, "crop_size": None, "rescale_factor": None, "image_std": [1, 1, 1]}
    path.write_text(json.dumps(json.loads(path.read_text()) | unset))
    assert Blip2.from_pretrained(str(tmp_path / "hub")).preprocess.std == (1.0, 1.0, 1.0)


def test_the_end_token_is_that_of_the_configuration_inside_as_in_transformers(
    hub_directory: Path, tmp_path: Path
) -> None:
    copytree(hub_directory, tmp_path / "hub")
    (tmp_path / "hub" / "generation_config.json").write_text('{"eos_token_id": 9}')
    language_model = Blip2.from_pretrained(str(tmp_path / "hub")).require_language_model()
    reference = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hub")
    assert language_model.eos_token_ids == (reference.language_model.generation_config.eos_token_id,) == (3,)


def test_a_missing_processor_is_made_up_and_said_so(
    hub_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copytree(hub_directory, tmp_path / "hub")
    (tmp_path / "hub" / "preprocessor_config.json").unlink()
    blip2 = Blip2.from_pretrained(str(tmp_path / "hub"))
    assert (blip2.preprocess.mean, blip2.preprocess.std) == (CLIP_MEAN, CLIP_STD)
    assert "has no preprocessor_config.json" in caplog.text
