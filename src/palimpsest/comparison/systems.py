"""What can be compared: the answers and losses in study run directories and in folders of `palimpsest evaluate`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from palimpsest.evaluation import judge
from palimpsest.evaluation.answers import SampleRow, models_in_folder, read_finished, verdicts_by_id
from palimpsest.evaluation.perplexity import Perplexity, read_losses
from palimpsest.evaluation.scoring import METRICS
from palimpsest.evaluation.tasks import text_version
from palimpsest.files import UserError, read_json
from palimpsest.records import BASE, method_of
from palimpsest.rundir import STUDY, models_in, run_labels

Key = tuple[str, str]  # (task, modality)
Matrix = NDArray[np.float64]  # (training runs, questions)
NOT_OF_WEIGHTS = {  # keys of a method and of section training that say nothing of what is learned
    *("checkpoint_every", "eval_every", "report_to", "gradient_checkpointing", "liger", "compile", "in_full", "curve"),
}


@dataclass(frozen=True)
class Answers:
    """One system's verdicts on one task and modality, by one metric; one mapping id -> right? per training seed."""

    version: str  # of the task
    metric_version: str
    max_new_tokens: int
    verdicts: tuple[Mapping[str, bool], ...]
    file: Path
    recordings: Mapping[str, str] = field(default_factory=dict)  # hashes of what was heard, by question


@dataclass(frozen=True)
class Losses:
    data: str  # fingerprint of the examples
    result: Perplexity
    file: Path


@dataclass(frozen=True)
class System:
    """A model that was evaluated: a method of a study, or the model of an evaluation folder."""

    label: str
    run: Path
    method: str | None  # None for an evaluation folder
    answers: Mapping[Key, Answers]
    losses: Mapping[Key, Losses]
    arithmetic: frozenset[str] = frozenset()  # that its answers and losses were computed in
    of_models: tuple[Path, ...] = ()  # of an evaluation folder, a file of each model that it has answers or losses of
    text_of_base: bool = False  # only an adaptor was trained: the language model is the base's by construction


def read_systems(runs: Sequence[Path], metric: str, methods: Sequence[str] | None = None) -> list[System]:
    """Every system in `runs`, in their order, studies' bases first; with `methods`, only those of the studies.

    A single run's systems are called by their method; with several runs the run's name stands before it.

    Raises:
        UserError: a folder that is neither kind, a method no run has, damaged or unfinished samples, an unknown
            metric.
    """
    if metric not in METRICS and metric != judge.METRIC:
        raise UserError(f"There is no metric {metric!r}; use one of {', '.join((*METRICS, judge.METRIC))}.")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("The same run is given twice; give each run once.")
    systems: list[System] = []
    for run, prefix in zip(runs, run_labels(runs), strict=True):
        found = _folders(run)
        if not found:
            raise UserError(f"{run} holds no answers; give the run directory of a study or the --out of evaluate.")
        adaptors = _adaptor_methods(run)
        for method, folder in found.items():
            label = prefix if method is None else method if len(runs) == 1 else f"{prefix}/{method}"
            if method is None or methods is None or method in methods:
                system = _read(label, run, method, folder, metric)
                unchanged = method is not None and method_of(method)[0] in adaptors
                systems.append(replace(system, text_of_base=unchanged))
    require_methods(systems, methods)
    return systems


def require_methods(systems: Sequence[System], methods: Sequence[str] | None) -> None:
    absent = [method for method in methods or [] if method not in {system.method for system in systems}]
    if absent:
        raise UserError(f"No run has a method {absent[0]!r}; correct --methods.")


def matrix(verdicts: Sequence[Mapping[str, bool]]) -> Matrix:
    """(training runs, questions), questions by sorted id so that nothing depends on the rows' order."""
    ids = sorted(verdicts[0])
    if any(one.keys() != verdicts[0].keys() for one in verdicts):
        raise UserError("The training runs of a method did not answer the same questions; run the study again.")
    return np.array([[one[i] for i in ids] for one in verdicts], dtype=np.float64)


