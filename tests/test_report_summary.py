"""The summary's sentences: what they say follows from the records, and they say so where nothing follows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from palimpsest.files import write_json, write_text
from palimpsest.report import summary
from palimpsest.report.inputs import read_inputs
from palimpsest.report.summary import is_known, points_of, scale
from report_fixture import accuracy_row, comparison_row, drift_row, invented_provenance, make_run, speech_test

LOST, WHERE, KEEPS, SPEECH = range(4)


def _answers(path: Path, question: int, **tables: Any) -> str:
    write_json(path / "results.json", {"schema": 1, **tables})
    point = points_of(read_inputs(path))[question]
    return "\n".join(line for finding in point.findings for line in (finding.sentence, *finding.details))


def test_scale_says_how_small_the_run_is(tmp_path: Path) -> None:
    sentence = scale(read_inputs(make_run(tmp_path)))
    for part in ("Invented-LM-135M (135 million parameters)", "1\u202f200 spoken questions", "up to 360 steps"):
        assert part in sentence
    assert sentence.endswith("not as evidence about large models.")


def test_scale_without_provenance_counts_the_scored_weights(tmp_path: Path) -> None:
    sentence = scale(read_inputs(make_run(tmp_path, without={"provenance.json", "training"})))
    # 16 layers × 3 538 944 weights
    assert sentence.startswith("This run trained a language model (57 million weights in its layers) on spoken")


def test_scale_of_a_large_run_has_no_reservation(tmp_path: Path) -> None:
    large = invented_provenance() | {
        "models": {"language_model": {"name": "Big", "n_parameters": 8_030_000_000}},
        "data": {"train": {"n": 450_000}},
    }
    write_json(tmp_path / "provenance.json", large)
    qa = [accuracy_row("full", "facts", "text", 60)]
    write_json(tmp_path / "results.json", {"schema": 1, "qa": qa})
    assert scale(read_inputs(tmp_path)) == (
        "This run trained Big (8.03 billion parameters) on 450\u202f000 spoken questions."
    )


@pytest.mark.parametrize(
    ("difference", "p", "verdict"),
    [(-0.1, 0.01, "a loss: −10 points"), (0.1, 0.01, "a gain: +10 "), (-0.1, 0.05, "no difference shown: −10 ")],
)
def test_lost_reads_the_paired_test(tmp_path: Path, difference: float, p: float, verdict: str) -> None:
    qa = [accuracy_row("base", "facts", "text", 60), accuracy_row("full", "facts", "text", 30)]
    there = _answers(tmp_path, LOST, qa=qa, comparisons=[comparison_row("facts", "base", "full", difference, p)])
    back = _answers(tmp_path, LOST, qa=qa, comparisons=[comparison_row("facts", "full", "base", -difference, p)])
    assert there == back  # the order in which the two were compared does not matter
    assert f"Full-FT (10.0\u00a0%): {verdict}" in there


def test_a_p_stands_beside_the_number_of_tests_it_is_corrected_for(tmp_path: Path) -> None:
    qa = [accuracy_row("base", "facts", "text", 60), accuracy_row("full", "facts", "text", 30)]
    row = comparison_row("facts", "base", "full", -0.1, 0.01)
    for more, said in (
        ({"n_family": 21, "left_out": None}, "p = 0.010, Holm over 21)"),
        ({"n_family": 21, "left_out": "equal by construction"}, "p = 0.010, equal by construction)"),
        ({}, "p = 0.010, Holm-corrected)"),  # a record of an earlier version
    ):
        assert said in _answers(tmp_path, LOST, qa=qa, comparisons=[{**row, **more}])


def test_lost_without_a_comparison_draws_no_conclusion(tmp_path: Path) -> None:
    qa = [accuracy_row("base", "facts", "text", 60), accuracy_row("full", "facts", "text", 0)]
    answer = _answers(tmp_path, LOST, qa=qa)
    assert "Not compared with the base question by question: Full-FT (0.0\u00a0%)." in answer
    assert "loss" not in answer


def test_where_needs_the_divergence_from_the_base(tmp_path: Path) -> None:
    answer = _answers(
        make_run(tmp_path),
        WHERE,
        shift=[
            {
                "model": "full",
                "reference": reference,
                "modality": "text",
                "reduction": "per_batch_abs",
                "measure": measure,
                "value": value,
                "ci_low": None,
                "ci_high": None,
                "noise_floor": 0.01,
            }
            for reference, measure, value in (
                ("base", "jensen_shannon", 0.05),
                ("base", "cosine", 0.99),
                ("lora", "jensen_shannon", 0.77),
            )
        ],
        layers=[],
    )
    assert (
        "Full-FT: 0.0500 bits, 5.0 times what the base alone differs by between these questions and others." in answer
    )
    assert "0.99" not in answer
    assert "0.77" not in answer


def test_where_names_the_peak_layers(tmp_path: Path) -> None:
    point = points_of(read_inputs(make_run(tmp_path)))[WHERE]
    assert point.findings[-1].sentence == (
        "The layer with the largest share is 12 in the base (layers 0 to 15), 3 in Full-FT, 10 in Layer-LR, 11 in LoRA."
    )


def test_keeps_tells_better_from_alike(tmp_path: Path) -> None:
    qa = [accuracy_row(method, "facts", "text", n) for method, n in (("full", 30), ("layer_lr", 60), ("lora", 63))]
    comparisons = [
        comparison_row("facts", "full", "lora", 0.11, 0.001),
        comparison_row("facts", "lora", "layer_lr", -0.01, 0.9),
    ]
    answer = _answers(tmp_path, KEEPS, qa=qa, comparisons=comparisons)
    assert "LoRA answers the most typed questions, 21.0\u00a0%." in answer
    assert "Better than Full-FT (10.0\u00a0%)." in answer
    assert "Not distinguishable from Layer-LR (20.0\u00a0%)." in answer


def test_one_given_model_is_no_comparison_of_trainings(tmp_path: Path) -> None:
    write_json(tmp_path / "provenance.json", {"models": {"given": {"tuned": {"name": "x"}}}})
    write_json(tmp_path / "results.json", {"schema": 1})
    point = points_of(read_inputs(tmp_path))[1 + KEEPS]  # behind "What is different?"
    (finding,) = point.findings
    assert "a study that trains in several ways (docs/remedies.md)." in finding.sentence
    assert not is_known(point)


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ((30, 30), "facts: all 2 trained models answer equally many typed questions, 10.0\u00a0%."),
        ((0, 0), "facts: all 2 trained models answer equally many typed questions, 0.0\u00a0%."),
        ((30, 30, 0), "facts: of the trained models Full-FT and Layer-LR answer the most typed questions, 10.0"),
    ],
)
def test_keeps_names_no_best_of_equal_ones(tmp_path: Path, right: tuple[int, ...], said: str) -> None:
    qa = [accuracy_row(m, "facts", "text", n) for m, n in zip(("full", "layer_lr", "lora"), right, strict=False)]
    assert said in _answers(tmp_path, KEEPS, qa=qa)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (
            (0.08, 0.12),
            "10.0\u00a0% of them (95 % interval 8.0 to 12.0 over the matrices) are among the 3.0\u00a0% that",
        ),
        ((0.08, 0.12), "depends on most, more than chance"),
        ((0.0, 0.08), "depends on most, not told from chance"),
        ((0.0, 0.01), "depends on most, less than chance"),
    ],
)
def test_where_says_whether_the_changed_weights_are_those_that_matter(
    tmp_path: Path, shares: tuple[float, float], said: str
) -> None:
    """Of two matrices the bootstrap's interval spans both; of two training runs each matrix counts with their mean."""
    delta = [
        {"method": run, "name": f"w{i}", "layer": i, "kind": "q", "relative_norm": 0.1,
         "overlap_with_importance": share + sign * 0.0005 * bool(share), "overlap_by_chance": 0.03}
        for run, sign in (("full", 1), ("full-seed1", -1)) for i, share in enumerate(shares)
    ]  # fmt: skip
    overlap = {
        "model": "full", "reference": "base", "name": "all", "layer": None, "kind": "all", "ratio": 0.03,
        "overlap": 0.4, "overlap_by_chance": 0.03, "ci_low": 0.35, "ci_high": 0.45, "noise_floor": 0.6,
    }  # fmt: skip
    write_json(tmp_path / "results.json", {"schema": 1, "delta": delta, "mask_overlap": [overlap]})
    inputs = read_inputs(tmp_path)
    merged = [{**row, "method": "full"} for row in inputs.results["delta"]]  # as by_method has them
    point = points_of(dataclasses.replace(inputs, results={**inputs.results, "delta": merged}))[WHERE]  # type: ignore[typeddict-item]
    (line,) = point.findings[0].details
    assert line.startswith("Full-FT: ")
    assert said in line
    assert line.endswith(
        "; 40.0\u00a0% (35.0 to 45.0) of those are still the most important ones, where other questions alone leave "
        "60.0\u00a0%."
    )


