"""Scenes of the synthetic world: one to four coloured shapes on a plain background.

Every scene is a pure function of `(seed, split, index)`, so a split is reproducible anywhere, and no two
splits share a random stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import dist
from typing import Literal, get_args

import numpy as np

Split = Literal["train", "unseen", "held-out", "recolored", "text-only"]
SPLITS: tuple[Split, ...] = get_args(Split)  # their order seeds the random streams
IMAGE_TEXT_SPLITS: tuple[Split, ...] = ("train", "unseen", "held-out")  # those with both images and texts

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (246, 138, 28),
    "yellow": (247, 220, 40),
    "green": (44, 160, 64),
    "cyan": (60, 205, 215),
    "blue": (40, 84, 220),
    "purple": (136, 56, 184),
    "pink": (246, 148, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
    "tan": (200, 176, 136),
    "navy": (20, 28, 84),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
TEXTURES = ("solid", "striped", "dotted")
SIZES: dict[str, tuple[float, float]] = {
    "small": (0.095, 0.115),
    "large": (0.165, 0.19),
}  # radius / image side
MAX_OBJECTS = 4

UNNAMED = "unnamed"  # a colour that no text names

# One pair of each colour that no training image or text contains; each colour and each shape still occurs.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("orange", "circle"),
        ("yellow", "cross"),
        ("green", "square"),
        ("cyan", "triangle"),
        ("blue", "diamond"),
        ("purple", "circle"),
        ("pink", "square"),
    }
)
TRAIN_PAIRS = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS)

# All words of texts; the additional ones occur in text-only scenes, and no image shows them.
TEXT_COLORS = (*COLORS, "brown", "lime", "teal", "gold", "silver", "violet", "beige", "maroon")
TEXT_SHAPES = (*SHAPES, "heart", "ring", "arrow", "moon", "oval", "hexagon")
TEXT_PAIRS = tuple((c, s) for c in TEXT_COLORS for s in TEXT_SHAPES if (c, s) not in HELD_OUT_PAIRS)

_OBJECT_COUNT_PROBABILITIES = (0.15, 0.25, 0.3, 0.3)  # of one to four objects
_COLOR_JITTER = 16  # maximal deviation from a colour's RGB in each channel, of 255
_MAX_PLACEMENTS = 200  # attempts to place an object before the scene is sampled again
_GAP = 0.02  # free space between two objects / image side


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: centre (`x`, `y`) and half width `radius`, as fractions of the image side.

    paint: its RGB colour; None: the RGB of `COLORS`.
    """

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    paint: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of one image; `objects` are sorted from left to right, no two share colour and shape."""

    objects: tuple[SceneObject, ...]
    background: str
    noise_seed: int


def sample_scene(seed: int, split: Split, index: int) -> Scene:
    """Sample scene `index` of a split.

    `train` and `unseen` never contain a pair of `HELD_OUT_PAIRS`; a `held-out` scene contains exactly one. In
    a `recolored` scene the paint of every object is sampled from all of RGB and its colour is `UNNAMED`; no
    paint is nearest to a colour that its shape is held out in. A `text-only` scene has pairs of `TEXT_PAIRS`
    and cannot be rendered.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    while True:
        objects = _place_objects(rng, _sample_pairs(rng, split), split)
        if objects is not None:
            break
    ordered = tuple(sorted(objects, key=lambda item: item.x))
    return Scene(ordered, _choice(rng, tuple(BACKGROUNDS)), int(rng.integers(2**31)))


def iter_scenes(seed: int, split: Split, count: int) -> Iterator[Scene]:
    """Iterate over the first `count` scenes of a split, in order."""
    return (sample_scene(seed, split, index) for index in range(count))


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _sample_pairs(rng: np.random.Generator, split: Split) -> list[tuple[str, str]]:
    count = int(rng.choice(MAX_OBJECTS, p=_OBJECT_COUNT_PROBABILITIES)) + 1
    allowed = TEXT_PAIRS if split == "text-only" else TRAIN_PAIRS
    indices = rng.choice(len(allowed), size=count, replace=False)
    pairs = [allowed[i] for i in indices]
    if split == "held-out":
        held_out = sorted(HELD_OUT_PAIRS)
        pairs[int(rng.integers(count))] = held_out[int(rng.integers(len(held_out)))]
    return pairs


def _place_objects(
    rng: np.random.Generator, pairs: list[tuple[str, str]], split: Split
) -> list[SceneObject] | None:
    """Place one object for each pair so that no two touch; None if an object does not fit."""
    placed: list[SceneObject] = []
    for color, shape in pairs:
        name, paint = _sample_color(rng, color, shape, split)
        size = _choice(rng, tuple(SIZES))
        texture = _choice(rng, TEXTURES)
        radius = float(rng.uniform(*SIZES[size]))
        for _ in range(_MAX_PLACEMENTS):
            x, y = (float(v) for v in rng.uniform(radius + _GAP, 1 - radius - _GAP, 2))
            if all(np.hypot(x - o.x, y - o.y) > radius + o.radius + _GAP for o in placed):
                placed.append(SceneObject(shape, name, size, texture, x, y, radius, paint))
                break
        else:
            return None
    return placed


def _sample_color(
    rng: np.random.Generator, color: str, shape: str, split: Split
) -> tuple[str, tuple[int, int, int] | None]:
    """Sample an object's colour name and its paint."""
    if split == "text-only":
        return color, None
    if split == "recolored":
        return UNNAMED, _sample_paint(rng, shape)
    return color, _jitter(rng, COLORS[color])


def _jitter(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = np.clip(rgb + rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1, 3), 0, 255)
    return int(red), int(green), int(blue)


def _sample_paint(rng: np.random.Generator, shape: str) -> tuple[int, int, int]:
    while True:
        red, green, blue = (int(channel) for channel in rng.integers(256, size=3))
        nearest = min(COLORS, key=lambda name: dist(COLORS[name], (red, green, blue)))
        if (nearest, shape) not in HELD_OUT_PAIRS:
            return red, green, blue
