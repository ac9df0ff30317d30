"""`palimpsest compare` on answers written by `answer_questions`: pairing, tables by hand, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from palimpsest import intervals
from palimpsest.cli import app
from palimpsest.commands import compare as command
from palimpsest.comparison.pairs import accuracy_records
from palimpsest.comparison.systems import Answers, System
from palimpsest.data.examples import Example
from palimpsest.evaluation import judge
from palimpsest.evaluation.answers import Answer, answer_questions
from palimpsest.evaluation.scoring import METRIC_VERSION
from palimpsest.evaluation.tasks import Task
from palimpsest.files import UserError, read_json, write_json, write_jsonl, write_text
from palimpsest.intervals import mcnemar_exact, minimum_detectable_difference, wilson
from palimpsest.records import method_of

N = 40
METRIC = "token_sequence_numbers"
EXAMPLES = tuple(Example(f"q{i:02}", f"Capital of country {i}?", (f"city{i}",), f"city{i}") for i in range(N))
SPOKEN = tuple(replace(e, audio=Path(f"audio/{e.id}.flac")) for e in EXAMPLES)


def answer(
    file: Path,
    right: Sequence[int],
    modality: str = "text",
    examples: Sequence[Example] = EXAMPLES,
    limit: int = 32,
    model: str | None = None,
) -> None:
    """Samples in which just the questions `right` are answered right."""

    def answerer(batch: Sequence[Example], _: str) -> list[Answer]:
        return [Answer(f"It is {e.answer}." if int(e.id[1:]) in right else "I forgot.", 4) for e in batch]

    task = Task("capitals", tuple(examples))
    answer_questions(answerer, task, modality, model=model or str(file.parent), out=file, max_new_tokens=limit)  # type: ignore[arg-type]


def evaluation(folder: Path, right: Sequence[int], modality: str = "text", **more: Any) -> Path:
    answer(folder / f"samples-{modality}.jsonl", right, modality, **more)
    return folder


def study(folder: Path, methods: Mapping[str, Mapping[str, Sequence[int]]]) -> Path:
    for method, by_modality in methods.items():
        where = folder / ("base" if method == "base" else f"methods/{method}") / "samples"
        for modality, right in by_modality.items():
            answer(where / f"capitals-{modality}" / "samples.jsonl", right, modality, SPOKEN)
    return folder


def losses(folder: Path, values: Sequence[float], tokens: Sequence[int], data: str = "d") -> None:
    rows = [{"id": f"q{i}", "loss": v, "n_tokens": t} for i, (v, t) in enumerate(zip(values, tokens, strict=True))]
    write_jsonl(folder / "losses-text.jsonl", rows)
    sidecar = {"schema": 1, "task": "heldout", "modality": "text", "data": data, "n": len(rows)}
    write_json(folder / "losses-text.json", sidecar)


def compared(*runs: Path, **options: Any) -> dict[str, Any]:
    out = runs[0].parent / "compared"
    if (methods := options.pop("methods", None)) is not None:
        options["methods"] = ",".join(methods)
    lines = list(command.run(command.Options(list(runs), out, **{"metric": METRIC, **options})))
    assert "\n".join(lines) == (out / "compare.md").read_text("utf-8").rstrip()
    tables: dict[str, Any] = read_json(out / "compare.json")
    return tables


# -- accuracy ------------------------------------------------------------------------------------------------
def test_two_evaluations_by_hand(tmp_path: Path) -> None:
    """A has 0–19, B has 5–31: only A 5, only B 12 of 40."""
    a = evaluation(tmp_path / "a", range(20))
    b = evaluation(tmp_path / "b", range(5, 32))
    (row,) = compared(a, b)["accuracy"]
    assert -0.1 < row["ci_low"] < 7 / 40 < row["ci_high"] < 0.4
    del row["ci_low"], row["ci_high"]
    assert row == {
        "task": "capitals",
        "modality": "text",
        "metric": METRIC,
        "metric_version": METRIC_VERSION,
        "method_a": "a",
        "method_b": "b",
        "n": 40,
        "seeds_a": 1,
        "seeds_b": 1,
        "accuracy_a": 0.5,
        "ci_low_a": pytest.approx(wilson(20, 40)[0]),
        "ci_high_a": pytest.approx(wilson(20, 40)[1]),
        "accuracy_b": pytest.approx(27 / 40),
        "ci_low_b": pytest.approx(wilson(27, 40)[0]),
        "ci_high_b": pytest.approx(wilson(27, 40)[1]),
        "only_a": 5,
        "only_b": 12,
        "difference": pytest.approx(7 / 40),
        "test": "mcnemar_exact",
        "p_value": pytest.approx(mcnemar_exact(5, 12)),
        "p_holm": pytest.approx(mcnemar_exact(5, 12)),
        "detectable": pytest.approx(minimum_detectable_difference(40, 17 / 40)),
        "verdict": "no difference shown",
        "family": "text, against each other",
        "n_family": 1,
        "left_out": None,
    }


def test_a_real_difference_is_called_by_name_and_turned_round(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", range(10)), evaluation(tmp_path / "b", range(30))
    assert compared(a, b)["accuracy"][0]["verdict"] == "better"
    assert compared(b, a)["accuracy"][0]["verdict"] == "worse"


def test_the_same_answers_differ_in_nothing(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", range(10)), evaluation(tmp_path / "b", range(10))
    (row,) = compared(a, b)["accuracy"]
    assert (row["difference"], row["p_holm"], row["detectable"]) == (0, 1, None)


def test_holm_is_over_the_tests_of_a_family(tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / name, range(k)) for name, k in (("a", 10), ("b", 16), ("c", 30))]
    rows = compared(*runs)["accuracy"]
    assert [(r["method_a"], r["method_b"]) for r in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    first = rows[0]
    assert first["p_value"] == pytest.approx(2 / 2**6)
    assert first["p_holm"] == pytest.approx(2 / 2**6)
    assert first["verdict"] == "better"
    assert rows[1]["p_holm"] == pytest.approx(3 * rows[1]["p_value"])


def test_equal_systems_are_called_different_in_at_most_5_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdicts of compare over 1000 draws of two equally good systems at n = 300, difficulty shared."""
    monkeypatch.setattr(intervals, "minimum_detectable_difference", lambda *_: None)  # slow, and not looked at here
    monkeypatch.setattr(intervals, "paired_bootstrap", lambda *_: (0.0, 0.0))
    random = np.random.default_rng(0)
    false = 0
    for draw in range(1000):
        skill = random.random(300)
        systems = []
        for name in ("a", "b"):
            verdicts = {f"q{i}": bool(v) for i, v in enumerate(random.random(300) < skill)}
            systems.append(
                System(name, tmp_path, name, {("t", "text"): Answers("1", "2", 32, (verdicts,), tmp_path)}, {})
            )
        (row,) = accuracy_records([(systems[0], systems[1])], METRIC, draw)
        false += row["verdict"] != "no difference shown"
    assert false / 1000 <= 0.05


