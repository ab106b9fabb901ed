"""Damaged adapters: errors name what is wrong, its file and the cure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import Blip2, CheckpointError
from model.checkpoints import EMBEDDED
from tests.model.checkpoints.damage import ADAPTER, edit_config, edit_tensors


def refusal(directory: Path) -> str:
    """Return the message of the error that loading a checkpoint raises."""
    with pytest.raises(CheckpointError) as caught:
        Blip2.from_pretrained(str(directory))
    return str(caught.value)


def test_a_path_that_is_absent_is_refused_with_the_names_that_are_accepted(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "nowhere" in message
    assert "'tiny'" in message
    assert "directory" in message


def test_of_the_embedded_models_those_that_are_there_are_offered(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    offered = [name for name in EMBEDDED if f"'{name}'" in message]
    assert offered == [name for name, directory in EMBEDDED.items() if directory.is_dir()]


def test_the_embedded_models_lie_beside_each_other() -> None:
    tiny = EMBEDDED["tiny"].parent
    assert EMBEDDED["tiny"] == tiny / "stage2"
    assert EMBEDDED["tiny-t5"] == tiny / "stage2_t5"


def test_a_name_of_nothing_is_told_what_may_be_given() -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint 'tinny'; give one of \['tiny', 'tiny-t5'\]"):
        Blip2.from_pretrained("tinny")


def test_a_revision_of_what_is_not_on_the_hub_is_refused() -> None:
    with pytest.raises(CheckpointError, match="revision 'main' is given for 'tiny', which is not on the Hub"):
        Blip2.from_pretrained("tiny", revision="main")


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "describes no BLIP-2 checkpoint" in refusal(tmp_path)


def test_a_config_that_is_not_json_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(checkpoint)


@pytest.mark.parametrize("directory", ["stage2", "stage1"])
def test_a_missing_tensor_is_named_with_its_file(checkpoint: Path, directory: str) -> None:
    path = checkpoint.parent / directory / ADAPTER
    edit_tensors(path, lambda tensors: tensors.pop("qformer.layernorm.weight"))
    message = refusal(checkpoint)
    assert f"{directory}/{ADAPTER} lacks the tensor 'qformer.layernorm.weight' (1 are missing" in message
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


@pytest.mark.parametrize("directory", ["vision_model", "language_model"])
def test_another_frozen_model_than_the_adapter_was_trained_on_is_refused(
    checkpoint: Path, directory: str
) -> None:
    weights = checkpoint.parent / directory / "model.safetensors"
    edit_tensors(weights, lambda tensors: next(iter(tensors.values())).add_(1))
    message = refusal(checkpoint)
    assert f"{directory} have sha256" in message
    assert "put the frozen part back" in message


def test_an_absent_frozen_model_is_named(checkpoint: Path) -> None:
    (checkpoint.parent / "language_model" / "model.safetensors").unlink()
    assert "language_model/model.safetensors" in refusal(checkpoint)


def test_a_frozen_model_of_another_kind_is_refused(checkpoint: Path) -> None:
    edit_config(checkpoint.parent / "vision_model", lambda fields: fields.update(model_type="bert"))
    assert "is of model type 'bert'; image encoders of ['blip-2', " in refusal(checkpoint)


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
        (
            lambda fields: fields.update(kind="chat"),
            "'kind': Input should be 'generation' or 'retrieval'; it is 'chat'",
        ),
        (
            lambda fields: fields["image"].update(size="32"),
            "'image': 'size': Input should be a valid integer; it is '32'",
        ),
        (lambda fields: fields.pop("language_model"), "must name its 'language_model'"),
        (lambda fields: fields.pop("qformer"), "'qformer'"),
        (lambda fields: fields.update(visoin={}), "unknown key 'visoin'"),
        (lambda fields: fields["qformer"].update(heads=3), "unknown key 'heads'"),
        (lambda fields: fields["qformer"].pop("hidden_size"), "'hidden_size'"),
        (lambda fields: fields["qformer"].update(num_attention_heads=5), "num_attention_heads 5"),
        (lambda fields: fields["qformer"].update(encoder_hidden_size=40), "its vision model gives 48"),
        (lambda fields: fields["image"].update(size=10**9), "image size 1000000000 is out of range"),
        (lambda fields: fields["image"].update(size=-8), "'image': size is -8; it must be at least 1"),
        (lambda fields: fields["image"].update(mean=[0.5, 0.5]), "both must be three finite numbers"),
        (lambda fields: fields["image"].update(std=[0.5, 0.5, 0.0]), "both must be three finite numbers"),
        (
            lambda fields: fields["image"].update(std=[0.5, 0.5, float("inf")]),
            "both must be three finite numbers",
        ),
        (lambda fields: fields.update(max_text_tokens=2), "max_text_tokens is 2, the least is 3"),
        (
            lambda fields: fields["qformer"].update(num_hidden_layers=10**9),
            "num_hidden_layers is 1000000000; the limit is 512",
        ),
        (
            lambda fields: fields["qformer"].update(num_hidden_layers=0),
            "num_hidden_layers is 0; it must be at least",
        ),
        (lambda fields: fields["qformer"].update(hidden_size=4 * 10**17), "no model can be built"),
        (lambda fields: fields["qformer"].update(intermediate_size=10**30), "no model can be built"),
        (
            lambda fields: fields["qformer"].update(num_query_tokens=10**12),
            "the configuration says [1, 1000000000000",
        ),
        (
            lambda fields: fields["qformer"].update(hidden_dropout_prob=1.5),
            "hidden_dropout_prob is 1.5; it must be",
        ),
        (lambda fields: fields["qformer"].update(layer_norm_eps=-1.0), "layer_norm_eps is -1.0; it must be"),
        (lambda fields: fields["image"].update(size="x" * 500), "it is '" + "x" * 59),
        (lambda fields: fields["image"].update(size=60), "image size 60 is no multiple of the patch size 8"),
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
    assert "holds no tokenizer (tokenizer.json" in refusal(checkpoint)
