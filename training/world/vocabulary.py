"""The vocabulary of the synthetic world, and word-level tokenizers for language models and Q-Former.

All tokenizers lower-case, split at white space and punctuation, and map two British spellings.
"""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from training.world.captions import FILLER, GRID
from training.world.phrases import NUMBERS, plural
from training.world.scenes import BACKGROUNDS, SIZES, TEXT_COLORS, TEXT_SHAPES, TEXTURES

END_OF_TEXT = "\n"  # the end token, as in the OPT checkpoints of BLIP-2; `</s>` is the begin token
IMAGE_TOKEN = "<image>"

_GRAMMAR = (
    *("a", "an", "the", "and", "or", "of", "on", "in", "to", "is", "are", "there", "what", "how", "many"),
    *("color", "shape", "size", "texture", "object", "objects", "background", "image", "photo"),
    *("left", "right", "above", "below", "question", "short", "answer", "describe", "yes", "no"),
    *(":", "?", ".", ","),
)


def list_words() -> tuple[str, ...]:
    """List the words of captions, questions, dense descriptions and common prompts, each once."""
    cells = [f"{axis}{cell}" for axis in "xy" for cell in range(GRID)]
    shapes = [*TEXT_SHAPES, *[plural(shape) for shape in TEXT_SHAPES]]
    attributes = [*TEXT_COLORS, *SIZES, *TEXTURES, *BACKGROUNDS]
    return tuple(dict.fromkeys([*_GRAMMAR, *attributes, *shapes, *NUMBERS, *cells, FILLER]))


def build_language_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with OPT's conventions: `<pad>` is 1, `</s>` (2) begins a text, a newline ends it."""
    special = ("<s>", "<pad>", "</s>", "<unk>", END_OF_TEXT, IMAGE_TOKEN)
    tokenizer = _word_level(special, list_words(), unknown="<unk>")
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
    """Build a tokenizer with T5's conventions: `<pad>` is 0 and begins an answer, `</s>` (1) ends a text."""
    tokenizer = _word_level(("<pad>", "</s>", "<unk>", IMAGE_TOKEN), list_words(), unknown="<unk>")
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
    """Build a tokenizer with BERT's conventions (`[CLS] text [SEP]`); `[DEC]` begins a generated text."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]")
    tokenizer = _word_level(special, list_words(), unknown="[UNK]")
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
