"""The summary of a run in plain sentences: how small it is, what was lost, where, and what keeps it.

Every sentence is made of records alone and says so where they do not decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from palimpsest.records import (
    MOST_CUT,
    ComparisonRecord,
    ProbeComparisonRecord,
    QARecord,
    ShiftRecord,
    SpeechTestRecord,
)
from palimpsest.report.across_runs import n_runs
from palimpsest.report.inputs import (
    MODALITY_NAMES,
    Inputs,
    at,
    having,
    is_point,
    listed,
    main_metric,
    main_reduction,
    method_key,
    method_name,
    model_name,
    peak_layer,
    task_name,
    text_layers,
    text_shifts,
)
from palimpsest.report.table import interval, p_value, percent, points, points_fitting, significant
from palimpsest.report.trade_off import keeps_most
from palimpsest.report.verdict import (
    ALL,
    LEVEL,
    Drift,
    accuracies,
    drift_of,
    nothing_changed,
    of_base,
    of_model,
    of_tuned,
    paired,
    unseen,
)
from palimpsest.rundir import STEP_FILE, models_in

BETTER, ALIKE, UNPAIRED = "Better than", "Not distinguishable from", "Not compared question by question with"
Pair = tuple[QARecord, ComparisonRecord]  # the accuracy of a model, and its comparison with the base
REFERENCES = {"unrelated": "against other questions", "text": "against typed", "cascade": "against the cascade"}
NOT_KNOWN = "Not known"
DIAGNOSIS = "diagnosis"  # name of the recipe that palimpsest diagnose writes
MOST_PEAKS = 8  # models whose layers stand in one sentence
LARGE_MODEL = 10**9  # parameters of the paper's smaller model
LARGE_DATA = 10**5  # training examples; the paper's sets have several 10⁵


@dataclass(frozen=True)
class Finding:
    """A sentence of the summary and what belongs under it."""

    sentence: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """One question of the summary and its answers."""

    question: str
    findings: tuple[Finding, ...]


def scale(inputs: Inputs) -> str:
    """How small the run is: model, training examples and steps, as far as the run directory says.

    Read from provenance.json: `models.language_model.{name, n_parameters}` and `data.train.n`; steps from the
    training records, and without a parameter count the scored weights of the layer records.
    """
    parameters = at(inputs.provenance, "models", "language_model", "n_parameters")
    scored = sum(row["n_parameters"] for row in having(text_layers(inputs.results), model="base"))
    examples = at(inputs.provenance, "data", "train", "n")
    steps = max((row["step"] for row in inputs.results["training"]), default=None)
    if not any(row["method"] != "base" for table in ("training", "qa") for row in inputs.results[table]):
        return _begun(inputs)
    what = model_name(inputs) or "a language model"
    if isinstance(parameters, int):
        what += f" ({_millions(parameters)} parameters)"
    elif scored:
        what += f" ({_millions(scored)} weights in its layers)"
    given, trains = given_models(inputs), bool(inputs.results["training"])
    if given and not trains:
        return f"This run sets {what} against {len(given)} tuned model{'s' * (len(given) > 1)} that it was given."
    on = f"{examples:,} spoken questions".replace(",", "\u202f") if isinstance(examples, int) else "spoken questions"
    sentence = f"This run trained {what} on {on}" + (f" for up to {steps} steps" if steps is not None else "")
    runs = n_runs(inputs.results)
    sentence += f", {runs} times with each method" if runs > 1 else ""
    sentence += f", and sets {', '.join(map(method_name, given))} beside it, which it was given" if given else ""
    known = isinstance(parameters, int) and isinstance(examples, int)
    if known and parameters >= LARGE_MODEL and examples >= LARGE_DATA:
        return sentence + "."
    return sentence + "; read it as a demonstration of the method, not as evidence about large models."


def _begun(inputs: Inputs) -> str:
    """Of a run without a record of a tuned model: which are there all the same, by the run directory, and which not."""
    methods = at(inputs.config, "methods")
    there = {name for name, folder in models_in(inputs.path).items() if (folder / "checkpoint" / STEP_FILE).is_file()}
    if not isinstance(methods, dict) or not methods:
        return "This run has not trained a model yet."
    said = []
    for name in sorted(methods, key=method_key):
        what = {"given": "given", "blend": "blended"}.get(str(at(methods[name], "kind")), "trained")
        said.append(f"{method_name(name)} {'is' if name in there else 'is to be'} {what}")
    return f"This run is not finished: {', '.join(said)}; nothing of a tuned model has been compared with the base yet."


def points_of(inputs: Inputs) -> list[Point]:
    """The summary's questions with their answers, in reading order."""
    several = "two trained models that answered the same typed questions"
    if len(given_models(inputs)) == 1 and not inputs.results["training"]:
        several = (
            "second tuned model; what keeps text is compared by a study that trains in several ways (docs/remedies.md)"
        )
    questions = (
        ("What was lost?", _lost, "accuracy of the base and a trained model on typed questions"),
        ("Where in the model?", _where, "layer-wise importance of a trained model"),
        ("Which training keeps the text?", _keeps, several),
        ("Do the models understand speech?", _understand, "answers to spoken questions"),
    )
    found = [
        Point(question, tuple(answer(inputs)) or (Finding(f"{NOT_KNOWN}: the run has no {lacking}."),))
        for question, answer, lacking in questions
    ]
    found[0] = replace(found[0], findings=(*found[0].findings, *_cut(inputs)))
    differs = tuple(_differs(inputs, name) for name in given_models(inputs))
    return [*([Point("What is different?", differs)] if differs else []), *found]


