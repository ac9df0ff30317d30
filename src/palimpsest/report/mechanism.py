"""Why text was lost, in a report: tables `predictors` and `restoration`.

How the numbers come about: comparison/predictors.py, comparison/restoration.py and docs/frontier.md.
"""

from __future__ import annotations

from palimpsest.report.inputs import method_name
from palimpsest.report.table import (
    EMPTY,
    Cell,
    Column,
    Row,
    Rows,
    Table,
    cells,
    count,
    counts,
    holm_over,
    interval,
    number,
    numbers,
    p_value,
    percent,
    table,
    text,
    words,
)
from palimpsest.report.trade_off import measure_name, signed, writer

PREDICTORS = {
    "jensen_shannon": "Shift, Jensen–Shannon",
    "wasserstein_1": "Shift, Wasserstein-1",
    "relative_change": "‖ΔW‖ / ‖W‖",
    "drift": "Drift",
}


def predictors(records: Rows) -> Table:
    """One row per kind of text and predictor."""
    return table(
        "predictors",
        "What predicts how much text was lost?",
        (
            (Column("Text lost"), lambda row: text(measure_name(row, "text"))),
            words("Predictor", "predictor", lambda name: PREDICTORS.get(name, name)),
            counts("Models", "n_models"),
            numbers("ρ", "spearman", _correlation),
            cells("ρ at equal speech loss", lambda row: _ranged(row, "partial", "ci")),
            numbers("p", "p_value", p_value),
            numbers("p, Holm", "p_holm", p_value),
            cells("Beyond ‖ΔW‖ / ‖W‖", lambda row: _ranged(row, "beyond_change", "beyond_change_ci")),
            words("Note", "note"),
        ),
        records,
        "Over the tuned models, one value each: Spearman's rank correlation of the predictor and the text lost, and "
        "the same with the ranks of the speech loss taken out of both. 1: the order of the predictor is that of the "
        "loss. p by permutation, Holm over the predictors of one kind of text. Beyond: how much further from 0 than "
        "the correlation of the change of the weights (mean over the scored matrices). Brackets: 95 % interval, "
        "bootstrap over models, of the correlation from 12 models on; models of one curve are relatives, which it does "
        "not know.",
    )


def _correlation(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _ranged(row: Row, key: str, of: str) -> Cell:
    if row[key] is None:
        return EMPTY
    return number(row[key], _correlation(row[key]), interval(row[f"{of}_low"], row[f"{of}_high"], _correlation))


def _measured(row: Row) -> Cell:
    return text(measure_name({"of_measure": row["measure"], "of_task": row["task"]}, "of"))


def restoration(records: Rows) -> Table:
    """One row per blend and measure, and per two blends and measure."""

    def value(row: Row, side: str) -> Cell:
        return number(row[f"value_{side}"], writer(row["measure"])(row[f"value_{side}"]))

    def difference(row: Row) -> Cell:
        write = signed(row["measure"])
        return number(row["difference"], write(row["difference"]), interval(row["ci_low"], row["ci_high"], write))

    def returned(row: Row) -> Cell:
        if row["returned"] is None:
            return EMPTY
        return number(
            row["returned"], percent(row["returned"]), interval(row["returned_ci_low"], row["returned_ci_high"])
        )

    return table(
        "restoration",
        "Layers that got the base's weights back",
        (
            (Column("Measure"), _measured),
            words("A", "method_a", method_name),
            words("B", "method_b", method_name),
            cells("Layers put back in B", lambda row: text(", ".join(map(str, row["layers_b"])))),
            cells("In A too", lambda row: EMPTY if row["n_shared"] is None else count(row["n_shared"])),
            *(cells("A is", lambda row: value(row, "a")), cells("B is", lambda row: value(row, "b"))),
            cells("B − A", difference),
            cells("Returned, %", returned),
            *(numbers("p", "p_value", p_value), numbers("p, Holm", "p_holm", p_value)),
            cells("Holm over", lambda row: Cell(holm_over(row), sort=row["n_family"])),
            words("B against A", "verdict"),
        ),
        records,
        "A: the tuned model, or a blend of it with as many layers put back. Returned: the share of the lost text that "
        "is back, where some was lost. Paired: the same texts, questions and answers for both, 10 000 draws. Drift, "
        "general text and speech loss: nats per token, lower is better; T2T (minus the base's): points; S2T: %, its "
        "differences points. Holm "
        "over: the rows of one measure against the tuned model, or of blends against each other. Brackets: 95 % "
        "interval.",
    )
