"""What all pages share: the template engine, the style, the one script and the policy under which only it may run."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from palimpsest import paper
from palimpsest.report import commands
from palimpsest.report.formats import to_csv, to_html, to_latex, to_markdown
from palimpsest.report.style import Drawing, to_inline_svg
from palimpsest.rundir import write_text

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, **values: Any) -> str:
    """The page as text; everything but the style, the script and the figures is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        citation=paper.CITATION,
        commands=commands,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        styles=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        svg=_svg,
        to_html=to_html,
        to_markdown=to_markdown,
        to_latex=to_latex,
        to_csv=to_csv,
        **values,
    )


def write_page(path: Path, page: str) -> None:
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))  # JSON can hold lone surrogates


def _svg(drawing: Drawing) -> Markup:
    return Markup(to_inline_svg(drawing))  # matplotlib escapes the texts it is given
