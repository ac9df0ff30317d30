"""From the steps' own files to results.json: every table as flat records, and what follows from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from palimpsest.analysis.analyse import TABLES
from palimpsest.analysis.claims import claim_records
from palimpsest.analysis.correlation import correlation_records
from palimpsest.comparison.by_voice import RECORDING, voice_records
from palimpsest.comparison.families import corrected
from palimpsest.comparison.frontier import Measure, frontier_tables, hearing_measures, places_of, text_measures
from palimpsest.comparison.general_text_pairs import general_text_comparisons
from palimpsest.comparison.loss_pairs import seed_losses
from palimpsest.comparison.pairs import compare
from palimpsest.comparison.predictors import predictor_records
from palimpsest.comparison.probe_pairs import probe_comparisons
from palimpsest.comparison.restoration import restoration_records, restored_in
from palimpsest.comparison.speech_inputs import speech_input_records
from palimpsest.comparison.training_runs import (
    Verdicts,
    pooled_comparisons,
    runs_of,
    seed_comparisons,
    seed_records,
)
from palimpsest.comparison.understanding import speech_tests
from palimpsest.data.examples import read_manifest
from palimpsest.evaluation.answers import read_finished, summarise, verdicts_by_id
from palimpsest.evaluation.floors import floor_records, unrelated_by_question
from palimpsest.evaluation.general_text import read_text_losses
from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.evaluation.tasks import Task
from palimpsest.files import hash_value, read_json
from palimpsest.records import (
    BASE,
    MODALITIES,
    RESULT_TABLES,
    SCHEMA,
    ComparisonRecord,
)
from palimpsest.rundir import RunDir, folder_of, manifest_of, samples_of

if TYPE_CHECKING:
    from palimpsest.config import StudyConfig
    from palimpsest.training.methods import Method


def collect(run: RunDir, config: StudyConfig, steps: Collection[str], seed: int) -> dict[str, Any]:
    """The value of results.json for a run whose `steps` are done; `seed` is the bootstrap's."""
    names = [BASE, *config.runs]
    first_runs = [BASE, *config.methods]
    same = same_as_text(config)
    points = {name for name, method in config.methods.items() if method.is_point}
    tables: dict[str, Any] = {"schema": SCHEMA} | {table: [] for table in RESULT_TABLES}
    for name in names:
        folder = run.path / folder_of(name)
        if config.measures(name, "deactivation"):
            tables["deactivation"] += read_json(folder / "deactivation" / "records.json")
        if config.has_parts(name):
            tables["importance_parts"] += read_json(folder / "importance_parts" / "records.json")
        if config.evaluation.probe and config.measures(name, "probe"):
            tables["probe"] += read_json(folder / "probe" / "records.json")
        for measure in config.drift_measures(name):
            tables[measure] += read_json(folder / measure / "records.json")
        tables["perplexity"] += read_json(folder / "perplexity" / "records.json")
        if name != BASE and config.runs[name].trains:
            tables["training"] += read_json(folder / "checkpoint" / "training.json")
    if config.evaluation.probe:
        probed = [name for name in config.methods if config.measures(name, "probe")]
        measured = dict.fromkeys(probed, config.seeds if "probe" in config.seeds_measure else 1)
        tables["probe_comparisons"] = probe_comparisons(run.path, probed, measured, seed, same, points)
    if "general_text" in config.drift_measures(BASE):
        losses = {
            name: read_text_losses(run.path / folder_of(name) / "general_text/losses.jsonl")
            for name in first_runs
            if "general_text" in config.drift_measures(name)
        }
        text = tables["general_text"][0]["text"]
        tables["general_text_comparisons"] = general_text_comparisons(
            (BASE, losses.pop(BASE)), losses, text, same, points
        )
    for table in TABLES:
        # A study that is not finished has none yet.
        tables[table] = read_json(run.path / "analysis" / f"{table}.json") if "analysis" in steps else []

    comparisons: list[ComparisonRecord] = []
    right: dict[tuple[str, str], Verdicts] = {}
    by_chance: dict[str, dict[str, dict[str, float]]] = {}
    trained_on = {example.voice or RECORDING for example in read_manifest(manifest_of(run.path, "train"))}
    for task_config in config.evaluation.tasks:
        examples = read_manifest(manifest_of(run.path, f"task-{task_config.name}"))
        task = Task(task_config.name, tuple(examples))
        for modality in MODALITIES if config.evaluation.text_asr else MODALITIES[:3]:
            verdicts: dict[str, Mapping[str, bool]] = {}
            for name in names:
                # The base model's answers to transcripts are its cascade.
                asked = "cascade" if (name, modality) == (BASE, "text_asr") else modality
                file = samples_of(run.path, name, task.name, asked)
                # The recipe says in what modalities a model is asked; a file may be left from an earlier one.
                if asked not in config.asked_as(name):
                    continue
                _, rows = read_finished(file)
                tables["qa"] += summarise(rows, name, task, modality)
                tables["qa_floors"] += floor_records(rows, name, task, modality, seed)
                if modality == "speech":
                    responses, golds = [row["response"] for row in rows], [row["answers"] for row in rows]
                    chance = unrelated_by_question(responses, golds, PRIMARY, seed)
                    by_chance.setdefault(task.name, {})[name] = {rows[i]["id"]: of for i, of in chance.items()}
                verdicts[name] = verdicts_by_id(rows, PRIMARY)
            right[task.name, modality] = verdicts
            first = {name: verdicts[name] for name in first_runs if name in verdicts}
            if len(first) > 1:
                comparisons += compare(
                    first, task=task.name, modality=modality, metric=PRIMARY, seed=seed, points=points
                )
        by_modality = {modality: verdicts for (name, modality), verdicts in right.items() if name == task.name}
        tables["voices"] += voice_records(
            task.name, examples, list(config.methods), config.seeds, by_modality, trained_on
        )
    tables["comparisons"] = corrected(comparisons, same)
    tables["speech_inputs"] = speech_input_records(
        run.path,
        config.methods,
        qa=tables["qa"],
        comparisons=tables["comparisons"],
        drifted=[name for name in config.methods if "drift" in config.drift_measures(name)],
        scored=[name for name in config.methods if config.measures(name, "importance")],
        reduction=config.importance.reduction,
        seed=seed,
    )
    tables["speech_tests"] = speech_tests(list(config.methods), config.seeds, right, by_chance, seed, points)
    tables["correlations"] = correlation_records(tables["shift"], tables["qa"], metric=PRIMARY)
    if config.seeds > 1:
        tables["seeds"] = seed_records(run.path, list(config.methods), config.seeds, right, tables)
        tables["seed_comparisons"] = seed_comparisons(list(config.methods), config.seeds, right, seed, same, points)
        tables["pooled_comparisons"] = pooled_comparisons(list(config.methods), config.seeds, right, seed, same, points)
    text, hearing = measures_of(run, config, right) if config.seeds > 1 or config.drift or points else ([], [])
    if config.seeds > 1:
        tables["seed_losses"] = seed_losses([*text, *hearing], list(config.methods), same, points)
    if config.drift is not None or points:
        places = places_of(config.methods)
        tables["frontier"], tables["equal_hearing"] = frontier_tables(places, text, hearing, seed)
        tables["predictors"] = predictor_records(
            tables["shift"],
            tables["delta"],
            tables["frontier"],
            reduction=config.importance.reduction,
            seed=seed,
            same=same,
        )
        tables["restoration"] = restoration_records(restored_in(config.methods), [*text, *hearing], seed)
    tables["claims"] = claim_records(tables, rank_series(config.methods))
    tables["timings"] = run.timings(steps)
    return tables


