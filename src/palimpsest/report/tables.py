"""The tables of a run's report, and those of them that say what the models can do.

Each is a list of columns over records of results.json. Where the paper has the same table, its numbers stand below
ours in rows of their own, labelled as published in their first cell, so that the label survives sorting and copying.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from palimpsest.files import without_folders
from palimpsest.report import mechanism, paper, structure_tables, trade_off
from palimpsest.report.across_runs import n_runs, of_first_runs
from palimpsest.report.inputs import (
    METHOD_ORDER,
    MODALITY_NAMES,
    Inputs,
    at,
    by_task,
    having,
    in_order,
    main_metric,
    main_reduction,
    method_key,
    method_name,
    methods_in,
    modality_key,
    model_name,
    rank_in_name,
    task_name,
    trains,
)
from palimpsest.report.table import (
    DASH,
    EMPTY,
    NOT_FINITE,
    Cell,
    Column,
    Field,
    Row,
    Rows,
    Table,
    cells,
    count,
    counts,
    grouped,
    holm_over,
    interval,
    mean,
    median_log,
    median_perplexity,
    numbers,
    p_value,
    percent,
    points,
    ranges,
    significant,
    table,
    text,
    where,
    words,
)

OF_LOSSES = trade_off.TEXT | trade_off.HEARING
OURS = "measured here"
PUBLISHED = {"source": paper.SOURCE_LABEL, "published": True}
FIRST_RUNS = "Of each method's first training run."
DIGEST_NOTE = "* from a secondary digest of the paper, not checked against it."
CONDITIONS = ("base", "top", "bottom", "random")
VERDICTS = {"holds": "✓ holds", "fails": "✗ fails", "undecided": "? undecided"}
ANSWERS = {"Empty": "empty", "Refused": "refusal", "Looping": "loop", "Failed": "failed", "Cut": "cut"}
OF_INPUTS = {"t2t": "T2T %", "s2t": "S2T %"}
FLOORS = {
    "unrelated": "Answers to other questions %",
    "echo": "Question repeated %",
    "echo_in_sentence": "Question in a sentence %",
}
REFERENCES = {"unrelated": "answers to other questions", "text": "the same questions typed", "cascade": "the cascade"}
ONE_CONTEXT = "Token 1 of plain follows the same beginning in all texts, so its interval has no width. "
OF_SEEDS = {  # what is measured over training runs
    "accuracy": "Accuracy %",
    "perplexity": "Perplexity",
    "perplexity_ratio": "Perplexity over the base's",
    "perplexity_ratio_top": "Perplexity without the top weights, times the whole's",
    "perplexity_ratio_bottom": "Perplexity without the bottom weights, times the whole's",
    "perplexity_ratio_random": "Perplexity without random weights, times the whole's",
}

SOURCE, TASK, INPUT = words("Source", "source"), words("Task", "task", task_name), words("Input", "modality")
METHOD, SYSTEM = words("Method", "method", method_name), words("Model", "model")
SYSTEM_NAME = words("Model", "model", method_name)
A, B = words("A", "method_a", method_name), words("B", "method_b", method_name)
N, DIFFERENCE = counts("n", "n"), ranges("B − A, points", "difference", points)
P, P_HOLM = numbers("p", "p_value", p_value), numbers("p, Holm", "p_holm", p_value)
OVER = cells("Holm over", lambda row: Cell(holm_over(row), sort=row.get("n_family")))
HOLM = (
    "Holm over: so many tests of one question, by input, against the base or against each other; a row that is no "
    "test of its own says why, and keeps its p. "
    "A dash: over the whole table, as earlier versions did."
)


def tables_of(inputs: Inputs, every_run: Inputs | None = None) -> dict[str, Table]:
    """Every table that has a row of this run; one with the paper's numbers alone would pass for a result.

    every_run: the inputs before `by_method`, for the tables that list every training run.
    """
    results, runs = inputs.results, (every_run or inputs).results
    of_each = n_runs(results)
    metric = main_metric(results)
    model = model_name(inputs) or DASH
    every = [
        deactivation(runs["deactivation"]),
        accuracy(results["qa"], metric, model, _tuned_on_text(inputs), of_each),
        accuracy_details(runs["qa"]),
        floors(results["qa_floors"], metric),
        speech_tests(results["speech_tests"]),
        voices(results["voices"]),
        lora_rank(results["qa"], metric, _ranks(inputs), model, of_each),
        comparisons(runs["comparisons"] if of_each == 1 else []),  # else of first runs alone
        speech_inputs(results["speech_inputs"]),
        seeds(results["seeds"]),
        seed_comparisons(results["seed_comparisons"]),
        pooled_comparisons(results["pooled_comparisons"]),
        seed_losses(results["seed_losses"]),
        perplexity(results["perplexity"], of_each),
        *claims(results["claims"], methods_in(results)),
        probe(results["probe"]),
        probe_comparisons(results["probe_comparisons"]),
        drift(results["drift"]),
        general_text(results["general_text"]),
        general_text_comparisons(results["general_text_comparisons"]),
        trade_off.frontier_table(results["frontier"]),
        trade_off.equal_hearing_table(results["equal_hearing"]),
        mechanism.predictors(results["predictors"]),
        mechanism.restoration(results["restoration"]),
        *structure_tables.layers(results["layers"], "text", main_reduction(results)),
        structure_tables.shift(results["shift"], of_each),
        structure_tables.clustering(results["clustering"]),
        structure_tables.clustering_summary(results["clustering_summary"]),
        structure_tables.delta(results["delta"]),
        structure_tables.embeddings(results["embeddings"]),
        structure_tables.importance_parts(results["importance_parts"], main_reduction(results)),
        structure_tables.mask_overlap(results["mask_overlap"]),
        structure_tables.correlations(results["correlations"]),
        structure_tables.timings(results["timings"]),
    ]
    if of_each > 1:
        first = {"floors", *of_first_runs(results)}
        every = [replace(t, note=f"{FIRST_RUNS} {t.note}") if t.name in first else t for t in every]
    every = [table for table in every if len(table.rows) > len(table.published)]
    if not trains(inputs.config):  # what the paper trained says little of the models that were given
        every = [part for table in every for part in _apart(table)]
    return {table.name: table for table in every}


def _apart(whole: Table) -> Iterator[Table]:
    """The table with our rows alone, and one of its published rows, if it has any."""
    rows = {of: [r for i, r in enumerate(whole.rows) if (i in whole.published) == of] for of in (False, True)}
    yield replace(whole, rows=tuple(rows[False]), published=frozenset())
    if whole.published:
        title, marked = f"Published: {whole.title}", frozenset(range(len(rows[True])))
        yield Table(f"{whole.name}_published", title, whole.columns, tuple(rows[True]), whole.note, marked)


def _tuned_on_text(inputs: Inputs) -> list[str]:
    """The methods that study.yaml trains on questions given as text."""
    methods = sorted({row["method"] for row in inputs.results["qa"]}, key=method_key)
    options = [(method, at(inputs.config, "methods", method)) for method in methods]
    return [method for method, of in options if at(of, "modality") == "text" and at(of, "kind") != "given"]


def _ranks(inputs: Inputs) -> dict[str, int]:
    """The rank of every LoRA method: what study.yaml says, else what its name says."""
    ranks: dict[str, int | None] = {}
    for method in sorted({row["method"] for row in inputs.results["qa"]}):
        options = at(inputs.config, "methods", method)
        configured = at(options, "rank") if at(options, "kind") == "lora" else None
        ranks[method] = configured if isinstance(configured, int) else rank_in_name(method)
    return {method: rank for method, rank in ranks.items() if rank is not None}


# ----------------------------------------------------------------------------------------------------------
# What the models can do
# ----------------------------------------------------------------------------------------------------------
def deactivation(records: Rows) -> Table:
    """Table 1: perplexity after zeroing the top, bottom or a random share of the weights.

    The random condition is the median over its masks, with median, smallest and largest logarithm of the ratio to the
    whole model's perplexity.
    """
    whole: dict[tuple[str, str], list[Row]] = {}
    seen: set[tuple[Any, ...]] = set()
    for row in having(records, condition="base"):  # the whole model stands in every scope; training runs have one each
        key = (_run(row), row["modality"], row["perplexity"])
        if key not in seen:
            seen.add(key)
            whole.setdefault((row["model"], row["modality"]), []).append(row)
    removed = (row for row in records if row["condition"] != "base")
    setting = ("model", "modality", "ratio", "scope", "reduction")
    rows: list[Row] = []
    for group in in_order(grouped(removed, *setting), *setting):
        of = {name: having(group["rows"], condition=name) for name in CONDITIONS}
        of["base"] = whole.get((group["model"], group["modality"]), [])
        shown = {"model": method_name(group["model"]), "selection": f"{group['scope']}, {group['reduction']}"}
        cells_of = {name: _perplexity(found, of["base"], name) for name, found in of.items()}
        rows.append({**group, **shown, "source": OURS, "cells": cells_of})
    rows += [
        {
            **PUBLISHED,
            "model": f"LLaMA-Omni {row.model}",
            "modality": row.modality,
            "ratio": paper.TABLE_1_RATIO,
            "selection": "not stated",
            "cells": {name: _published(getattr(row, name), significant) for name in CONDITIONS},
        }
        for row in paper.TABLE_1
    ]
    removed_share = numbers("Removed %", "ratio", lambda ratio: f"{100 * ratio:g}")
    return table(
        "deactivation",
        "Perplexity with a share of the weights set to zero (the paper's Table 1)",
        (
            *(SOURCE, SYSTEM, INPUT, removed_share, words("Selected by", "selection")),
            *(_given("Whole" if name == "base" else name.capitalize(), name) for name in CONDITIONS),
        ),
        rows,
        f"Selected by: scope of the selection and reduction of the scores. Random: median over the masks; in brackets "
        f"the natural logarithm of its ratio to the whole model's perplexity, the smallest and the largest, and the "
        f"number of masks. {_sizes(records, 'examples')}{DIGEST_NOTE}",
    )


def _run(row: Row) -> str:
    """The training run that a record is of; where the runs of a method stand together, their records say so."""
    return str(row.get("run", row["model"]))


def _perplexity(records: Rows, whole: Rows, condition: str) -> Cell:
    if not records:
        return EMPTY
    values = [row["perplexity"] for row in records]
    if condition == "random":
        return _over_masks(records, {_run(row): row["perplexity"] for row in whole})
    if len(values) == 1 or None in values:
        return mean(values)
    return mean(values, f"{interval(min(values), max(values), significant)}; {len(values)} seeds")


def _over_masks(records: Rows, whole: Mapping[str, float | None]) -> Cell:
    values = [row["perplexity"] for row in records]
    shown = median_perplexity(values)
    if any(whole.get(_run(row)) is None for row in records):
        detail = ""  # nothing to compare with
    else:
        logs = [
            "∞" if log == math.inf else significant(log)
            for log in median_log(values, [whole[_run(row)] for row in records])
        ]
        detail = f"ln ratio {logs[0]}, {logs[1]} to {logs[2]}; "
    if len(values) == 1:
        return Cell(shown.text, detail.removesuffix("; ").split(",")[0], shown.sort)
    return Cell(shown.text, f"{detail}{len(values)} masks", shown.sort)


def _sizes(records: Rows, what: str) -> str:
    """On how much text the perplexities were measured."""
    sizes = sorted({(row["modality"], row["n_examples"], row["n_tokens"]) for row in records})
    return "".join(f"{modality}: {n} {what}, {tokens} tokens. " for modality, n, tokens in sizes)


def _given(title: str, name: str) -> Field:
    """Cells that the row has already, by name."""
    return cells(title, lambda row: row["cells"].get(name, EMPTY))


def _published(value: paper.Value | None, write: Callable[[float], str], unit: float = 1) -> Cell:
    if value is None:
        return EMPTY
    return Cell(write(value.value) + (" *" if value.certainty == "digest" else ""), sort=value.value / unit)


def accuracy(
    records: Rows, metric: str, model: str = DASH, tuned_on_text: Sequence[str] = (), n_runs: int = 1
) -> Table:
    """Table 2: accuracy from text (T2T), from speech (S2T) and of the cascade, under one scoring rule.

    `tuned_on_text` names the methods that were trained on questions given as text; `n_runs` of each method are meant.
    """
    asked = {row["modality"] for row in records}
    records = having(records, metric=metric)
    rows = _beside_the_paper(records, paper.TABLE_2, model, "method", {})
    base_has_adaptor = bool(having(records, method="base", modality="speech"))
    return table(
        "accuracy",
        "Accuracy from typed (T2T) and spoken (S2T) questions (the paper's Table 2)",
        (
            SOURCE,
            TASK,
            SYSTEM,
            (Column("Method"), lambda row: text(method_name(row["method"])) if row["method"] else EMPTY),
            *(_given(f"{name} %", key) for key, name in MODALITY_NAMES.items() if key != "text_asr" or key in asked),
        ),
        rows,
        f"Ours: scoring rule {metric}, {_brackets(n_runs)}. The paper "
        "states neither its scoring rule nor intervals, so the two are not the same measurement."
        f"{_not_spoken_to(tuned_on_text)}{BASE_WITH_ADAPTOR if base_has_adaptor else ''}",
    )


BASE_WITH_ADAPTOR = " The base model heard through the adaptor that the methods started from."


def _brackets(n_runs: int) -> str:
    if n_runs == 1:
        return "95 % Wilson interval and number of questions in brackets"
    return (
        f"means of {n_runs} training runs; in brackets the 95 % interval over seeds and questions (of the base, which "
        "has one, Wilson's) and the number of questions"
    )


def _not_spoken_to(tuned_on_text: Sequence[str]) -> str:
    """Why some methods have no S2T."""
    if not tuned_on_text:
        return ""
    names = ", ".join(map(method_name, tuned_on_text))
    return (
        f" Tuned on the same questions as text, therefore without a trained adaptor and not asked in speech: {names}."
    )


def _beside_the_paper(
    records: Rows, published: Sequence[paper.AccuracyRow], model: str, key: str, ranks: Mapping[str, int]
) -> list[Row]:
    """By task, a row per method of ours, then the paper's; tasks in this run's order, then those only the paper has."""
    ours: list[Row] = [
        {
            **group,
            "source": OURS,
            "model": model,
            "rank": ranks.get(group["method"]),
            "cells": {row["modality"]: accuracy_cell(row) for row in group["rows"]},
        }
        for group in grouped(records, "task", "method")
    ]
    theirs: list[Row] = [
        {
            **PUBLISHED,
            "task": row.task,
            "model": f"{row.system}, {row.size}",
            "method": row.method,
            "rank": row.rank,
            "cells": {  # ours sort by shares
                "text": _published(row.t2t, "{:.1f}".format, unit=100),
                "speech": _published(row.s2t, "{:.1f}".format, unit=100),
            },
        }
        for row in published
    ]
    order = list(dict.fromkeys(row["task"] for row in (*ours, *theirs)))
    return sorted([*in_order(ours, key), *theirs], key=lambda row: order.index(row["task"]))


def accuracy_cell(row: Row) -> Cell:
    detail = f"{interval(row['ci_low'], row['ci_high'])}; n {row['n']}"
    return Cell(percent(row["accuracy"]), detail, row["accuracy"])


def lora_rank(records: Rows, metric: str, ranks: Mapping[str, int], model: str = DASH, n_runs: int = 1) -> Table:
    """Table 3: LoRA by rank. `ranks` gives the rank of each LoRA method of this run."""
    records = [row for row in records if row["metric"] == metric and row["method"] in ranks]
    rows = _beside_the_paper(records, paper.TABLE_3, model, "rank", ranks)
    return table(
        "lora_rank",
        "LoRA by rank (the paper's Table 3)",
        (SOURCE, TASK, SYSTEM, counts("Rank", "rank"), _given("T2T %", "text"), _given("S2T %", "speech")),
        rows,
        f"Ours: scoring rule {metric}, {_brackets(n_runs)}.",
    )


def accuracy_details(records: Rows) -> Table:
    """Every accuracy of the run, by scoring rule, with how many answers were empty, refused, looping, failed or cut."""
    return table(
        "accuracy_details",
        "Every accuracy, by scoring rule",
        (
            (Column("Source"), lambda row: text(OURS if (of := row.get("source", "measured")) == "measured" else of)),
            *(METHOD, TASK, INPUT),
            (Column("Scoring rule"), lambda row: text(f"{row['metric']} {row['metric_version']}")),
            *(N, counts("Correct", "correct"), ranges("Accuracy %", "accuracy", percent)),
            *(counts(title, f"n_{what}") for title, what in ANSWERS.items()),
        ),
        in_order(records, "metric", "task", "modality", "method"),
        "Empty and failed answers count as wrong. Refused and looping ones are scored as they are: a refusal opens "
        "with an apology or not knowing, a loop repeats a run of words three times or more, over at least six words. "
        "So are answers that were cut at the limit of new tokens: what would have followed is not known.",
    )


def floors(records: Rows, metric: str) -> Table:
    """What the main scoring rule calls right by chance, one row per method, task and input."""
    rows = grouped(having(records, metric=metric), "task", "modality", "method")
    return table(
        "floors",
        "What the scoring rule calls right that cannot be",
        (
            *(METHOD, TASK, INPUT),
            cells("n", lambda group: count(max(row["n"] for row in group["rows"]))),
            *(where(ranges(title, "value", percent), floor=floor) for floor, title in FLOORS.items()),
        ),
        by_task(rows),
        f"Scoring rule {metric}. Answers to other questions: each answer scored against the gold answers of another "
        "question, mean over several draws. An accuracy near these numbers says nothing. Brackets: 95 % interval.",
    )


def speech_tests(records: Rows) -> Table:
    """S2T against chance, the same questions typed, and the cascade."""
    return table(
        "speech_tests",
        "S2T against chance, typed questions and the cascade",
        (
            *(TASK, METHOD, words("Against", "reference", lambda name: REFERENCES.get(name, name)), N),
            *(numbers("S2T %", "accuracy", percent), numbers("Reference %", "reference_accuracy", percent)),
            *(ranges("S2T − reference, points", "difference", points), P, P_HOLM, OVER),
        ),
        in_order(records, "task", "method"),
        "Paired on the same questions; of several training runs their means, clustered by question and seed. Answers "
        "to other questions: each spoken answer scored against the gold answers of another question, mean over several "
        "draws. Holm over: the tests against one reference. Brackets: 95 % interval.",
    )


def voices(records: Rows) -> Table:
    """Accuracy by the voice of the question, of tasks spoken in several voices."""
    return table(
        "voices",
        "Accuracy by the voice of the question",
        (
            *(TASK, INPUT, METHOD, words("Voice", "voice", without_folders)),
            words("Trained on", "trained_on", lambda known: "yes" if known else "no"),
            counts("Questions", "n"),
            ranges("Accuracy %", "accuracy", percent),
            numbers("The same as text %", "accuracy_text", percent),
        ),
        in_order(records, "task", "modality", "method"),
        "Mean over the training runs of a method. Trained on: the voice of some of the study's training questions. The "
        "questions differ from voice to voice; the last column says how hard they are. Brackets: 95 % interval.",
    )


def comparisons(records: Rows) -> Table:
    """Two methods on the same questions."""
    only = (counts("Only A right", "only_a"), counts("Only B right", "only_b"))
    return table(
        "comparisons",
        "Paired comparisons on the same questions",
        (TASK, INPUT, words("Scoring rule", "metric"), A, B, N, *only, DIFFERENCE, P, P_HOLM, OVER),
        records,
        f"p: exact McNemar test. {HOLM} Brackets: 95 % interval.",
    )


def speech_inputs(records: Rows) -> Table:
    """Speech tokens against encoder frames, method by method."""

    def written(row: Row) -> Callable[[float], str]:
        return percent if row["measure"] in OF_INPUTS else significant

    def difference(row: Row) -> Cell:
        share = row["measure"] in OF_INPUTS
        return _between("", "difference", "", points if share else "{:+.3g}".format)[1](row)

    return table(
        "speech_inputs",
        "Speech as tokens against speech as encoder frames",
        (
            *(METHOD, words("Reads", "speech"), words("Against", "reference", method_name)),
            cells("Measure", lambda row: text(OF_INPUTS.get(str(row["measure"]), str(row["measure"])))),
            *(words("Of", "of", task_name), counts("n", "n")),
            cells("From frames", lambda row: numbers("", "value_reference", written(row))[1](row)),
            cells("From tokens", lambda row: numbers("", "value", written(row))[1](row)),
            *(cells("Difference", difference), P, P_HOLM, OVER),
        ),
        in_order(records, "method"),
        "Each method beside the one that differs from it in what stands for speech alone. drift: KL to the base, nats "
        "per token; shift: distance of the layers' importance from the base's. p: of T2T and S2T the exact McNemar "
        "test, Holm as in the paired comparisons; of drift and shift the share of the bootstrap's draws beyond 0, Holm "
        "over the pairs of this table. Brackets: 95 % interval of the paired difference.",
    )


def seeds(records: Rows) -> Table:
    """Mean, standard deviation and interval of every measure over the training runs of each method."""
    order = list(dict.fromkeys([*OF_SEEDS, *(row["measure"] for row in records)]))
    key = lambda row: (order.index(row["measure"]), row.get("scope", ""), row["basis"] or "", row["task"] or "")  # noqa: E731
    return table(
        "seeds",
        "Several training runs of each method: mean and spread",
        (
            (Column("Measure"), lambda row: text(_measure(row))),
            words("Task", "task", lambda task: task_name(task) if task else ""),
            INPUT,
            METHOD,
            counts("Runs", "n_seeds"),
            cells("Mean", lambda row: mean([None]) if row["mean"] is None else ranges("", "mean", _write(row))[1](row)),
            cells("Deviation", lambda row: numbers("", "std", _write(row))[1](row)),
            (Column("Each run", prose=True), _each_run),
            words("Interval over", "ci_over"),
        ),
        sorted(in_order(records, "modality", "method"), key=key),
        "The runs of a method differ in their seeds: first weights of the adaptor and of LoRA, order of the examples, "
        "dropout. Brackets: 95 % interval of the mean, over what the last column names. Deviation: standard deviation "
        "of the runs. Means of perplexities and of their ratios are geometric.",
    )


def _measure(row: Row) -> str:
    if row["measure"] in OF_SEEDS:
        return OF_SEEDS[row["measure"]] + (f", scope {row['scope']}" if row.get("scope") else "")
    reference = "" if row["reference"] is None else f" from {method_name(row['reference'])}"
    return f"{row['measure']}{reference}, {row['basis']}"


def _write(row: Row) -> Callable[[float], str]:
    return percent if row["measure"] == "accuracy" else significant


def _each_run(row: Row) -> Cell:
    return text(", ".join(NOT_FINITE if value is None else _write(row)(value) for value in row["values"]))


def seed_comparisons(records: Rows) -> Table:
    """Two methods on the same questions, each the mean over its runs."""
    runs = (counts("Runs of A", "seeds_a"), counts("Runs of B", "seeds_b"))
    return table(
        "seed_comparisons",
        "Paired comparisons of the methods' means over their runs",
        (TASK, INPUT, A, B, N, *runs, DIFFERENCE, P, P_HOLM, OVER, words("B is", "verdict")),
        records,
        f"Clustered by question and by seed. {HOLM} Brackets: 95 % interval.",
    )


def pooled_comparisons(records: Rows) -> Table:
    """As `seed_comparisons`, over the questions of several tasks."""
    of_tasks = words("Tasks", "task", lambda tasks: ", ".join(map(task_name, tasks.split(", "))))
    runs = (counts("Runs of A", "seeds_a"), counts("Runs of B", "seeds_b"))
    return table(
        "pooled_comparisons",
        "Paired comparisons over all tasks, of the methods' means over their runs",
        (of_tasks, INPUT, A, B, N, *runs, DIFFERENCE, P, P_HOLM, OVER, words("B is", "verdict")),
        records,
        "What the claims about accuracy are decided on. The questions of all tasks are pooled in each training run and "
        f"then clustered by question and by seed. {HOLM} Brackets: 95 % interval.",
    )


def seed_losses(records: Rows) -> Table:
    """Two models in drift, general text and speech loss, of methods the mean over their runs."""
    runs = (counts("Runs of A", "seeds_a"), counts("Runs of B", "seeds_b"))
    signed = lambda value: _minus(_nats(value))  # noqa: E731
    return table(
        "seed_losses",
        "Text and hearing of the methods' means over their runs, in nats per token",
        (
            *(words("Measure", "measure", lambda name: OF_LOSSES.get(name, name)), A, B, N, *runs),
            *(numbers("A is at", "loss_a", significant), numbers("B is at", "loss_b", significant)),
            ranges("B − A", "difference", signed),
            cells("Each run", lambda row: text(", ".join(map(signed, row["values"])))),
            *(P, P_HOLM, OVER, words("B is", "verdict")),
        ),
        records,
        "Run by run on the same texts, documents or held-out answers; p and interval are over these and over runs. "
        "Drift is a distance to the base, so methods are compared in it with each other alone; general text is the "
        f"loss minus the base's. {HOLM} Brackets: 95 % interval.",
    )


def perplexity(records: Rows, n_runs: int = 1) -> Table:
    """Perplexity of the unchanged models on the held-out answers, typed and spoken questions side by side."""
    modalities = sorted({row["modality"] for row in records}, key=modality_key)
    of = {name: f"{MODALITY_NAMES.get(name, name)} perplexity" for name in modalities}
    return table(
        "perplexity",
        "Perplexity of the held-out answers",
        (METHOD, *(where(cells(of[name], lambda row: mean([row["perplexity"]])), modality=name) for name in of)),
        in_order(grouped(records, "method"), "method"),
        (f"Geometric means of {n_runs} training runs. " * (n_runs > 1) + _sizes(records, "answers")).strip(),
    )


def claims(records: Rows, models: Sequence[str] = ()) -> tuple[Table, Table]:
    """The paper's claims, each with this run's measure, value, interval and verdict; and those that do not apply.

    Of these a part that was not measured is what decides: their title says how many they are and, by the `models` that
    the run has, why.
    """
    published = {claim.claim: text(f"{claim.where} (published): {claim.published}") for claim in paper.CLAIMS}
    fields = (
        counts("Claim", "claim"),
        words("Statement", "statement", prose=True),
        words("Verdict", "verdict", lambda verdict: VERDICTS.get(verdict, verdict)),
        words("Measure", "measure", prose=True),
        ranges("Value", "value"),
        (Column("Note", prose=True), lambda row: text(row.get("note", ""))),
        (Column("In the paper", prose=True), lambda row: published.get(row["claim"], EMPTY)),
    )
    rows = in_order(records, "claim")
    left = [row for row in rows if row["verdict"] == "undecided" and row["value"] is None]
    does = "does" if len(left) == 1 else "do"
    lacking = [method_name(method) for method in METHOD_ORDER if method not in models]
    why = f"it has no {' and no '.join(lacking)}; " * bool(lacking) + "the notes say what each needs"
    return (
        table(
            "claims",
            "The paper's claims, tested on this run",
            fields,
            [row for row in rows if row not in left],
            "A verdict is about this run, not about the paper: the models and data differ. Brackets: 95 % interval.",
        ),
        table("claims_left", f"{len(left)} of {len(rows)} claims {does} not apply to this run: {why}", fields, left),
    )


def probe(records: Rows) -> Table:
    """The retention probe: one row per kind of pairs, two columns per model; of many models a row each."""
    share, margin = ranges("Right %", "accuracy", percent), numbers("Margin", "margin")
    rows: Rows = grouped(records, "kind", "n")
    fields: tuple[Field, ...] = (
        words("Pairs", "kind"),
        N,
        *structure_tables.by_model(
            records,
            lambda model: ranges(f"{model} %", "accuracy", percent),
            lambda model: numbers(f"{model}, margin", "margin"),
        ),
    )
    if len({row["model"] for row in records}) > structure_tables.MANY_COLUMNS:
        rows, fields = in_order(records, "model"), (SYSTEM_NAME, words("Pairs", "kind"), N, share, margin)
    return table(
        "probe",
        "Retention probe: right against wrong continuations, without generation",
        fields,
        rows,
        "Share of pairs whose right continuation has the lower loss, 95 % Wilson interval; chance is 50 %. Margin: "
        "mean of the wrong continuation's loss minus the right one's, nats per token.",
    )


def probe_comparisons(records: Rows) -> Table:
    """Every method's probe against the base's, paired."""
    return table(
        "probe_comparisons",
        "Retention probe against the base, on the same pairs",
        (
            *(
                METHOD,
                words("Pairs", "kind"),
                N,
                ranges("Method − base, points", "difference", points),
                P,
                P_HOLM,
                OVER,
            ),
            _between("Margin − base's", "margin_difference", "margin", _nats),
            _between("Loss of the right one − base's", "loss_right_difference", "loss_right", _nats),
        ),
        in_order(records, "method"),
        "Paired by pair: exact McNemar test, of several training runs clustered by pair and seed; Holm over: the "
        "methods' tests on all pairs, or those on single kinds. Margin and loss: nats per token. Most pairs are easy: "
        "a model can lose text and keep them, so read the last column (above 0: the right text is less likely now) and "
        "the perplexity of the held-out answers beside it. Brackets: 95 % interval.",
    )


def drift(records: Rows) -> Table:
    """How far the tuned models' next-token distributions are from the base's, on text of the base's own."""
    of = (
        ("kl", "KL to the base", significant),
        ("reverse_kl", "Reverse", significant),
        ("agreement", "Same top %", percent),
    )
    runs, means, over = _over_runs(records)
    return table(
        "drift",
        "Drift from the base, on text that the base wrote",
        (
            *(SYSTEM_NAME, *runs, words("Text", "text"), words("Tokens", "tokens"), counts("n", "n_tokens")),
            *(_between(title, key, key, write) for key, title, write in of),
            _between("Loss − base's", "loss_difference", "loss_difference", _nats),
        ),
        in_order(records, "model"),
        f"{means}Nats per token: KL(base ‖ model) and KL(model ‖ base) over the whole vocabulary; the share of tokens "
        "at which both have the same most likely one; loss of the token that stands there. plain: from the beginning "
        "of a text on; chat: the answer to a question that the base wrote too. A KL is never below 0, so its interval "
        f"is no test. {ONE_CONTEXT * any(_has_one_context(row) for row in records)}Brackets: 95 % interval over "
        f"texts{over}.",
    )


