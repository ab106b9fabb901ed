"""Supervision that teaches a small language model to look up what a text names: for pre-training only.

A small model that only predicts words stays for thousands of steps at answering from the bag of a scene's
attributes, without binding them to objects. The generator knows which object every noun phrase names, so one
attention head is told where to look, and linear read-outs of the hidden states what to find there. Nothing of
this is part of the model or of inference.

Layers are counted from 0. At the last word of a noun phrase, head 0 of layer 1 attends to the words of the
object in the description, and the states behind that layer hold its six attributes. At the second of two
compared phrases, head 1 of layer 2 attends to the end of the first, and the states behind it hold which of
the two is further right and further down. At the "?" of a question that is answered by an object, head 2 of
layer 2 attends to that object's words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.world.captions import GRID
from training.world.phrases import find_referents
from training.world.scenes import SIZES, TEXTURES, TOLD_COLORS, TOLD_SHAPES, Scene, SceneObject

WORDS_PER_OBJECT = 6
_LOOKUP_LAYER, _COMPARE_LAYER = 1, 2
_LOOKUP_HEAD, _COMPARE_HEAD, _ANSWER_HEAD = 0, 1, 2
_CLASSES = (len(TOLD_COLORS), len(SIZES), len(TEXTURES), len(TOLD_SHAPES), GRID, GRID)  # as in dense_words


@dataclass(frozen=True, slots=True)
class Mentions:
    """Where the texts of a batch name objects; every position counts from the start of the sequence.

    `named` [M, 3]: sequence, position of the phrase's last word, object. `attributes` [M, 6] int64: classes
    of that object. `compared` [C, 3]: sequence, position of the second phrase, of the first; `order` [C, 2]:
    1 where the second object is further right, further down. `asked` [A, 3]: sequence, position of the
    question mark, object that answers.
    """

    named: Tensor
    attributes: Tensor
    compared: Tensor
    order: Tensor
    asked: Tensor

    def to(self, device: torch.device) -> "Mentions":
        return Mentions(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class ReadText:
    """One text as a model reads it: its words, the position of the first, and how many of them are read."""

    words: Sequence[str]
    start: int
    num_read: int


def find_mentions(batch: Sequence[Sequence[ReadText]], scenes: Sequence[Scene]) -> Mentions:
    """Finds the mentions in the texts of each sequence, all of them about one scene."""
    named, attributes, compared, order, asked = [], [], [], [], []
    for row, (texts, scene) in enumerate(zip(batch, scenes, strict=True)):
        for text in texts:
            found = find_referents(text.words, scene)
            read = [(end, k) for end, k in found if end < text.num_read]
            named += [(row, text.start + end, k) for end, k in read]
            attributes += [_attribute_classes(scene.objects[k]) for _, k in read]
            if "?" not in text.words:
                continue
            mark = text.words.index("?")
            inside = [(end, k) for end, k in found if end < mark]
            answers = [k for end, k in found if end > mark]
            if len(inside) == 2:
                (first_end, first), (second_end, second) = inside
                compared.append((row, text.start + second_end, text.start + first_end))
                order.append(_order(scene.objects[first], scene.objects[second]))
            elif len(answers) == 1:
                asked.append((row, text.start + mark, answers[0]))
    return Mentions(
        _rows(named, 3), _rows(attributes, 6), _rows(compared, 3), _rows(order, 2).float(), _rows(asked, 3)
    )


class ReadingHeads(nn.Module):
    """The read-outs; thrown away after pre-training."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.attributes = nn.ModuleList(nn.Linear(hidden_size, count) for count in _CLASSES)
        self.order = nn.Linear(hidden_size, 2)

    def losses(
        self, hidden_states: Sequence[Tensor], attentions: Sequence[Tensor], mentions: Mentions
    ) -> dict[str, Tensor]:
        """Losses by name, of the states [B, S, L] behind each layer and its attention weights [B, H, S, S].

        The description begins the sequence: one word of background, then six for each object.
        """
        row, end, item = mentions.named.unbind(1)
        lookup = _mass_on_object(attentions[_LOOKUP_LAYER][row, _LOOKUP_HEAD, end], item)
        states = hidden_states[_LOOKUP_LAYER][row, end]  # [M, L]
        attributes = torch.stack(
            [
                F.cross_entropy(head(states).float(), mentions.attributes[:, k], reduction="none")
                for k, head in enumerate(self.attributes)
            ]
        )
        row, second, first = mentions.compared.unbind(1)
        compare = attentions[_COMPARE_LAYER][row, _COMPARE_HEAD, second, first]
        order = self.order(hidden_states[_COMPARE_LAYER][row, second]).float()
        row, mark, item = mentions.asked.unbind(1)
        answer = _mass_on_object(attentions[_COMPARE_LAYER][row, _ANSWER_HEAD, mark], item)
        return {
            "lookup": _mean(_minus_log(lookup)),
            "attributes": _mean(attributes),
            "compare": _mean(_minus_log(compare)),
            "order": _mean(F.binary_cross_entropy_with_logits(order, mentions.order, reduction="none")),
            "answer": _mean(_minus_log(answer)),
        }


def _mass_on_object(weights: Tensor, item: Tensor) -> Tensor:
    """How much of each attention row [M, S] lies on the six words of its object [M]."""
    words = 1 + WORDS_PER_OBJECT * item[:, None] + torch.arange(WORDS_PER_OBJECT, device=item.device)
    return weights.gather(1, words).sum(1)


def _minus_log(mass: Tensor) -> Tensor:
    return -mass.float().clamp_min(1e-6).log()


def _mean(losses: Tensor) -> Tensor:
    """The mean; 0 where a batch holds nothing to learn it from."""
    return losses.sum() / max(1, losses.numel())


def _attribute_classes(item: SceneObject) -> list[int]:
    cells = [min(int(value * GRID), GRID - 1) for value in (item.x, item.y)]
    named = [TOLD_COLORS.index(item.color), list(SIZES).index(item.size), TEXTURES.index(item.texture)]
    return [*named, TOLD_SHAPES.index(item.shape), *cells]


def _order(first: SceneObject, second: SceneObject) -> list[int]:
    return [int(second.x > first.x), int(second.y > first.y)]


def _rows(values: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long).reshape(-1, width)
