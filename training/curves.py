"""Loss curves of a phase as a picture."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_curves(rows: list[dict[str, float]], path: Path, *, title: str) -> None:
    """Draws every figure of `rows` (each with its `step`) against the step, one panel for each name."""
    names = [name for name in rows[-1] if name != "step"] if rows else []
    if not names:
        return
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=0.8)
        axes.set(title=f"{title}: {name}", xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