# -- studies -------------------------------------------------------------------------------------------------
def test_a_study_has_pairs_retention_and_modality_gap(tmp_path: Path) -> None:
    run = study(
        tmp_path / "run",
        {
            "base": {"text": range(30), "cascade": range(2, 28)},
            "full": {"text": range(24), "speech": range(8)},
            "lora": {"text": range(28), "speech": range(10)},
        },
    )
    tables = compared(run)
    assert [(r["method_a"], r["method_b"], r["modality"]) for r in tables["accuracy"]] == [
        ("base", "full", "text"),
        ("base", "lora", "text"),
        ("full", "lora", "text"),
        ("full", "lora", "speech"),
    ]
    kept = {r["method"]: r for r in tables["retention"]}
    assert {m: r["value"] for m, r in kept.items()} == {"full": pytest.approx(0.8), "lora": pytest.approx(28 / 30)}
    assert kept["full"]["ci_low"] < 0.8 < kept["full"]["ci_high"] < 1
    gaps = {(r["method"], r["modality"]): r["value"] for r in tables["modality_gap"]}
    assert gaps == {
        ("base", "cascade"): pytest.approx(4 / 40),
        ("full", "speech"): pytest.approx(16 / 40),
        ("lora", "speech"): pytest.approx(18 / 40),
    }
    assert tables["not_compared"] == []
    only = compared(run, methods=["full", "lora"])
    assert {(r["method_a"], r["method_b"]) for r in only["accuracy"]} == {("full", "lora")}


