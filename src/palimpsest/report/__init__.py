"""The report of a finished (or half-finished) run directory: figures, tables, one HTML file.

Reads files only. Imports of this package nothing but `files`, `records` and `rundir`, and never torch.
"""
