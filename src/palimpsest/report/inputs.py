"""What a report reads of a run directory, checked once, so that nothing after it has to ask again.

A report is also made of runs that failed half-way. So nothing here raises for a file that is absent or
damaged: every such thing is one line of `Inputs.missing`, which the report shows in one box.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import yaml
from typing_extensions import TypedDict

from palimpsest import records
from palimpsest.files import UserError
from palimpsest.records import MODALITIES, DeactivationRecord, Results, method_of
from palimpsest.report.public import public, without_paths
from palimpsest.rundir import STEP_FILE, models_in

METHOD_NAMES = {"base": "Base", "full": "Full-FT", "layer_lr": "Layer-LR", "lora": "LoRA"}
METHOD_ORDER = tuple(METHOD_NAMES)
TASK_NAMES = {"llama_questions": "Llama Questions", "web_questions": "Web Questions"}
MODALITY_NAMES = {"text": "T2T", "speech": "S2T", "cascade": "Cascade", "text_asr": "Transcript"}
MAIN_METRIC = "token_sequence_numbers"  # the scoring rule and the reduction that the claims are decided on;
MAIN_REDUCTION = "per_batch_abs"  # a run without them is shown by the first it has
OF_SEVERAL_RUNS = {"seeds", "seed_comparisons"}  # empty where every method was trained once
NO_RECORDS = "results.json has no records in “{}”."
POOLED = "pooled_comparisons"  # empty with one run of each method, or one task
SEED_LOSSES = "seed_losses"  # empty with one run of each method, or no loss that two runs have
OF_DRIFT = {"drift", "general_text", "general_text_comparisons"}  # of recipes that measure it
OF_FRONTIER = {"frontier", "equal_hearing", "predictors", "restoration"}  # of recipes with curves or a section drift
OF_SPEECH_TOKENS = {"speech_inputs", "importance_parts"}  # of recipes with methods that read speech tokens
# Voices are there where a task is spoken in several, embeddings where a model is given.
MAY_BE_EMPTY = (
    OF_SEVERAL_RUNS | OF_DRIFT | OF_FRONTIER | OF_SPEECH_TOKENS | {POOLED, SEED_LOSSES, "voices", "embeddings"}
)
OF_TUNED_SCORES = {"shift", "delta", "mask_overlap", "correlations"}
MAX_SAMPLES_BYTES = 64 * 2**20  # of one samples.jsonl
R = TypeVar("R", bound=Mapping[str, Any])  # a record


class _Scalars(TypedDict):
    """What every line of a samples.jsonl must have."""

    id: str
    question: str
    response: str
    n_new_tokens: int


class Sample(_Scalars):
    """One answered question of one method."""

    answers: list[str]
    verdicts: dict[str, bool]
    failed: bool


@dataclass(frozen=True)
class Inputs:
    """A run directory as read, without the folders of the machine. `samples` is keyed (method, task, modality)."""

    path: Path
    results: Results
    provenance: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    importance_maps: Mapping[tuple[str, str], npt.NDArray[np.float32]]  # (model, parameter) -> (rows, columns)
    delta_maps: Mapping[tuple[str, str], npt.NDArray[np.float32]]
    samples: dict[tuple[str, str, str], list[Sample]]
    missing: tuple[str, ...]
    drawings: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # figures.draw's


def read_inputs(run: Path, so_far: tuple[dict[str, Any], dict[str, Any]] | None = None) -> Inputs:
    """Read the run directory `run`.

    so_far: (results, provenance) of a run that is not finished and has no such files; what it lacks is to come, and is
    not called missing.

    Raises:
        UserError: `run` is not a folder.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a folder; give the run directory of a study.")
    missing: list[str] = []
    if so_far is None:
        results = _read_results(run / "results.json", missing)
        provenance = _read_mapping(run / "provenance.json", missing)
    else:
        results, provenance = _tables_of(so_far[0], "the results", missing), so_far[1]
    config = _read_mapping(run / "study.yaml", missing)
    left_out = {NO_RECORDS.format(table) for table in _not_asked_for(config)}
    missing = [line for line in missing if line not in left_out]
    if expected := _asked_for(config, results):
        missing += [NO_RECORDS.format(t) for t in sorted(expected) if not dict(results)[t]]
    return Inputs(
        path=run,
        results=results,
        provenance=public(provenance or {}),
        config=public(config or {}),
        config_text=yaml.safe_dump(public(config), sort_keys=False, allow_unicode=True) if config else "",
        importance_maps=_read_maps(run / "maps" / "importance.npz", missing),
        delta_maps=_read_maps(run / "maps" / "delta.npz", missing),
        samples=_read_samples(run, results, missing),
        missing=tuple(without_paths(line, run) for line in missing) if so_far is None else (),
    )


