"""The command line: each command parses its arguments and makes one call.

Commands of one kind share a module, which puts them on `app`; `main` is the entry point.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from rich.console import Console

from palimpsest.cli import compare, data, export, measuring, plan, probe, studies, ui
from palimpsest.cli.app import app
from palimpsest.files import UserError

__all__ = ["app", "compare", "data", "export", "main", "measuring", "plan", "probe", "studies", "ui"]


def main() -> None:
    """Entry point: bad input ends with one sentence and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    _quiet_transformers()
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"palimpsest: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _quiet_transformers() -> None:
    """Its loading bars and notices would tear up our own progress; set before it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
