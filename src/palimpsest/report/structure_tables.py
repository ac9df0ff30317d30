"""Tables of where and how the weights differ, and of what the run cost: lists of columns over records."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, median

from palimpsest.report.inputs import having, in_order, method_key, method_name
from palimpsest.report.table import (
    EMPTY,
    Cell,
    Field,
    Row,
    Rows,
    Table,
    cells,
    count,
    counts,
    grouped,
    interval,
    number,
    numbers,
    p_value,
    percent,
    ranges,
    seconds,
    significant,
    table,
    where,
    words,
)

MANY_COLUMNS = 8  # models side by side in a table; more stand below each other, or in two tables
OF = {"importance": "importance", "mask": "top mask", "delta": "change"}
PARTS = {"layers": "layers", "old_rows": "old rows", "new_rows": "new rows", "adaptor": "adaptor"}

METHOD, MODEL, REFERENCE = (words(key.capitalize(), key, method_name) for key in ("method", "model", "reference"))
KIND, MEASURE, SCORES = words("Kind", "kind"), words("Measure", "measure"), words("Scores", "reduction")
INPUT = words("Input", "modality")
MATRICES = cells("Matrices", lambda group: count(len(group["rows"])))


def layers(records: Rows, modality: str, reduction: str) -> list[Table]:
    """Importance by layer: share of the model's total, and the total; of many models each in a table of its own."""
    rows = having(records, modality=modality, reduction=reduction, kind="all")

    def share(model: str) -> Field:
        return numbers(f"{model}, %", "share", lambda share: percent(share, 2))

    def total(model: str) -> Field:
        return numbers(f"{model}, sum", "total")

    def of(name: str, title: str, *fields: Callable[[str], Field]) -> Table:
        return table(
            f"layers_{name}",
            f"{title}, {modality} input",
            (counts("Layer", "layer"), *by_model(rows, *fields)),
            in_order(grouped(rows, "layer"), "layer"),
            f"Reduction {reduction}. %: share of the model's total. Sum: over the layer's scored weights.",
        )

    if len({row["model"] for row in rows}) <= MANY_COLUMNS:
        return [of(modality, "Importance by layer", share, total)]
    return [
        of(modality, "Importance by layer, as a share of the model's total", share),
        of(f"{modality}_sum", "Importance by layer, as a sum", total),
    ]


def by_model(records: Rows, *fields: Callable[[str], Field]) -> list[Field]:
    """For every model of `records` the columns that `fields` make of its name."""
    models = sorted({row["model"] for row in records}, key=method_key)
    return [where(field(method_name(model)), model=model) for model in models for field in fields]


def shift(records: Rows, n_runs: int = 1) -> Table:
    """How far each model's layer-wise importance lies from its reference, beside the noise of the measure."""
    runs = cells("Runs", lambda row: count(row.get("n_seeds", 1)))
    means = f"Means of {n_runs} training runs, or the first run alone, as the column says. " if n_runs > 1 else ""
    return table(
        "shift",
        "Shift of the layer-wise importance",
        (
            *(MODEL, REFERENCE, INPUT, SCORES, MEASURE, *((runs,) if n_runs > 1 else ())),
            *(ranges("Value", "value"), numbers("Noise floor", "noise_floor")),
        ),
        records,
        f"{means}Noise floor: the same measure between the reference and itself scored on other data"
        f"{_fewer(records)}. Brackets: 95 % interval.",
    )


def _fewer(records: Rows) -> str:
    """Of how many batches the noise floor is, where not of as many: of fewer it is on the high side."""
    sizes = {(row.get("n_batches_other"), row.get("n_batches")) for row in records if row["noise_floor"] is not None}
    unlike = sorted((there, here) for there, here in sizes if there is not None and there != here)
    return f" ({', '.join(f'{there} batches against {here}' for there, here in unlike)})" if unlike else ""


def clustering(records: Rows) -> Table:
    """Concentration on rows and columns, summarised over the layers of each module kind."""
    groups = in_order(grouped(records, "of", "model", "kind", "measure"), "model", "of", "kind", "measure")
    return table(
        "clustering",
        "Rank clustering: concentration on rows and columns",
        (
            *(words("Of", "of"), MODEL, KIND, MEASURE, MATRICES),
            _over("Value", "value", median),
            _over("Shuffled", "null_mean", median),
            _over("z", "z", median),
            _over("z > 3, %", "z", lambda z: sum(value > 3 for value in z) / len(z), lambda share: percent(share, 0)),
        ),
        sorted(groups, key=lambda row: row["of"] != "importance"),
        "Medians over the matrices of a kind. Shuffled: what the same entries give in random places; "
        "z: distance from that in its standard deviations.",
    )


def _over(
    title: str, key: str, statistic: Callable[[list[float]], float], write: Callable[[float], str] = significant
) -> Field:
    """A statistic over the records of a group, without the nulls that stand for numbers that are not finite."""

    def cell(group: Row) -> Cell:
        values = _finite(group, key)
        return number(value := statistic(values), write(value)) if values else EMPTY

    return cells(title, cell)


def _finite(group: Row, key: str) -> list[float]:
    return [row[key] for row in group["rows"] if row.get(key) is not None]


