"""What a run has come to, as tables for the terminal and as a page."""

from training.tiny.report.tables import format_report, markdown_row

__all__ = ["format_report", "markdown_row"]