def test_the_noise_floor_is_said_to_be_of_other_questions(tmp_path: Path) -> None:
    point = points_of(read_inputs(make_run(tmp_path)))[WHERE]
    said = "between these questions and others (20 batches of these, 13 of the others)."
    assert [said in detail for detail in point.findings[0].details] == [True] * 3


def _spoken(
    shares: dict[str, tuple[float, float, float]], p: tuple[float, float, float], n: int = 300
) -> dict[str, Any]:
    """qa and speech_tests of methods: (S2T, chance, typed), with the p of chance, typed and cascade (40 %)."""
    qa, tests = [], []
    for method, (share, chance, typed) in shares.items():
        qa.append(accuracy_row(method, "facts", "speech", round(n * share), n))
        for reference, against, p_holm in zip(("unrelated", "text", "cascade"), (chance, typed, 0.4), p, strict=True):
            tests.append(speech_test(method, "facts", reference, share, against, p_holm))
    return {"qa": qa, "speech_tests": tests}


def test_speech_at_chance_is_said_plainly(tmp_path: Path) -> None:
    tables = _spoken({"full": (0.01, 0.01, 0.3), "lora": (0.02, 0.01, 0.3)}, (0.6, 0.001, 0.001))
    answer = _answers(tmp_path, SPEECH, **tables)
    assert answer.startswith(
        "No. The models do not yet understand speech: the best S2T accuracy is 2.0\u00a0% (LoRA, facts), none lies "
        "above what the same answers score for other questions, and each lies below that of the same questions typed."
    )


