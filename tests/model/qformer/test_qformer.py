"""The Q-Former: its attention masks, and equality with the reference implementation."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from model.config import QFormerConfig
from model.qformer import QFormer, build_query_tokens, copy_text_ffn_to_query_ffn
from tests.builders import NUM_QUERY_TOKENS, build_qformer_config

NUM_TEXT_TOKENS = 6
PERTURBED = 3  # the text position that the mask tests change


@pytest.fixture(scope="module")
def qformer() -> QFormer:
    torch.manual_seed(0)
    return QFormer(build_qformer_config(), has_text_branch=True).eval()


@pytest.fixture(scope="module")
def query_tokens(qformer: QFormer) -> Tensor:
    return build_query_tokens(qformer.config).detach().expand(2, -1, -1)


def random_texts(*, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return [2, T, D] embeddings and the mask of a full text and one whose last two tokens are padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, NUM_TEXT_TOKENS, dtype=torch.long)
    mask[1, -2:] = 0
    return torch.randn(2, NUM_TEXT_TOKENS, 32, generator=generator), mask


def random_image_features(*, seed: int = 2) -> Tensor:
    return torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(seed))


def perturbed(embeds: Tensor, position: int) -> Tensor:
    changed = embeds.clone()
    changed[:, position] += 1.0
    return changed


def changed_positions(before: Tensor, after: Tensor) -> list[int]:
    """Return the positions of the first sequence whose states differ, to the bit."""
    return (before[0] != after[0]).any(dim=-1).nonzero().flatten().tolist()


def test_uni_modal_mask_lets_every_text_token_see_every_other(qformer: QFormer) -> None:
    embeds, mask = random_texts()
    before = qformer.encode_texts(embeds, mask)
    after = qformer.encode_texts(perturbed(embeds, PERTURBED), mask)
    assert changed_positions(before, after) == list(range(NUM_TEXT_TOKENS))


def test_uni_modal_queries_all_see_the_image_and_each_other(qformer: QFormer, query_tokens: Tensor) -> None:
    features = random_image_features()
    before = qformer.encode_queries(query_tokens, features).query_output
    other_image = qformer.encode_queries(query_tokens, perturbed(features, 5)).query_output
    other_query = qformer.encode_queries(perturbed(query_tokens, 0), features).query_output
    assert changed_positions(before, other_image) == list(range(NUM_QUERY_TOKENS))
    assert changed_positions(before, other_query) == list(range(NUM_QUERY_TOKENS))


def test_bi_directional_mask_lets_queries_and_texts_see_each_other(
    qformer: QFormer, query_tokens: Tensor
) -> None:
    embeds, mask = random_texts()
    features = random_image_features()
    everyone = list(range(NUM_QUERY_TOKENS + NUM_TEXT_TOKENS))
    before = qformer.encode_pairs(query_tokens, embeds, mask, features)
    other_text = qformer.encode_pairs(query_tokens, perturbed(embeds, PERTURBED), mask, features)
    other_query = qformer.encode_pairs(perturbed(query_tokens, 0), embeds, mask, features)
    other_image = qformer.encode_pairs(query_tokens, embeds, mask, perturbed(features, 5))
    assert changed_positions(before, other_text) == everyone
    assert changed_positions(before, other_query) == everyone
    assert changed_positions(before, other_image) == everyone


def test_multimodal_causal_mask_hides_later_tokens_but_no_query(
    qformer: QFormer, query_tokens: Tensor
) -> None:
    embeds, mask = random_texts()
    features = random_image_features()
    states = qformer.encode_queries(query_tokens, features)
    before = qformer.decode_texts(embeds, mask, states.keys_values)
    other_text = qformer.decode_texts(perturbed(embeds, PERTURBED), mask, states.keys_values)
    other_states = qformer.encode_queries(perturbed(query_tokens, NUM_QUERY_TOKENS - 1), features)
    other_query = qformer.decode_texts(embeds, mask, other_states.keys_values)
    assert changed_positions(before, other_text) == list(range(PERTURBED, NUM_TEXT_TOKENS))
    assert changed_positions(before, other_query) == list(range(NUM_TEXT_TOKENS))


def test_text_reaches_the_image_only_in_layers_whose_index_the_frequency_divides() -> None:
    config = dataclasses.replace(build_qformer_config(num_hidden_layers=6), cross_attention_frequency=3)
    layers = QFormer(config, has_text_branch=False).layers
    assert [layer.crossattention is not None for layer in layers] == [True, False, False] * 2


def test_padding_is_seen_by_nobody(qformer: QFormer, query_tokens: Tensor) -> None:
    embeds, mask = random_texts()
    features = random_image_features()
    keys_values = qformer.encode_queries(query_tokens, features).keys_values
    other = embeds.clone()
    other[1, -2:] += 1.0  # the padding of the second text
    real = slice(0, NUM_TEXT_TOKENS - 2)
    pairs = [qformer.encode_pairs(query_tokens, text, mask, features)[1] for text in (embeds, other)]
    texts = [qformer.encode_texts(text, mask)[1] for text in (embeds, other)]
    decoded = [qformer.decode_texts(text, mask, keys_values)[1] for text in (embeds, other)]
    seen = NUM_QUERY_TOKENS + NUM_TEXT_TOKENS - 2
    torch.testing.assert_close(pairs[0][:seen], pairs[1][:seen], rtol=0, atol=0)
    torch.testing.assert_close(texts[0][real], texts[1][real], rtol=0, atol=0)
    torch.testing.assert_close(decoded[0][real], decoded[1][real], rtol=0, atol=0)


def test_a_text_that_is_all_padding_stays_finite(qformer: QFormer) -> None:
    embeds, _ = random_texts()
    assert qformer.encode_texts(embeds, torch.zeros(2, NUM_TEXT_TOKENS)).isfinite().all()


def test_cached_pass_equals_one_joint_pass_under_the_unilm_mask(
    qformer: QFormer, query_tokens: Tensor
) -> None:
    embeds, mask = random_texts()
    features = random_image_features()
    states = qformer.encode_queries(query_tokens, features)
    decoded = qformer.decode_texts(embeds, mask, states.keys_values)
    queries, texts = joint_pass(qformer, query_tokens, embeds, mask, features)
    torch.testing.assert_close(states.query_output, queries, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded[0], texts[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded[1, :-2], texts[1, :-2], rtol=0, atol=1e-5)


def joint_pass(
    qformer: QFormer, query_tokens: Tensor, embeds: Tensor, mask: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute queries and texts together, with the multimodal causal mask written out."""
    num_queries, num_text_tokens = query_tokens.shape[1], embeds.shape[1]
    num_tokens = num_queries + num_text_tokens
    visible = torch.zeros(2, 1, num_tokens, num_tokens, dtype=torch.bool)
    visible[:, :, :, :num_queries] = True
    visible[:, :, num_queries:, num_queries:] = torch.ones(num_text_tokens, num_text_tokens).tril().bool()
    visible[:, :, :, num_queries:] &= mask.bool()[:, None, None, :]
    hidden_states = qformer.layernorm(torch.cat([query_tokens, embeds], dim=1))
    for layer in qformer.layers:
        attended = layer.attend(hidden_states, layer.keys_values(hidden_states), visible)
        queries = layer.finish_queries(attended[:, :num_queries], layer.image_keys_values(features))
        hidden_states = torch.cat([queries, layer.finish_texts(attended[:, num_queries:])], dim=1)
    return hidden_states[:, :num_queries], hidden_states[:, num_queries:]


