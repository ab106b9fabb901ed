import torch

from training.tiny.attention_supervision import AttentionProbes, TextSpan, find_attention_targets
from training.world.captions import dense_description
from training.world.scenes import TEXT_COLORS, TEXT_SHAPES, Scene, SceneObject

CIRCLE = SceneObject("circle", "red", "large", "solid", x=0.25, y=0.75, radius=0.18)
CROSS = SceneObject("cross", "orange", "small", "striped", x=0.8, y=0.2, radius=0.1)
SCENE = Scene((CIRCLE, CROSS), "gray", noise_seed=0)


def span(text: str, start: int, num_encoded: int | None = None) -> TextSpan:
    words = text.split()
    return TextSpan(words, start, len(words) if num_encoded is None else num_encoded)


def test_a_noun_phrase_points_at_its_object_from_its_last_word() -> None:
    targets = find_attention_targets([[span("what size is the orange cross ? small", start=28)]], [SCENE])
    assert targets.mentions.tolist() == [[0, 28 + 5, 1]]
    color, size, texture, shape, x, y = targets.attributes[0].tolist()
    assert (TEXT_COLORS[color], TEXT_SHAPES[shape]) == ("orange", "cross")
    assert (size, texture, x, y) == (0, 1, 9, 2)
    assert not len(targets.comparisons)


def test_a_relation_compares_its_second_phrase_with_its_first() -> None:
    targets = find_attention_targets(
        [[span("is the orange cross above the red circle ? yes", start=10)]], [SCENE]
    )
    assert targets.comparisons.tolist() == [[0, 10 + 7, 10 + 3]]
    assert targets.order.tolist() == [[0, 1]]  # the circle is further left and further down


def test_a_question_mark_attends_to_the_object_of_the_answer() -> None:
    texts = [
        [
            span("how many objects are there ? two", 5),
            span("what is left of the orange cross ? red circle", 12),
        ]
    ]
    targets = find_attention_targets(texts, [SCENE])
    assert targets.answers.tolist() == [[0, 12 + 7, 0]]


def test_words_outside_the_encoder_are_no_positions_but_contain_the_answer() -> None:
    text = span("what is left of the orange cross ? red circle", start=0, num_encoded=8)
    targets = find_attention_targets([[text]], [SCENE])
    assert targets.mentions.tolist() == [[0, 6, 1]]
    assert targets.answers.tolist() == [[0, 7, 0]]


def test_attention_on_the_right_words_costs_nothing_and_elsewhere_much() -> None:
    torch.manual_seed(0)
    words = dense_description(SCENE, 13).split()
    start = len(words)
    targets = find_attention_targets(
        [[span("is the orange cross above the red circle ? yes", start)]], [SCENE]
    )
    size = start + 10
    states = [torch.randn(1, size, 16, requires_grad=True) for _ in range(3)]
    right = [torch.zeros(1, 3, size, size) for _ in range(3)]
    for (_, end, item), words_of in zip(targets.mentions.tolist(), (slice(7, 13), slice(1, 7)), strict=True):
        assert {words[k] for k in range(words_of.start, words_of.stop)} >= {SCENE.objects[item].color}
        right[1][0, 0, end, words_of] = 1 / 6
    _, second, first = targets.comparisons[0].tolist()
    right[2][0, 1, second, first] = 1.0
    probes = AttentionProbes(16)
    losses = probes.losses(states, right, targets)
    assert losses["lookup"].item() < 1e-5
    assert losses["compare"].item() == 0
    wrong = probes.losses(states, [weights.flip(-1) for weights in right], targets)
    assert wrong["lookup"].item() > 5
    assert wrong["compare"].item() > 5
    torch.autograd.backward(losses["attributes"] + losses["order"])
    touched = states[1].grad[0].abs().sum(1).nonzero().flatten().tolist()  # type: ignore[index]
    assert touched == sorted(end for _, end, _ in targets.mentions.tolist())
    assert states[2].grad[0].abs().sum(1).nonzero().flatten().tolist() == [second]  # type: ignore[index]
