"""Export of scenes with their annotations: `00000.png …` and `scenes.jsonl`, one row for each image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from training.world.captions import listing_caption, sample_caption
from training.world.questions import QUESTION_TYPES, sample_question
from training.world.rendering import render_scene
from training.world.scenes import Scene, Split, iter_scenes

_NUM_SAMPLED_CAPTIONS = 4


def write_scenes(directory: Path, seed: int, split: Split, count: int, image_size: int) -> None:
    """Render the first `count` scenes of a split into `directory` and write their annotations."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "scenes.jsonl").open("w", encoding="utf-8") as file:
        scenes = iter_scenes(seed, split, count)
        for index, scene in enumerate(tqdm(scenes, desc="scenes", total=count, mininterval=1)):
            name = f"{index:05d}.png"
            render_scene(scene, image_size).save(directory / name)
            rng = np.random.default_rng([seed, index])
            file.write(json.dumps({"image": name, **annotate_scene(scene, rng)}) + "\n")


def annotate_scene(scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    """Return a scene's objects, captions (the full listing first) and one question of each type.

    `x` and `y` are the centre of an object as fractions of the image side, from the left and from the top.
    """
    captions = [listing_caption(scene), *(sample_caption(scene, rng) for _ in range(_NUM_SAMPLED_CAPTIONS))]
    questions = [sample_question(scene, rng, question_type) for question_type in QUESTION_TYPES]
    keys = ("shape", "color", "size", "texture", "x", "y")
    return {
        "objects": [{key: getattr(item, key) for key in keys} for item in scene.objects],
        "background": scene.background,
        "captions": list(dict.fromkeys(captions)),
        "questions": [
            {"family": item.question_type, "question": item.question, "answer": item.answer}
            for item in questions
            if item is not None
        ],
    }