def _asked_for(config: dict[str, Any] | None, results: Results) -> set[str]:
    """The tables that only some recipes make, and this one does."""
    found: set[str] = set()
    several = at(config, "seeds")
    if isinstance(several, int) and several > 1:
        found |= {*OF_SEVERAL_RUNS, *({POOLED} if len({row["task"] for row in results["qa"]}) > 1 else ())}
    if isinstance(at(config, "drift"), dict):
        found |= OF_DRIFT if at(config, "drift", "general_text", "text") else {"drift"}
    return found


def _not_asked_for(config: dict[str, Any] | None) -> set[str]:
    """The tables that most recipes make, and this one does not."""
    found = set() if trains(config) else {"training"}
    if at(config, "evaluation", "probe") is False:
        found |= {"probe"}
    if not tuned_are_scored(config):
        found |= OF_TUNED_SCORES
    return found


def tuned_are_scored(config: Any) -> bool:
    """Whether the importance of any tuned model is estimated: of points of curves the recipe says it; with a gate or
    inserted layers it is not."""
    methods = at(config, "methods")
    if not isinstance(methods, dict) or not methods:
        return True
    scored = [it for it in methods.values() if at(it, "kind") != "inserted" and at(it, "gate") in (None, "none")]
    of_points = "importance" in (at(config, "frontier", "measure") or ())
    return any(of_points or not is_point(method) for method in scored)


def is_point(method: Any) -> bool:
    """Of a method in a recipe: whether it is a point of a curve and no more."""
    return at(method, "curve") is not None and at(method, "in_full") is not True


# ----------------------------------------------------------------------------------------------------------
# Order and names, the same everywhere in a report
# ----------------------------------------------------------------------------------------------------------
def method_key(method: str) -> tuple[int, str]:
    """Sort key: base and the paper's methods first, in its order; then the others by name; runs after their method."""
    method, number = method_of(method)
    if number:
        group, name = method_key(method)
        return group, f"{name}-seed{number:06d}"
    rank = rank_in_name(method)
    if rank is not None:
        return (len(METHOD_ORDER), f"{rank:06d}")
    return (METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER) + 1, method)


def method_name(method: str) -> str:
    method, number = method_of(method)
    if number:
        return f"{method_name(method)}, run {number + 1}"
    rank = rank_in_name(method)
    return METHOD_NAMES.get(method, method) if rank is None else f"LoRA rank {rank}"


def listed(names: Sequence[str]) -> str:
    """A, B and C."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def rank_in_name(method: str) -> int | None:
    """The rank in a name such as `lora_r8`."""
    match = re.fullmatch(r"lora_r(\d{1,6})", method)
    return int(match[1]) if match else None


def trains(config: Any) -> bool:
    """Whether the study of a configuration trains a model; where nobody knows, it does."""
    methods = at(config, "methods")
    kinds = [at(method, "kind") for method in methods.values()] if isinstance(methods, dict) else []
    return not kinds or any(kind not in ("given", "blend") for kind in kinds)


def model_name(inputs: Inputs) -> str | None:
    """The language model's name as provenance.json has it, None if it has none."""
    name = at(inputs.provenance, "models", "language_model", "name")
    return str(name) if name else None


def task_name(task: str) -> str:
    return TASK_NAMES.get(task, task)


def modality_key(modality: str) -> tuple[int, str]:
    return (MODALITIES.index(modality) if modality in MODALITIES else len(MODALITIES), modality)


def in_order(rows: Iterable[R], *keys: str) -> list[R]:
    """`rows` sorted by their values of `keys`, with methods, models and inputs in the report's order."""
    by: dict[str, Callable[[Any], Any]] = {"method": method_key, "model": method_key, "modality": modality_key}
    return sorted(rows, key=lambda row: [by[key](row[key]) if key in by else row[key] for key in keys])


