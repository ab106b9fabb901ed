"""Adapters: what was saved is what is loaded, and whatever is wrong is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import Blip2, CheckpointError
from model.checkpoints import save_generation_adapter, save_retrieval_adapter
from tests.builders import build_matcher, build_parts, random_pixels

ADAPTER = "adapter.safetensors"


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


def refusal(directory: Path) -> str:
    """Gives the message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        Blip2.from_pretrained(str(directory))
    return str(caught.value)


def test_loaded_weights_are_the_saved_ones(checkpoint: Path) -> None:
    parts = build_parts()
    blip2 = Blip2.from_pretrained(str(checkpoint))
    expected = Blip2(parts).state_dict()
    for name, value in expected.items():
        assert torch.equal(blip2.state_dict()[name], value), name
    assert blip2.prompts == parts.prompts
    assert blip2.matcher is not None
    for name, value in build_matcher().state_dict().items():
        assert torch.equal(blip2.matcher.state_dict()[name], value), name


def test_the_tied_matrix_is_stored_once_and_tied_again(checkpoint: Path) -> None:
    names = load_file(checkpoint.parent / "stage1" / ADAPTER).keys()
    assert "embeddings.word_embeddings.weight" in names
    assert "text_head.decoder.weight" not in names
    matcher = Blip2.from_pretrained(str(checkpoint)).matcher
    assert matcher is not None
    assert matcher.text_head is not None
    assert matcher.text_head.decoder.weight is matcher.embeddings.word_embeddings.weight


def test_weights_saved_in_half_precision_are_loaded_in_float32(checkpoint: Path) -> None:
    root = checkpoint.parent
    parts = build_parts()
    save_generation_adapter(
        checkpoint,
        parts,
        vision_directory=root / "vision_model",
        language_directory=root / "language_model",
        dtype=torch.bfloat16,
    )
    assert {value.dtype for value in load_file(checkpoint / ADAPTER).values()} == {torch.bfloat16}
    blip2 = Blip2.from_pretrained(str(checkpoint))
    assert blip2.query_tokens.dtype == torch.float32
    assert torch.equal(blip2.query_tokens, parts.query_tokens.bfloat16().float())
    assert blip2.matcher is None


def test_a_tree_of_checkpoints_can_be_moved_as_a_whole(checkpoint: Path, tmp_path: Path) -> None:
    before = Blip2.from_pretrained(str(checkpoint)).fingerprint
    moved = checkpoint.parent.rename(tmp_path / "moved") / "stage2"
    assert Blip2.from_pretrained(str(moved)).fingerprint == before


def test_saving_leaves_no_temporary_files_and_replaces_what_was_there(checkpoint: Path) -> None:
    before = sorted(path.name for path in checkpoint.iterdir())
    root = checkpoint.parent
    save_generation_adapter(
        checkpoint,
        build_parts(seed=1),
        vision_directory=root / "vision_model",
        language_directory=root / "language_model",
    )
    assert sorted(path.name for path in checkpoint.iterdir()) == before
    query_tokens = load_file(checkpoint / ADAPTER)["query_tokens"]
    assert torch.equal(query_tokens, build_parts(seed=1).query_tokens)


@torch.inference_mode()
def test_an_opt_with_a_head_of_its_own_keeps_it(checkpoint: Path) -> None:
    root = checkpoint.parent
    weights = root / "language_model" / "model.safetensors"
    head = torch.randn(load_file(weights)["model.decoder.embed_tokens.weight"].shape)
    edit_tensors(weights, lambda tensors: tensors.update({"lm_head.weight": head}))
    save_generation_adapter(
        checkpoint,
        build_parts(),
        vision_directory=root / "vision_model",
        language_directory=root / "language_model",
    )
    language_model = Blip2.from_pretrained(str(checkpoint)).language_model
    assert language_model is not None
    assert torch.equal(language_model.llm.lm_head.weight, head)
    assert not torch.equal(language_model.llm.get_input_embeddings().weight, head)


def test_fingerprint_tells_weights_configuration_and_dtype_apart(checkpoint: Path) -> None:
    same = [Blip2.from_pretrained(str(checkpoint)).fingerprint for _ in range(2)]
    other_dtype = Blip2.from_pretrained(str(checkpoint), dtype=torch.bfloat16).fingerprint
    edit_config(checkpoint, lambda fields: fields["prompts"].update(caption="a photo of"))
    other_config = Blip2.from_pretrained(str(checkpoint)).fingerprint
    edit_tensors(checkpoint / ADAPTER, lambda tensors: tensors["query_tokens"].add_(1))
    other_weights = Blip2.from_pretrained(str(checkpoint)).fingerprint
    stage1 = checkpoint.parent / "stage1" / ADAPTER
    edit_tensors(stage1, lambda tensors: tensors["query_tokens"].add_(1))
    other_matcher = Blip2.from_pretrained(str(checkpoint)).fingerprint
    assert same[0] == same[1]
    assert len({same[0], other_dtype, other_config, other_weights, other_matcher}) == 5
    assert all(len(value) == 64 for value in same)