def is_known(point: Point) -> bool:
    return not point.findings[0].sentence.startswith(NOT_KNOWN)


def in_short(inputs: Inputs) -> list[str]:
    """What is different, as a few lines of text: all there is to say of one model, the first of each of several."""
    found = [_differs(inputs, name) for name in given_models(inputs)]
    return [found[0].sentence, *found[0].details] if len(found) == 1 else [it.sentence for it in found]


def given_models(inputs: Inputs) -> list[str]:
    """The models that the run was given and did not train, in the report's order."""
    given = at(inputs.provenance, "models", "given")
    return sorted(given, key=method_key) if isinstance(given, dict) else []


# ----------------------------------------------------------------------------------------------------------
# What is different: a model that was given, from what it was made of
# ----------------------------------------------------------------------------------------------------------
def _differs(inputs: Inputs, model: str) -> Finding:
    """Whether text was kept, by how much, and where in the layers the model differs."""
    probe = having(inputs.results["probe_comparisons"], method=model, kind=ALL)
    details = (
        *_drifted(inputs, model),
        *map(_probed, probe),
        *_heard(inputs, model),
        *_changed(inputs, model),
        *_moved(inputs, model),
        *_noted(inputs, model),
    )
    return Finding(of_model(inputs, model), details)


def _noted(inputs: Inputs, model: str) -> list[str]:
    """What of it is not compared, and how it was not asked."""
    notes = at(inputs.provenance, "models", "given", model, "notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _drifted(inputs: Inputs, model: str) -> Iterator[str]:
    """How far its next tokens are from the base's, and whether it lost on text that no training taught."""
    said = [
        f"{significant(row['kl'])} nats a token on {'answers in chats' if row['text'] == 'chat' else 'text'} of the "
        f"base's (95 % interval {interval(row['kl_ci_low'], row['kl_ci_high'], significant)}), where the most likely "
        f"token is the same at {_share(row['agreement'])}"
        for row in having(inputs.results["drift"], model=model, tokens=ALL)
    ]
    if said:
        yield f"Drift, KL(base ‖ model): {'; '.join(said)}."
    for row in having(inputs.results["general_text_comparisons"], method=model):
        yield (
            f"General text: {row['difference']:+.3g} nats a byte against the base (95 % interval "
            f"{interval(row['ci_low'], row['ci_high'], significant)})."
        )


def _probed(row: ProbeComparisonRecord) -> str:
    evidence = f"95 % interval {interval(row['ci_low'], row['ci_high'], points)}"
    return (
        f"Probe: it prefers the right of two continuations in {_share(row['accuracy'])} of {row['n']} pairs, the base "
        f"in {_share(row['accuracy_base'])}: {points(row['difference'])} points ({evidence})."
    )


def _heard(inputs: Inputs, model: str) -> Iterator[str]:
    said = [
        f"{task_name(row['task'])} {_share(row['accuracy'])}"
        for row in having(accuracies(inputs, "speech"), method=model)
    ]
    if said:
        yield f"From speech: {'; '.join(said)}."


def _changed(inputs: Inputs, model: str) -> Iterator[str]:
    """How far the weights moved, by layer: the mean over its matrices of ‖ΔW‖ / ‖W‖."""
    of_layer: dict[int, list[float]] = {}
    for row in having(inputs.results["delta"], method=model):
        if row["relative_norm"] is not None:
            of_layer.setdefault(row["layer"], []).append(row["relative_norm"])
    if of_layer:
        means = {layer: sum(of) / len(of) for layer, of in of_layer.items()}
        most, least = max(means, key=lambda it: means[it]), min(means, key=lambda it: means[it])
        whole = sum(map(sum, of_layer.values())) / sum(map(len, of_layer.values()))
        if not whole:
            yield "Weights: not one of the matrices in its layers was changed."
            return
        yield (
            f"Weights: a matrix changed by {significant(100 * whole, 2)}\u00a0% of its norm on average, most in layer "
            f"{most} ({significant(100 * means[most], 2)}\u00a0%), least in layer {least} "
            f"({significant(100 * means[least], 2)}\u00a0%)."
        )
        if where := _on_important(inputs, model):
            yield f"The weights that changed most: {where}."
        if whole > 1:
            yield "Warning: the weights changed by more than their norm, as if it had been made from another base."


def _on_important(inputs: Inputs, model: str) -> str:
    """Whether the weights that changed most are those that the base's text depends on; empty where nobody knows.

    Mean over the matrices, of several training runs of their means, with a bootstrap interval over the matrices.
    """
    from palimpsest.intervals import bootstrap_ratio

    of_matrix: dict[str, list[float]] = {}
    rows = [row for row in having(inputs.results["delta"], method=model) if row["overlap_with_importance"] is not None]
    for row in rows:
        of_matrix.setdefault(row["name"], []).append(row["overlap_with_importance"])
    if len(of_matrix) < 2:
        return ""
    shares = [fmean(of) for of in of_matrix.values()]
    low, high = bootstrap_ratio([[share] for share in shares], [1] * len(shares), seed=0)[:, 0]
    chance = fmean(row["overlap_by_chance"] for row in rows)
    shown = "more than chance" if low > chance else "less than chance" if high < chance else "not told from chance"
    said = (
        f"{_share(fmean(shares))} of them (95 % interval {interval(low, high)} over the matrices) are among the "
        f"{_share(chance)} that the base's text depends on most, {shown}"
    )
    for stays in having(inputs.results["mask_overlap"], model=model, reference="base", kind="all"):
        spread = interval(stays["ci_low"], stays["ci_high"])
        said += (
            f"; {_share(stays['overlap'])}{f' ({spread})' * bool(spread)} of those are still the most important ones"
        )
        if stays["noise_floor"] is not None:
            said += f", where other questions alone leave {_share(stays['noise_floor'])}"
    return said


def _moved(inputs: Inputs, model: str) -> Iterator[str]:
    """How far text importance moved over the layers, and to and from which."""
    layers = text_layers(inputs.results)
    before, after = ({row["layer"]: row["share"] for row in having(layers, model=it)} for it in ("base", model))
    moved = {layer: after[layer] - share for layer, share in before.items() if layer in after}
    rows = [row for row in text_shifts(inputs.results) if row["model"] == model and row["value"] is not None]
    for row in rows:
        said = f"Importance for text ({row['reduction']}): moved over the layers by {_shift(row)}"
        if any(moved.values()):
            up, down = max(moved, key=lambda it: moved[it]), min(moved, key=lambda it: moved[it])
            said += f"; its share rose most in layer {up} ({points(moved[up])} points) and fell most in layer {down} "
            said += f"({points(moved[down])})"
        yield said + "."


def _lost(inputs: Inputs) -> Iterator[Finding]:
    rows = accuracies(inputs, "text")
    for task in dict.fromkeys(row["task"] for row in rows):
        base, trained = of_base(rows, task), of_tuned(rows, task)
        if base is None or not trained:
            continue
        compared = [(row, paired(inputs, task, "base", row["method"])) for row in trained]
        details = []
        for curve, of in _by_curve(inputs, [(row, pair) for row, pair in compared if pair is not None]).items():
            details.append(f"{_named(of[0][0])}: {_difference(of[0][1])}" if len(of) == 1 else _curve(curve, of))
        alone = [_named(row) for row, comparison in compared if comparison is None]
        if alone:
            details.append(f"Not compared with the base question by question: {', '.join(alone)}.")
        answered = f"the base answers {_share(base['accuracy'])} of {base['n']} typed questions"
        if base["accuracy"] == 0:
            answered += ", so that none can be lost; drift and general text say what changed"
        yield Finding(f"{task_name(task)}: {answered}; the trained models:", tuple(details))


def _by_curve(inputs: Inputs, compared: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The points of a curve under its name, every other model under its own."""
    groups: dict[str, list[Pair]] = {}
    for row, pair in compared:
        curve = at(inputs.config, "methods", row["method"], "curve")
        groups.setdefault(row["method"] if curve is None else str(curve), []).append((row, pair))
    return groups


def _curve(curve: str, of: Sequence[Pair]) -> str:
    """A line for all points: what is shown, and between which differences they lie."""
    kinds: dict[str, list[str]] = {}
    for row, pair in of:
        verdict = "no difference shown" if pair["p_holm"] >= LEVEL else "a gain" if pair["difference"] > 0 else "a loss"
        kinds.setdefault(verdict, []).append(method_name(row["method"]))
    every = "both points" if len(of) == 2 else f"all {len(of)} points"
    said = [
        f"{verdict} at {every if len(names) == len(of) else ', '.join(names)}"
        for verdict, names in sorted(kinds.items())
    ]
    differences = [pair["difference"] for _, pair in of]
    widest = max((unseen(pair) for _, pair in of if pair["p_holm"] >= LEVEL), key=lambda it: it[1], default=("", 0.0))
    return (
        f"{method_name(curve)}: {'; '.join(said)} ({points(min(differences))} to {points(max(differences))} points)"
        f"{'; ' * bool(widest[0])}{widest[0]}."
    )


def _cut(inputs: Inputs) -> Iterator[Finding]:
    """A warning where so many answers were cut at the limit that accuracies may say more about it than about models."""
    details = [
        f"{method_name(row['method'])}, {task_name(row['task'])}, "
        f"{MODALITY_NAMES.get(row['modality'], row['modality'])}: {row['n_cut']} of {row['n']}."
        for row in sorted(
            having(inputs.results["qa"], metric=main_metric(inputs.results)), key=lambda row: method_key(row["method"])
        )
        if row.get("n_cut", 0) > MOST_CUT * row["n"]
    ]
    if details:
        sentence = (
            f"Warning: of these answers more than {percent(MOST_CUT)}\u00a0% were cut at the limit of new tokens "
            "without an end. What would have followed was not scored, so their accuracies, and differences between "
            f"them, may come from the limit; {_raise_it(inputs)}."
        )
        yield Finding(sentence, tuple(details))


def _raise_it(inputs: Inputs) -> str:
    """How the limit is raised: of a diagnosis its command writes the recipe."""
    if at(inputs.config, "name") == DIAGNOSIS:
        return "give palimpsest diagnose a higher --max-new-tokens (evaluation.max_new_tokens), with --changed"
    return "raise evaluation.max_new_tokens and run the study again with --changed"


def _where(inputs: Inputs) -> Iterator[Finding]:
    layers = text_layers(inputs.results)
    runs = n_runs(inputs.results)
    details: list[str] = []
    for row in text_shifts(inputs.results):
        if row["value"] is None:
            continue
        detail = f"{method_name(row['model'])}: {_shift(row)}"
        if runs > 1:
            detail += "; its first training run alone" if row.get("n_seeds") == 1 else f"; mean of {runs} training runs"
        details.append(detail + ".")
    if details:
        lead = (
            "How far training moved the spread of text importance over the layers (Jensen–Shannon divergence, scores "
            f"{main_reduction(inputs.results)}):"
        )
        yield Finding(lead, tuple(details))
    changed = dict.fromkeys(row["method"] for row in inputs.results["delta"])
    where = {model: said for model in sorted(changed, key=method_key) if (said := _on_important(inputs, model))}
    if where:
        lead = "Are the weights that training changed most those that the base's text depends on?"
        yield Finding(lead, tuple(f"{method_name(model)}: {said}." for model, said in where.items()))
    models = {row["model"] for row in layers}
    if "base" in models and len(models) > 1:
        trained = sorted(models - {"base"}, key=method_key)
        peaks = {method_name(model): peak_layer(layers, model) for model in trained}
        depth = max(row["layer"] for row in layers)
        largest = f"The layer with the largest share is {peak_layer(layers, 'base')} in the base (layers 0 to {depth})"
        if len(peaks) <= MOST_PEAKS:
            yield Finding(f"{largest}, {', '.join(f'{layer} in {name}' for name, layer in peaks.items())}.")
        else:
            spread = f"{largest}, {min(peaks.values())} to {max(peaks.values())} in the {len(peaks)} other models."
            yield Finding(spread, tuple(f"{name}: {layer}." for name, layer in peaks.items()))


def _shift(row: ShiftRecord) -> str:
    spread = interval(row["ci_low"], row["ci_high"], significant)
    said = f"{significant(row['value'] or 0.0)} bits"
    said += f" (95 % interval {spread})" if spread else ""
    if row["noise_floor"]:
        noise = significant((row["value"] or 0.0) / row["noise_floor"], 2)
        said += f", {noise} times what the base alone differs by between {_floor(row)}"
    return said


def _floor(row: ShiftRecord) -> str:
    """What the noise floor is a difference of. Records of earlier versions do not say how many batches it has."""
    here, there = row.get("n_batches"), row.get("n_batches_other")
    if here is not None and there is None:
        return "the even and the odd half of these questions"
    unlike = f" ({here} batches of these, {there} of the others)" if here != there else ""
    return f"these questions and others{unlike}"


def _keeps(inputs: Inputs) -> Iterator[Finding]:
    yield from (Finding(*said) for said in keeps_most(inputs))
    if not any(row["text_measure"] == "drift" for row in inputs.results["equal_hearing"]):
        yield from _nearest(inputs)
    rows = accuracies(inputs, "text")
    rows = [row for row in rows if not _is_point(inputs, row["method"])]  # those are compared as curves
    for task in dict.fromkeys(row["task"] for row in rows):
        trained = of_tuned(rows, task)
        if len(trained) < 2:
            continue
        best = max(trained, key=lambda row: row["accuracy"])
        first = [method_name(row["method"]) for row in trained if row["accuracy"] == best["accuracy"]]
        who = f"of the trained models {listed(first)} answer{'s' * (len(first) == 1)} the most typed questions"
        if len(first) == len(trained):
            who = f"all {len(first)} trained models answer equally many typed questions"
        others: dict[str, list[str]] = {BETTER: [], ALIKE: [], UNPAIRED: []}
        for row in trained:
            if row is not best:
                others[_relation(paired(inputs, task, row["method"], best["method"]))].append(_named(row))
        yield Finding(
            f"{task_name(task)}: {who}, {_share(best['accuracy'])}.",
            tuple(f"{relation} {', '.join(names)}." for relation, names in others.items() if names),
        )


def _nearest(inputs: Inputs) -> Iterator[Finding]:
    """The models by their drift, whatever they understand of speech; of intervals that overlap nothing is concluded."""
    models = sorted({row["model"] for row in inputs.results["drift"]} - {"base"}, key=method_key)
    known = {model: drift for model in models if (drift := drift_of(inputs, model)) is not None}
    if len(known) < 2:
        return
    order = sorted(known, key=lambda model: known[model].value)
    apart = [model for model in order[1:] if known[model].low > known[order[0]].high]
    shown = "from none of the others" if not apart else f"from {len(apart)} of the other {len(order) - 1}"
    shown = "from every other" if len(apart) == len(order) - 1 else shown
    yield Finding(
        f"Drift: {method_name(order[0])} is nearest to the base on {known[order[0]].text}, its interval apart {shown}; "
        "what was understood of speech is left aside. Nats a token:",
        tuple(f"{method_name(model)}: {_kl(known[model])}." for model in order),
    )


def _kl(drift: Drift) -> str:
    return f"{significant(drift.value)} (95 % interval {interval(drift.low, drift.high, significant)})"


def _is_point(inputs: Inputs, method: str) -> bool:
    return is_point(at(inputs.config, "methods", method))


def _relation(paired: ComparisonRecord | None) -> str:
    if paired is None:
        return UNPAIRED
    return BETTER if paired["p_holm"] < LEVEL and paired["difference"] > 0 else ALIKE


def _understand(inputs: Inputs) -> Iterator[Finding]:
    rows = [row for row in accuracies(inputs, "speech") if row["method"] != "base"]
    if not rows:
        return
    tests = having(inputs.results["speech_tests"], metric=main_metric(inputs.results))
    found = {(row["method"], row["task"], row["reference"]): row for row in tests}
    chance = [found.get((row["method"], row["task"], "unrelated")) for row in rows]
    typed = [found.get((row["method"], row["task"], "text")) for row in rows]
    best = max(rows, key=lambda row: row["accuracy"])
    best_of_all = f"the best S2T accuracy is {_share(best['accuracy'])} ({method_name(best['method'])}, "
    best_of_all += f"{task_name(best['task'])})"
    if best["accuracy"] == 0:
        best_of_all = "every S2T accuracy is 0"
    understood = [test for test in chance if test is not None and _direction(test) > 0]
    if any(test is None for test in (*chance, *typed)):
        yield Finding(
            f"Not decided: {best_of_all}, but results.json does not have every S2T accuracy tested against answers to "
            "other questions and to the typed ones. A task of one question has no such test; a run of an earlier "
            "version gets them by its study command, given again."
        )
    elif understood:
        yield Finding(
            f"{len(understood)} of {len(rows)} S2T accuracies lie above what the same answers score for other "
            "questions, which is chance. How much is understood is their distance from typed questions and the cascade."
        )
    elif all(test is not None and _direction(test) < 0 for test in typed):
        yield Finding(
            f"No. The models do not yet understand speech: {best_of_all}, none lies above what the same answers score "
            "for other questions, and each lies below that of the same questions typed. At that level, differences in "
            "S2T between the methods say nothing about how well they understand."
        )
    else:
        yield Finding(
            f"Not shown: {best_of_all}, and none lies above what the same answers score for other questions; but "
            "typed questions are not all answered better either: they may be too hard, or too few, to show it."
        )
    for task in dict.fromkeys(row["task"] for row in rows):
        details = (f"{'; '.join(_against(row, found))}." for row in having(rows, task=task))
        yield Finding(f"{task_name(task)}, spoken questions{_beside(inputs, task)}:", tuple(details))


def _against(row: QARecord, tests: Mapping[tuple[str, str, str], SpeechTestRecord]) -> Iterator[str]:
    """An accuracy from speech, and its distance from each reference that it was tested against."""
    yield f"{_named(row)}, 95 % interval {interval(row['ci_low'], row['ci_high'])}"
    for reference, against in REFERENCES.items():
        if test := tests.get((row["method"], row["task"], reference)):
            difference = _difference(test, "higher", "lower").removesuffix(".")
            yield f"{against} {_share(test['reference_accuracy'])}: {difference}"


def _direction(test: SpeechTestRecord) -> int:
    """1: above the reference, −1: below, 0: no difference shown."""
    return 0 if test["p_holm"] >= LEVEL else 1 if test["difference"] > 0 else -1


def _beside(inputs: Inputs, task: str) -> str:
    """What the methods' answers to speech are read against: the base through its adaptor, the cascade."""
    spoken, written = of_base(accuracies(inputs, "speech"), task), of_base(accuracies(inputs, "cascade"), task)
    parts = [f"the base through the adaptor it was given answers {_share(spoken['accuracy'])}"] if spoken else []
    parts += [f"the base after a recogniser {_share(written['accuracy'])}"] if written else []
    return f" ({'; '.join(parts)})" if parts else ""


# ----------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------
def _difference(row: ComparisonRecord | SpeechTestRecord, more: str = "a gain", less: str = "a loss") -> str:
    """With what a comparison of models could not have seen, where it shows nothing."""
    value, low, high = points_fitting(row["difference"], row["ci_low"], row["ci_high"])
    p = p_value(row["p_holm"])
    over = "Holm-corrected" if "n_family" not in row else row.get("left_out") or f"Holm over {row['n_family']}"
    evidence = f"95 % interval {low} to {high}; paired p {p if p.startswith('<') else f'= {p}'}, {over}"
    if row["p_holm"] < LEVEL:
        return f"{more if row['difference'] > 0 else less}: {value} points ({evidence})."
    if "method_a" not in row:
        if row["ci_low"] == row["ci_high"] == 0:
            return f"no difference shown: not one of {row['n']} questions separates them."
        return f"no difference shown: {value} points ({evidence})."
    left_open, _ = unseen(row)
    if nothing_changed(row):
        return f"no difference shown: {left_open}."
    return f"no difference shown: {value} points ({evidence}); {left_open}."


def _named(row: QARecord) -> str:
    return f"{method_name(row['method'])} ({_share(row['accuracy'])})"


def _share(value: float) -> str:
    return f"{percent(value)}\u00a0%"


def _millions(n: int) -> str:
    return f"{significant(n / 1e9)} billion" if n >= 10**9 else f"{n / 1e6:.0f} million"
