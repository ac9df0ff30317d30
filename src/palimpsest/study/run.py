"""A study from data to report: the steps in order, each written once and skipped when nothing it depends on changed.

data → features → base (importance, own text, deactivation, probe, answers) → each training run (train, and the same)
→ analysis → results.json, figures, report.html; between the steps a report of what is there (live.py)
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING

from palimpsest.config import StudyConfig, load_config, require_same_recipe
from palimpsest.files import locked
from palimpsest.parallel import is_main, joined, share, wait_for_all, world_size
from palimpsest.progress import Reporter
from palimpsest.records import BASE
from palimpsest.rundir import STEP_FILE, STUDY
from palimpsest.study import steps
from palimpsest.study.live import LivePage, Progress, inputs_so_far, name_of, progress_of
from palimpsest.study.workspace import Workspace, keeping_memory
from palimpsest.training.remedies import OWN

if TYPE_CHECKING:
    from palimpsest.report.inputs import Inputs

Step = Callable[[Workspace], None]  # writes one folder of the run directory


def run_study(config: StudyConfig, folder: Path, reporter: Reporter | None = None, *, changed: bool = False) -> Path:
    """Run or resume a study in `folder`; returns the path of its report.

    One process, or one group of processes, works in a folder at a time. A folder that holds a study of another
    configuration is refused, unless `changed`: then the steps that the change touches run again. Raises UserError for
    bad input, before the long work where it can be known. Several processes (torchrun, accelerate launch) speak,
    encode, train, score and evaluate together; reading the data, the analysis and the report are done by rank 0.

    Stopped by Ctrl-C or SIGTERM it says that it continues, and ends with KeyboardInterrupt or SystemExit(143).
    """
    with joined(), locked(folder) if is_main() else nullcontext(), sigterm_raised():
        if is_main() and not changed:
            require_same_recipe(config, folder / STUDY)
        study = Study(config, folder, reporter)
        try:
            return study.run()
        except (KeyboardInterrupt, SystemExit):
            study.ws.reporter.note(f"stopped; the same command continues in {folder}.")
            raise


@contextmanager
def sigterm_raised() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit(143), as Ctrl-C raises KeyboardInterrupt; a second one kills.

    Does nothing in a thread, where the program handles SIGTERM itself, and beside other processes: one that waits for
    another in a collective would not end.
    """
    alone = world_size() == 1 and current_thread() is main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Study:
    def __init__(self, config: StudyConfig, folder: Path, reporter: Reporter | None = None) -> None:
        self.steps = list(steps_of(config))
        n_steps = len(self.steps) + 2  # models are looked at before them, the report is written after
        self.ws = Workspace(config, folder, reporter or Reporter(n_steps, quiet=not is_main()))

    def check(self) -> None:
        steps.check(self.ws)

    def run(self) -> Path:
        started = time.time()
        if is_main():
            self.check()
        wait_for_all()
        seed = self.ws.seed("results")
        live = LivePage(self.ws.dir, self.ws.config, self.steps, seed, self.ws.reporter)
        with keeping_memory():
            for n_done, step in enumerate(self.steps, 1):
                step(self.ws)
                if not self.ws.done[-1].skipped:
                    live.after(n_done)
        self.ws.forget()
        return share(steps.report(self.ws, started) if is_main() else None)


def unfinished(run: Path) -> tuple[Inputs, Progress]:
    """Of a study that was stopped, what the report reads: the results of its finished steps, and what is to come.

    Raises UserError where study.yaml cannot be used or what a step wrote cannot be read.
    """
    study = Study(load_config(run / STUDY), run, Reporter(0, quiet=True))
    names = [name_of(step) for step in study.steps]
    done = [name for name in names if (run / name / STEP_FILE).is_file()]
    ws = study.ws
    return inputs_so_far(ws.dir, ws.config, study.steps, done, ws.seed("results")), progress_of(ws.dir, names, done)


def steps_of(config: StudyConfig) -> Iterator[Step]:
    """Every step that is skipped when it was done before, in order."""
    yield steps.data
    if config.models.encoder is not None:
        yield steps.features
    for k in config.token_sizes:
        yield steps.tokens if k is None else partial(steps.tokens, k=k)
    yield partial(steps.importance, model=BASE)
    yield partial(steps.importance, model=BASE, other=True)
    if any(method.weighs_by("fisher") for method in config.methods.values()):
        yield steps.fisher
    if config.drift is not None:
        yield steps.own_text
    trained = [method for method in config.methods.values() if method.trains]
    if any(config.answers_of(method) == "own" for method in trained):
        yield steps.own_answers
    if any(method.replay is not None and method.replay.text == OWN for method in trained):
        yield steps.replay_text
    for model in (BASE, *config.runs):
        if model != BASE:
            makes = {"given": steps.given, "blend": steps.blend}.get(config.runs[model].kind, steps.train)
            yield partial(makes, model=model)
            if config.measures(model, "importance"):
                yield partial(steps.importance, model=model)
            if config.has_parts(model):
                yield partial(steps.importance_parts, model=model)
        if config.measures(model, "deactivation"):
            yield partial(steps.deactivation, model=model)
        yield partial(steps.perplexity, model=model)
        if config.evaluation.probe and config.measures(model, "probe"):
            yield partial(steps.probe, model=model)
        for measure in config.drift_measures(model):
            yield partial(steps.drift if measure == "drift" else steps.general_text, model=model)
        for task in config.evaluation.tasks:
            for modality in config.asked_as(model):
                yield partial(steps.answers, model=model, task=task.name, modality=modality)
    yield steps.analysis
    yield steps.maps
