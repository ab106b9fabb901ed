import numpy as np

from training.world.captions import dense_words
from training.world.qa_turns import DENSE_PROMPT, sample_qa_turns
from training.world.scenes import iter_scenes
from training.world.truth import is_true_caption


def test_a_caption_comes_first_the_description_second_and_then_the_questions() -> None:
    rng = np.random.default_rng(0)
    for scene in iter_scenes(0, "train", 50):
        caption, dense, *questions = sample_qa_turns(scene, rng, 4)
        assert caption.prompt == ""
        assert is_true_caption(caption.answer, scene)
        assert (dense.prompt, dense.answer) == (DENSE_PROMPT, " ".join(dense_words(scene)))
        assert len(questions) == 4
        assert all(item.prompt.startswith("Question: ") for item in questions)
        assert all(item.prompt.endswith("? Answer:") for item in questions)
        assert (caption.weight, dense.weight, {item.weight for item in questions}) == (0.5, 0.5, {1.0})
