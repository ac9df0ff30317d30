"""How the scripts that print a plan's pairs and typed answers write numbers into the cells of a Markdown table."""

from __future__ import annotations

from palimpsest.report.table import p_value


def plain(value: float) -> str:
    """Three digits, with a true minus."""
    return f"{value:.3g}".replace("-", "−")


def signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def signed_interval(value: float, low: float, high: float) -> str:
    return f"{signed(value)} \\[{signed(low)} to {signed(high)}\\]"


def p_cell(value: float) -> str:
    return p_value(value).replace("<", r"\<")