def _has_one_context(row: Row) -> bool:
    return (row["text"], row["tokens"]) == ("plain", "token 1")


def general_text(records: Rows) -> Table:
    """The loss of text that the recipe names."""
    runs, means, over = _over_runs(records)
    return table(
        "general_text",
        "Loss of general text",
        (
            *(SYSTEM_NAME, *runs, words("Text", "text"), counts("Texts", "n_texts"), counts("Bytes", "n_bytes")),
            _between("Nats per byte", "per_byte", "per_byte", "{:.4f}".format),
            _between("Nats per token", "loss", "loss", "{:.3f}".format),
            numbers("Perplexity", "perplexity"),
        ),
        in_order(records, "model"),
        f"{means}Every token is predicted once, from the window before it. Brackets: 95 % interval over documents, "
        f"which are the same for all models{over}; the difference to the base is paired, in the next table.",
    )


def general_text_comparisons(records: Rows) -> Table:
    """The loss of general text against the base's, paired."""
    runs, means, over = _over_runs(records)
    test = "the level at which the interval reaches 0" if over else "a ratio of sums, t-test of its residuals"
    return table(
        "general_text_comparisons",
        "Loss of general text against the base",
        (
            *(METHOD, *runs, words("Text", "text"), counts("Documents", "n")),
            _between("Method − base, nats per byte", "difference", "", "{:+.4f}".format),
            _between("Nats per token", "per_token_difference", "per_token", _nats),
            *(P, P_HOLM, OVER, words("Method is", "verdict")),
        ),
        in_order(records, "method"),
        f"{means}Paired by document{over}; p: {test}. Above 0 the text is less likely than before. Holm over: the "
        "methods' tests; a row that is no test of its own says why, and keeps its p. Brackets: 95 % interval.",
    )


def _over_runs(records: Rows) -> tuple[list[Field], str, str]:
    """Where rows are means over training runs: the column of how many, a sentence, and what intervals are over too."""
    if all(row.get("n_seeds", 1) == 1 for row in records):
        return [], "", ""
    column = cells("Runs", lambda row: count(row.get("n_seeds", 1)))
    return [column], "Means over so many training runs as the column says. ", " and training runs"


def _between(title: str, key: str, bounds: str, write: Callable[[float], str]) -> Field:
    """Numbers with the interval from BOUNDS_ci_low to BOUNDS_ci_high; a dash for null."""
    low, high = (f"{bounds}_{end}".removeprefix("_") for end in ("ci_low", "ci_high"))

    def cell(row: Row) -> Cell:
        value = row[key]
        if value is None:
            return EMPTY
        return Cell(_minus(write(value)), interval(row[low], row[high], lambda end: _minus(write(end))), value)

    return cells(title, cell)


def _nats(value: float) -> str:
    return f"{value:+.3f}"


def _minus(written: str) -> str:
    return written.replace("-", "−")
