"""The figures of an evaluation as a Markdown table for each task."""

from collections.abc import Mapping

from training.metrics import Figures


def format_report(figures: Mapping[str, Figures]) -> str:
    """One table for each group of rows that share their columns, in the order of `figures`."""
    tables: list[list[str]] = []
    columns: list[str] = []
    for task, row in figures.items():
        if list(row) != columns:
            columns = list(row)
            tables.append([_line(["", *columns]), _line(["---"] * (len(columns) + 1))])
        tables[-1].append(_line([task, *(f"{value:.3f}" for value in row.values())]))
    return "\n\n".join("\n".join(table) for table in tables)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
