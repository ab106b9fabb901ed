"""Rendering of scenes with Pillow: antialiased shapes with textures, and sensor noise."""

from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from training.world.scenes import BACKGROUNDS, COLORS, Scene, SceneObject

_SUPERSAMPLING = 4
_SHADE = 0.4  # brightness of stripes and dots / brightness of the paint


def render_scene(scene: Scene, image_size_px: int) -> Image.Image:
    """Render a scene as a square RGB image, with sensor noise from the scene's `noise_seed`."""
    side = image_size_px * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    for item in scene.objects:
        _draw_object(canvas, item)
    resized = canvas.resize((image_size_px, image_size_px), Image.Resampling.LANCZOS)
    rng = np.random.default_rng(scene.noise_seed)
    noise = rng.normal(0.0, rng.uniform(0.0, 8.0), (image_size_px, image_size_px, 3))
    pixels = np.asarray(resized, dtype=np.float32) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


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
    """Draw darker diagonal stripes over the whole paint; the object's mask crops them."""
    for offset in np.arange(-2 * radius, 2 * radius, 2 * stripe_width):
        x = center[0] + offset
        ends = [(x - radius, center[1] - radius), (x + radius, center[1] + radius)]
        draw.line(ends, fill=shade, width=max(1, int(0.6 * stripe_width)))


def _draw_dots(
    draw: ImageDraw.ImageDraw,
    center: tuple[float, float],
    radius: float,
    spacing: float,
    shade: tuple[int, int, int],
) -> None:
    """Draw darker dots on a square grid around the centre; the object's mask crops them."""
    num_dots = int(radius / spacing) + 1  # to each side of the centre
    dot_radius = 0.3 * spacing
    for row in range(-num_dots, num_dots + 1):
        for column in range(-num_dots, num_dots + 1):
            x, y = center[0] + column * spacing, center[1] + row * spacing
            draw.ellipse((x - dot_radius, y - dot_radius, x + dot_radius, y + dot_radius), fill=shade)


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