def pool_seeds(systems: Sequence[System]) -> list[System]:
    """Systems of the same method as one with several seeds; a name's ending -seed3 or _seed3 does not count.

    Raises:
        UserError: seeds that were not evaluated on the same tasks and versions, an evaluation folder, or studies whose
            recipes have the same seed or train a method in different ways.
    """
    groups: dict[str, list[System]] = {}
    for system in systems:
        if system.method is None:
            raise UserError(f"{system.run} is not a study, so its model has no training seeds; leave out --seeds.")
        groups.setdefault(re.sub(r"[-_]seed[-_]?\d+$", "", system.method), []).append(system)
    pooled = []
    for name, members in groups.items():
        first = members[0]
        if name != BASE:
            _require_seeds(members)
        answers: dict[Key, Answers] = {}
        for key in dict.fromkeys(key for member in members for key in member.answers):
            parts = [member.answers[key] for member in members if key in member.answers]
            mine = parts[0]
            if len(parts) < len(members):
                without = next(member.run for member in members if key not in member.answers)
                raise UserError(
                    f"{without} has no answers of {name} to {key[0]} from {key[1]}, which another seed has; finish the "
                    "studies, with the same tasks and modalities."
                )
            for part in parts:
                require_same(mine, part, key)
            answers[key] = replace(mine, verdicts=tuple(v for part in parts for v in part.verdicts))
        losses = first.losses if len(members) == 1 else {}
        pooled.append(replace(first, label=name, method=name, answers=answers, losses=losses))
    return pooled


def _require_seeds(members: Sequence[System]) -> None:
    """Raise UserError where the runs of a method are, by their studies' recipes, no training runs of one method.

    A key that only one recipe has is passed over: it may be of another version, which writes out other defaults.
    """
    first: tuple[Path, Mapping[str, Any]] | None = None
    seen: dict[Any, Path] = {}
    for run, member in {member.run: member for member in members}.items():
        recipe = _recipe(run)
        own = _section(_section(recipe, "methods"), method_of(str(member.method))[0])
        if not own or own.get("kind") == "given":  # of a given model a study says nothing of how it was trained
            continue
        if (seed := recipe.get("seed")) in seen:
            raise UserError(
                f"{seen[seed]} and {run} have the same seed, {seed}, so their runs of {member.method} are no two "
                "training runs; give studies of different seeds."
            )
        seen[seed] = run
        trained = {**own, **{f"training.{key}": value for key, value in _section(recipe, "training").items()}}
        first = first or (run, trained)
        both = [key for key in trained if key in first[1] and key.removeprefix("training.") not in NOT_OF_WEIGHTS]
        if differing := sorted(key for key in both if trained[key] != first[1][key]):
            raise UserError(
                f"{first[0]} and {run} train {member.method} in different ways ({', '.join(differing)}); they are two "
                "methods, and no two seeds of one: leave out --seeds."
            )


