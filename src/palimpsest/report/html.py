"""The report as one HTML file that needs no network: summary, tables, figures, samples, provenance.

Everything that comes from the run directory is escaped by the template engine. As a second fence the page
carries a content security policy under which only its own script runs and nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from palimpsest import paper
from palimpsest.report import analysis_tables, evaluation_tables, structure_tables, summary, tables
from palimpsest.report.figures import FIGURES, OPTIONAL, draw, why_not
from palimpsest.report.formats import DASH, Table, to_csv, to_html, to_latex, to_markdown
from palimpsest.report.inputs import (
    MODALITY_NAMES,
    Inputs,
    Sample,
    at,
    lora_rank,
    main_metric,
    main_reduction,
    method_key,
    method_name,
    modality_key,
    read_inputs,
    task_name,
)
from palimpsest.report.style import Drawing, to_inline_svg
from palimpsest.rundir import write_text

TEMPLATES = Path(__file__).parent / "templates"
MAX_QUESTIONS = 20  # of a task, whose answers are shown
MAX_CHARACTERS = 600  # of one answer
MAX_VALUE = 400  # characters of one provenance value


@dataclass(frozen=True)
class Answer:
    """One cell of the samples: what a model wrote, and whether it counted as right."""

    response: str
    verdict: str  # right | wrong | failed | unscored
    cut: int  # characters not shown


@dataclass(frozen=True)
class Question:
    """A question with the answers of every method (rows) by input (columns); None where there is none."""

    text: str
    gold: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Answer | None, ...]], ...]


def write_report(run: Path) -> Path:
    """Write `run`/report.html from what the run directory holds and return its path.

    Missing or damaged parts are named in the report, not raised. The same directory gives the same bytes.

    Raises:
        UserError: `run` is not a folder.
    """
    path = run / "report.html"
    page = render(read_inputs(run))
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))  # JSON can hold lone surrogates
    return path


def render(inputs: Inputs) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    drawings = {name: drawing for name in FIGURES if (drawing := draw(name, inputs)) is not None}
    not_drawn = {name: why_not(name, inputs) for name in FIGURES if name not in drawings}
    return environment.get_template("report.html.j2").render(
        name=inputs.path.resolve().name,
        scale=summary.scale(inputs),
        points=summary.points_of(inputs),
        missing=[*inputs.missing, *(why for name, why in not_drawn.items() if name not in OPTIONAL)],
        not_drawn=not_drawn,
        tables=tables_of(inputs),
        drawings=drawings,
        samples={task_name(task): questions for task, questions in samples_of(inputs).items()},
        max_questions=MAX_QUESTIONS,
        metric=main_metric(inputs.results),
        provenance=_provenance(inputs),
        config=inputs.config_text,
        citation=paper.CITATION,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        styles=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        svg=_svg,
        to_html=to_html,
        to_markdown=to_markdown,
        to_latex=to_latex,
        to_csv=to_csv,
    )


def _svg(drawing: Drawing) -> Markup:
    return Markup(to_inline_svg(drawing))  # matplotlib escapes the texts it is given


def tables_of(inputs: Inputs) -> dict[str, Table]:
    """Every table that has a row of this run; one with the paper's numbers alone would pass for a result."""
    results = inputs.results
    metric = main_metric(results)
    model = summary.model_name(inputs) or DASH
    every = [
        tables.deactivation(results["deactivation"]),
        tables.accuracy(results["qa"], metric, model, _tuned_on_text(inputs)),
        tables.accuracy_details(results["qa"]),
        evaluation_tables.floors(results["qa_floors"], metric),
        tables.lora_rank(results["qa"], metric, _ranks(inputs), model),
        tables.comparisons(results["comparisons"]),
        evaluation_tables.perplexity(results["perplexity"]),
        tables.claims(results["claims"]),
        analysis_tables.probe(results["probe"]),
        analysis_tables.layers(results["layers"], "text", main_reduction(results)),
        analysis_tables.shift(results["shift"]),
        analysis_tables.clustering(results["clustering"]),
        structure_tables.clustering_summary(results["clustering_summary"]),
        analysis_tables.delta(results["delta"]),
        structure_tables.mask_overlap(results["mask_overlap"]),
        structure_tables.correlations(results["correlations"]),
        analysis_tables.timings(results["timings"]),
    ]
    return {table.name: table for table in every if len(table.rows) > len(table.published)}


