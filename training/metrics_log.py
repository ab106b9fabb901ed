"""The metrics log of a phase: `metrics.jsonl`, TensorBoard events and `curves.png`."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """One row of figures for each logged step; a context manager that closes the TensorBoard writer.

    start: the step of the loaded checkpoint; rows of later steps are dropped.
    """

    def __init__(self, directory: Path, name: str, start: int) -> None:
        self._directory, self._name = directory, name
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        lines: Iterable[str] = self._path.read_text().splitlines() if self._path.exists() else ()
        rows = (json.loads(line) for line in lines if line.endswith("}"))  # a kill can cut the last line
        self._rows: list[dict[str, float]] = [row for row in rows if row["step"] <= start]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    @property
    def rows(self) -> Sequence[dict[str, float]]:
        """The figures of each logged step, with its `step`."""
        return self._rows

    def append(self, step: int, figures: dict[str, float]) -> None:
        """Write the figures of one step."""
        self._rows.append({"step": step, **figures})
        with self._path.open("a") as file:
            file.write(json.dumps(self._rows[-1]) + "\n")
        for name, value in figures.items():
            self._writer.add_scalar(f"{self._name}/{name}", value, step)

    def plot(self) -> None:
        """Plot all rows into `curves.png`."""
        plot_curves(self._rows, self._directory / "curves.png", title=self._name)


def plot_curves(rows: Sequence[dict[str, float]], path: Path, *, title: str) -> None:
    """Plot every figure of `rows` against its `step`, one panel for each name."""
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
