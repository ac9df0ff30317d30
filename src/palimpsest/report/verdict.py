"""What a run says of the text, in a sentence: of every model whether text was lost, by every measure that looked.

A test that finds nothing is no evidence that nothing was lost. So what is not shown is said with what could have been
seen: the smallest loss that this number of questions finds, at the level of the first step of Holm's correction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.records import ComparisonRecord, QARecord
from palimpsest.report.inputs import Inputs, having, in_order, listed, main_metric, method_key, method_name, task_name
from palimpsest.report.table import fitting, points_fitting, significant

LEVEL = 0.05
POWER = 0.8
ALL = "all"  # kinds of pairs of the probe, classes of tokens
FAR = 0.1  # nats a token: from here on answers that stayed right are no verdict by themselves
ROUNDING = 1e-6  # nats a token: of float32 logits
KINDS = (
    "lost",
    "both",
    "gained",
    "level",
    "far",
    "nothing",
    "same",
    "unasked",
)  # what is said of a model among several
EQUAL = "equal by construction"  # left_out of a comparison: a gate, or a scale of 0, leaves typed questions to the base
MOST_NAMES = 4  # of models in a sentence


# ----------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------
def accuracies(inputs: Inputs, modality: str) -> list[QARecord]:
    rows = having(inputs.results["qa"], modality=modality, metric=main_metric(inputs.results))
    return in_order(rows, "method")


def of_base(rows: Sequence[QARecord], task: str) -> QARecord | None:
    return next(iter(having(rows, task=task, method="base")), None)


def of_tuned(rows: Sequence[QARecord], task: str) -> list[QARecord]:
    return [row for row in having(rows, task=task) if row["method"] != "base"]


def paired(inputs: Inputs, task: str, before: str, after: str) -> ComparisonRecord | None:
    """The comparison on typed questions, turned so that `difference` = accuracy(after) − accuracy(before)."""
    typed = {"task": task, "modality": "text", "metric": main_metric(inputs.results)}
    for row in having(inputs.results["comparisons"], **typed):
        if (row["method_a"], row["method_b"]) == (before, after):
            return row
        if (row["method_a"], row["method_b"]) == (after, before):
            return {
                **row,
                "method_a": before,
                "method_b": after,
                "only_a": row["only_b"],
                "only_b": row["only_a"],
                "difference": -row["difference"],
                "ci_low": -row["ci_high"],
                "ci_high": -row["ci_low"],
            }
    return None


# ----------------------------------------------------------------------------------------------------------
# What could have been seen
# ----------------------------------------------------------------------------------------------------------
def smallest_seen(row: Mapping[str, Any]) -> float | None:
    """The smallest true difference that a comparison would have found with probability 0.8; None: no difference.

    From its questions and how many of them separated the two. Where even all of these on one side would not be enough,
    the smallest share of questions that would, were all of them lost.
    """
    from palimpsest.intervals import mcnemar_power, minimum_detectable_difference  # brings scipy

    if "detectable" in row:  # of several training runs
        detectable: float | None = row["detectable"]
        return detectable
    n, apart = row["n"], row["only_a"] + row["only_b"]
    level = 1 - LEVEL / max(1, row.get("n_family") or 1)
    if apart and (found := minimum_detectable_difference(n, apart / n, level, POWER)) is not None:
        return found
    below, enough = apart, n + 1  # power grows with the share, so halve
    while enough - below > 1:
        k = (below + enough) // 2
        if mcnemar_power(n, k / n, k / n, level) >= POWER:
            enough = k
        else:
            below = k
    return enough / n if enough <= n else None


def unseen(row: Mapping[str, Any], questions: str = "questions") -> tuple[str, float]:
    """(what a comparison that shows no difference leaves open, the loss that it has room for; infinite: any)."""
    n = row["n"]
    if is_same(row):
        return f"by construction both answer {questions} as one model", 0.0
    if nothing_changed(row) and n > 3:
        # The rule of three: of a share above 3/n, n questions show none with a probability below 5 %.
        return f"no answer to {n} {questions} changed, which leaves room for a loss of up to {_points(3 / n)}", 3 / n
    seen = smallest_seen(row)
    questions = questions.replace("questions", "question", n == 1)
    if seen is None:
        return f"{n} {questions} cannot tell any loss from none", math.inf
    return f"{n} {questions} cannot tell a loss of less than {_points(seen)} from none", seen


def is_same(row: Mapping[str, Any]) -> bool:
    """Whether both sides are the same model on this text, by construction: then it is known that nothing was lost."""
    return row.get("left_out") == EQUAL


def nothing_changed(row: Mapping[str, Any]) -> bool:
    """Whether not one question separates the two: an interval from 0 to 0 is then no certainty."""
    return "detectable" not in row and row["only_a"] + row["only_b"] == 0


def _points(share: float) -> str:
    value = 100 * share
    written = f"{value:.0f}" if value >= 1.95 else f"{value:.1f}" if value >= 0.095 else significant(value, 2)
    return f"{written} point{'s' * (written != '1')}"


# ----------------------------------------------------------------------------------------------------------
# One model
# ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sign:
    """What one measure says of one model: −1 text was lost, 1 gained, 0 neither is shown."""

    measure: str
    sign: int
    said: str  # the difference with its interval; empty where no answer changed
    size: float  # share of answers, nats; what it is measured in differs by measure
    left_open: str  # of 0: what could not have been seen,
    room: float = 0.0  # and the loss that there is room for
    nothing: bool = False  # nothing could be lost: the base has no right answer
    same: bool = False  # nothing was lost: the model is the base on this text, by construction


@dataclass(frozen=True)
class Drift:
    """KL of a model to the base, nats per token."""

    value: float
    low: float
    high: float
    text: str  # on what


def _sign(row: Mapping[str, Any]) -> int:
    """1: the difference is above 0, −1: below; 0 where that is not shown, or no number says it."""
    if not row["p_holm"] < LEVEL:
        return 0
    return int(row["difference"] > 0) - int(row["difference"] < 0)


def models_of(inputs: Inputs) -> list[str]:
    """Every model but the base of which text was measured, in the report's order."""
    results = inputs.results
    found = {row["method"] for row in accuracies(inputs, "text")} | {row["model"] for row in results["drift"]}
    found |= {row["method"] for row in (*results["general_text_comparisons"], *results["probe_comparisons"])}
    return sorted(found - {"base"}, key=method_key)