def test_gradients_of_the_decoded_text_reach_queries_and_image_through_the_cache(qformer: QFormer) -> None:
    embeds, mask = random_texts()
    query_tokens = build_query_tokens(qformer.config)
    features = random_image_features().requires_grad_()
    states = qformer.encode_queries(query_tokens.expand(2, -1, -1), features)
    qformer.decode_texts(embeds, mask, states.keys_values).square().sum().backward()
    assert query_tokens.grad is not None
    assert query_tokens.grad.abs().sum() > 0
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


def test_training_under_bfloat16_autocast_gives_finite_gradients_everywhere(qformer: QFormer) -> None:
    torch.manual_seed(0)
    trained = QFormer(build_qformer_config(), has_text_branch=True).train()
    embeds, mask = random_texts()
    features = random_image_features()
    query_tokens = build_query_tokens(trained.config).expand(2, -1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        states = trained.encode_queries(query_tokens, features)
        pairs = trained.encode_pairs(query_tokens, embeds, mask, features)
        decoded = trained.decode_texts(embeds, mask, states.keys_values)
    assert pairs.dtype == torch.float32, "each layer ends in a LayerNorm, which autocast keeps in float32"
    (pairs.square().sum() + decoded.square().sum()).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in trained.parameters())


def build_reference(config: QFormerConfig, qformer: QFormer) -> Blip2QFormerModel:
    """Build transformers' Q-Former with the same weights."""
    fields = dataclasses.asdict(config)
    reference = Blip2QFormerModel(Blip2QFormerConfig(**fields, use_qformer_text_input=True)).eval()
    reference.load_state_dict(qformer.state_dict())
    return reference


