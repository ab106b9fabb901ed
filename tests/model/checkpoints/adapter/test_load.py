"""Adapters: loading returns the saved weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from model import Blip2
from model.checkpoints import LoadOptions, save_generation_adapter, save_retrieval_adapter
from tests.builders import build_components, build_matcher, random_pixels
from tests.model.checkpoints.damage import ADAPTER, edit_config, edit_tensors


def test_loaded_weights_are_the_saved_ones(checkpoint: Path) -> None:
    components = build_components()
    blip2 = Blip2.from_pretrained(str(checkpoint))
    expected = Blip2(components).state_dict()
    for name, value in expected.items():
        assert torch.equal(blip2.state_dict()[name], value), name
    assert blip2.prompts == components.prompts
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
    components = build_components()
    save_generation_adapter(
        checkpoint,
        components,
        vision_directory=root / "vision_model",
        language_directory=root / "language_model",
        dtype=torch.bfloat16,
    )
    assert {value.dtype for value in load_file(checkpoint / ADAPTER).values()} == {torch.bfloat16}
    blip2 = Blip2.from_pretrained(str(checkpoint))
    assert blip2.query_tokens.dtype == torch.float32
    assert torch.equal(blip2.query_tokens, components.query_tokens.bfloat16().float())
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
        build_components(seed=1),
        vision_directory=root / "vision_model",
        language_directory=root / "language_model",
    )
    assert sorted(path.name for path in checkpoint.iterdir()) == before
    query_tokens = load_file(checkpoint / ADAPTER)["query_tokens"]
    assert torch.equal(query_tokens, build_components(seed=1).query_tokens)


@torch.inference_mode()
def test_an_opt_with_a_head_of_its_own_keeps_it(checkpoint: Path) -> None:
    root = checkpoint.parent
    weights = root / "language_model" / "model.safetensors"
    head = torch.randn(load_file(weights)["model.decoder.embed_tokens.weight"].shape)
    edit_tensors(weights, lambda tensors: tensors.update({"lm_head.weight": head}))
    save_generation_adapter(
        checkpoint,
        build_components(),
        vision_directory=root / "vision_model",
        language_directory=root / "language_model",
    )
    language_model = Blip2.from_pretrained(str(checkpoint)).language_model
    assert language_model is not None
    assert torch.equal(language_model.llm.lm_head.weight, head)
    assert not torch.equal(language_model.llm.get_input_embeddings().weight, head)


def test_fingerprint_tells_weights_configuration_and_dtype_apart(checkpoint: Path) -> None:
    same = [Blip2.from_pretrained(str(checkpoint)).fingerprint for _ in range(2)]
    other_dtype = Blip2.from_pretrained(str(checkpoint), LoadOptions(dtype=torch.bfloat16)).fingerprint
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


@torch.inference_mode()
def test_a_saved_matcher_scores_as_the_one_it_was_saved_from(checkpoint: Path) -> None:
    matcher = build_matcher(seed=5)
    root = checkpoint.parent
    save_retrieval_adapter(
        root / "other", matcher, build_components().preprocess, vision_directory=root / "vision_model"
    )
    reloaded = Blip2.from_pretrained(str(root / "other"))
    features = reloaded.encode_images(random_pixels(2))
    tokens = matcher.tokenize(["a red circle", "there is no star"])
    assert reloaded.matcher is not None
    torch.testing.assert_close(
        reloaded.matcher.match_logits(features, *tokens), matcher.match_logits(features, *tokens)
    )
    assert reloaded.matcher.max_text_tokens == matcher.max_text_tokens