def _tuned_on_text(inputs: Inputs) -> list[str]:
    """The methods that study.yaml trains on questions given as text."""
    methods = {row["method"] for row in inputs.results["qa"]}
    return [method for method in sorted(methods) if at(inputs.config, "methods", method, "modality") == "text"]


def _ranks(inputs: Inputs) -> dict[str, int]:
    """The rank of every LoRA method: what study.yaml says, else what its name says."""
    ranks: dict[str, int] = {}
    for method in sorted({row["method"] for row in inputs.results["qa"]}):
        options = at(inputs.config, "methods", method)
        configured = at(options, "rank") if at(options, "kind") == "lora" else None
        rank = configured if isinstance(configured, int) else lora_rank(method)
        if rank is not None:
            ranks[method] = rank
    return ranks


def samples_of(inputs: Inputs) -> dict[str, list[Question]]:
    """The first questions of each task with the answers of every method, side by side."""
    metric = main_metric(inputs.results)
    tasks = sorted({task for _, task, _ in inputs.samples}, key=_task_order(inputs))
    shown: dict[str, list[Question]] = {}
    for task in tasks:
        files = {(method, modality): rows for (method, of, modality), rows in inputs.samples.items() if of == task}
        methods = sorted({method for method, _ in files}, key=method_key)
        modalities = sorted({modality for _, modality in files}, key=modality_key)
        by_id = {key: {row["id"]: row for row in rows} for key, rows in files.items()}
        first: dict[str, Sample] = {}
        for rows in files.values():
            for row in rows:
                first.setdefault(row["id"], row)
        shown[task] = [
            Question(
                text=sample["question"],
                gold=" · ".join(sample["answers"]),
                columns=tuple(MODALITY_NAMES.get(modality, modality) for modality in modalities),
                rows=tuple(
                    (
                        method_name(method),
                        tuple(
                            _answer(by_id.get((method, modality), {}).get(identifier), metric)
                            for modality in modalities
                        ),
                    )
                    for method in methods
                ),
            )
            for identifier, sample in list(first.items())[:MAX_QUESTIONS]
        ]
    return shown


def _task_order(inputs: Inputs) -> Callable[[str], tuple[int, str]]:
    """Tasks in the order of the accuracy records."""
    order = list(dict.fromkeys(row["task"] for row in inputs.results["qa"]))
    return lambda task: (order.index(task) if task in order else len(order), task)


def _answer(sample: Sample | None, metric: str) -> Answer | None:
    if sample is None:
        return None
    if sample["failed"]:
        verdict = "failed"
    elif metric not in sample["verdicts"]:
        verdict = "unscored"
    else:
        verdict = "right" if sample["verdicts"][metric] else "wrong"
    response = sample["response"]
    return Answer(response[:MAX_CHARACTERS], verdict, max(0, len(response) - MAX_CHARACTERS))


def _provenance(inputs: Inputs) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled groups of rows: the many fingerprints of the steps apart from the rest."""
    rows = list(_flat(inputs.provenance))
    steps = [row for row in rows if row[0].startswith("steps.")]
    return [
        ("Versions, hardware, models, data", [row for row in rows if row not in steps]),
        ("Fingerprints of the steps", steps),
    ]


def _flat(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Nested provenance as (dotted key, value) rows, in the order of the file."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, (*path, str(index)))
    elif path:
        written = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield ".".join(path), written if len(written) <= MAX_VALUE else f"{written[:MAX_VALUE]} …"
