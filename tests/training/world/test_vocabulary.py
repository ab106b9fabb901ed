import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from training.world.captions import dense_description
from training.world.qa_turns import sample_qa_turns
from training.world.scenes import Split, iter_scenes
from training.world.vocabulary import (
    build_encoder_decoder_tokenizer,
    build_language_tokenizer,
    build_text_tokenizer,
)

OPT, T5, BERT = build_language_tokenizer(), build_encoder_decoder_tokenizer(), build_text_tokenizer()


@pytest.mark.parametrize("tokenizer", [OPT, T5, BERT], ids=["opt", "t5", "bert"])
@pytest.mark.parametrize("split", ["train", "held-out", "text-only"])
def test_no_word_of_the_world_is_unknown(tokenizer: PreTrainedTokenizerFast, split: Split) -> None:
    rng = np.random.default_rng(0)
    texts = []
    for scene in iter_scenes(0, split, 200):
        texts.append(dense_description(scene, 28))
        texts += [f"{item.prompt} {item.answer}" for item in sample_qa_turns(scene, rng, 8)]
    ids = {token for row in tokenizer(texts).input_ids for token in row}
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),
    [
        (OPT, ["</s>", "a", "red", "circle"]),
        (T5, ["a", "red", "circle", "</s>"]),
        (BERT, ["[CLS]", "a", "red", "circle", "[SEP]"]),
    ],
)
def test_texts_begin_and_end_as_their_kind_has_it(
    tokenizer: PreTrainedTokenizerFast, tokens: list[str]
) -> None:
    ids = tokenizer("a red circle").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle"


def test_special_ids_are_those_of_the_published_kinds() -> None:
    assert (OPT.pad_token_id, OPT.bos_token_id, OPT.eos_token) == (1, 2, "\n")
    assert (T5.pad_token_id, T5.eos_token_id) == (0, 1)
    assert (BERT.pad_token, BERT.cls_token, BERT.sep_token, BERT.bos_token) == (
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[DEC]",
    )


def test_case_punctuation_and_british_spelling_do_not_matter() -> None:
    asked = OPT("What COLOUR is the grey circle?").input_ids
    assert OPT.convert_ids_to_tokens(asked) == ["</s>", "what", "color", "is", "the", "gray", "circle", "?"]
    assert OPT.convert_ids_to_tokens(OPT("a heptagon").input_ids) == ["</s>", "a", "<unk>"]
