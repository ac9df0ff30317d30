"""The report that grows with the study: RUN/report.html is there after the first measurement and is written again.

It has the tables of the models that are finished, the layers of every model whose importance is there, and in a box on
top what is done, what is to come and how long it may take. It is made in memory: results.json, the steps and their
fingerprints know nothing of it, and the study's end writes the page that stays. What cannot be drawn stops nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from palimpsest.config import StudyConfig
from palimpsest.files import read_json, to_line
from palimpsest.parallel import is_main
from palimpsest.progress import Reporter
from palimpsest.records import BASE, RESULT_TABLES, SCHEMA, method_of
from palimpsest.rundir import STEP_FILE, RunDir, folder_of, tokens_folder

if TYPE_CHECKING:
    from palimpsest.report.inputs import Inputs

FIRST_AFTER = 10.0  # s of work: a study of seconds has its report soon enough
EVERY = 30.0  # s between two pages, and at most a share of the time goes into them:
SHARE = 1 / 30
Step = Callable[..., None]  # of run.steps_of
TO_CHECKPOINT = ("train", "given", "blend")
TOP_LEVEL = ("data", "features", "analysis", "maps")


def name_of(step: Step) -> str:
    """The folder in the run directory of a step of `run.steps_of`."""
    function, asked = (step.func, step.keywords) if isinstance(step, partial) else (step, {})
    name = str(getattr(function, "__name__", ""))
    if name == "tokens":
        return tokens_folder(asked.get("k"))
    if name in TOP_LEVEL:
        return name
    if name in TO_CHECKPOINT:
        name = "checkpoint"
    elif name == "answers":
        name = f"samples/{asked['task']}-{asked['modality']}"
    return f"{folder_of(asked.get('model', BASE))}/{name}{'_other' * asked.get('other', False)}"


@dataclass(frozen=True)
class Progress:
    """What stands in the box of an unfinished run's page."""

    there: tuple[str, ...]  # steps
    to_come: tuple[str, ...]
    seconds_left: float  # of the steps to come, as their like took
    untimed: tuple[str, ...]  # kinds of steps to come whose like has not been done yet
    written: str  # time of day; empty where nobody works on it


class LivePage:
    """Writes the page between the steps of a study that works; of several processes the first writes."""

    def __init__(self, run: RunDir, config: StudyConfig, steps: Sequence[Step], seed: int, reporter: Reporter) -> None:
        self.run, self.config, self.steps, self.seed, self.reporter = run, config, steps, seed, reporter
        self.names = [name_of(step) for step in steps]
        self.started = time.monotonic()
        self.written: float | None = None  # when the last page was
        self.seconds = 0.0  # that it took
        self.failed = False

    def after(self, n_done: int) -> None:
        """`n_done` steps are done. Does nothing where a page was written a short time ago, or the last one is near."""
        if not is_main() or self.failed or n_done >= len(self.steps) - 1 or not self._due():
            return
        if f"{BASE}/importance" not in self.names[:n_done]:
            return
        started = time.monotonic()
        try:
            self._write(n_done)
        except Exception as error:  # noqa: BLE001 - a page on the way is worth no study
            self.failed = True
            reason = str(error).partition("\n")[0][:160]
            self.reporter.note(
                f"the report on the way cannot be drawn ({type(error).__name__}: {reason}); the study goes on."
            )
        self.written, self.seconds = time.monotonic(), time.monotonic() - started

    def _due(self) -> bool:
        now = time.monotonic()
        if self.written is None:
            return now - self.started >= FIRST_AFTER
        return now - self.written >= max(EVERY, self.seconds / SHARE)

    def _write(self, n_done: int) -> None:
        from palimpsest.report.glance import base_importance
        from palimpsest.report.page import write_report

        done = self.names[:n_done]
        inputs = inputs_so_far(self.run, self.config, self.steps, done, self.seed)
        progress = progress_of(self.run, self.names, done, time.strftime("%H:%M:%S"))
        page = write_report(self.run.path, samples=False, inputs=inputs, progress=progress)
        if self.written is None:
            about = base_importance(inputs)
            self.reporter.note(f"{about} The report grows with the study: {page}".strip())


