"""Which rows are corrected for one another: families of tests, and the rows that are no test of their own.

A family is one question that the report answers (docs/evaluation.md lists them), not a table: that LoRA was also asked
in speech makes no loss of text less certain. Holm's correction is over the tests of a family, so that with probability
0.95 or more none of its differences is called real by chance. A row is no test, and costs the others nothing, where

    equal by construction    both sides are the same model on this input: an adaptor leaves typed questions to the base
    repeats another row      it is the same test as another row, because one side is the base under another name
    nothing separates them   the two sides gave the same on every question: p is 1 whatever the others are (Tarone 1990)

The first two are known before anything is measured. The third is seen in the data, and safe all the same: such a row
could not be a discovery at any level, and McNemar's test is conditional on the questions that separate the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from palimpsest.intervals import holm
from palimpsest.records import BASE

LEVEL = 0.05
BETTER, WORSE, ALIKE = "better", "worse", "no difference shown"
EQUAL, REPEATS, INSEPARABLE = "equal by construction", "repeats another row", "nothing separates them"
WRITTEN = ("text", "cascade", "text_asr")  # inputs that reach the language model as text, past any adaptor


def family_of_pair(a: str | None, b: str | None, modality: str, points: Collection[str] = ()) -> str:
    """The family of a pair of methods: what training did to the base, or which training is better, by input.

    All tasks are in one family: "text was lost" may rest on any of them. points: of curves, as `pairs_of` takes them.
    """
    against = "the base" if (a == BASE) != (b == BASE) else "each other"
    return of_points(f"{modality}, against {against}", a in points or b in points)


def of_points(family: str, is_point: bool) -> str:
    """Points of curves are many, and what a report asks of methods is not asked of them: corrected among themselves."""
    return f"{family}, points of curves" if is_point else family


def pairs_of(methods: Sequence[str], points: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Every pair that is compared; points of curves with the base alone, since frontier.py compares the curves."""
    for a, b in combinations(methods, 2):
        if BASE in (a, b) or not {a, b} & set(points):
            yield a, b


def corrected(rows: Sequence[Any], same: Mapping[str, str] | None = None, *, better: int = 1) -> list[Any]:
    """`rows`, which name their `family`, with `p_holm`, `n_family` and `left_out`, and the verdict where they have one.

    A row that is left out keeps its own p, or that of the row it repeats, whose family it then names.

    Args:
        same: method or label -> the model that it is on written input, such as {"adaptor": "base"}.
        better: the sign of a difference that is good for b.
    """
    left_out, repeated = _left_out(rows, same or {})
    families: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if i not in left_out:
            families[row["family"]].append(i)
    adjusted = {i: float(row["p_value"]) for i, row in enumerate(rows)}
    for members in families.values():
        adjusted |= dict(zip(members, holm([rows[i]["p_value"] for i in members]), strict=True))
    made = []
    for i, row in enumerate(rows):
        of = repeated.get(i, i)
        p, family = max(adjusted[i], adjusted[of]), rows[of]["family"]
        verdict = ALIKE if p > LEVEL else BETTER if better * row.get("difference", 0) > 0 else WORSE
        made.append(
            {
                **row,
                "p_holm": p,
                "family": family,
                "n_family": len(families[family]),
                "left_out": left_out.get(i),
                **({"verdict": verdict} if "verdict" in row else {}),
            }
        )
    return made


def _left_out(rows: Sequence[Mapping[str, Any]], same: Mapping[str, str]) -> tuple[dict[int, str], dict[int, int]]:
    """(row -> why it is no test, row -> the row that it repeats)."""
    reasons: dict[int, str] = {}
    tests: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        own = _sides(row)
        meant = tuple(same.get(side, side) for side in own) if row.get("modality", "text") in WRITTEN else own
        if len(set(meant)) < len(meant):
            reasons[i] = EQUAL
        elif _inseparable(row):
            reasons[i] = INSEPARABLE
        elif len(meant) == 2:
            key = (*(row.get(name) for name in ("task", "modality", "metric", "kind")), frozenset(meant))
            # The row that names the models as what they are stands for the others.
            tests[key].insert(0 if meant == own else len(tests[key]), i)
    repeated = {i: first for first, *others in tests.values() for i in others}
    return reasons | dict.fromkeys(repeated, REPEATS), repeated


def _sides(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The two that a row compares; one side alone where the other is no model (a gap, a floor)."""
    if "method_a" in row:
        return row["method_a"], row["method_b"]
    if "per_byte_base" in row:
        return row["base"], row["method"]
    return (BASE, row["method"]) if "accuracy_base" in row else (row["method"],)


def _inseparable(row: Mapping[str, Any]) -> bool:
    difference = row["difference"] if "difference" in row else row["value"]
    return bool(difference == 0 and row["ci_low"] == 0 and row["ci_high"] == 0)