def test_one_evaluation_of_two_modalities_has_its_gap(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a", range(20))
    evaluation(folder, range(4, 20), "cascade", examples=SPOKEN)
    tables = compared(folder)
    assert (tables["accuracy"], tables["not_compared"]) == ([], [])
    (gap,) = tables["modality_gap"]
    assert (gap["value"], gap["p_value"]) == pytest.approx((0.1, 2 / 2**4))


def test_several_studies_pair_the_same_method_and_an_evaluation_pairs_with_all(tmp_path: Path) -> None:
    one = study(tmp_path / "one", {"base": {"text": range(20)}, "full": {"text": range(15)}})
    two = study(tmp_path / "two", {"base": {"text": range(20)}, "full": {"text": range(25)}})
    rows = compared(one, two)["accuracy"]
    assert [(r["method_a"], r["method_b"]) for r in rows] == [("one/base", "two/base"), ("one/full", "two/full")]
    other = evaluation(tmp_path / "other", range(20))  # asked without recordings: typed questions are the same
    rows = compared(one, other)["accuracy"]
    assert [(r["method_a"], r["method_b"]) for r in rows] == [("one/base", "other"), ("one/full", "other")]
    kept = compared(one, other, base="one/base")["retention"]
    assert [(r["base"], r["method"]) for r in kept] == [("one/base", "one/full"), ("one/base", "other")]


def test_seeds_are_pooled_and_clustered(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    runs = []
    for k in range(3):
        noise = {int(i) for i in random.integers(0, 40, 3)}
        full = sorted(set(range(14)) ^ noise)
        runs.append(
            study(tmp_path / f"s{k}", {"base": {"text": range(30)}, "full": {"text": full, "speech": range(5 + k)}})
        )
    tables = compared(*runs, seeds=True)
    (row,) = tables["accuracy"]
    assert (row["method_a"], row["method_b"], row["seeds_a"], row["seeds_b"]) == ("base", "full", 3, 3)
    assert (row["test"], row["only_a"], row["verdict"]) == ("clustered_t", None, "worse")
    (kept,) = tables["retention"]
    assert kept["value"] == pytest.approx(row["accuracy_b"] / 0.75)
    assert kept["ci_low"] < kept["value"] < kept["ci_high"]
    (gap,) = tables["modality_gap"]
    assert gap["ci_low"] < gap["value"] < gap["ci_high"]
    with pytest.raises(UserError, match="not a study"):
        compared(runs[0], evaluation(tmp_path / "e", range(3)), seeds=True)


@pytest.mark.parametrize(
    ("of_second", "said"),
    [
        ({"seed": 0}, r"s0 and \S*s1 have the same seed, 0, so their runs of \S+ are no two training runs"),
        ({"methods": {"full": {"kind": "full", "learning_rate": 2e-5}}}, r"in different ways \(learning_rate\); they"),
        ({"training": {"epochs": 2, "eval_every": 1}}, r"in different ways \(training\.epochs\)"),
        ({"training": {"epochs": 1, "eval_every": 7, "gradient_checkpointing": True, "new": 1}, "name": "other"}, None),
        ({"methods": {"full": {"kind": "full", "learning_rate": 1e-5, "in_full": True}}}, None),
        ({"seed": 0, "methods": {"full": {"kind": "given", "checkpoint": "elsewhere"}}}, None),
        ({"methods": "damaged", "training": None}, None),
    ],
)
@pytest.mark.parametrize("names", [("full", "full"), ("full_seed1", "full_seed2"), ("full-seed1", "full-seed2")])
def test_seeds_are_training_runs_of_one_method(
    tmp_path: Path, names: tuple[str, str], of_second: dict[str, Any], said: str | None
) -> None:
    recipe = {"seed": 0, "methods": {"full": {"kind": "full", "learning_rate": 1e-5}}, "training": {"epochs": 1}}
    runs = []
    for k, of in enumerate((recipe, {**recipe, "seed": 1, **of_second})):
        runs.append(study(tmp_path / f"s{k}", {"base": {"text": range(30)}, names[k]: {"text": range(14 + k)}}))
        if isinstance(of["methods"], dict):  # by its own name; NAME-seed1 is a run of NAME
            of = {**of, "methods": {method_of(names[k])[0]: of["methods"]["full"]}}
        write_text(runs[-1] / "study.yaml", json.dumps(of))
    if said is None:
        assert compared(*runs, seeds=True)["accuracy"][0]["seeds_b"] == 2
        return
    with pytest.raises(UserError, match=said):
        compared(*runs, seeds=True)


def test_what_only_a_later_seed_was_asked_is_not_left_out_without_a_word(tmp_path: Path) -> None:
    one = study(tmp_path / "s0", {"full": {"text": range(5)}, "base": {"text": range(5)}})
    two = study(tmp_path / "s1", {"full": {"text": range(5), "speech": range(5)}, "base": {"text": range(5)}})
    with pytest.raises(UserError, match="s0 has no answers of full to capitals from speech, which another seed has"):
        compared(one, two, seeds=True)


def test_seeds_in_the_names_of_methods(tmp_path: Path) -> None:
    methods = {"base": {"text": range(20)}} | {f"lora-seed{k}": {"text": range(10 + k)} for k in range(3)}
    (row,) = compared(study(tmp_path / "run", methods), seeds=True)["accuracy"]
    assert (row["method_a"], row["method_b"], row["seeds_a"], row["seeds_b"]) == ("base", "lora", 1, 3)
    assert row["accuracy_b"] == pytest.approx(11 / 40)


def test_a_base_without_a_right_answer_has_no_retention(tmp_path: Path) -> None:
    run = study(tmp_path / "run", {"base": {"text": []}, "full": {"text": range(3)}})
    (row,) = compared(run)["retention"]
    assert (row["value"], row["ci_low"]) == (None, None)
    assert "the base has no right answer" in (tmp_path / "compared" / "compare.md").read_text("utf-8")


# -- losses --------------------------------------------------------------------------------------------------
def test_losses_are_compared_by_token(tmp_path: Path) -> None:
    losses(tmp_path / "a", [2.0, 4.0, 9.0], [1, 2, 3])
    losses(tmp_path / "b", [1.5, 3.0, 7.4], [1, 2, 3])
    tables = compared(tmp_path / "a", tmp_path / "b")
    assert tables["accuracy"] == []
    (row,) = tables["perplexity"]
    assert (row["loss_a"], row["loss_b"]) == pytest.approx((2.5, 11.9 / 6))
    assert row["difference"] == pytest.approx(-3.1 / 6)
    assert row["perplexity_ratio"] == pytest.approx(np.exp(-3.1 / 6))
    assert row["verdict"] == "better", "a lower loss is better"


@pytest.mark.parametrize(
    ("tokens", "data", "message"), [([1, 2, 4], "d", "different tokenizers"), ([1, 2, 3], "other", "different answers")]
)
def test_losses_that_are_not_comparable(tmp_path: Path, tokens: list[int], data: str, message: str) -> None:
    losses(tmp_path / "a", [2.0, 4.0, 9.0], [1, 2, 3])
    losses(tmp_path / "b", [2.0, 4.0, 9.0], tokens, data)
    with pytest.raises(UserError, match=message):
        compared(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-9], "losses-text.jsonl:3 is not a line of losses"),
        (lambda text: text.rpartition("\n{")[0] + "\n", "2 of 3 losses"),
        (lambda text: text.replace('"q1"', '"q0"'), "a second time"),
        (lambda text: text.replace("4.0", "null"), "losses-text.jsonl:2"),
        (lambda text: text.replace("4.0", "NaN"), "losses-text.jsonl:2"),
        (lambda text: text.replace('"n_tokens": 2', '"n_tokens": Infinity'), "losses-text.jsonl:2"),
        (lambda text: text.replace('"n_tokens": 2', '"n_tokens": 2.5'), "losses-text.jsonl:2"),
    ],
)
def test_damaged_losses(tmp_path: Path, damage: Any, message: str) -> None:
    losses(tmp_path / "a", [2.0, 4.0, 9.0], [1, 2, 3])
    losses(tmp_path / "b", [2.0, 4.0, 9.0], [1, 2, 3])
    file = tmp_path / "b" / "losses-text.jsonl"
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=message):
        compared(tmp_path / "a", tmp_path / "b")


