"""The synthetic world: scenes of coloured shapes, drawn with Pillow, the same for the same seed.

A scene holds one to four objects on a plain background. Every scene is a pure function of `(seed, split,
index)`, so a split can be made again anywhere, and no two splits share a random stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, dist, pi, sin
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "unseen", "held-out", "recolored", "told"]
SPLITS: tuple[Split, ...] = get_args(Split)
PICTURED_SPLITS: tuple[Split, ...] = ("train", "unseen", "held-out")  # those with both images and texts

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

# One pair for each colour that no training image or text ever shows; each colour and each shape still occurs.
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

# Words of which a language model reads and that no image shows.
TOLD_COLORS = (*COLORS, "brown", "lime", "teal", "gold", "silver", "violet", "beige", "maroon")
TOLD_SHAPES = (*SHAPES, "heart", "ring", "arrow", "moon", "oval", "hexagon")
TOLD_PAIRS = tuple((c, s) for c in TOLD_COLORS for s in TOLD_SHAPES if (c, s) not in HELD_OUT_PAIRS)

_SUPERSAMPLING = 4
_OBJECT_COUNTS = (0.15, 0.25, 0.3, 0.3)  # how often a scene has one to four objects
_COLOR_JITTER = 16  # a colour is painted up to this much off in each channel, of 255
_MAX_PLACEMENTS = 200  # tries to place an object clear of the others before the scene is begun again
_SHADE = 0.4  # stripes and dots are this much of the paint's brightness
_GAP = 0.02  # free space between two objects, of the image side


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One drawn object: centre (`x`, `y`) and half width `radius`, as fractions of the image side.

    paint: its RGB colour; None paints it as `COLORS` has it.
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
    """What one image shows; `objects` are sorted from left to right and no two share colour and shape."""

    objects: tuple[SceneObject, ...]
    background: str
    noise_seed: int


def sample_scene(seed: int, split: Split, index: int) -> Scene:
    """The scene number `index` of a split.

    `train` and `unseen` never hold a pair of `HELD_OUT_PAIRS`; a `held-out` scene holds exactly one. In a
    `recolored` scene the paint of every object is drawn from all of RGB and its colour is `UNNAMED`; no paint
    is nearest to a colour that its shape is held out in. A `told` scene has pairs of `TOLD_PAIRS`: it is for
    texts only and cannot be drawn.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    while True:
        objects = _place_objects(rng, _sample_pairs(rng, split), split)
        if objects is not None:
            break
    ordered = tuple(sorted(objects, key=lambda item: item.x))
    return Scene(ordered, _choice(rng, tuple(BACKGROUNDS)), int(rng.integers(2**31)))


def iter_scenes(seed: int, split: Split, count: int) -> Iterator[Scene]:
    """The first `count` scenes of a split, in order."""
    return (sample_scene(seed, split, index) for index in range(count))


def render_scene(scene: Scene, image_size_px: int) -> Image.Image:
    """Draws a scene as a square RGB image, with sensor noise from the scene's own seed."""
    side = image_size_px * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    for item in scene.objects:
        _draw_object(canvas, item)
    small = canvas.resize((image_size_px, image_size_px), Image.Resampling.LANCZOS)
    rng = np.random.default_rng(scene.noise_seed)
    noise = rng.normal(0.0, rng.uniform(0.0, 8.0), (image_size_px, image_size_px, 3))
    pixels = np.asarray(small, dtype=np.float32) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _sample_pairs(rng: np.random.Generator, split: Split) -> list[tuple[str, str]]:
    count = int(rng.choice(MAX_OBJECTS, p=_OBJECT_COUNTS)) + 1
    allowed = TOLD_PAIRS if split == "told" else TRAIN_PAIRS
    chosen = rng.choice(len(allowed), size=count, replace=False)
    pairs = [allowed[i] for i in chosen]
    if split == "held-out":
        held = sorted(HELD_OUT_PAIRS)
        pairs[int(rng.integers(count))] = held[int(rng.integers(len(held)))]
    return pairs


def _place_objects(
    rng: np.random.Generator, pairs: list[tuple[str, str]], split: Split
) -> list[SceneObject] | None:
    """Places one object for each pair so that no two touch; None where it does not fit."""
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
    """What an object's colour is called, and the paint that shows it."""
    if split == "told":
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


def _draw_object(canvas: Image.Image, item: SceneObject) -> None:
    side = canvas.width
    center, radius = (item.x * side, item.y * side), item.radius * side
    mask = Image.new("L", canvas.size, 0)
    _draw_outline(ImageDraw.Draw(mask), item.shape, center, radius)
    rgb = item.paint or COLORS[item.color]
    shade = (int(_SHADE * rgb[0]), int(_SHADE * rgb[1]), int(_SHADE * rgb[2]))
    paint = Image.new("RGB", canvas.size, rgb)
    if item.texture == "striped":
        _draw_stripes(ImageDraw.Draw(paint), center, radius, 0.035 * side, shade)
    elif item.texture == "dotted":
        _draw_dots(ImageDraw.Draw(paint), center, radius, 0.055 * side, shade)
    left, top = int(center[0] - radius), int(center[1] - radius)
    box = (left, top, int(center[0] + radius) + 1, int(center[1] + radius) + 1)
    canvas.paste(paint.crop(box), box, mask.crop(box))


def _draw_stripes(
    draw: ImageDraw.ImageDraw,
    center: tuple[float, float],
    radius: float,
    stripe_width: float,
    shade: tuple[int, int, int],
) -> None:
    """Darker diagonal bars over the whole paint; the object's outline cuts them."""
    for offset in np.arange(-2 * radius, 2 * radius, 2 * stripe_width):
        x = center[0] + offset
        line = [(x - radius, center[1] - radius), (x + radius, center[1] + radius)]
        draw.line(line, fill=shade, width=max(1, int(0.6 * stripe_width)))


def _draw_dots(
    draw: ImageDraw.ImageDraw,
    center: tuple[float, float],
    radius: float,
    spacing: float,
    shade: tuple[int, int, int],
) -> None:
    """Darker dots on a square grid around the centre; the object's outline cuts them."""
    reach = int(radius / spacing) + 1
    dot = 0.3 * spacing
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            x, y = center[0] + column * spacing, center[1] + row * spacing
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=shade)


def _draw_outline(draw: ImageDraw.ImageDraw, shape: str, center: tuple[float, float], radius: float) -> None:
    (x, y), r = center, radius
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        draw.rectangle((x - 0.86 * r, y - 0.86 * r, x + 0.86 * r, y + 0.86 * r), fill=255)
    elif shape == "cross":
        arm = 0.34 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
    else:
        draw.polygon([(x + r * dx, y + r * dy) for dx, dy in _POLYGONS[shape]], fill=255)


def _regular(corners: int) -> list[tuple[float, float]]:
    return [(sin(2 * pi * k / corners), -cos(2 * pi * k / corners)) for k in range(corners)]


def _star() -> list[tuple[float, float]]:
    radii = (1.0, 0.42)
    return [(radii[k % 2] * sin(pi * k / 5), -radii[k % 2] * cos(pi * k / 5)) for k in range(10)]


_POLYGONS = {"triangle": [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)], "star": _star(), "diamond": _regular(4)}
