import numpy as np

from training.world.captions import listing_caption, sample_text
from training.world.pairs import true_matches
from training.world.scenes import iter_scenes
from training.world.truth import is_true_caption


def test_a_text_matches_every_scene_it_is_true_of() -> None:
    rng = np.random.default_rng(0)
    scenes = list(iter_scenes(0, "train", 64))
    first = scenes[0].objects[0]
    texts = [f"{'an' if first.color == 'orange' else 'a'} {first.color} {first.shape}"]
    texts += [sample_text(scene, rng) for scene in scenes[1:32]]
    texts += [listing_caption(scene) for scene in scenes[32:]]
    matches = true_matches(scenes, texts)
    assert matches.diagonal().all()
    assert matches.tolist() == [[is_true_caption(text, scene) for text in texts] for scene in scenes]
    assert matches[:, 0].sum() > 1, "a short caption is true of several scenes"