def test_two_arithmetics_are_said(tmp_path: Path) -> None:
    for name in "ab":
        losses(tmp_path / name, [2.0, 4.0, 9.0], [1, 2, 3])
    assert compared(tmp_path / "a", tmp_path / "b")["notes"] == []
    sidecar = tmp_path / "b" / "losses-text.json"
    write_json(sidecar, {**read_json(sidecar), "compute": "bfloat16"})
    (note,) = compared(tmp_path / "a", tmp_path / "b")["notes"]
    assert note == "a was computed in float32, b in bfloat16: differences hold that of the rounding too."


# -- what is refused -----------------------------------------------------------------------------------------
def test_other_questions_other_rules_other_lengths_are_refused(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", range(20))
    fewer = evaluation(tmp_path / "fewer", range(20), examples=EXAMPLES[:30])
    with pytest.raises(UserError, match=rf"task version 1\.{METRIC_VERSION}-.* evaluate both on the same questions"):
        compared(a, fewer)
    longer = evaluation(tmp_path / "longer", range(20), limit=64)
    with pytest.raises(UserError, match="32 and 64 tokens"):
        compared(a, longer)
    older = evaluation(tmp_path / "older", range(20))
    binding = read_json(older / "samples-text.json")
    write_json(older / "samples-text.json", {**binding, "metric_version": "1"})
    with pytest.raises(UserError, match=rf"metric version {METRIC_VERSION} there, .* and 1 here"):
        compared(a, older)
    assert not (tmp_path / "compared").exists()


def test_speech_of_other_recordings_is_refused(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", range(20), "speech", examples=SPOKEN)
    again = tuple(replace(e, audio=Path(f"audio/{e.id}-noisy.flac")) for e in SPOKEN)
    b = evaluation(tmp_path / "b", range(20), "speech", examples=again)
    with pytest.raises(UserError, match="capitals from speech"):
        compared(a, b)


def test_other_files_of_the_same_names_are_compared_and_said(tmp_path: Path) -> None:
    heard = {}
    for name in ("a", "b"):
        heard[name] = tuple(replace(e, audio=tmp_path / name / "audio" / f"{e.id}.flac") for e in SPOKEN)
        for i, example in enumerate(heard[name]):
            assert example.audio is not None
            write_text(example.audio, f"{example.id}{name if i < 3 else ''}")
        evaluation(tmp_path / name, range(20), "speech", examples=heard[name])
    tables = compared(tmp_path / "a", tmp_path / "b")
    assert len(tables["accuracy"]) == 1
    (note,) = tables["notes"]
    assert note.startswith("capitals from speech: of 40 recordings 3 are other files for a than for b")
    assert compared(tmp_path / "a", evaluation(tmp_path / "c", [1], "speech", examples=heard["a"]))["notes"] == []


@pytest.mark.parametrize("second", ["speech", "losses", "cascade"])
def test_a_folder_of_two_models_is_said(tmp_path: Path, second: str) -> None:
    """Text of one and speech of another is no modality gap; nor are losses those of the model that answered."""
    a, b = evaluation(tmp_path / "a", range(20)), evaluation(tmp_path / "b", range(20))
    losses(a, [2.0, 4.0], [1, 2])
    assert compared(a, b)["notes"] == []  # losses that do not say of what model they are, as of earlier versions
    if second == "losses":
        write_json(a / "losses-text.json", {**read_json(a / "losses-text.json"), "model": "another"})
    else:
        answer(a / f"samples-{second}.jsonl", range(20), second, SPOKEN, model="another")
    if second == "cascade":  # of which the name is the recogniser's too
        assert compared(a, b)["notes"] == []
        sidecar = read_json(a / "samples-cascade.json")
        write_json(a / "samples-cascade.json", {**sidecar, "answered_by": "another"})
    (note,) = compared(a, b)["notes"]
    assert "are of two models, by their files: whatever is said of a in more than one modality" in note


def test_unfinished_and_damaged_samples_are_refused_and_left_alone(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", range(20)), evaluation(tmp_path / "b", range(25))
    file = b / "samples-text.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for damaged, message in (
        (b"".join(lines[:-1]), "39 of 40 answers"),
        (whole[:-20], r"samples-text\.jsonl:40 is not JSON"),
        (b"".join([*lines, lines[0]]), "a second time"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            compared(a, b)
        assert file.read_bytes() == damaged


def test_nothing_to_compare(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", range(20))
    run = study(tmp_path / "run", {"base": {"text": range(3)}, "full": {"text": range(3)}})
    (tmp_path / "empty").mkdir()
    spoken = evaluation(tmp_path / "spoken", range(20), "speech", examples=SPOKEN)
    for runs, options, message in (
        ([a], {}, "no two systems"),
        ([a, a], {}, "given twice"),
        ([a, tmp_path / "empty"], {}, "holds no answers"),
        ([a, tmp_path / "none"], {}, "not a folder"),
        ([a, spoken], {}, "no task and modality in common"),
        ([run], {"methods": ["full", "lora"]}, "method 'lora'"),
        ([run], {"metric": "bleu"}, "no metric 'bleu'"),
        ([run], {"base": "lora"}, "--base 'lora' is none of base, full"),
        ([run], {"metric": "llm_judge"}, "not judged"),
    ):
        with pytest.raises(UserError, match=message):
            compared(*runs, **options)


def test_a_judge_s_verdicts_can_be_compared(tmp_path: Path) -> None:
    for name, wrong in (("a", 5), ("b", 9)):
        folder = evaluation(tmp_path / name, range(20))
        write_json(folder / "results-text.json", {"schema": 1, "judge": {"version": "1:m"}})
        rows = [json.loads(line) for line in (folder / "samples-text.jsonl").read_text().splitlines()]
        kept = [
            {"id": row["id"], "judge": "1:m", "shown": judge.shown(row), "correct": i >= wrong}
            for i, row in enumerate(rows)
        ]
        write_jsonl(folder / "samples-text.judge.jsonl", kept)
    (row,) = compared(tmp_path / "a", tmp_path / "b", metric="llm_judge")["accuracy"]
    # the cache goes by what was shown; "I forgot." to 20 different questions are 20 entries
    assert (row["accuracy_a"], row["accuracy_b"]) == (35 / 40, 31 / 40)
    assert row["metric_version"] == "1:m"


def test_answers_that_the_judge_gave_no_verdict_on_are_not_compared_as_wrong(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = evaluation(tmp_path / name, range(20))
        write_json(folder / "results-text.json", {"schema": 1, "judge": {"version": "1:m"}})
        rows = [json.loads(line) for line in (folder / "samples-text.jsonl").read_text().splitlines()]
        kept = [{"id": row["id"], "judge": "1:m", "shown": judge.shown(row), "correct": True} for row in rows]
        write_jsonl(folder / "samples-text.judge.jsonl", kept if name == "a" else kept[:-2])
    with pytest.raises(UserError, match=r"judge 1:m has no verdict on 2 of 40 answers, the first 'q38'"):
        compared(tmp_path / "a", tmp_path / "b", metric="llm_judge")


def test_the_command(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", range(20)), evaluation(tmp_path / "b", range(25))
    result = CliRunner().invoke(app, ["compare", str(a), str(b), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "no difference shown" in result.output or "better" in result.output
    assert (tmp_path / "out" / "compare.json").is_file()


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("samples-text.json", lambda content: "[]", r"samples-text\.json is damaged \("),
        ("samples-text.json", lambda content: content.replace('"task"', '"tusk"'), r"damaged \(task: Field required\)"),
        ("samples-text.json", lambda content: content.replace(f'"n": {N}', f'"n": "{N}"'), r"damaged \(n: "),
        ("samples-text.jsonl", lambda content: content.replace("[", "7, [", 1), r"samples-text\.jsonl:1 is not"),
        (
            "samples-text.jsonl",
            lambda content: content.replace('"verdicts": {', '"verdicts": 7, "x": {', 1),
            "not a row",
        ),
        (
            "samples-text.jsonl",
            lambda content: content.replace('"failed": false', '"failed": 0', 1),
            r"damaged \(failed: ",
        ),
    ],
)
def test_a_damaged_file_of_an_evaluation_is_one_sentence(tmp_path: Path, name: str, damage: Any, said: str) -> None:
    answer(tmp_path / "a" / "samples-text.jsonl", [1, 2])
    answer(tmp_path / "b" / "samples-text.jsonl", [2, 3])
    file = tmp_path / "a" / name
    before = file.read_text()
    file.write_text(damage(before))
    assert file.read_text() != before
    with pytest.raises(UserError, match=said):
        list(command.run(command.Options([tmp_path / "a", tmp_path / "b"], tmp_path / "out")))
