"""Some layers get the base's weights back: does the text return, and does hearing stay?

A blend with `scale: 0` and `layers` is a tuned model in which these layers are the base's again. Where training did
its harm cannot be seen from what changed alone; putting layers back says what of the harm sits in them. So that "the
layers that shifted most" means something, as many other layers are put back too, and the two are compared.

Two kinds of rows, over the same texts, questions and answers, paired:

    against the tuned model    what putting these layers back changes; `returned` = 1 − value / reference_value is the
                               share of the lost text that comes back, 1 all of it, below 0 more is lost than before
    against another blend      of the same model with as many layers: which layers give back more

Differences are `value − reference_value`, intervals and p as in frontier.py (bootstrap, 10,000 draws, units drawn once
for all). Holm is over the rows of one measure and one kind; the same layers under another name repeat a row. Drift,
general text and T2T are of text, speech loss and S2T say what it costs. Of several training runs the first ones are
compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from palimpsest.comparison.families import ALIKE, corrected
from palimpsest.comparison.frontier import DRAWS, DRIFT, GENERAL_TEXT, Array, Measure, draws_of, sign_p
from palimpsest.records import RestorationRecord
from palimpsest.training.methods import Method

LOST = (DRIFT, GENERAL_TEXT)  # of which a share can return: 0 is the base's


@dataclass(frozen=True)
class Restored:
    """A method in which some layers are the base's again."""

    of: str  # the method that they were taken back from
    layers: tuple[int, ...]


def restored_in(methods: Mapping[str, Method]) -> dict[str, Restored]:
    """The methods that put layers of another back."""
    return {
        name: Restored(method.of, tuple(method.layers))
        for name, method in methods.items()
        if method.of is not None and method.layers is not None and method.scale == 0.0
    }


def restoration_records(
    restored: Mapping[str, Restored], measures: Sequence[Measure], seed: int, n_draws: int = DRAWS
) -> list[RestorationRecord]:
    """`restoration` of results.json. measures: of text and of hearing, from frontier.py."""
    records: list[RestorationRecord] = []
    wanted = {*restored, *(of.of for of in restored.values())}
    kept = [
        replace(measure, totals={name: {0: runs[0]} for name, runs in measure.totals.items() if name in wanted})
        for measure in measures
    ]
    kept = [measure for measure in kept if measure.totals]
    drawn = draws_of(kept, seed, n_draws) if kept else {}
    same = _same_layers(restored)
    for measure in kept:
        values = {name: float(runs[0].sum() / measure.counts.sum()) for name, runs in measure.totals.items()}
        draws = {name: drawn[(*measure.key, name, (0,))] for name in values}
        tuned = [(name, of.of) for name, of in restored.items()]
        others = [
            (b, a)
            for a, b in combinations(restored, 2)
            if restored[a].of == restored[b].of and len(restored[a].layers) == len(restored[b].layers)
        ]
        for pairs in (tuned, others):
            rows = [
                _record(measure, restored, pair, values, draws)
                for pair in pairs
                if all(name in values for name in pair)
            ]
            records += corrected(rows, same, better=measure.sign)
    return records


def _same_layers(restored: Mapping[str, Restored]) -> dict[str, str]:
    """Methods that are an earlier one by construction: the same layers of the same model."""
    first: dict[tuple[str, frozenset[int]], str] = {}
    for name, own in restored.items():
        first.setdefault((own.of, frozenset(own.layers)), name)
    made = {name: first[own.of, frozenset(own.layers)] for name, own in restored.items()}
    return {name: of for name, of in made.items() if of != name}


def _record(
    measure: Measure,
    restored: Mapping[str, Restored],
    pair: tuple[str, str],
    values: Mapping[str, float],
    draws: Mapping[str, Array],
) -> RestorationRecord:
    name, reference = pair
    own, other = restored[name], restored.get(reference)
    against_tuned = reference == own.of
    differences = draws[name] - draws[reference]
    low, high = np.quantile(differences, [0.025, 0.975]).tolist()
    returned: tuple[float | None, float | None, float | None] = (None, None, None)
    # A share of what was lost has a meaning where something was, beyond doubt.
    if against_tuned and measure.name in LOST and np.quantile(draws[reference], 0.025) > 0:
        lost = draws[reference] > 0  # where few texts hold all of the loss, a draw may have none of them
        share_low, share_high = np.quantile(1 - draws[name][lost] / draws[reference][lost], [0.025, 0.975]).tolist()
        returned = 1 - values[name] / values[reference], share_low, share_high
    kind = "the tuned model" if against_tuned else "other layers"
    return {
        "of": own.of,
        "method_a": reference,
        "method_b": name,
        "layers_a": None if other is None or against_tuned else list(other.layers),
        "layers_b": list(own.layers),
        "n_shared": None if other is None or against_tuned else len(set(own.layers) & set(other.layers)),
        "measure": measure.name,
        "task": measure.task,
        "better": measure.better,
        "n": len(measure.units),
        "value_a": values[reference],
        "value_b": values[name],
        "difference": values[name] - values[reference],
        "ci_low": low,
        "ci_high": high,
        "returned": returned[0],
        "returned_ci_low": returned[1],
        "returned_ci_high": returned[2],
        "p_value": sign_p(differences, len(measure.units)),
        "p_holm": 1.0,
        "verdict": ALIKE,
        "family": f"restoration of {own.of}, against {kind}: {measure.name}"
        + (f" ({measure.task})" * bool(measure.task)),
        "n_family": 1,
        "left_out": None,
    }
