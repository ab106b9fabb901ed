"""Every word of the synthetic world, from which the tokenizers are built."""

from training.world.captions import FILLER, GRID
from training.world.phrases import NUMBERS, plural
from training.world.scenes import BACKGROUNDS, SIZES, TEXTURES, TOLD_COLORS, TOLD_SHAPES

_GRAMMAR = (
    *("a", "an", "the", "and", "or", "of", "on", "in", "to", "is", "are", "there", "what", "how", "many"),
    *("color", "shape", "size", "texture", "object", "objects", "background", "image", "photo"),
    *("left", "right", "above", "below", "question", "short", "answer", "describe", "yes", "no"),
    *(":", "?", ".", ","),
)


def vocabulary() -> tuple[str, ...]:
    """The words of captions, questions and dense descriptions, and those a prompt may bring."""
    cells = [f"{axis}{cell}" for axis in "xy" for cell in range(GRID)]
    shapes = [*TOLD_SHAPES, *[plural(shape) for shape in TOLD_SHAPES]]
    attributes = [*TOLD_COLORS, *SIZES, *TEXTURES, *BACKGROUNDS]
    return tuple(dict.fromkeys([*_GRAMMAR, *attributes, *shapes, *NUMBERS, *cells, FILLER]))