def same_as_text(config: StudyConfig) -> dict[str, str]:
    """The methods that answer written questions as another model does, by construction: method → that model.

    What trains an adaptor alone, or is on for speech alone, is the base there; a blend is what it is made of at its two
    ends.
    """
    same = {}
    for name, method in config.methods.items():
        if method.kind == "adaptor" or config.gated(name):
            same[name] = BASE
        elif method.of is not None and method.norm_of is None:
            if method.scale == 1.0:
                same[name] = method.of
            elif method.scale == 0.0 and method.layers is None:
                same[name] = BASE
    return same


def measures_of(
    run: RunDir, config: StudyConfig, right: Mapping[tuple[str, str], Verdicts]
) -> tuple[list[Measure], list[Measure]]:
    """What is known of text kept and of hearing gained, of every method that was measured. right: by task, modality."""
    runs = {method: runs_of(method, config.seeds) for method in (BASE, *config.methods)}

    def having(measure: str) -> dict[str, list[str]]:
        of = {
            method: [name for name in names if measure in config.drift_measures(name)] for method, names in runs.items()
        }
        return {method: names for method, names in of.items() if names}

    spoken = {method: names for method, names in runs.items() if config.takes_speech(method)}
    asked = {task.name: read_manifest(manifest_of(run.path, f"task-{task.name}")) for task in config.evaluation.tasks}
    heldout = read_manifest(manifest_of(run.path, "heldout"))
    return (
        text_measures(run.path, having("drift"), having("general_text"), right, runs, asked),
        hearing_measures(run.path, spoken, right, runs, asked, heldout),
    )


def rank_series(methods: Mapping[str, Method]) -> dict[str, int | None]:
    """The rank of the LoRA methods that differ in their rank alone; None for every other method.

    Of several such series the one with the most ranks counts, of those of one length that with the method `lora`, else
    the first of the recipe. α counts by what it is over the rank. Of two methods that are the same in everything the
    first counts.
    """
    series: dict[str, dict[int, str]] = {}
    for name, method in methods.items():
        if method.kind == "lora" and not method.is_point:  # points of curves are compared with the base alone
            alpha = 2.0 if method.alpha is None else method.alpha / method.rank
            alike = hash_value({**asdict(method), "rank": None, "alpha": alpha, "curve": None, "in_full": None})
            series.setdefault(alike, {}).setdefault(method.rank, name)
    longest = max(series.values(), key=lambda of: (len(of), "lora" in of.values()), default={})
    return {**dict.fromkeys(methods), **{name: rank for rank, name in longest.items()}}