# ---------------------------------------------------------------------------------------------------------------------
# What is there
# ---------------------------------------------------------------------------------------------------------------------
def inputs_so_far(run: RunDir, config: StudyConfig, steps: Sequence[Step], done: Collection[str], seed: int) -> Inputs:
    """What a report reads, of the steps that are `done`."""
    from palimpsest.report.inputs import read_inputs

    tables = json.loads(to_line(tables_so_far(run, config, steps, done, seed)))  # as a file would have them
    manifest = run.path / "data" / "train.jsonl"
    provenance: dict[str, Any] = {"models": {"language_model": {"name": config.models.language_model}}}
    if "data" in done and manifest.is_file():
        provenance["data"] = {"train": {"n": sum(1 for line in manifest.read_bytes().splitlines() if line.strip())}}
    given = [name for name, method in config.methods.items() if method.kind == "given"]
    provenance["models"]["given"] = {name: {} for name in given if f"{folder_of(name)}/checkpoint" in done}
    return read_inputs(run.path, so_far=(tables, provenance))


def tables_so_far(
    run: RunDir, config: StudyConfig, steps: Sequence[Step], done: Collection[str], seed: int
) -> dict[str, Any]:
    """results.json of the models whose every step is done; layers of all that have their importance."""
    from palimpsest.study.results import collect

    needed: dict[str, list[str]] = {}
    for step in steps:
        if isinstance(step, partial) and "model" in step.keywords:
            needed.setdefault(step.keywords["model"], []).append(name_of(step))
    finished = [model for model, names in needed.items() if _all(names, done)]
    tables: dict[str, Any] = {"schema": SCHEMA} | {table: [] for table in RESULT_TABLES}
    if BASE in finished:
        methods = {name: method for name, method in config.methods.items() if name in finished}
        seeds = config.seeds if _all(needed, finished) else 1
        tables = collect(run, config.model_copy(update={"methods": methods, "seeds": seeds}), done, seed)
    if "analysis" not in done:
        tables["claims"] = []  # what decides them is to come
    if not tables["layers"]:
        for model in needed:
            if method_of(model)[1] == 0 and f"{folder_of(model)}/importance" in done:
                tables["layers"] += _layers(run.path / folder_of(model) / "importance", model)
    return tables


def _all(wanted: Collection[str], done: Collection[str]) -> bool:
    return all(name in done for name in wanted)


def _layers(folder: Path, model: str) -> list[Any]:
    """By per_batch_abs, whose sums every score folder has; the scores of single weights are not read."""
    from palimpsest.analysis.layers import ModelLayers, distribution_of_sums, layer_records
    from palimpsest.importance.scores import Scores

    scores = Scores.open(folder)
    sums = scores.batch_totals.sum(axis=0) / scores.batch_tokens.sum()
    sizes = {item["name"]: math.prod(item["shape"]) for item in scores.metadata["parameters"]}
    distribution = distribution_of_sums(dict(zip(scores.names, map(float, sums), strict=True)), sizes)
    return [*layer_records(ModelLayers(model, distribution), modality="text", reduction="per_batch_abs")]


# ---------------------------------------------------------------------------------------------------------------------
# What is to come
# ---------------------------------------------------------------------------------------------------------------------
def progress_of(run: RunDir, steps: Sequence[str], done: Collection[str], written: str = "") -> Progress:
    """Time left: of every step to come the mean of the finished steps of its kind, of whatever model."""
    took: dict[str, list[float]] = {}
    for name in done:
        took.setdefault(kind_of(name), []).append(float(read_json(run.path / name / STEP_FILE)["seconds"]))
    to_come = [name for name in steps if name not in done]
    known = [fmean(took[kind_of(name)]) for name in to_come if kind_of(name) in took]
    untimed = dict.fromkeys(kind_of(name) for name in to_come if kind_of(name) not in took)
    return Progress(tuple(name for name in steps if name in done), tuple(to_come), sum(known), tuple(untimed), written)


def kind_of(name: str) -> str:
    """A step without its model: methods/lora/samples/facts-text is samples/facts-text."""
    parts = name.split("/")
    return "/".join(parts[2:] if parts[0] == "methods" else parts[1:] if parts[0] == BASE else parts)