def test_a_path_that_is_absent_is_refused_with_the_names_that_are_accepted(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "nowhere" in message
    assert "'tiny'" in message
    assert "directory" in message


def test_a_hub_id_is_refused_and_a_directory_asked_for() -> None:
    with pytest.raises(CheckpointError, match=r"'Salesforce/blip2-opt-2\.7b'.*give a directory"):
        Blip2.from_pretrained("Salesforce/blip2-opt-2.7b")


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "describes no BLIP-2 checkpoint" in refusal(tmp_path)


def test_a_config_that_is_not_json_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(checkpoint)


@pytest.mark.parametrize("part", ["stage2", "stage1"])
def test_a_missing_tensor_is_named_with_its_file(checkpoint: Path, part: str) -> None:
    path = checkpoint.parent / part / ADAPTER
    edit_tensors(path, lambda tensors: tensors.pop("qformer.layernorm.weight"))
    message = refusal(checkpoint)
    assert f"{part}/{ADAPTER} lacks the tensor 'qformer.layernorm.weight' (1 are missing" in message
    assert "save the checkpoint again" in message


def test_a_tensor_too_many_is_named_with_its_file(checkpoint: Path) -> None:
    edit_tensors(checkpoint / ADAPTER, lambda tensors: tensors.update({"qformer.extra": torch.zeros(2)}))
    message = refusal(checkpoint)
    assert f"{ADAPTER} holds the tensor 'qformer.extra'" in message
    assert "config.json" in message


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    wrong = torch.zeros(1, 7, 32)
    edit_tensors(checkpoint / ADAPTER, lambda tensors: tensors.update({"query_tokens": wrong}))
    message = refusal(checkpoint)
    assert f"{ADAPTER}: the tensor 'query_tokens' has shape [1, 7, 32]" in message
    assert "the configuration says [1, 8, 32]" in message


@pytest.mark.parametrize("file", [f"stage2/{ADAPTER}", f"stage1/{ADAPTER}", "vision_model/model.safetensors"])
@pytest.mark.parametrize("num_bytes", [0, 5, 1000])
def test_a_truncated_file_is_named(checkpoint: Path, file: str, num_bytes: int) -> None:
    path = checkpoint.parent / file
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert f"{file} (" in refusal(checkpoint)


@pytest.mark.parametrize("part", ["vision_model", "language_model"])
def test_another_frozen_part_than_the_adapter_was_trained_on_is_refused(checkpoint: Path, part: str) -> None:
    weights = checkpoint.parent / part / "model.safetensors"
    edit_tensors(weights, lambda tensors: next(iter(tensors.values())).add_(1))
    message = refusal(checkpoint)
    assert f"{part} have sha256" in message
    assert "put the frozen part back" in message


def test_an_absent_frozen_part_is_named(checkpoint: Path) -> None:
    (checkpoint.parent / "language_model" / "model.safetensors").unlink()
    assert "language_model/model.safetensors" in refusal(checkpoint)


def test_a_frozen_part_of_another_kind_is_refused(checkpoint: Path) -> None:
    edit_config(checkpoint.parent / "vision_model", lambda fields: fields.update(model_type="clip"))
    assert "is of model type 'clip', 'blip_2_vision_model' is needed" in refusal(checkpoint)


def test_a_retrieval_model_on_another_encoder_is_refused(checkpoint: Path) -> None:
    edit_config(checkpoint.parent / "stage1", lambda fields: fields["vision_model"].update(sha256="0" * 64))
    assert "was trained on another vision model" in refusal(checkpoint)


def test_a_generation_adapter_is_no_retrieval_model(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda fields: fields.update(retrieval_model="."))
    assert "is no retrieval adapter" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda fields: fields.update(version=2), "is of version 2, this release reads 1"),
        (lambda fields: fields.update(kind="chat"), "kind is 'chat'"),
        (lambda fields: fields.pop("language_model"), "must name its 'language_model'"),
        (lambda fields: fields.pop("qformer"), "'qformer'"),
        (lambda fields: fields.update(visoin={}), "unknown key 'visoin'"),
        (lambda fields: fields["qformer"].update(heads=3), "unknown key 'heads'"),
        (lambda fields: fields["qformer"].pop("hidden_size"), "'hidden_size'"),
        (lambda fields: fields["qformer"].update(num_attention_heads=5), "num_attention_heads 5"),
        (lambda fields: fields["qformer"].update(encoder_hidden_size=40), "its vision model gives width 48"),
        (lambda fields: fields["image"].update(size=64), "its vision model gives width 48 from 32 px"),
        (lambda fields: fields["prompts"].update(question="no place"), "holds 0 places"),
        (lambda fields: fields.update(image=3), "'image' must be a JSON object"),
    ],
)
def test_a_wrong_entry_in_the_config_is_named(
    checkpoint: Path, edit: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    edit_config(checkpoint, edit)
    message = refusal(checkpoint)
    assert complaint in message
    assert "stage2" in message


def test_a_missing_tokenizer_is_named(checkpoint: Path) -> None:
    (checkpoint.parent / "stage1" / "tokenizer.json").unlink()
    assert "holds no tokenizer that can be read" in refusal(checkpoint)


@torch.inference_mode()
def test_a_saved_matcher_scores_as_the_one_it_was_saved_from(checkpoint: Path) -> None:
    matcher = build_matcher(seed=5)
    root = checkpoint.parent
    save_retrieval_adapter(
        root / "other", matcher, build_parts().preprocess, vision_directory=root / "vision_model"
    )
    loaded = Blip2.from_pretrained(str(root / "other"))
    features = loaded.encode_images(random_pixels(2))
    tokens = matcher.tokenize(["a red circle", "there is no star"])
    assert loaded.matcher is not None
    torch.testing.assert_close(
        loaded.matcher.match_logits(features, *tokens), matcher.match_logits(features, *tokens)
    )
    assert loaded.matcher.max_text_tokens == matcher.max_text_tokens
