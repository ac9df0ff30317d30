"""The one typer application that every command is put on."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="palimpsest",
    help="What speech training writes over in a language model, and how to keep it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
