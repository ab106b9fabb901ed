"""Scenes on disk: `00000.png …` and `scenes.jsonl`, one line for each image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from training.world.captions import listing_caption, sample_caption
from training.world.questions import FAMILIES, sample_question
from training.world.scenes import Scene, Split, iter_scenes, render_scene

_SAMPLED_CAPTIONS = 4


def write_scenes(directory: Path, seed: int, split: Split, count: int, image_size: int) -> None:
    """Draws the first `count` scenes of a split into `directory`, with what is true of each."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "scenes.jsonl").open("w", encoding="utf-8") as file:
        scenes = iter_scenes(seed, split, count)
        for index, scene in enumerate(tqdm(scenes, desc="scenes", total=count, mininterval=1)):
            name = f"{index:05d}.png"
            render_scene(scene, image_size).save(directory / name)
            rng = np.random.default_rng([seed, index])
            file.write(json.dumps({"image": name, **describe_scene(scene, rng)}) + "\n")


def describe_scene(scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    """What is true of a scene: its objects, captions (the full listing first) and a question of each family.

    `x` and `y` are the centre of an object as fractions of the image side, from the left and from the top.
    """
    captions = [listing_caption(scene), *(sample_caption(scene, rng) for _ in range(_SAMPLED_CAPTIONS))]
    questions = [sample_question(scene, rng, family) for family in FAMILIES]
    keys = ("shape", "color", "size", "texture", "x", "y")
    return {
        "objects": [{key: getattr(item, key) for key in keys} for item in scene.objects],
        "background": scene.background,
        "captions": list(dict.fromkeys(captions)),
        "questions": [
            {"family": item.family, "question": item.question, "answer": item.answer}
            for item in questions
            if item is not None
        ],
    }