def _section(recipe: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = recipe.get(key)
    return found if isinstance(found, Mapping) else {}


def require_same(a: Answers, b: Answers, key: Key, what: str = "the same questions and scoring rules") -> None:
    """Raise UserError unless the two were asked the same task, scored by the same metric version, at equal length."""
    task, modality = key
    if a.version != b.version or a.metric_version != b.metric_version:
        raise UserError(
            f"{a.file} and {b.file} cannot be compared on {task} from {modality}: task version {a.version} and metric "
            f"version {a.metric_version} there, {b.version} and {b.metric_version} here; evaluate both on {what}."
        )
    if a.max_new_tokens != b.max_new_tokens:
        raise UserError(
            f"{a.file} and {b.file} cannot be compared: answers of up to {a.max_new_tokens} and {b.max_new_tokens} "
            "tokens; evaluate both with the same --max-new-tokens."
        )
    for verdicts in (*a.verdicts, *b.verdicts):
        if verdicts.keys() != a.verdicts[0].keys():
            raise UserError(f"{a.file} and {b.file} do not hold answers to the same questions; evaluate both again.")


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------
def _folders(run: Path) -> dict[str | None, Path]:
    """Method -> folder of a study; None -> the folder itself for an evaluation."""
    if not run.is_dir():
        raise UserError(f"{run} is not a folder; give the run directory of a study or the --out of evaluate.")
    found: dict[str | None, Path] = {m: f for m, f in models_in(run).items() if _sample_files(f) or _loss_files(f)}
    return found or ({None: run} if _sample_files(run) or _loss_files(run) else {})


def _recipe(run: Path) -> dict[str, Any]:
    """That of a study; {} where there is none, or none that can be read."""
    try:
        recipe = yaml.safe_load((run / STUDY).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _adaptor_methods(run: Path) -> set[str]:
    """The methods of a study that train nothing but the adaptor, by its recipe; none where there is no readable one."""
    try:
        return {name for name, method in _recipe(run)["methods"].items() if method["kind"] == "adaptor"}
    except (LookupError, TypeError, AttributeError):
        return set()


def _sample_files(folder: Path) -> list[Path]:
    flat = [file for file in folder.glob("samples-*.jsonl") if not file.name.endswith(".judge.jsonl")]
    return sorted([*flat, *folder.glob("samples/*/samples.jsonl")])


def _loss_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("losses-*.jsonl"), *folder.glob("perplexity/losses-*.jsonl")])


def _read(label: str, run: Path, method: str | None, folder: Path, metric: str) -> System:
    answers: dict[Key, Answers] = {}
    arithmetic = set()
    for file in _sample_files(folder):
        binding, rows = read_finished(file)
        arithmetic.add(str(binding.get("compute", "float32")))
        key = (str(binding["task"]), str(binding["modality"]))
        version, verdicts = _verdicts(file, rows, metric, str(binding["metric_version"]), key[1])
        task = str(binding["task_version"])
        task = text_version(task) if key[1] == "text" else task  # what was typed does not depend on recordings
        heard = {row["id"]: hash for row in rows if (hash := row.get("recording")) is not None}
        answers[key] = Answers(task, version, binding["max_new_tokens"], (verdicts,), file, heard)
    losses: dict[Key, Losses] = {}
    for file in _loss_files(folder):
        binding, result = read_losses(file)
        arithmetic.add(str(binding.get("compute", "float32")))
        losses[str(binding["task"]), str(binding["modality"])] = Losses(str(binding["data"]), result, file)
    files = list(models_in_folder(folder).values()) if method is None else []
    return System(label, run, method, answers, losses, frozenset(arithmetic), of_models=tuple(files))


def _verdicts(
    file: Path, rows: Sequence[SampleRow], metric: str, version: str, modality: str
) -> tuple[str, Mapping[str, bool]]:
    """(metric version, id -> right?); a judge's verdicts lie beside the samples."""
    if metric in METRICS:
        missing = next((row["id"] for row in rows if metric not in row["verdicts"]), None)
        if missing is not None:
            raise UserError(f"{file} has no verdict of {metric} on {missing!r}; evaluate again.")
        return version, verdicts_by_id(rows, metric)
    results = file.parent / f"results-{modality}.json"
    said = read_json(results).get("judge") if results.exists() else None
    if said is None:
        raise UserError(f"{file} was not judged by a language model; run evaluate with --judge-url and --judge-model.")
    known = judge.read_cache(file.with_suffix(".judge.jsonl"), said["version"])
    unjudged = [row["id"] for row in judge.to_judge(rows) if judge.shown(row) not in known]
    if unjudged:  # an answer that nobody judged is not a wrong one
        raise UserError(
            f"{file}: the judge {said['version']} has no verdict on {len(unjudged)} of {len(rows)} answers, the first "
            f"{unjudged[0]!r}; run evaluate with the same judge again, it asks about these alone."
        )
    return said["version"], {row["id"]: known.get(judge.shown(row), False) for row in rows}