def signs(inputs: Inputs, model: str) -> list[Sign]:
    """Every test of the model's text against the base's: question sets, general text, the probe."""
    return [*_of_answers(inputs, model), *_of_general_text(inputs, model), *_of_probe(inputs, model)]


def _of_answers(inputs: Inputs, model: str) -> Iterator[Sign]:
    rows = accuracies(inputs, "text")
    for asked in having(rows, method=model):
        task = asked["task"]
        row, base = paired(inputs, task, "base", model), of_base(rows, task)
        if row is None:
            continue
        if is_same(row):
            yield Sign(task, 0, "", 0.0, f"{task_name(task)} is answered by the base itself", same=True)
            continue
        sign = _sign(row)
        said = "" if nothing_changed(row) else f"{_between(row, points_fitting, ' points')} in {task_name(task)}"
        if sign == 0 and base is not None and base["accuracy"] == 0:
            why = f"the base answers 0 of {base['n']} questions of {task_name(task)}, where nothing can be lost"
            yield Sign(task, 0, said, 0.0, why, nothing=True)
        else:
            yield Sign(task, sign, said, row["difference"], *unseen(row, f"questions of {task_name(task)}"))


def _of_general_text(inputs: Inputs, model: str) -> Iterator[Sign]:
    for row in having(inputs.results["general_text_comparisons"], method=model):
        if is_same(row):
            yield Sign("general text", 0, "", 0.0, "general text is read by the base itself", same=True)
            continue
        sign = -_sign(row)
        said = f"{_between(row, fitting, ' nats a byte')} on general text"
        room = max(0.0, row["ci_high"])
        left_open = f"general text leaves room for a loss of {significant(room, 2)} nats a byte"
        if not room:
            left_open = "general text has no room for a loss"
        yield Sign("general text", sign, said, -row["difference"], left_open, room)