@torch.no_grad()
def test_all_passes_but_the_causal_one_equal_transformers(qformer: QFormer, query_tokens: Tensor) -> None:
    ours = copy.deepcopy(qformer).double()  # so that nothing but a difference in kind can show
    reference = build_reference(qformer.config, qformer).double()
    (embeds, mask), features = random_texts(), random_image_features()
    query_tokens, embeds, features = query_tokens.double(), embeds.double(), features.double()
    queries = reference(query_embeds=query_tokens, encoder_hidden_states=features).last_hidden_state
    texts = reference(query_embeds=embeds, query_length=0, attention_mask=mask).last_hidden_state
    pairs = reference(
        query_embeds=torch.cat([query_tokens, embeds], dim=1),
        query_length=NUM_QUERY_TOKENS,
        attention_mask=torch.cat([torch.ones(2, NUM_QUERY_TOKENS, dtype=torch.long), mask], dim=1),
        encoder_hidden_states=features,
    ).last_hidden_state
    assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-10)
    assert_equal(ours.encode_queries(query_tokens, features).query_output, queries)
    assert_equal(ours.encode_texts(embeds, mask), texts)
    assert_equal(ours.encode_pairs(query_tokens, embeds, mask, features), pairs)


def test_fresh_queries_differ_from_each_other_and_so_do_their_outputs(qformer: QFormer) -> None:
    query_tokens = build_query_tokens(qformer.config)
    output = qformer.encode_queries(query_tokens, random_image_features()[:1]).query_output[0]
    assert torch.pdist(output).min() > 0.01


def test_fresh_weights_have_the_spread_the_configuration_names() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(build_qformer_config(), hidden_size=128, initializer_range=0.02)
    qformer = QFormer(config, has_text_branch=True)
    query = qformer.layers[0].attention.attention.query
    assert query.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert query.bias.abs().max() == 0
    assert (qformer.layernorm.weight == 1).all()


def test_stage_1_starts_the_query_ffn_as_a_copy_that_trains_apart_from_the_text_ffn() -> None:
    qformer = QFormer(build_qformer_config(), has_text_branch=True)
    copy_text_ffn_to_query_ffn(qformer)
    weights = {name: value for name, value in qformer.named_parameters() if "_query." in name}
    assert len(weights) == 6 * len(qformer.layers)
    for name, value in weights.items():
        of_texts = qformer.get_parameter(name.replace("_query.", "."))
        assert torch.equal(value, of_texts)
        assert value is not of_texts


def test_heads_that_do_not_divide_the_width_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="hidden_size 32 is not a multiple of num_attention_heads 5"):
        dataclasses.replace(build_qformer_config(), num_attention_heads=5)