def by_task(rows: Iterable[R]) -> list[R]:
    """`rows` with their tasks as they come, within a task by input and method."""
    rows = list(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(in_order(rows, "modality", "method"), key=lambda row: tasks.index(row["task"]))


def having(rows: Iterable[R], **wanted: Any) -> list[R]:
    """The rows that have the `wanted` values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def whole_models(records: Iterable[DeactivationRecord], scope: str) -> list[DeactivationRecord]:
    """The records of the unchanged models, which stand in every scope: those of one, or all where it has none."""
    whole = having(records, condition="base")
    return having(whole, scope=scope) or whole


def at(value: Any, *keys: str) -> Any:
    """The value under nested `keys`, None where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def flat(value: Any, limit: int | None = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Nested mappings as (dotted key, value) rows in their order; values cut after `limit` characters."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, limit, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for index, item in enumerate(value):
            yield from flat(item, limit, (*path, str(index)))
    elif path:
        written = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield ".".join(path), written if limit is None or len(written) <= limit else f"{written[:limit]} …"


def main_metric(results: Results) -> str:
    """The scoring rule of the summary and the main tables: the one the run compared its methods by."""
    if results["comparisons"]:
        return results["comparisons"][0]["metric"]
    metrics = [row["metric"] for row in results["qa"]]
    return MAIN_METRIC if MAIN_METRIC in metrics or not metrics else metrics[0]


def main_reduction(results: Results) -> str:
    """The reduction of the importance scores in the summary and the layer figures."""
    reductions = [row["reduction"] for row in results["layers"]]
    return MAIN_REDUCTION if MAIN_REDUCTION in reductions or not reductions else reductions[0]


def text_layers(results: Results) -> list[records.LayerRecord]:
    """The records of the layer figures: text input, whole layers, the main reduction."""
    return having(results["layers"], modality="text", kind="all", reduction=main_reduction(results))


def text_shifts(results: Results) -> list[records.ShiftRecord]:
    """How far the text importance moved over the layers from the base's, by the main reduction."""
    wanted = {"reference": "base", "modality": "text", "measure": "jensen_shannon"}
    return having(results["shift"], reduction=main_reduction(results), **wanted)


def peak_layer(rows: list[records.LayerRecord], model: str) -> int:
    """The layer with the largest share of the model's importance, by its number from 0."""
    return max(having(rows, model=model), key=lambda row: row["share"])["layer"]


def methods_in(results: Results) -> list[str]:
    """Every method named anywhere in the records, in the report's order."""
    trained = {row["method"] for row in (*results["qa"], *results["training"], *results["delta"])}
    return sorted(trained | {row["model"] for row in results["layers"]}, key=method_key)


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------
def _read_mapping(path: Path, missing: list[str]) -> dict[str, Any] | None:
    """The mapping in a JSON or YAML file; None, with a line in `missing`, where there is none."""
    with _reading(path.name, missing):
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        if isinstance(value, dict):
            return value
        missing.append(f"{path.name} does not hold a mapping.")
    return None


@contextmanager
def _reading(where: str, missing: list[str]) -> Iterator[None]:
    """Makes a line in `missing` of a file that is absent or damaged."""
    try:
        yield
    except FileNotFoundError:
        missing.append(f"{where} is not there.")
    except (OSError, ValueError, EOFError, yaml.YAMLError, zipfile.BadZipFile, zlib.error) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()[:160]
        missing.append(f"{where} cannot be read ({reason}).")


def _read_results(path: Path, missing: list[str]) -> Results:
    return _tables_of(_read_mapping(path, missing), path.name, missing)


def _tables_of(raw: dict[str, Any] | None, name: str, missing: list[str]) -> Results:
    if raw is not None and raw.get("schema") != records.SCHEMA:
        missing.append(
            f"{name} says schema {raw.get('schema')!r}, this version reads {records.SCHEMA}; "
            "what it does not know is left out."
        )
    types = get_type_hints(Results)
    tables: dict[str, list[Any]] = {}
    for table in records.RESULT_TABLES:
        (record,) = get_args(types[table])
        rows = None if raw is None else raw.get(table)
        tables[table] = []
        if rows is None or rows == []:
            needed = {  # tables that only some runs have
                "speech_tests": any(row["modality"] == "speech" for row in tables.get("qa", [])),
                "probe_comparisons": any(row["model"] != "base" for row in tables.get("probe", [])),
            }
            if raw is not None and table not in MAY_BE_EMPTY and needed.get(table, True):
                missing.append(NO_RECORDS.format(table))
            continue
        if not isinstance(rows, list):
            missing.append(f"{name}: “{table}” is not a list.")
            continue
        tables[table], bad = _checked(rows, record)
        if bad:
            missing.append(f"{name}: {len(bad)} of {len(rows)} records of “{table}” are left out ({bad[0]}).")
    return cast(Results, tables)


def _checked(rows: Sequence[Any], record: type) -> tuple[list[Any], list[str]]:
    """The rows that are a `record`, and why each other one is not. Keys that only newer versions write are no fault."""
    from pydantic import TypeAdapter, ValidationError  # importing a report brings no pydantic

    checker = TypeAdapter[Any](record)
    good, bad = [], []
    for row in rows:
        try:
            checker.validate_python(row, strict=True)
            good.append(row)
        except ValidationError as error:
            if isinstance(row, dict):
                key = error.errors()[0]["loc"][0]
                bad.append(f"“{key}” is {str(row[key])[:40]!r}" if key in row else f"“{key}” is missing")
            else:
                bad.append("not a mapping")
    return good, bad


def _read_maps(path: Path, missing: list[str]) -> dict[tuple[str, str], npt.NDArray[np.float32]]:
    where = f"maps/{path.name}"
    maps: dict[tuple[str, str], npt.NDArray[np.float32]] = {}
    with _reading(where, missing), np.load(path, allow_pickle=False) as file:
        for key in sorted(file.files):
            model, separator, name = key.partition("|")
            array = file[key]
            if not separator or array.ndim != 2 or array.size == 0 or array.dtype.kind != "f":
                missing.append(f"{where}: “{key}” is not a two-dimensional map named MODEL|PARAMETER.")
            else:
                maps[model, name] = array.astype(np.float32)
    return maps


def _read_samples(run: Path, results: Results, missing: list[str]) -> dict[tuple[str, str, str], list[Sample]]:
    samples: dict[tuple[str, str, str], list[Sample]] = {}
    folders = models_in(run)
    for method in sorted(folders, key=method_key):
        for file in sorted(folders[method].glob("samples/*/samples.jsonl")):
            task, _, modality = file.parent.name.rpartition("-")
            where = str(file.relative_to(run))
            if not task:
                missing.append(f"{where}: the folder is not named TASK-MODALITY.")
                continue
            rows = _read_sample_file(file, where, missing)
            if rows:
                samples[method, task, modality] = rows
    expected = {(row["method"], row["task"], row["modality"]) for row in results["qa"]}
    for method, task, modality in sorted(expected - set(samples)):
        missing.append(f"There are no sample answers of {method} for {task}, {modality}.")
    if not samples and not expected:
        missing.append("There are no sample answers.")
    return samples


def _read_sample_file(file: Path, where: str, missing: list[str]) -> list[Sample]:
    if file.stat().st_size > MAX_SAMPLES_BYTES:
        missing.append(f"{where} is larger than {MAX_SAMPLES_BYTES // 2**20} MiB and is not shown.")
        return []
    lines: list[str] = []
    with _reading(where, missing):
        lines = file.read_text(encoding="utf-8").split("\n")
    rows = [_parsed(line) for line in lines if line.strip()]
    good, bad = _checked(rows, _Scalars)
    if bad:
        missing.append(f"{where}: {len(bad)} damaged lines are left out.")
    return [_sample(row) for row in good]


def _parsed(line: str) -> Any:
    with suppress(ValueError):
        return json.loads(line)


def _sample(row: dict[str, Any]) -> Sample:
    answers, verdicts = row.get("answers"), row.get("verdicts")
    return {
        "id": row["id"],
        "question": row["question"],
        "response": row["response"],
        "answers": [str(answer) for answer in answers] if isinstance(answers, list) else [],
        "verdicts": {str(key): value is True for key, value in verdicts.items()} if isinstance(verdicts, dict) else {},
        "n_new_tokens": row["n_new_tokens"],
        "failed": row.get("failed") is True,
    }


def missing_steps(run: Path, provenance: dict[str, Any]) -> list[str]:
    """A sentence for the steps begun and not finished, one for the finished steps that are not there any more."""
    # .working/ holds a step as STEP-FINGERPRINT with __ for /; see rundir.RunDir.step.
    begun = sorted({path.name.rpartition("-")[0].replace("__", "/") for path in run.glob(".working/*-*")})
    begun = [name for name in begun if not (run / name / STEP_FILE).is_file()]  # of a change that was undone
    done = at(provenance, "steps")
    gone = [name for name in done if not (run / name / STEP_FILE).is_file()] if isinstance(done, dict) else []
    sentences = {"Begun and not finished": begun, "Steps whose folder is gone, which a resumed study runs again": gone}
    return [f"{what}: {', '.join(steps)}." for what, steps in sentences.items() if steps]
