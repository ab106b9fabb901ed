"""Attention supervision of small language models, for pre-training only; the released model has none of it.

With next-token prediction alone, a small model answers from a scene's bag of attributes for thousands of
steps, without binding attributes to objects. The generator knows which object each noun phrase refers to, so
three attention heads are supervised with their targets, and linear probes with the attributes found there.

Layers are counted from 0; "description" is the dense description that begins the sequence.

| position | head | target | probe behind that layer |
|---|---|---|---|
| last word of a noun phrase | layer 1, head 0 | the object's words in the description | its six attributes |
| second of two compared phrases | layer 2, head 1 | the end of the first | further right? further down? |
| "?" of a question about an object | layer 2, head 2 | the words of the answer's object | none |
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.world.captions import GRID
from training.world.phrases import find_referents
from training.world.scenes import SIZES, TEXT_COLORS, TEXT_SHAPES, TEXTURES, Scene, SceneObject

WORDS_PER_OBJECT = 6
MIN_LAYERS_AND_HEADS = 3  # layers, and heads of each, that the supervision uses
LOSS_WEIGHT = 0.3  # of each loss, relative to the language-model loss
_LOOKUP_LAYER, _COMPARE_LAYER = 1, 2
_LOOKUP_HEAD, _COMPARE_HEAD, _ANSWER_HEAD = 0, 1, 2
# As in `dense_words`.
_NUM_CLASSES = (len(TEXT_COLORS), len(SIZES), len(TEXTURES), len(TEXT_SHAPES), GRID, GRID)


@dataclass(frozen=True, slots=True)
class TextSpan:
    """One text in a sequence: its words, the position of the first, and how many are the layers' input."""

    words: Sequence[str]
    start: int
    num_encoded: int


@dataclass(frozen=True, slots=True)
class AttentionTargets:
    """Supervised positions of a batch, counted from the start of each sequence.

    `mentions` [M, 3]: sequence, position of a noun phrase's last word, object; `attributes` [M, 6] int64: the
    classes of that object. `comparisons` [C, 3]: sequence, position of the second phrase, of the first;
    `order` [C, 2]: 1 if the second object is further right, further down. `answers` [A, 3]: sequence,
    position of the question mark, object of the answer.
    """

    mentions: Tensor
    attributes: Tensor
    comparisons: Tensor
    order: Tensor
    answers: Tensor

    def to(self, device: torch.device) -> "AttentionTargets":
        return AttentionTargets(*(getattr(self, name).to(device) for name in self.__slots__))


def find_attention_targets(batch: Sequence[Sequence[TextSpan]], scenes: Sequence[Scene]) -> AttentionTargets:
    """Find the supervised positions in the texts of each sequence, all of them about one scene."""
    rows = _TargetRows()
    for row, (spans, scene) in enumerate(zip(batch, scenes, strict=True)):
        for span in spans:
            rows.add(row, span, scene)
    return AttentionTargets(
        _to_tensor(rows.mentions, 3),
        _to_tensor(rows.attributes, 6),
        _to_tensor(rows.comparisons, 3),
        _to_tensor(rows.order, 2).float(),
        _to_tensor(rows.answers, 3),
    )


@dataclass(slots=True)
class _TargetRows:
    """The rows of `AttentionTargets`, collected text by text."""

    mentions: list[Sequence[int]] = field(default_factory=list)
    attributes: list[Sequence[int]] = field(default_factory=list)
    comparisons: list[Sequence[int]] = field(default_factory=list)
    order: list[Sequence[int]] = field(default_factory=list)
    answers: list[Sequence[int]] = field(default_factory=list)

    def add(self, row: int, span: TextSpan, scene: Scene) -> None:
        """Append the targets of one text of sequence `row`."""
        referents = find_referents(span.words, scene)
        encoded = [(end, k) for end, k in referents if end < span.num_encoded]
        self.mentions += [(row, span.start + end, k) for end, k in encoded]
        self.attributes += [_attribute_classes(scene.objects[k]) for _, k in encoded]
        if "?" not in span.words:
            return
        mark = span.words.index("?")
        in_question = [(end, k) for end, k in referents if end < mark]
        in_answer = [k for end, k in referents if end > mark]
        if len(in_question) == 2:
            (first_end, first), (second_end, second) = in_question
            self.comparisons.append((row, span.start + second_end, span.start + first_end))
            self.order.append(_order(scene.objects[first], scene.objects[second]))
        elif len(in_answer) == 1:
            self.answers.append((row, span.start + mark, in_answer[0]))


class AttentionProbes(nn.Module):
    """The linear probes, and the losses of the supervised heads; discarded after pre-training."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.attributes = nn.ModuleList(nn.Linear(hidden_size, count) for count in _NUM_CLASSES)
        self.order = nn.Linear(hidden_size, 2)

    def losses(
        self, hidden_states: Sequence[Tensor], attentions: Sequence[Tensor], targets: AttentionTargets
    ) -> dict[str, Tensor]:
        """Compute the losses by name from each layer's output [B, S, L] and attention weights [B, H, S, S].

        The description begins the sequence: one word of background, then six for each object.
        """
        row, end, item = targets.mentions.unbind(1)
        lookup = _mass_on_object(attentions[_LOOKUP_LAYER][row, _LOOKUP_HEAD, end], item)
        states = hidden_states[_LOOKUP_LAYER][row, end]  # [M, L]
        attributes = torch.stack(
            [
                F.cross_entropy(head(states).float(), targets.attributes[:, k], reduction="none")
                for k, head in enumerate(self.attributes)
            ]
        )
        row, second, first = targets.comparisons.unbind(1)
        compare = attentions[_COMPARE_LAYER][row, _COMPARE_HEAD, second, first]
        order = self.order(hidden_states[_COMPARE_LAYER][row, second]).float()
        row, mark, item = targets.answers.unbind(1)
        answer = _mass_on_object(attentions[_COMPARE_LAYER][row, _ANSWER_HEAD, mark], item)
        return {
            "lookup": _mean(_minus_log(lookup)),
            "attributes": _mean(attributes),
            "compare": _mean(_minus_log(compare)),
            "order": _mean(F.binary_cross_entropy_with_logits(order, targets.order, reduction="none")),
            "answer": _mean(_minus_log(answer)),
        }


def _mass_on_object(weights: Tensor, item: Tensor) -> Tensor:
    """Sum each attention row [M, S] over the six description words of its object [M]."""
    words = 1 + WORDS_PER_OBJECT * item[:, None] + torch.arange(WORDS_PER_OBJECT, device=item.device)
    return weights.gather(1, words).sum(1)


def _minus_log(mass: Tensor) -> Tensor:
    return -mass.float().clamp_min(1e-6).log()


def _mean(losses: Tensor) -> Tensor:
    """Compute the mean; 0 if the batch has no target."""
    return losses.sum() / max(1, losses.numel())


def _attribute_classes(item: SceneObject) -> list[int]:
    cells = [min(int(value * GRID), GRID - 1) for value in (item.x, item.y)]
    attributes = [TEXT_COLORS.index(item.color), list(SIZES).index(item.size), TEXTURES.index(item.texture)]
    return [*attributes, TEXT_SHAPES.index(item.shape), *cells]


def _order(first: SceneObject, second: SceneObject) -> list[int]:
    return [int(second.x > first.x), int(second.y > first.y)]


def _to_tensor(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.long).reshape(-1, width)
