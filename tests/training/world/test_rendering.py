import numpy as np

from training.world.rendering import render_scene
from training.world.scenes import BACKGROUNDS, Scene, SceneObject, sample_scene


def test_the_same_seed_split_and_index_give_the_same_scene_and_pixels() -> None:
    first, second = (sample_scene(3, "unseen", 17) for _ in range(2))
    assert first == second
    assert render_scene(first, 64).tobytes() == render_scene(second, 64).tobytes()


def test_an_object_is_drawn_in_its_colour_at_its_place_on_its_background() -> None:
    item = SceneObject("circle", "red", "large", "solid", x=0.25, y=0.75, radius=0.18)
    pixels = np.asarray(render_scene(Scene((item,), "white", noise_seed=0), 100)).astype(int)
    assert np.abs(pixels[73:78, 23:28].mean(axis=(0, 1)) - (214, 40, 40)).max() < 12
    assert np.abs(pixels[5:20, 70:95].mean(axis=(0, 1)) - BACKGROUNDS["white"]).max() < 12