def _of_probe(inputs: Inputs, model: str) -> Iterator[Sign]:
    for row in having(inputs.results["probe_comparisons"], method=model, kind=ALL):
        if is_same(row):
            yield Sign("probe", 0, "", 0.0, "the probe is of the base itself", same=True)
            continue
        sign = _sign(row)
        said = f"{_between(row, points_fitting, ' points')} in the probe"
        room = max(0.0, -row["ci_low"])
        left_open = f"the probe leaves room for a loss of {_points(room)}"
        if row["only_base"] == 0 == row["only_method"]:
            said, room = "", 3 / max(3, row["n"])
            left_open = f"none of the probe's {row['n']} pairs changed, which leaves room for {_points(room)}"
        elif not room:
            left_open = "the probe has no room for a loss"
        yield Sign("probe", sign, said, row["difference"], left_open, room)


def drift_of(inputs: Inputs, model: str) -> Drift | None:
    """On all of the base's own text where the frontier has it, else on the kind on which it is largest."""
    for row in having(inputs.results["frontier"], model=model, text_measure="drift"):
        return Drift(row["text"], row["text_ci_low"], row["text_ci_high"], "the base's own text")
    rows = having(inputs.results["drift"], model=model, tokens=ALL)
    for of in sorted(rows, key=lambda row: -row["kl"])[:1]:
        kind = "chats of the base" if of["text"] == "chat" else "text of the base"
        return Drift(of["kl"], of["kl_ci_low"], of["kl_ci_high"], kind)
    return None


def goes_on_otherwise(drift: Drift | None) -> bool:
    """Whether a model is so far from its base that few answers that stayed right cannot be called kept text."""
    return drift is not None and drift.low > FAR


def of_model(inputs: Inputs, model: str) -> str:
    """The verdict on one model: what was shown, by which measure, and what could not be."""
    found, drift = signs(inputs, model), drift_of(inputs, model)
    name = method_name(model)
    lost, gained, level = (_of(found, sign) for sign in (-1, 1, 0))
    if not found:
        parts = [f"{name}: no text was compared with the base's"]
    elif lost and gained:
        parts = [f"{name} lost text by one measure and gained by another: {_joined([*lost, *gained])}"]
    elif lost or gained:
        parts = [f"{name} {'lost' if lost else 'gained'} text: {_joined(lost or gained)}"]
    elif all(it.same for it in level):
        parts = [f"{name} lost no text, by construction"]
    elif all(it.nothing for it in level):
        parts = [f"{name}: whether text was lost is not known"]
    else:
        seen = _joined([it for it in level if it.said and not it.nothing])
        lead = f"{name}: no loss of text is shown"
        if goes_on_otherwise(drift):
            lead = f"{name} writes otherwise than its base, though no loss of answers is shown"
        parts = [lead + f", {seen}" * bool(seen)]
    parts += [it.left_open for it in level]
    if drift:
        parts.append(f"drift from the base: {_drifted(drift)}")
    elif found and all(it.nothing for it in found):
        parts.append("a section drift in the recipe measures what changed")
    return "; ".join(parts) + "."


def _of(found: Sequence[Sign], sign: int) -> list[Sign]:
    return [it for it in found if it.sign == sign]


def _joined(found: Sequence[Sign]) -> str:
    return " and ".join(it.said for it in found)


def _drifted(drift: Drift) -> str:
    return f"{_nats(drift)} nats a token on {drift.text}"


def _nats(drift: Drift) -> str:
    if abs(drift.value) < ROUNDING:
        return "0"
    value, low, high = fitting(drift.value, drift.low, drift.high)
    return f"{value} ({low} to {high})"


def _between(row: Mapping[str, Any], write: Callable[..., tuple[str, str, str]], unit: str) -> str:
    value, low, high = write(row["difference"], row["ci_low"], row["ci_high"])
    signed = value if value[0] in "+−" or not value.strip("0.") else f"+{value}"
    return f"{signed}{unit} ({low} to {high})"


