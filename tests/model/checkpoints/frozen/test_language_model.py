"""Checkpoints with a T5: loading returns the saved weights, and errors name what is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5ForConditionalGeneration

from model import Blip2, CheckpointError, GenerationParams
from model.checkpoints import LoadOptions, load_language_model, save_hub
from model.language import LanguageModel
from tests.builders import random_pixels
from tests.builders_t5 import (
    Tying,
    build_t5,
    build_t5_components,
    build_t5_tokenizer,
    save_random_t5_checkpoint,
)
from tests.model.checkpoints.damage import edit_config, edit_tensors

WEIGHTS = "model.safetensors"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@pytest.fixture(params=["tied", "untied"])
def kind(request: pytest.FixtureRequest) -> Tying:
    kind: Tying = request.param
    return kind


@pytest.fixture
def t5_checkpoint(tmp_path: Path, kind: Tying) -> Path:
    """Save a random checkpoint with a T5, which a test may damage; return its adapter."""
    return save_random_t5_checkpoint(tmp_path / "checkpoint", kind)


@pytest.fixture
def t5_directory(tmp_path: Path) -> Path:
    """Save an untied T5 with its tokenizer."""
    build_t5("untied").save_pretrained(tmp_path)
    build_t5_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def language_model_of(blip2: Blip2) -> LanguageModel:
    assert blip2.language_model is not None
    return blip2.language_model


def answers(blip2: Blip2) -> object:
    params = GenerationParams(num_beams=3, num_return_sequences=3, max_new_tokens=8)
    with torch.inference_mode():
        query_output = blip2.encode_queries(blip2.encode_images(random_pixels(2)))
        return blip2.generate(blip2.project_queries(query_output), ["", "a photo of"], params)


def refusal(directory: Path) -> str:
    """Return the message of the error that loading a language model raises."""
    with pytest.raises(CheckpointError) as caught:
        load_language_model(directory)
    return str(caught.value)


def test_an_adapter_on_a_t5_is_loaded_as_it_was_saved(t5_checkpoint: Path, kind: Tying) -> None:
    built, reloaded = Blip2(build_t5_components(kind)).eval(), Blip2.from_pretrained(str(t5_checkpoint))
    for name, value in built.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value), name
    assert reloaded.prompts == built.prompts
    assert reloaded.matcher is not None
    assert answers(reloaded) == answers(built)
    assert not any(value.requires_grad for value in language_model_of(reloaded).parameters())


def test_a_t5_saved_for_the_hub_answers_the_same_when_loaded_from_there(kind: Tying, tmp_path: Path) -> None:
    built = Blip2(build_t5_components(kind)).eval()
    save_hub(tmp_path, built.components)
    reloaded = Blip2.from_pretrained(str(tmp_path))
    assert answers(reloaded) == answers(built)
    assert reloaded.prompts.question == "Question: {} Short answer:"
    assert language_model_of(reloaded).image_token_id == language_model_of(built).image_token_id


def test_saving_for_the_hub_leaves_the_model_as_it_was(kind: Tying, tmp_path: Path) -> None:
    built = Blip2(build_t5_components(kind)).eval()
    parameters = dict(built.named_parameters())
    save_hub(tmp_path, built.components)
    assert {name: id(value) for name, value in built.named_parameters()} == {
        name: id(value) for name, value in parameters.items()
    }


def test_one_matrix_embeds_the_words_of_encoder_decoder_and_tied_head(
    t5_checkpoint: Path, kind: Tying
) -> None:
    llm = language_model_of(Blip2.from_pretrained(str(t5_checkpoint))).llm
    assert llm.encoder.embed_tokens.weight is llm.shared.weight
    assert llm.decoder.embed_tokens.weight is llm.shared.weight
    assert (llm.lm_head.weight is llm.shared.weight) == (kind == "tied")


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_the_gelu_is_the_one_the_configuration_names(t5_directory: Path, activation: str) -> None:
    edit_config(t5_directory, lambda fields: fields.update(dense_act_fn=activation))
    llm = load_language_model(t5_directory).llm
    expected = T5ForConditionalGeneration.from_pretrained(t5_directory)
    gates = torch.linspace(-3, 3, 50)
    exact = torch.nn.functional.gelu(gates)
    act, expected_act = (model.encoder.block[0].layer[1].DenseReluDense.act for model in (llm, expected))
    assert torch.equal(act(gates), expected_act(gates))
    assert torch.equal(act(gates), exact) == (activation == "gelu")


def test_prompts_an_adapter_does_not_set_are_those_of_its_language_model(tmp_path: Path) -> None:
    directory = save_random_t5_checkpoint(tmp_path, "tied")
    for adapter, question in (
        (directory, "Question: {} Short answer:"),
        (tmp_path / "stage2", "Question: {} Answer:"),
    ):
        edit_config(adapter, lambda fields: fields.pop("prompts"))
        assert Blip2.from_pretrained(str(adapter)).prompts.question == question


def test_a_t5_is_refused_in_float16_with_the_types_it_runs_in(tmp_path: Path) -> None:
    adapter = save_random_t5_checkpoint(tmp_path / "checkpoint", "tied")
    save_hub(tmp_path / "hub", build_t5_components("tied"))
    for directory in (adapter, tmp_path / "hub"):
        with pytest.raises(CheckpointError, match="overflows in float16; load it in bfloat16 or float32"):
            Blip2.from_pretrained(str(directory), LoadOptions(dtype=torch.float16))
        reloaded = Blip2.from_pretrained(str(directory), LoadOptions(dtype=torch.bfloat16))
        assert {value.dtype for value in language_model_of(reloaded).parameters()} == {torch.bfloat16}
        assert reloaded.query_tokens.dtype == torch.float32


@pytest.mark.parametrize("kept", COPIES)
def test_word_embeddings_are_found_under_the_name_of_a_copy(t5_directory: Path, kept: str) -> None:
    expected = load_language_model(t5_directory).state_dict()
    edit_tensors(t5_directory / WEIGHTS, lambda tensors: tensors.update({kept: tensors.pop("shared.weight")}))
    reloaded = load_language_model(t5_directory).state_dict()
    assert all(torch.equal(reloaded[name], value) for name, value in expected.items())


def test_copies_of_the_word_embeddings_may_stand_beside_them(t5_directory: Path) -> None:
    expected = load_language_model(t5_directory).state_dict()
    edit_tensors(t5_directory / WEIGHTS, add_copies)
    reloaded = load_language_model(t5_directory).state_dict()
    assert all(torch.equal(reloaded[name], value) for name, value in expected.items())


def add_copies(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: tensors["shared.weight"].clone() for name in COPIES})


def add_other_embeddings(tensors: dict[str, Tensor]) -> None:
    tensors[COPIES[1]] = tensors["shared.weight"] + 1


def test_a_tensor_of_the_first_releases_that_nothing_reads_is_passed_over(t5_directory: Path) -> None:
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    edit_tensors(t5_directory / WEIGHTS, lambda tensors: tensors.update({name: torch.zeros(8, 4)}))
    assert load_language_model(t5_directory).llm.config.model_type == "t5"


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (add_other_embeddings, "word embeddings that differ"),
        (lambda tensors: tensors.pop("shared.weight"), "lacks the tensor 'shared.weight' (1 are missing"),
        (
            lambda tensors: tensors.pop("encoder.final_layer_norm.weight"),
            "lacks the tensor 'encoder.final_layer_norm.weight'",
        ),
        (
            lambda tensors: tensors.update({"encoder.extra": torch.zeros(2)}),
            "holds the tensor 'encoder.extra'",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 32)}),
            "the tensor 'lm_head.weight' has shape [3, 32]",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(
    t5_directory: Path, edit: Callable[[dict[str, Tensor]], object], complaint: str
) -> None:
    edit_tensors(t5_directory / WEIGHTS, edit)
    message = refusal(t5_directory)
    assert complaint in message
    assert WEIGHTS in message


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda fields: fields.pop("decoder_start_token_id"), "does not set 'decoder_start_token_id'"),
        (lambda fields: fields.update(eos_token_id=None), "does not set 'eos_token_id'"),
        (
            lambda fields: fields.update(model_type="dinov2"),
            "type 'dinov2'; those that transformers has",
        ),
        (lambda fields: fields.pop("model_type"), "type None; those that transformers has"),
    ],
)
def test_a_wrong_configuration_is_named(
    t5_directory: Path, edit: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    edit_config(t5_directory, edit)
    message = refusal(t5_directory)
    assert complaint in message
    assert "config.json" in message


@pytest.mark.parametrize("wrapped", [False, True], ids=["directory", "hub"])
def test_a_head_that_was_cut_off_is_missed_where_the_configuration_says_it_is_no_copy(
    t5_directory: Path, tmp_path: Path, wrapped: bool
) -> None:
    """Check files of Flan-T5, and of BLIP-2 on it, as transformers before release 5 saved them."""
    directory, prefix = t5_directory, ""
    if wrapped:
        directory, prefix = tmp_path / "hub", "language_model."
        save_hub(directory, build_t5_components("untied"))

    def say_untied(fields: dict[str, Any]) -> None:
        (fields["text_config"] if wrapped else fields).update(tie_word_embeddings=False)

    load: Callable[[], object] = (
        (lambda: Blip2.from_pretrained(str(directory)))
        if wrapped
        else (lambda: load_language_model(directory))
    )
    edit_config(directory, say_untied)
    load()
    edit_tensors(directory / WEIGHTS, lambda tensors: tensors.pop(f"{prefix}lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'lm_head\.weight'"):
        load()


def test_another_t5_than_the_adapter_was_trained_on_is_refused(tmp_path: Path) -> None:
    adapter = save_random_t5_checkpoint(tmp_path, "tied")
    shutil.rmtree(tmp_path / "language_model_t5")
    build_t5("tied", seed=1).save_pretrained(tmp_path / "language_model_t5")
    build_t5_tokenizer().save_pretrained(tmp_path / "language_model_t5")
    with pytest.raises(CheckpointError, match=r"language_model_t5 have sha256.*put the frozen part back"):
        Blip2.from_pretrained(str(adapter))


def test_the_head_of_a_t5_is_stored_where_it_is_its_own(t5_checkpoint: Path, kind: Tying) -> None:
    names = load_file(t5_checkpoint.parent / "language_model_t5" / WEIGHTS).keys()
    assert ("lm_head.weight" in names) == (kind == "untied")
