"""Several training runs of every method: their mean and interval by hand, the claims on them, a tiny study of two."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from palimpsest.analysis.claims import claim_records
from palimpsest.commands import compare
from palimpsest.comparison.training_runs import pooled_comparisons, seed_comparisons, seed_records
from palimpsest.config import StudyConfig, parse_config
from palimpsest.files import UserError, read_json, write_json, write_jsonl
from palimpsest.intervals import mean_arms, over_runs
from palimpsest.records import method_of, run_name
from palimpsest.report import figures
from palimpsest.report import page as html
from palimpsest.report.across_runs import by_method
from palimpsest.report.inputs import main_metric, method_key, method_name, read_inputs
from palimpsest.report.page import render, tables_of
from palimpsest.report.summary import points_of
from palimpsest.study.run import Study, run_study
from report_fixture import make_run
from tiny_study import numbered, write_inputs

T2 = 4.302652729911275  # t of 2 degrees of freedom at 97.5 %, from a table


# ------------------------------------------------------------------------------------------------------------
# The interval
# ------------------------------------------------------------------------------------------------------------
def test_the_interval_of_three_runs_by_hand() -> None:
    mean, low, high = over_runs([1.0, 2.0, 3.0])
    spread = T2 * 1.0 / math.sqrt(3)  # their standard deviation is 1
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - spread, 2.0 + spread))
    # Arms over data of 3 and 4 add as squares, each on its own side.
    mean, low, high = over_runs([1.0, 2.0, 3.0], 3.0, 4.0)
    assert (mean, low, high) == pytest.approx((2.0, 2 - math.sqrt(9 + spread**2), 2 + math.sqrt(16 + spread**2)))


def test_runs_that_agree_have_the_interval_of_one() -> None:
    """The data are shared: three runs on them say no more about other data than one."""
    below, above = mean_arms([5.0] * 3, [4.0] * 3, [7.0] * 3)
    assert over_runs([5.0] * 3, below, above) == pytest.approx((5.0, 4.0, 7.0))


def test_the_arms_are_means_and_none_is_below_0() -> None:
    assert mean_arms([1.0, 2.0], [0.0, 1.5], [2.0, 5.0]) == pytest.approx((0.75, 2.0))
    assert mean_arms([1.0, 2.0], [1.5, 2.5], [2.0, 5.0]) == pytest.approx((0.0, 2.0))
    with pytest.raises(ValueError, match="two or more"):
        over_runs([1.0])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6), st.floats(0, 50), st.floats(0, 50))
def test_more_noise_never_narrows_the_interval(values: list[float], below: float, above: float) -> None:
    mean, low, high = over_runs(values, below, above)
    alone = over_runs(values)
    assert low <= min(alone[1], mean - below) + 1e-9
    assert high >= max(alone[2], mean + above) - 1e-9


@settings(deadline=None, max_examples=50)
@given(st.text("abc_-0123456789", min_size=1), st.integers(0, 30))
def test_names_of_runs_can_be_taken_apart_again(method: str, number: int) -> None:
    if method_of(method) == (method, 0):
        assert method_of(run_name(method, number)) == (method, number)


# ------------------------------------------------------------------------------------------------------------
# The tables
# ------------------------------------------------------------------------------------------------------------
def losses(folder: Path, values: dict[str, tuple[float, int]]) -> None:
    write_jsonl(folder / "losses-text.jsonl", [{"id": i, "loss": x, "n_tokens": n} for i, (x, n) in values.items()])
    binding = {"schema": 1, "task": "heldout", "modality": "text", "data": "any", "n": len(values)}
    write_json(folder / "losses-text.json", binding)


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Any]:
    """Method m, two runs, on four questions and two answers of 1 and 3 tokens; base beside it."""
    by_run = {"base": (1.0, 3.0), "m": (3.0, 3.0), "m-seed1": (3.0, 5.0)}  # nats per token: 1, 1.5, 2
    for name, (first, second) in by_run.items():
        folder = tmp_path / (name if name == "base" else f"methods/{name}") / "perplexity"
        losses(folder, {"a": (first, 1), "b": (second, 3)})
    row = {"task": "heldout", "modality": "text", "n_examples": 2}
    shift = {"reference": "base", "modality": "text", "reduction": "per_batch_abs", "noise_floor": 0.01}
    off = {"modality": "text", "n_examples": 2}
    removed = {"m": (2.0, 4.0), "m-seed1": (3.0, 7.0)}
    return {
        "perplexity": [{**row, "method": name, "loss": sum(x) / 4} for name, x in by_run.items()],
        "deactivation": [
            {**off, "model": name, "condition": condition, "loss": loss}
            for name, (whole, top) in removed.items()
            for condition, loss in (("base", whole), ("top", top))
        ],
        "shift": [
            {**shift, "model": "m", "measure": "jensen_shannon", "value": 0.4, "ci_low": 0.3, "ci_high": 0.6},
            {**shift, "model": "m-seed1", "measure": "jensen_shannon", "value": 0.6, "ci_low": 0.5, "ci_high": 0.8},
            {**shift, "model": "m", "measure": "spearman", "value": 0.9, "ci_low": None, "ci_high": None},
            {**shift, "model": "m-seed1", "measure": "spearman", "value": None, "ci_low": None, "ci_high": None},
            {**shift, "model": "m", "measure": "only_once", "value": 0.4, "ci_low": 0.3, "ci_high": 0.6},
        ],
        "verdicts": {
            ("facts", "text"): {
                "base": dict(zip("abcd", (True, True, True, False), strict=True)),
                "m": dict(zip("abcd", (True, True, False, False), strict=True)),
                "m-seed1": dict(zip("abcd", (True, True, True, False), strict=True)),
            }
        },
    }


def test_the_seeds_table_by_hand(tables: dict[str, Any], tmp_path: Path) -> None:
    records = seed_records(tmp_path, ["m"], 2, tables["verdicts"], tables)
    found = {(r["measure"], r["reference"]): r for r in records}
    assert {key[0] for key in found} == {
        "accuracy", "perplexity", "perplexity_ratio", "perplexity_ratio_top", "jensen_shannon", "spearman",
    }  # fmt: skip

    accuracy = found["accuracy", None]
    assert (accuracy["values"], accuracy["mean"], accuracy["n"], accuracy["n_seeds"]) == ([0.5, 0.75], 0.625, 4, 2)
    assert accuracy["std"] == pytest.approx(0.25 / math.sqrt(2))
    # The interval, of the formula below in the test of comparisons, is wider than what an accuracy can be.
    assert (accuracy["ci_low"], accuracy["ci_high"], accuracy["ci_over"]) == (0.0, 1.0, "seeds, questions")

    # Nats per token 1.5 and 2 over the base's 1: ratios e^0.5 and e^1, mean e^0.75.
    ratio = found["perplexity_ratio", "base"]
    assert ratio["values"] == pytest.approx([math.exp(0.5), math.e])
    assert ratio["mean"] == pytest.approx(math.exp(0.75))
    assert ratio["std"] == pytest.approx((math.e - math.exp(0.5)) / math.sqrt(2))
    # Mean loss less the base's: 2 and 1 over 1 and 3 tokens, 0.75 per token, residuals ±1.25; their error is
    # sqrt(2·1.25²)·sqrt(2)/4 = 0.625. Both parts have one degree of freedom: t = 12.706.
    t1 = 12.706204736432095
    data, spread = t1 * 0.625, t1 * (0.5 / math.sqrt(2)) / math.sqrt(2)
    assert ratio["ci_high"] == pytest.approx(math.exp(0.75 + math.hypot(data, spread)))
    assert ratio["ci_over"] == "seeds, answers"
    assert found["perplexity", None]["mean"] == pytest.approx(math.exp(1.75))

    top = found["perplexity_ratio_top", "m"]  # e^2 and e^4 without the top weights
    assert top["values"] == pytest.approx([math.exp(2), math.exp(4)])
    assert (top["mean"], top["ci_over"]) == (pytest.approx(math.exp(3)), "seeds")

    shift = found["jensen_shannon", "base"]
    spread = t1 * (0.2 / math.sqrt(2)) / math.sqrt(2)
    assert shift["mean"] == pytest.approx(0.5)
    assert shift["ci_low"] == pytest.approx(0.5 - math.hypot(0.1, spread))
    assert shift["ci_high"] == pytest.approx(0.5 + math.hypot(0.2, spread))
    assert shift["ci_over"] == "seeds, batches"
    assert (found["spearman", "base"]["mean"], found["spearman", "base"]["values"]) == (None, [0.9, None])


def test_the_seeds_table_keeps_scopes_apart(tables: dict[str, Any], tmp_path: Path) -> None:
    def removed() -> dict[str | None, list[Any]]:
        records = seed_records(tmp_path, ["m"], 2, tables["verdicts"], tables)
        return {r.get("scope"): r["values"] for r in records if r["measure"] == "perplexity_ratio_top"}

    rows = tables["deactivation"]
    tables["deactivation"] = [{**row, "scope": "global"} for row in rows]
    assert removed() == {None: pytest.approx([math.exp(2), math.exp(4)])}  # one scope needs no name
    tables["deactivation"] += [
        {**row, "scope": "per_matrix", "loss": row["loss"] - (row["condition"] == "top")} for row in rows
    ]
    assert removed() == {
        "global": pytest.approx([math.exp(2), math.exp(4)]),
        "per_matrix": pytest.approx([math.exp(1), math.exp(3)]),
    }


def test_a_loss_that_is_not_finite_leaves_the_mean_out_and_is_no_error(tables: dict[str, Any], tmp_path: Path) -> None:
    next(row for row in tables["perplexity"] if row["method"] == "m-seed1")["loss"] = None
    next(row for row in tables["deactivation"] if row["condition"] == "top")["loss"] = math.inf
    found = {r["measure"]: r for r in seed_records(tmp_path, ["m"], 2, tables["verdicts"], tables)}
    for measure in ("perplexity", "perplexity_ratio", "perplexity_ratio_top"):
        record = found[measure]
        assert (record["mean"], record["std"], record["ci_low"], record["values"]) == (None, None, None, [None, None])


def test_comparisons_are_of_means_over_runs(tables: dict[str, Any], tmp_path: Path) -> None:
    (row,) = seed_comparisons(["m"], 2, tables["verdicts"], 0)
    assert (row["method_a"], row["seeds_a"], row["method_b"], row["seeds_b"]) == ("base", 1, "m", 2)
    assert (row["accuracy_a"], row["accuracy_b"], row["difference"]) == (0.75, 0.625, -0.125)
    # Differences of the questions 0, 0, −0.5, 0: variance 0.1875 / 3, over 4. Seeds: 0.03125, over 2.
    questions, seeds = 0.0625 / 4, 0.03125 / 2
    df = (questions + seeds) ** 2 / (questions**2 / 3 + seeds**2)
    half = float(stats.t.ppf(0.975, df)) * math.sqrt(questions + seeds)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((-0.125 - half, -0.125 + half))
    assert row["test"] == "clustered_t"


# ------------------------------------------------------------------------------------------------------------
# The claims
# ------------------------------------------------------------------------------------------------------------
def gain(method_a: str, method_b: str, low: float, high: float) -> dict[str, Any]:
    return {
        "task": "facts", "modality": "text", "metric": "token_sequence_numbers", "method_a": method_a,
        "method_b": method_b, "n": 100, "difference": (low + high) / 2, "ci_low": low, "ci_high": high,
    }  # fmt: skip


def pooled(method: str, reference: str, measure: str, mean: float, low: float, high: float) -> dict[str, Any]:
    return {
        "method": method, "reference": reference, "measure": measure, "modality": "text", "basis": "per_batch_abs",
        "n_seeds": 3, "mean": mean, "ci_low": low, "ci_high": high, "ci_over": "seeds, batches",
    }  # fmt: skip


def first_run(method: str, reference: str, measure: str, value: float) -> dict[str, Any]:
    return {
        "model": method, "reference": reference, "measure": measure, "modality": "text", "noise_floor": 0.1,
        "reduction": "per_batch_abs", "value": value, "ci_low": value - 0.01, "ci_high": value + 0.01,
    }  # fmt: skip


def test_claims_are_about_the_means_over_runs() -> None:
    """The first runs alone would say the opposite each time."""
    results = {
        "comparisons": [gain("base", "full", 0.1, 0.2), gain("full", "layer_lr", -0.2, -0.1),
                        gain("full", "lora", -0.2, -0.1)],
        "seed_comparisons": [gain("base", "full", -0.2, -0.1), gain("full", "layer_lr", 0.1, 0.2),
                             gain("full", "lora", 0.1, 0.2)],
        "shift": [first_run("full", "base", "jensen_shannon", 0.1), first_run("full", "base", "centre_shift", 0.3),
                  *(first_run(m, "full", "jensen_shannon_difference", 0.1) for m in ("layer_lr", "lora"))],
        "seeds": [pooled("full", "base", "jensen_shannon", 0.5, 0.3, 0.7),
                  pooled("full", "base", "centre_shift", -0.5, -0.7, -0.3),
                  pooled("layer_lr", "full", "jensen_shannon_difference", -0.1, -0.2, -0.05),
                  pooled("lora", "full", "jensen_shannon_difference", -0.1, -0.3, 0.05)],
    }  # fmt: skip
    claims = {record["claim"]: record for record in claim_records(results)}
    assert (claims[3]["verdict"], claims[3]["value"]) == ("holds", 0.5)
    assert claims[4]["verdict"] == "undecided"
    assert claims[5]["verdict"] == "holds"
    assert "mean of 3 runs" in claims[3]["note"]
    alone = {record["claim"]: record for record in claim_records({**results, "seeds": []})}
    assert [alone[number]["verdict"] for number in (3, 4, 5)] == ["fails", "fails", "fails"]
    # A measurement that the recipe spared the further runs: the first runs', and said.
    spared = {record["claim"]: record for record in claim_records({**results, "seeds": results["seeds"][:1]})}
    assert (spared[4]["verdict"], "first runs alone" in spared[4]["note"]) == ("fails", True)


def test_equal_methods_on_several_tasks_are_seldom_called_different() -> None:
    """Two equally good LoRA ranks, three runs each, on five tasks, with one luck per run in all (claim 8).

    Nominally 5 %. Tasks whose intervals are combined as independent ones: more than 15 %.
    """
    rng, methods, verdicts = np.random.default_rng(1), ["lora_r8", "lora_r24"], []
    for _ in range(120):
        luck = {run_name(method, k): 0.5 * rng.normal() for method in methods for k in range(3)}
        tasks: dict[tuple[str, str], Any] = {}
        for task in "abcde":
            hard = rng.normal(-0.8, 1.2, 100)
            right = {run: rng.random(100) < 1 / (1 + np.exp(-(hard + of))) for run, of in luck.items()}
            tasks[task, "text"] = {run: dict(enumerate(of.tolist())) for run, of in right.items()}
        tables = {
            "comparisons": [gain("lora_r8", "lora_r24", 0, 0)],
            "seeds": [pooled("lora_r8", "base", "x", 0, 0, 0)],
            "seed_comparisons": seed_comparisons(methods, 3, tasks, 0),
            "pooled_comparisons": pooled_comparisons(methods, 3, tasks, 0),
        }
        for rows in tables.values():
            rows += [{**row, "modality": "speech"} for row in rows]
        verdicts.append(claim_records(tables)[7]["verdict"])
    assert sum(verdict != "undecided" for verdict in verdicts) / len(verdicts) < 0.1


def test_tasks_are_pooled_in_each_run_and_then_clustered() -> None:
    """Two tasks of the same two questions and runs are one task of four, each question its own."""
    first = {"base": {"a": True, "b": False}, "m": {"a": True, "b": True}, "m-seed1": {"a": False, "b": True}}
    second = {"base": {"a": False, "b": False}, "m": {"a": True, "b": False}, "m-seed1": {"a": False, "b": False}}
    (row,) = pooled_comparisons(["m"], 2, {("x", "text"): first, ("y", "text"): second}, 0)
    whole = {name: {f"{task}{i}": right for task, of in (("x", first), ("y", second)) for i, right in of[name].items()}
             for name in first}  # fmt: skip
    (same,) = seed_comparisons(["m"], 2, {("x, y", "text"): whole}, 0)
    assert row == same
    assert (row["n"], row["difference"]) == (4, 0.25)
    assert pooled_comparisons(["m"], 2, {("x", "text"): first, ("y", "speech"): second}, 0) == []  # one task each


def test_several_tasks_that_were_not_pooled_decide_nothing() -> None:
    rows = [{**gain("base", "full", -0.2, -0.1), "task": task} for task in ("facts", "web")]
    results = {"seed_comparisons": rows, "seeds": [pooled("full", "base", "x", 0, 0, 0)]}
    assert claim_records(results)[4]["note"].startswith("Missing: comparison of base with full over all tasks, text")


def change(model: str, name: str, log_ratio: float) -> list[dict[str, Any]]:
    row = {"model": model, "name": name, "null_mean": 1.0, "value": math.exp(log_ratio)}
    return [
        {**row, "of": of, "measure": measure}
        for of in ("delta", "delta_rank8")
        for measure in ("top5_rows", "top5_columns")
    ]


def test_the_clustering_claim_averages_matrices_over_runs() -> None:
    """LoRA over Layer-LR: log ratios of 1 in one run and 3 in the other; ten matrices agree, seeds do not."""
    rows = []
    for number, log_ratio in enumerate((1.0, 3.0)):
        for name in "abcdefghij":
            rows += change(run_name("lora", number), name, log_ratio) + change(run_name("layer_lr", number), name, 0.0)
    several = claim_records({"clustering": rows, "seeds": [{**pooled("m", "base", "x", 0, 0, 0), "n_seeds": 2}]})[6]
    half = 12.706204736432095 * math.sqrt(2) / math.sqrt(2)
    assert several["value"] == pytest.approx(math.exp(2))
    assert (several["ci_low"], several["ci_high"]) == pytest.approx((math.exp(2 - half), math.exp(2 + half)))
    assert several["verdict"] == "undecided"
    one = claim_records({"clustering": rows})[6]
    assert (one["value"], one["verdict"]) == (pytest.approx(math.e), "holds")


# ------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------
def test_the_report_shows_methods_and_lists_their_runs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    one = read_inputs(folder)
    assert by_method(one) is one
    assert not any("seed" in line for line in one.missing)
    metric = main_metric(one.results)
    results = read_json(folder / "results.json")
    of_full = [r for r in results["qa"] if r["method"] == "full" and r["metric"] == metric]
    results["qa"] += [{**r, "method": "full-seed1", "accuracy": 1.0} for r in of_full]
    results["layers"] += [
        {**r, "model": "full-seed1", "total": r["total"] + 2} for r in results["layers"] if r["model"] == "full"
    ]
    results["seeds"] = [
        {"method": "full", "reference": None, "measure": "accuracy", "task": r["task"], "modality": r["modality"],
         "basis": metric, "n_seeds": 2, "n": 25, "values": [0.111, 0.333], "mean": 0.222, "std": 0.157,
         "ci_low": 0.0, "ci_high": 0.9, "ci_over": "seeds, questions"}
        for r in of_full
    ]  # fmt: skip
    write_json(folder / "results.json", results)
    several = read_inputs(folder)
    shown = by_method(several).results
    assert {r["method"] for r in shown["qa"]} == {r["method"] for r in one.results["qa"]}
    assert {(r["accuracy"], r["ci_high"]) for r in shown["qa"] if (r["method"], r["metric"]) == ("full", metric)} == {
        (0.222, 0.9)
    }
    totals = [[r["total"] for r in x["layers"] if r["model"] == "full"] for x in (one.results, shown)]
    assert totals[1] == pytest.approx([total + 1 for total in totals[0]])
    page = render(several)
    assert "Several training runs of each method" in page
    assert "11.1, 33.3" in page
    assert "means of 2 training runs" in page
    assert "Full-FT, run 2" in page  # in the table of every accuracy
    assert not {"seeds", "seed_comparisons"} & tables_of(one).keys()


def test_shifts_and_perplexities_are_means_over_the_runs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", without={"maps", "samples"})
    results = read_json(folder / "results.json")
    shift = next(row for row in results["shift"] if (row["model"], row["measure"]) == ("full", "jensen_shannon"))
    results["shift"].append({**shift, "model": "full-seed1", "value": 3 * shift["value"]})
    about = {
        "method": "full",
        "modality": "text",
        "task": None,
        "n": None,
        "n_seeds": 2,
        "std": 0.1,
        "ci_over": "seeds",
    }
    results["seeds"] = [
        {**about, "reference": "base", "measure": "jensen_shannon", "basis": "per_batch_abs", "values": [0.08, 0.24],
         "mean": 0.16, "ci_low": 0.01, "ci_high": 0.5},
        {**about, "reference": None, "measure": "perplexity", "basis": None, "values": [4.0, 9.0], "mean": 6.0,
         "ci_low": 1.0, "ci_high": 20.0},
    ]  # fmt: skip
    write_json(folder / "results.json", results)
    shown = by_method(read_inputs(folder))
    of_full = next(r for r in shown.results["shift"] if (r["model"], r["measure"]) == ("full", "jensen_shannon"))
    assert (of_full["value"], of_full["ci_low"], of_full["ci_high"]) == (0.16, 0.01, 0.5)
    assert {
        r["perplexity"] for r in shown.results["perplexity"] if (r["method"], r["modality"]) == ("full", "text")
    } == {6}
    (where,) = [point for point in points_of(shown) if point.question == "Where in the model?"]
    assert where.findings[0].details[0].startswith("Full-FT: 0.160 bits (95 % interval 0.0100 to 0.500), 40 times")
    assert where.findings[0].details[0].endswith("; mean of 2 training runs.")
    assert where.findings[0].details[1].endswith("; its first training run alone.")  # the recipe spared the others
    notes = {name: table.note for name, table in tables_of(shown).items()}
    assert notes["probe"].startswith("Of each method's first training run.")
    assert notes["perplexity"].startswith("Geometric means of 2 training runs.")


def test_runs_stand_behind_their_method() -> None:
    names = ["lora-seed1", "full", "lora", "full-seed1", "base", "lora_r8-seed2", "lora_r8", "mine"]
    assert sorted(names, key=method_key) == [
        "base", "full", "full-seed1", "lora", "lora-seed1", "lora_r8", "lora_r8-seed2", "mine",
    ]  # fmt: skip
    assert [method_name(name) for name in ("lora_r8-seed2", "mine-seed1")] == ["LoRA rank 8, run 3", "mine, run 2"]


# ------------------------------------------------------------------------------------------------------------
# The recipe and the study
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    splits = numbered(24, 4, "What is {i}?", "It is {i}.")
    folder = write_inputs(tmp_path_factory.mktemp("inputs"), splits, lambda i: 6_400 + 800 * (i % 3))
    source = {split: {"source": str(folder / f"{split}.jsonl"), "split": split} for split in ("train", "heldout")}
    return {
        "name": "tiny",
        "models": {"language_model": str(folder / "llm"), "encoder": str(folder / "whisper"), "compute": "float32"},
        "speech": {"adaptor_hidden_size": 24},
        "data": source,
        "methods": {
            "full": {"kind": "full", "learning_rate": 1e-3},
            "lora": {"kind": "lora", "learning_rate": 1e-3, "rank": 2, "dropout": 0.3},
        },
        "training": {"epochs": 1, "batch_size": 4},
        "importance": {"n_examples": 20, "batch_size": 2},
        "deactivation": {"random_seeds": 1},
        "analysis": {"shuffles": 1, "bootstrap": 100, "rank_draws": 0},
        "evaluation": {
            "tasks": [{"name": "numbers", **source["heldout"]}],
            "max_new_tokens": 3,
            "batch_size": 4,
            "probe": False,
        },
    }


def config(recipe: dict[str, Any], **changes: Any) -> StudyConfig:
    return parse_config({**recipe, **changes}, "test")


def test_names_of_runs_are_not_left_to_methods(recipe: dict[str, Any]) -> None:
    methods = {"full": {"kind": "full"}, "full-seed1": {"kind": "full"}}
    for n in (1, 2):  # of one run each too: tables go by the name
        with pytest.raises(UserError, match="'full-seed1' is that of a training run of 'full'"):
            config(recipe, methods=methods, seeds=n)
    with pytest.raises(UserError, match="need importance"):
        config(recipe, seeds=2, seeds_measure=["deactivation"])
    with pytest.raises(UserError, match="seeds_measure"):
        config(recipe, seeds=2, seeds_measure=["accuracy"])
    several = config(recipe, seeds=3, seeds_measure=["importance"])
    assert list(several.runs) == ["full", "lora", "full-seed1", "lora-seed1", "full-seed2", "lora-seed2"]
    assert [several.measures(run, "probe") for run in ("base", "full", "full-seed1")] == [True, True, False]


def test_seeds_differ_by_run_and_purpose_and_those_of_the_first_stay(recipe: dict[str, Any], tmp_path: Path) -> None:
    one, three = (Study(config(recipe, seeds=n), tmp_path / "run").ws for n in (1, 3))
    for purpose in ("adaptor", "train"):
        assert one.seed(purpose) == one.seed(purpose, "full") == three.seed(purpose, "lora")
    runs = ("full", "full-seed1", "full-seed2")
    every = [three.seed(purpose, run) for purpose in ("adaptor", "train") for run in runs]
    assert len(set(every)) == 6
    assert three.seed("adaptor", "full-seed1") == three.seed("adaptor", "lora-seed1")  # methods are paired by number


def run(config: StudyConfig, folder: Path) -> dict[str, Any]:
    study = Study(config, folder)
    study.run()
    assert study.ws.reporter.n_done == study.ws.reporter.n_steps  # as many steps as were announced
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    del found["timings"]
    return found


def steps(folder: Path) -> dict[Path, int]:
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("step.json")}


def test_a_study_of_two_runs_adds_to_that_of_one_repeats_and_resumes(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (figures, html):  # drawing takes most of the time, and is tested elsewhere
        monkeypatch.setattr(module, "FIGURES", {})
    one, two = config(recipe), config(recipe, seeds=2)
    grown = tmp_path / "grown"
    first = run(one, grown)
    before = steps(grown)
    shutil.copytree(grown, tmp_path / "again")
    with pytest.raises(UserError, match=r"another recipe \(seeds: 1 → 2\)"):
        run_study(two, grown)
    found = run(two, grown)

    # The first runs were left alone, the second are others, and all is measured of all.
    after = steps(grown)
    assert {path for path in before if before[path] != after[path]} == {Path("analysis/step.json")}
    runs = ("full", "lora", "full-seed1", "lora-seed1")
    for table, field in (("qa", "method"), ("deactivation", "model"), ("delta", "method"), ("mask_overlap", "model")):
        assert {r[field] for r in found[table]} - {"base"} == set(runs), table
        old = [r for r in found[table] if not r[field].endswith("-seed1")]
        assert old == first[table], table
    assert found["comparisons"] == first["comparisons"]
    weights = {name: (grown / "methods" / name / "checkpoint/model.safetensors").read_bytes() for name in runs}
    assert len(set(weights.values())) == 4
    curves = {name: [r["loss"] for r in found["training"] if r["method"] == name] for name in runs}
    assert curves["full"][0] != curves["full-seed1"][0]  # another adaptor and another order from the first step on

    # What is said of both together.
    by_measure = {(r["method"], r["measure"], r["modality"]): r for r in found["seeds"] if r["reference"] != "full"}
    accuracy = by_measure["full", "accuracy", "speech"]
    each = [r["accuracy"] for name in ("full", "full-seed1") for r in found["qa"]
            if (r["method"], r["modality"], r["metric"]) == (name, "speech", accuracy["basis"])]  # fmt: skip
    assert (accuracy["values"], accuracy["mean"]) == (each, pytest.approx(sum(each) / 2))
    ratio = by_measure["full", "perplexity_ratio", "text"]
    table = {r["method"]: r["perplexity"] for r in found["perplexity"] if r["modality"] == "text"}
    assert ratio["values"] == pytest.approx([table[name] / table["base"] for name in ("full", "full-seed1")])
    pairs = {(r["model"], r["reference"]) for r in found["shift"] if r["measure"] == "jensen_shannon_difference"}
    assert pairs == {("lora", "full"), ("lora-seed1", "full-seed1")}
    assert {(r["method_a"], r["method_b"], r["seeds_b"]) for r in found["seed_comparisons"]} == {
        ("base", "full", 2), ("base", "lora", 2), ("full", "lora", 2),
    }  # fmt: skip
    compare_runs_says_the_same(grown, found, tmp_path)

    # Another folder that grows from one run to two ends the same to the bit, also when steps are lost and made again.
    again = tmp_path / "again"
    shutil.rmtree(again / "methods/full/samples")
    assert run(two, again) == found
    for name in runs:
        assert (again / "methods" / name / "checkpoint/model.safetensors").read_bytes() == weights[name], name
    shutil.rmtree(again / "methods/lora-seed1")
    assert run(two, again) == found
    assert (again / "methods/lora-seed1/checkpoint/model.safetensors").read_bytes() == weights["lora-seed1"]

    # Further runs that are measured less: what lies there from before is not taken for a result.
    less = run(config(recipe, seeds=2, seeds_measure=["importance"]), again)
    assert {r["model"] for r in less["shift"]} == set(runs)
    for table, field in (("deactivation", "model"), ("delta", "method"), ("mask_overlap", "model")):
        assert {r[field] for r in less[table]} - {"base"} == {"full", "lora"}, table
    assert [r for r in less["seeds"] if r["measure"] == "accuracy"] == [
        r for r in found["seeds"] if r["measure"] == "accuracy"
    ]


def compare_runs_says_the_same(folder: Path, found: dict[str, Any], tmp_path: Path) -> None:
    list(compare.run(compare.Options([folder], tmp_path / "compare", seeds=True, methods="full")))
    tables = json.loads((tmp_path / "compare/compare.json").read_text())
    assert [system["label"] for system in tables["systems"]] == ["full"]
    list(compare.run(compare.Options([folder], tmp_path / "compare", seeds=True)))
    rows = json.loads((tmp_path / "compare/compare.json").read_text())["accuracy"]
    key = ("task", "modality", "method_a", "method_b", "difference", "ci_low", "ci_high", "p_value")
    assert sorted([r[k] for k in key] for r in rows) == sorted([r[k] for k in key] for r in found["seed_comparisons"])
