"""The report as one HTML file that needs no network: summary, tables, figures, samples, provenance.

Everything that comes from the run directory is escaped by the template engine. As a second fence the page
carries a content security policy under which only its own script runs and nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from palimpsest.files import write_text
from palimpsest.report import glance, paper, summary
from palimpsest.report import remake as commands
from palimpsest.report.across_runs import by_method
from palimpsest.report.figures import FIGURES, draw, first_pictures, may_lack, why_not
from palimpsest.report.inputs import Inputs, flat, main_metric, missing_steps, read_inputs, task_name, trains
from palimpsest.report.recordings import MAX_BYTES, Recording, read_recordings
from palimpsest.report.samples import MAX_QUESTIONS, samples_of
from palimpsest.report.style import to_inline_svg
from palimpsest.report.table import seconds, to_csv, to_html, to_latex, to_markdown
from palimpsest.report.tables import tables_of

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
        svg=lambda drawing: Markup(to_inline_svg(drawing)),  # matplotlib escapes the texts it is given
        to_html=to_html,
        to_markdown=to_markdown,
        to_latex=to_latex,
        to_csv=to_csv,
        **values,
    )


def write_page(path: Path, page: str) -> None:
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))  # JSON can hold lone surrogates


MAX_VALUE = 400  # characters of one provenance value
MAX_PAGE = 15 * 10**6  # bytes; recordings get what the rest of the page leaves
ROOM_TO_SAY_SO = 1000  # bytes, of the sentence on those that have no room


class Progress(Protocol):
    """How far a run is that is not finished; study/live.py has it."""

    @property
    def there(self) -> Sequence[str]: ...
    @property
    def to_come(self) -> Sequence[str]: ...
    @property
    def seconds_left(self) -> float: ...
    @property
    def untimed(self) -> Sequence[str]: ...
    @property
    def written(self) -> str: ...


def write_report(
    run: Path,
    out: Path | None = None,
    *,
    audio: bool = True,
    samples: bool = True,
    inputs: Inputs | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `out`, by default `run`/report.html, from what the run directory holds and return its path.

    Missing or damaged parts are named in the report, not raised. The same directory,
    called from the same place, gives the same bytes.

    Args:
        audio: put recordings of the spoken questions shown into the page.
        samples: show questions and answers; False leaves out the recordings too.
        inputs: what `read_inputs` gave for `run`, where that was read already.
        progress: of a run that is not finished: the page says what is there and what is to come, instead of missing.

    Raises:
        UserError: `run` is not a folder.
    """
    path = out or run / "report.html"
    page = render(read_inputs(run) if inputs is None else inputs, audio=audio, samples=samples, progress=progress)
    write_page(path, page)
    return path


def render(inputs: Inputs, *, audio: bool = True, samples: bool = True, progress: Progress | None = None) -> str:
    """The page as text."""
    every_run, inputs = inputs, by_method(inputs)
    drawings = {name: drawing for name in FIGURES if (drawing := draw(name, every_run)) is not None}
    questions = samples_of(inputs) if samples else {}
    encoded: dict[Path, Recording] = {}
    recordings = read_recordings(inputs, questions, audio, encoded=encoded)
    not_drawn = {name: why_not(name, inputs) for name in FIGURES if name not in drawings}
    page_with = partial(
        render_page,
        "report.html.j2",
        name=inputs.path.resolve().name,
        run=inputs.path,
        opening=glance.opening(inputs),
        numbers=glance.numbers_of(inputs),
        pictures=first_pictures(inputs),
        scale=summary.scale(inputs),
        points=[it for it in summary.points_of(inputs) if progress is None or summary.is_known(it)],
        progress=progress,
        duration=lambda left: seconds(left) if left >= 60 else f"{left:.0f} s",
        missing=[]
        if progress is not None
        else [
            *inputs.missing,
            *missing_steps(inputs.path, inputs.provenance),
            *recordings.missing,
            *(why for name, why in not_drawn.items() if not may_lack(name, inputs)),
        ],
        training_note=not_drawn.get("retention" if trains(inputs.config) else "training"),
        tables=tables_of(inputs, every_run),
        drawings=drawings,
        samples=questions,
        show_samples=samples,
        task_name=task_name,
        audio=audio,
        max_audio=MAX_BYTES,
        max_page=MAX_PAGE,
        max_questions=MAX_QUESTIONS,
        metric=main_metric(inputs.results),
        prompts=_prompts(inputs),
        provenance=_provenance(inputs),
        config=inputs.config_text,
    )
    page = page_with(recordings=recordings)
    excess = len(page.encode("utf-8", "replace")) - MAX_PAGE
    if excess > 0 and recordings.n_bytes:
        budget = max(0, recordings.n_bytes - excess - ROOM_TO_SAY_SO)
        recordings = read_recordings(inputs, questions, budget=budget, encoded=encoded)
        page = page_with(recordings=recordings)
    return page


def _prompts(inputs: Inputs) -> list[tuple[str, str]]:
    """What a model is given, as text and as speech, and what is supervised; none in runs of earlier versions."""
    prompts = inputs.provenance.get("prompts")
    return [(str(kind), str(text)) for kind, text in prompts.items()] if isinstance(prompts, dict) else []


def _provenance(inputs: Inputs) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled groups of rows: the many fingerprints of the steps apart from the rest."""
    rows = [row for row in flat(inputs.provenance, MAX_VALUE) if not row[0].startswith("prompts.")]
    steps = [row for row in rows if row[0].startswith("steps.")]
    return [
        ("Versions, hardware, models, data", [row for row in rows if row not in steps]),
        ("Fingerprints of the steps", steps),
    ]
