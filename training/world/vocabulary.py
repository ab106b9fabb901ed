"""Word-level tokenizers of the synthetic world, for the language model and for the Q-Former's text side.

Both lower-case, split at white space and punctuation, and take the British spellings of two words.
"""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from training.world.words import vocabulary

END_OF_TEXT = "\n"  # ends a text, as in the OPT checkpoints of BLIP-2; `</s>` begins one
IMAGE_TOKEN = "<image>"


def build_language_tokenizer() -> PreTrainedTokenizerFast:
    """OPT's conventions: `<pad>` is 1, `</s>` (2) begins every text, a newline ends it."""
    special = ("<s>", "<pad>", "</s>", "<unk>", END_OF_TEXT, IMAGE_TOKEN)
    tokenizer = _word_level(special, vocabulary(), unknown="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token=END_OF_TEXT,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN],
        clean_up_tokenization_spaces=True,
    )


def build_encoder_decoder_tokenizer() -> PreTrainedTokenizerFast:
    """T5's conventions: `<pad>` is 0 and begins every answer, `</s>` (1) ends every text."""
    tokenizer = _word_level(("<pad>", "</s>", "<unk>", IMAGE_TOKEN), vocabulary(), unknown="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN],
        clean_up_tokenization_spaces=True,
    )


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's conventions (`[CLS] text [SEP]`) with `[DEC]`, which begins a text to be generated."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]")
    tokenizer = _word_level(special, vocabulary(), unknown="[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[DEC]",
    )


def _word_level(special: tuple[str, ...], words: tuple[str, ...], unknown: str) -> Tokenizer:
    vocab = {token: index for index, token in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\bcolour"), "color"),
            normalizers.Replace(Regex(r"\bgrey\b"), "gray"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return tokenizer