def test_a_hard_task_is_no_lack_of_understanding(tmp_path: Path) -> None:
    """S2T 8 % where typed questions give 10 % and the cascade 6 %: all that the model knows, from speech too."""
    tables = _spoken({"lora": (0.08, 0.004, 0.1)}, (0.0001, 0.3, 0.0001), n=2000)
    answer = _answers(tmp_path, SPEECH, **tables)
    assert "No." not in answer
    assert answer.startswith("1 of 1 S2T accuracies lie above what the same answers score for other questions")
    assert (
        "LoRA (8.0\u00a0%), 95 % interval 6.9 to 9.3; against other questions 0.4\u00a0%: higher: +7.6 points" in answer
    )
    assert "against typed 10.0\u00a0%: no difference shown: −2.0 points" in answer
    assert "against the cascade 40.0\u00a0%: lower: −32.0 points" in answer


def test_a_task_too_hard_to_tell_is_not_denied(tmp_path: Path) -> None:
    answer = _answers(tmp_path, SPEECH, **_spoken({"full": (0.01, 0.01, 0.02)}, (0.6, 0.4, 0.001)))
    assert answer.startswith("Not shown: the best S2T accuracy is 1.0\u00a0% (Full-FT, facts), and none lies above")


def test_speech_without_tests_is_not_decided(tmp_path: Path) -> None:
    """Of an earlier version's results.json nothing is concluded from an accuracy alone."""
    for right in (0, 3, 150):
        answer = _answers(tmp_path, SPEECH, qa=[accuracy_row("full", "facts", "speech", right)])
        said = "the best S2T accuracy is" if right else "every S2T accuracy is 0, but"
        assert answer.startswith(f"Not decided: {said}")
    assert "Full-FT (50.0\u00a0%), 95 % interval 44.4 to 55.6." in answer


def test_speech_is_read_against_the_base_through_its_adaptor_and_the_cascade(tmp_path: Path) -> None:
    rows = [("base", "speech", 60), ("base", "cascade", 120), ("lora", "speech", 150)]
    answer = _answers(tmp_path, SPEECH, qa=[accuracy_row(method, "facts", put, n) for method, put, n in rows])
    assert (
        "the base through the adaptor it was given answers 20.0\u00a0%; the base after a recogniser 40.0\u00a0%"
        in answer
    )
    assert "adaptor" not in _answers(tmp_path, SPEECH, qa=[accuracy_row("lora", "facts", "speech", 150)])


def test_many_cut_answers_are_warned_of(tmp_path: Path) -> None:
    few = accuracy_row("base", "facts", "text", 60) | {"n_cut": 15}  # of 300: exactly 5 %
    many = accuracy_row("full", "facts", "speech", 30) | {"n_cut": 16}
    unknown = accuracy_row("lora", "facts", "text", 30)
    assert "Warning" not in _answers(tmp_path, LOST, qa=[few, unknown])
    answer = _answers(tmp_path, LOST, qa=[few, many, unknown])
    assert "more than 5.0\u00a0% were cut" in answer
    assert answer.endswith("Full-FT, facts, S2T: 16 of 300.")


def test_an_empty_run_answers_no_question(tmp_path: Path) -> None:
    assert scale(read_inputs(tmp_path)) == "This run has not trained a model yet."
    for point in points_of(read_inputs(tmp_path)):
        assert [finding.sentence[:10] for finding in point.findings] == ["Not known:"]


