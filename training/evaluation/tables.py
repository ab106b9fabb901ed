"""Tables of figures for the terminal and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from training.evaluation.metrics import Figures


@dataclass(frozen=True, slots=True)
class Table:
    """Figures with the same columns; each row has a name and as many figures."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]


def group_rows(figures: Mapping[str, Figures]) -> list[Table]:
    """Group consecutive rows with the same columns into tables, in the order of `figures`."""
    return [
        Table(columns, tuple((name, tuple(row.values())) for name, row in rows))
        for columns, rows in groupby(figures.items(), key=lambda item: tuple(item[1]))
    ]


def format_tables(figures: Mapping[str, Figures]) -> str:
    """Format the tables of `group_rows` in Markdown."""
    return "\n\n".join(_format_table(table) for table in group_rows(figures))


def markdown_row(cells: Sequence[str]) -> str:
    """Format one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _format_table(table: Table) -> str:
    head = [markdown_row(["", *table.columns]), markdown_row(["---"] * (len(table.columns) + 1))]
    rows = [markdown_row([name, *(f"{value:.3f}" for value in values)]) for name, values in table.rows]
    return "\n".join([*head, *rows])
