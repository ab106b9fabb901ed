"""No text becomes a special token, whatever tokenizer reads it, and no token is past the embeddings."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, Metaspace
from transformers import AddedToken, PreTrainedTokenizerFast

from model import Blip2, CheckpointError
from model.checkpoints import save_hub
from model.checkpoints.convert import convert
from model.errors import UnfitLanguageModelError
from model.language import LanguageModel
from model.text_encoder import TextEncoder
from tests.builders import build_components, build_language_tokenizer, build_opt, build_text_tokenizer
from tests.model.checkpoints.hub.test_processor import build_retrieval, with_language_model

TEXTS = ("a </s> b", "<image>", "x<image>y", "<pad>", "[CLS] a [SEP]", "[DEC]", "<extra_id_0>", "</s>")


def build_bpe() -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes with OPT's special tokens."""
    vocabulary = ["<s>", "<pad>", "</s>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **special)
    fast.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return fast


def build_unigram() -> PreTrainedTokenizerFast:
    """Build a tokenizer like T5's: special tokens are words of its vocabulary, "<image>" is not special."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdegimpsxyt_0/>", "<extra_id_0>"]
    tokenizer = Tokenizer(
        Unigram([(piece, -1.0 if index > 2 else 0.0) for index, piece in enumerate(pieces)], 2)
    )
    tokenizer.pre_tokenizer = Metaspace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<extra_id_0>"], **special
    )
    fast.add_tokens([AddedToken("<image>", special=False)])
    return fast


def build_wordpiece() -> PreTrainedTokenizerFast:
    """Build a tokenizer like BERT's, with the "<image>" that published processors add."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[DEC]",
        *"abxy[]<>/",
        "cls",
        "sep",
        "dec",
        "image",
        "pad",
        "s",
    ]
    tokenizer = Tokenizer(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "bos": "[DEC]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    )
    fast.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return fast


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes, as OPT": build_bpe,
    "unigram, as T5": build_unigram,
    "word pieces, as BERT": build_wordpiece,
    "words, as tiny": build_language_tokenizer,
    "words of texts, as tiny": build_text_tokenizer,
}


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    image_token_id = tokenizer.get_vocab().get("<image>", -1)
    return {*tokenizer.all_special_ids, image_token_id} - {tokenizer.unk_token_id}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_no_text_becomes_a_special_token(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    token_ids = TextEncoder(tokenizer).encode(text)
    assert token_ids
    assert special_ids(tokenizer).isdisjoint(token_ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_without_special_tokens_is_encoded_as_by_its_tokenizer(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    for text in ("a", "x y a", " a  b ", "", "\n", "< s >", "a red circle"):
        assert TextEncoder(tokenizer).encode(text) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("kind", "text", "tokens"),
    [
        ("bytes, as OPT", "a</s>", ["a", "<", "/", "s", ">"]),
        ("unigram, as T5", "a </s>", ["▁", "a", "▁", "<unk>", "/", "s", ">"]),
        ("unigram, as T5", "<image>", ["<unk>", *"image>"]),
        ("word pieces, as BERT", "[SEP] a <image>", ["[", "sep", "]", "a", "<", "image", ">"]),
        ("words, as tiny", "a </s>", ["a", *["<unk>"] * 4]),
    ],
)
def test_what_is_written_like_a_special_token_is_read_as_characters(
    kind: str, text: str, tokens: list[str]
) -> None:
    tokenizer = TOKENIZERS[kind]()
    assert tokenizer.convert_ids_to_tokens(TextEncoder(tokenizer).encode(text)) == tokens


def test_other_callers_of_the_tokenizer_change_nothing() -> None:
    tokenizer = build_bpe()
    encoder = TextEncoder(tokenizer)
    tokenizer("a", truncation=True, max_length=1)
    tokenizer("a", padding="max_length", max_length=9)
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]
    with ThreadPoolExecutor(4) as threads:
        lengths = set(threads.map(len, threads.map(encoder.encode, ["</s>"] * 64)))
    assert lengths == {4}


def test_prompts_and_texts_hold_only_the_special_tokens_around_them() -> None:
    language_model = LanguageModel(build_opt(), build_language_tokenizer())
    assert language_model.tokenize("a </s> <image> <pad>").count(2) == 1
    assert language_model.image_token_id not in language_model.tokenize("<image>")
    matcher = build_retrieval().matcher
    assert matcher is not None
    input_ids, _ = matcher.tokenize(["a [SEP] b [CLS] [DEC] [PAD]"])
    assert [input_ids[0].tolist().count(special) for special in range(5) if special != 1] == [0, 1, 1, 0]


def test_a_language_model_with_fewer_embeddings_than_words_is_refused(tmp_path: Path) -> None:
    """A word without an embedding would end the process of a GPU."""
    save_hub(tmp_path, build_components())
    tokenizer = build_language_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(4)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has 46 word embeddings, and its tokenizer the token 'word3' with the id 46"
    ):
        Blip2.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("end", [46, 99, -1, -(10**9)])
def test_an_end_token_without_an_embedding_is_refused(end: int) -> None:
    opt = build_opt()
    assert opt.generation_config is not None
    opt.generation_config.eos_token_id = [3, end]
    with pytest.raises(
        UnfitLanguageModelError,
        match=rf"has 46 word embeddings, and its configuration the special token {end}",
    ):
        LanguageModel(opt, build_language_tokenizer())


@torch.inference_mode()
def test_an_image_token_without_an_embedding_is_never_looked_up(tmp_path: Path) -> None:
    """Published retrieval checkpoints have one row less than tokens, the last being "<image>"."""
    components = build_retrieval()
    save_hub(tmp_path / "retrieval", components)
    matcher = Blip2.from_pretrained(str(tmp_path / "retrieval")).require_matcher()
    rows = len(matcher.embeddings.word_embeddings.weight)
    assert matcher.tokenizer.convert_tokens_to_ids("<image>") == rows
    matcher.embed_texts(["<image>", "a <image>", "<image>" * 9])
    assert int(matcher.tokenize(["<image>"])[0].max()) < rows


def test_an_image_token_of_a_language_model_without_an_embedding_is_replaced() -> None:
    """Repetition penalties count the id of image tokens among the logits."""
    tokenizer = build_language_tokenizer()
    opt = build_opt()
    language_model = LanguageModel(opt, tokenizer, image_token_id=opt.config.vocab_size)
    assert language_model.image_token_id == tokenizer.convert_tokens_to_ids("<image>")


@pytest.mark.parametrize("target_format", ["hub", "adapter"])
def test_a_text_tokenizer_with_more_words_than_embeddings_is_refused(
    target_format: str, tmp_path: Path
) -> None:
    convert(build_retrieval(), tmp_path / "model", target_format)  # type: ignore[arg-type]
    tokenizer = build_text_tokenizer()
    tokenizer.add_tokens(["giraffe"])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"the token 'giraffe' with the id 43; put the tokenizer there"):
        Blip2.from_pretrained(str(tmp_path / "model"))


def test_special_tokens_survive_saving(tmp_path: Path) -> None:
    """The encoder of texts is a copy: what is saved reads "<image>" as transformers' processor needs."""
    components = with_language_model(LanguageModel(build_opt(), build_language_tokenizer()))
    assert components.language_model is not None
    components.language_model.tokenize("<image>")
    save_hub(tmp_path, components)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert saved.encode("<image>", add_special_tokens=False) == [components.language_model.image_token_id]
