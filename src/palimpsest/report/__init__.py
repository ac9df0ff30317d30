"""The report of a finished (or half-finished) run directory: figures, tables, one HTML file.

Reads files only. Imports of this package nothing but `files`, `records` and `rundir`, and never torch.
"""

from __future__ import annotations

from palimpsest.report.figures import write_figure, write_figures
from palimpsest.report.page import write_report

__all__ = ["write_figure", "write_figures", "write_report"]