def test_drift_and_general_text_are_sentences_with_their_intervals() -> None:
    """Of the model asked for and of all tokens; nothing where neither was measured."""
    drift = [
        {"model": model, "text": "chat", "tokens": tokens, "kl": 0.0462, "kl_ci_low": 0.033, "kl_ci_high": 0.0596,
         "agreement": 0.9}
        for model in ("full", "lora") for tokens in ("all", "token 1")
    ]  # fmt: skip
    general = [{"method": "full", "difference": 0.0065, "ci_low": 0.003, "ci_high": 0.01}]
    inputs: Any = SimpleNamespace(results={"drift": drift, "general_text_comparisons": general})
    said = list(summary._drifted(inputs, "full"))
    assert said == [
        "Drift, KL(base ‖ model): 0.0462 nats a token on answers in chats of the base's (95 % interval 0.0330 to "
        "0.0596), where the most likely token is the same at 90.0\u00a0%.",
        "General text: +0.0065 nats a byte against the base (95 % interval 0.00300 to 0.0100).",
    ]
    assert list(summary._drifted(inputs, "layer_lr")) == []


def test_points_of_a_curve_are_one_line(tmp_path: Path) -> None:
    methods = {f"full-{rate}": {"kind": "full", "curve": "full"} for rate in ("1e-4", "2e-4", "5e-4")}
    write_text(tmp_path / "study.yaml", json.dumps({"methods": {**methods, "lora": {"kind": "lora"}}}))
    found = {"full-1e-4": (0.0, 1.0), "full-2e-4": (-0.02, 0.5), "full-5e-4": (-0.2, 0.001), "lora": (0.01, 0.9)}
    qa = [accuracy_row(method, "facts", "text", 60) for method in ("base", *found)]
    comparisons = [comparison_row("facts", "base", method, *of) for method, of in found.items()]
    lines = _answers(tmp_path, LOST, qa=qa, comparisons=comparisons).split("\n")[1:]
    assert len(lines) == 2  # one for the curve, one for the method that is none
    assert lines[0].startswith("LoRA") != lines[1].startswith("LoRA")
    (curve,) = (line for line in lines if line.startswith("Full-FT"))
    assert "a loss at full-5e-4; no difference shown at full-1e-4, full-2e-4 (−20.0 to 0.0 points)" in curve


def test_of_a_base_without_a_right_answer_nothing_is_lost(tmp_path: Path) -> None:
    qa = [accuracy_row("base", "facts", "text", 0), accuracy_row("full", "facts", "text", 0)]
    row = {**comparison_row("facts", "base", "full", 0.0, 1.0), "only_a": 0, "only_b": 0, "ci_low": 0.0, "ci_high": 0.0}
    answer = _answers(tmp_path, LOST, qa=qa, comparisons=[row])
    assert "of 300 typed questions, so that none can be lost; drift and general text say what changed" in answer
    assert "no answer to 300 questions changed, which leaves room for a loss of up to 1.0 points" in answer
    assert "0.0 to 0.0" not in answer


def test_drift_says_which_model_is_nearest(tmp_path: Path) -> None:
    drift = [drift_row("full", "plain", 0.5), drift_row("lora", "plain", 0.1), drift_row("layer_lr", "plain", 0.105)]
    answer = _answers(tmp_path, KEEPS, drift=drift)
    # 0.1 ± 0.01 overlaps 0.105 ± 0.0105 and not 0.5 ± 0.05
    assert "Drift: LoRA is nearest to the base on text of the base, its interval apart from 1 of the other 2" in answer
    assert answer.index("LoRA: 0.100") < answer.index("Layer-LR: 0.105") < answer.index("Full-FT: 0.500")


def test_a_run_that_is_not_finished_says_what_is_there_and_what_is_to_come(tmp_path: Path) -> None:
    methods = {"full": {"kind": "full"}, "lora": {"kind": "lora"}, "other": {"kind": "given", "checkpoint": "x"}}
    write_text(tmp_path / "study.yaml", json.dumps({"methods": methods}))
    for name in ("full", "other"):
        write_json(tmp_path / "methods" / name / "checkpoint" / "step.json", {})
    assert scale(read_inputs(tmp_path)).startswith(
        "This run is not finished: Full-FT is trained, LoRA is to be trained, other is given; nothing"
    )


def test_the_cut_answers_of_a_diagnosis_name_its_option(tmp_path: Path) -> None:
    qa = [{**accuracy_row("base", "facts", "text", 60), "n_cut": 200}]
    for name, said in (("diagnosis", "--max-new-tokens"), ("demo", "; raise evaluation.max_new_tokens and run")):
        write_text(tmp_path / "study.yaml", f"name: {name}\n")
        assert said in _answers(tmp_path, LOST, qa=qa)