def clustering_summary(records: Rows) -> Table:
    """One row per model and what was measured: typical ratios of the measures to their shuffled null."""
    records = having(records, kind="all")
    order = {of: place for place, of in enumerate(OF)}
    measures = dict.fromkeys(row["measure"] for row in records if row["ratio"] is not None)
    return table(
        "clustering_summary",
        "Rank clustering of whole models: measure over its value for shuffled entries",
        (words("Of", "of", _of), MODEL, *(where(ranges(name, "ratio"), measure=name) for name in measures)),
        sorted(in_order(grouped(records, "of", "model"), "of", "model"), key=lambda row: order.get(row["of"], len(OF))),
        "Geometric mean over the matrices, 95 % interval over the matrices. 1: no clustering; above 1 for shares and "
        "Gini, below 1 for the effective rank: clustered. Change of rank r: the change cut to its r largest singular "
        "directions, over random directions.",
    )


def _of(of: str) -> str:
    rank = of.removeprefix("delta_rank")
    return f"change of rank {rank}" if rank != of else OF.get(of, of)


def delta(records: Rows) -> Table:
    """How much each method changed the weights, and how often the largest changes hit important weights."""

    def change(group: Row) -> Cell:
        values = _finite(group, "relative_norm")
        return number(median(values), detail=interval(min(values), max(values), significant)) if values else EMPTY

    return table(
        "delta",
        "Parameter change by method",
        (
            *(METHOD, KIND, MATRICES, cells("Relative change", change)),
            _over("Overlap with importance %", "overlap_with_importance", fmean, percent),
            _over("Overlap by chance %", "overlap_by_chance", fmean, percent),
            _over("Effective rank", "effective_rank", median),
            _over("Energy in 8 directions, %", "energy_top8", fmean, percent),
        ),
        in_order(grouped(records, "method", "kind"), "method", "kind"),
        "Relative change: Frobenius norm of the change over that of the base weights, median and range over "
        "the matrices. Overlap: share of the largest changes that hit the base model's most important "
        "weights, mean. Effective rank: participation ratio of the squared singular values, median.",
    )


def embeddings(records: Rows) -> Table:
    """What happened to the embedding and the head of given models, and to how many of their rows."""
    return table(
        "embeddings",
        "Change of embedding and head",
        (
            *(METHOD, words("Part", "part"), counts("Rows, base", "rows_base"), counts("Rows, tuned", "rows_tuned")),
            *(counts("In both", "rows"), counts("Changed", "rows_changed")),
            numbers("Relative change", "relative_norm"),
        ),
        in_order(records, "method"),
        "Rows are tokens. Relative change: Frobenius norm of the change over that of the base weights, in the rows "
        "that both models have; the others are not compared.",
    )


def importance_parts(records: Rows, reduction: str) -> Table:
    """Layers, old rows and new rows of the models that read speech tokens."""
    part = words("Part", "part", lambda name: PARTS.get(name, name))
    return table(
        "importance_parts",
        "Importance on spoken questions: layers, old rows and new rows",
        (
            *(MODEL, part, ranges("Share, %", "share", lambda share: percent(share, 2))),
            *(numbers("Sum", "total"), numbers("A weight", "mean"), counts("Weights", "n_parameters")),
            cells("Rows", lambda row: EMPTY if row["n_rows"] is None else count(row["n_rows"])),
            cells("Reached", lambda row: EMPTY if row["n_reached"] is None else count(row["n_reached"])),
        ),
        in_order(having(records, reduction=reduction), "model"),
        f"Reduction {reduction}, on the questions of importance, spoken. Old rows: the embedding, with what it does as "
        "the head where the two are tied. New rows: of the speech tokens; those that were not said have 0. Reached: "
        "rows with a score above 0. Brackets: 95 % interval of the share, over batches.",
    )


def mask_overlap(records: Rows) -> Table:
    """One row per model and module kind would be long; over all matrices, with what other data alone change."""
    return table(
        "mask_overlap",
        "Most important weights that stay the most important ones",
        (
            *(MODEL, REFERENCE, numbers("Weights, %", "ratio", lambda share: percent(share, 0))),
            ranges("Shared, %", "overlap", percent),
            numbers("Same model, other data, %", "noise_floor", percent),
            numbers("By chance, %", "overlap_by_chance", percent),
        ),
        in_order(having(records, kind="all"), "model"),
        "Mean over the matrices of the share of a model's top weights that are the reference's too; 95 % interval over "
        "the matrices.",
    )


def correlations(records: Rows) -> Table:
    """Shift of importance against loss of text accuracy, over the tuned models."""
    kendall, p = numbers("Kendall τ", "kendall_tau"), numbers("p", "p_value", p_value)
    return table(
        "correlations",
        "Does more shift go with more loss of text accuracy?",
        (words("Shift", "measure"), SCORES, counts("Models", "n_models"), kendall, p, words("Note", "note")),
        records,
        "Over the tuned models; exact two-sided p. Three models cannot give a p below 0.33.",
    )


def timings(records: Rows) -> Table:
    memory = numbers("Peak memory, GB", "peak_rss_bytes", lambda size: f"{size / 1e9:.2f}")
    return table(
        "timings",
        "Time and memory of each step",
        (words("Step", "step"), numbers("Time", "seconds", seconds), memory),
        records,
        f"{seconds(sum(row['seconds'] for row in records))} in all. "
        "Peak memory: largest resident size of the process so far.",
    )
