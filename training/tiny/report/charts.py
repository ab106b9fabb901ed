"""Loss curves as inline SVG in the colours of the page, for its light and dark themes."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_TEXT_COLOR, _CURVE_COLOR = "#010203", "#040506"  # replaced by CSS colours, which matplotlib does not accept
_CSS_COLORS = {_TEXT_COLOR: "currentColor", _CURVE_COLOR: "var(--accent)"}
_WINDOW = 15  # logged steps in the running mean
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def draw_curves(history: Sequence[Mapping[str, float]], phase: str) -> list[Markup]:
    """Plot every figure of a phase against the step: its `loss`, then the terms of the loss."""
    names = [name for name in history[-1] if name not in ("step", "loss")] if history else []
    terms = [_draw_chart(history, name, phase, title=name.replace("_", " ")) for name in names]
    return [_draw_chart(history, "loss", phase, title=phase), *terms] if history else []


def _draw_chart(history: Sequence[Mapping[str, float]], name: str, phase: str, *, title: str) -> Markup:
    rows = [row for row in history if name in row]
    steps, values = [row["step"] for row in rows], [row[name] for row in rows]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{phase} {name}"}):
        figure = Figure(figsize=(3.4, 2.3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.plot(steps, values, color=_CURVE_COLOR, linewidth=0.8, alpha=0.35)
        axes.plot(steps, _running_mean(values), color=_CURVE_COLOR, linewidth=1.6)
        axes.set_title(title, color=_TEXT_COLOR, fontsize=10)
        axes.tick_params(colors=_TEXT_COLOR, labelsize=8, length=2)
        axes.grid(color=_TEXT_COLOR, alpha=0.12)
        axes.set_facecolor("none")
        axes.spines[:].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    label = f"{phase}: {name}, {values[0]:.3g} to {values[-1]:.3g} over {steps[-1]:.0f} steps"
    return _inline(buffer.getvalue(), f"{phase}-{name}", label)


def _running_mean(values: Sequence[float]) -> list[float]:
    radii = [min(_WINDOW // 2, k, len(values) - 1 - k) for k in range(len(values))]  # smaller at the ends
    return [float(np.mean(values[k - r : k + r + 1])) for k, r in enumerate(radii)]


def _inline(svg: str, name: str, label: str) -> Markup:
    """Turn an SVG document into an HTML element: without header, and with ids unique in the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(xmlns(:\w+)?|width|height)="[^"]*"', "", svg, count=4)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for placeholder, color in _CSS_COLORS.items():
        svg = svg.replace(placeholder, color)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(label)}"', 1))
