"""Curves as SVG that sits inside a page and takes the page's colours, in light and dark alike."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_INK, _LINE = "#010203", "#040506"  # stand for the colours of the page, which matplotlib cannot name
_PAGE_COLORS = {_INK: "currentColor", _LINE: "var(--accent)"}
_SMOOTHED = 15  # logged steps around a point that the strong line is the mean of
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def draw_curves(history: Sequence[Mapping[str, float]], phase: str) -> list[Markup]:
    """A chart of every figure of a phase against the step: its `loss`, then what that is made of."""
    names = [name for name in history[-1] if name not in ("step", "loss")] if history else []
    parts = [_draw(history, name, phase, title=name.replace("_", " ")) for name in names]
    return [_draw(history, "loss", phase, title=phase), *parts] if history else []


def _draw(history: Sequence[Mapping[str, float]], name: str, phase: str, *, title: str) -> Markup:
    rows = [row for row in history if name in row]
    steps, values = [row["step"] for row in rows], [row[name] for row in rows]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{phase} {name}"}):
        figure = Figure(figsize=(3.4, 2.3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.plot(steps, values, color=_LINE, linewidth=0.8, alpha=0.35)
        axes.plot(steps, _running_mean(values), color=_LINE, linewidth=1.6)
        axes.set_title(title, color=_INK, fontsize=10)
        axes.tick_params(colors=_INK, labelsize=8, length=2)
        axes.grid(color=_INK, alpha=0.12)
        axes.set_facecolor("none")
        axes.spines[:].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    label = f"{phase}: {name}, {values[0]:.3g} to {values[-1]:.3g} over {steps[-1]:.0f} steps"
    return _inline(buffer.getvalue(), f"{phase}-{name}", label)


def _running_mean(values: Sequence[float]) -> list[float]:
    reach = [min(_SMOOTHED // 2, k, len(values) - 1 - k) for k in range(len(values))]  # less at the ends
    return [float(np.mean(values[k - r : k + r + 1])) for k, r in enumerate(reach)]


def _inline(svg: str, name: str, label: str) -> Markup:
    """An SVG document as an element of a page: without its head, its ids unlike those of any other."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(xmlns(:\w+)?|width|height)="[^"]*"', "", svg, count=4)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for stand_in, color in _PAGE_COLORS.items():
        svg = svg.replace(stand_in, color)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(label)}"', 1))