# ----------------------------------------------------------------------------------------------------------
# All of them
# ----------------------------------------------------------------------------------------------------------
def headline(inputs: Inputs) -> str:
    """The verdict of the run in one sentence; of several models, those that lost text are named first."""
    models = models_of(inputs)
    if not models:
        return "No model has been compared with the base yet."
    if len(models) == 1:
        return of_model(inputs, models[0])
    found = {model: signs(inputs, model) for model in models}
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for model, of in found.items():
        kind = _kind(of)
        kinds["far" if kind == "level" and goes_on_otherwise(drift_of(inputs, model)) else kind].append(model)
    parts = []
    if kinds["lost"]:
        most = min(kinds["lost"], key=lambda model: min(it.size for it in _of(found[model], -1)))
        worst = min(_of(found[most], -1), key=lambda it: it.size)
        lead = "" if len(kinds["lost"]) == 1 else f"most {method_name(most)}, "
        also = "; ".join(it.left_open for it in _of(found[most], 0))
        parts.append(f"{_names(kinds['lost'], models)} lost text: {lead}{worst.said}{', while ' * bool(also)}{also}")
    if kinds["both"]:
        said = _joined([*_of(found[kinds["both"][0]], -1), *_of(found[kinds["both"][0]], 1)])
        lead = "" if len(kinds["both"]) == 1 else f"{method_name(kinds['both'][0])} "
        parts.append(f"{_names(kinds['both'], models)} lost text by one measure and gained by another: {lead}{said}")
    if kinds["gained"]:
        most = max(kinds["gained"], key=lambda model: max(it.size for it in _of(found[model], 1)))
        best = max(_of(found[most], 1), key=lambda it: it.size)
        lead = "" if len(kinds["gained"]) == 1 else f"most {method_name(most)}, "
        parts.append(f"{_names(kinds['gained'], models)} gained text: {lead}{best.said}")
    if kinds["far"]:
        opened = _left_open([it for model in kinds["far"] for it in _of(found[model], 0)])
        who = (
            f"{_names(kinds['far'], models)} {'writes' if len(kinds['far']) == 1 else 'write'} otherwise than the base"
        )
        parts.append(f"{who}, though no loss of answers is shown: {'; '.join(opened)}")
    if kinds["level"]:
        opened = _left_open([it for model in kinds["level"] for it in _of(found[model], 0)])
        parts.append(f"no loss of text is shown for {_names(kinds['level'], models)}, but {'; '.join(opened)}")
    if kinds["same"]:
        parts.append(f"{_names(kinds['same'], models)} lost no text, by construction")
    if kinds["nothing"]:
        why = found[kinds["nothing"][0]][0].left_open
        parts.append(f"whether {_names(kinds['nothing'], models)} lost text is not known: {why}")
    if kinds["unasked"]:
        parts.append(f"of {_names(kinds['unasked'], models)} no text was compared with the base's")
    parts += _drifts(inputs, models)
    sentence = "; ".join(parts) + "."
    return sentence if sentence.startswith(tuple(map(method_name, models))) else sentence[0].upper() + sentence[1:]


def _kind(found: Sequence[Sign]) -> str:
    lost, gained = bool(_of(found, -1)), bool(_of(found, 1))
    if lost or gained:
        return "both" if lost and gained else "lost" if lost else "gained"
    if not found:
        return "unasked"
    if all(it.same for it in found):
        return "same"
    return "nothing" if all(it.nothing for it in found) else "level"


def _left_open(found: Sequence[Sign]) -> list[str]:
    """What could not have been seen, by measure: of the model that it says least of."""
    widest: dict[str, Sign] = {}
    for it in found:
        if it.measure not in widest or it.room > widest[it.measure].room:
            widest[it.measure] = it
    return [it.left_open for it in widest.values()]


def _drifts(inputs: Inputs, models: Sequence[str]) -> Iterator[str]:
    known = {model: drift for model in models if (drift := drift_of(inputs, model)) is not None}
    if not known:
        return
    most, least = max(known, key=lambda it: known[it].value), min(known, key=lambda it: known[it].value)
    said = f"drift from the base, nats a token on {known[most].text}: largest in {method_name(most)}, "
    said += _nats(known[most])
    differ = known[most].value - known[least].value > ROUNDING
    on = "" if known[least].text == known[most].text else f" on {known[least].text}"
    yield said + (f", smallest in {method_name(least)}{on}, {_nats(known[least])}" if differ else "")


def _names(models: Sequence[str], of: Sequence[str]) -> str:
    """All by name where they are few, else how many and the first."""
    names = [method_name(model) for model in models]
    if len(names) == len(of) > MOST_NAMES:
        return f"all {len(of)} models"
    if len(names) > MOST_NAMES:
        return f"{len(names)} of {len(of)} models ({', '.join(names[: MOST_NAMES - 1])} …)"
    return listed(names)


def share_fitting(row: QARecord) -> tuple[str, str, str]:
    """An accuracy and the ends of its interval in percent, with the digits that the interval carries."""
    return fitting(row["accuracy"], row["ci_low"], row["ci_high"], 100)
