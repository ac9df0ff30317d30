"""The sample stands for all weights; agreement against numbers by hand and against scipy; the command's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tests.test_importance_estimate import make_batches
from tests.tiny import tiny_llama, tiny_tokenizer

from palimpsest.ablation import validation
from palimpsest.ablation.agreement import (
    EDGES,
    advantage,
    agreement,
    resampled_weights,
    sample_weights,
    scores_at,
    sign_agreement,
)
from palimpsest.files import UserError, read_json
from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.scores import Scores
from palimpsest.models.anatomy import module_kind, scored_parameters


@pytest.fixture(scope="module")
def scores() -> Scores:
    return estimate_importance(tiny_llama(), make_batches(2))


# ---------------------------------------------------------------------------------------------------------------------
# Sample
# ---------------------------------------------------------------------------------------------------------------------
def test_the_weights_of_the_sample_add_up_to_the_model(scores: Scores) -> None:
    sample = sample_weights(scores, 420)
    parameters = scored_parameters(tiny_llama())
    n_strata = 7 * (len(EDGES) + 1)
    for kind in set(sample.kinds):
        there = sum(p.numel() for name, p in parameters.items() if module_kind(name) == kind)
        assert sample.weights[np.array(sample.kinds) == kind].sum() == pytest.approx(there)
    assert len(np.unique(sample.strata)) == n_strata
    assert len(set(sample.positions)) == len(sample.positions)  # drawn without replacement
    assert all(module_kind(name) == kind for (name, _), kind in zip(sample.positions, sample.kinds, strict=True))
    assert all(0 <= index < parameters[name].numel() for name, index in sample.positions)


def test_strata_are_ordered_by_importance_and_the_upper_ones_hold_the_top(scores: Scores) -> None:
    sample = sample_weights(scores, 840)
    one = sample_weights(Scores(scores.metadata, {"signed_sum": scores.tensors("signed_sum")}, *[None] * 2), 840)  # type: ignore[list-item]
    values = scores_at(scores, "signed_sum", one.positions)
    in_up = np.array([kind == "up" for kind in one.kinds])
    levels = one.strata[in_up] - one.strata[in_up].min()
    for level in range(len(EDGES)):
        assert values[in_up][levels == level].min() >= values[in_up][levels == level + 1].max()
    n_up = sum(p.numel() for name, p in scored_parameters(tiny_llama()).items() if module_kind(name) == "up")
    top = one.weights[in_up][levels <= 2].sum()  # the strata above the 3 % edge
    assert top == pytest.approx(0.03 * n_up, abs=1)
    assert sample.positions != one.positions


def test_the_sample_is_seeded_and_has_a_least_size(scores: Scores) -> None:
    assert sample_weights(scores, 84, seed=3).positions == sample_weights(scores, 84, seed=3).positions
    assert sample_weights(scores, 84, seed=3).positions != sample_weights(scores, 84, seed=4).positions
    with pytest.raises(UserError, match="42 strata"):
        sample_weights(scores, 41)


def test_scores_at_reads_single_weights(scores: Scores) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    expected = scores.tensors("per_batch_abs")[name]
    positions = [(name, 5), ("model.layers.0.self_attn.q_proj.weight", 0), (name, 60)]
    got = scores_at(scores, "per_batch_abs", positions)
    assert (got[0], got[2]) == (float(expected[0, 5]), float(expected[1, 60 - 48]))


# ---------------------------------------------------------------------------------------------------------------------
# Agreement
# ---------------------------------------------------------------------------------------------------------------------
def test_agreement_by_hand() -> None:
    exact = np.arange(10.0)
    same = agreement(exact, exact**2, share=0.2)
    assert (same.n, same.spearman.value, same.kendall.value) == (10, pytest.approx(1), pytest.approx(1))
    assert same.top_precision.value == pytest.approx(1)
    swapped = exact.copy()
    swapped[[7, 8]] = swapped[[8, 7]]  # first two by exact: 9, 8; by the other: 9, 7
    result = agreement(exact, swapped, share=0.2)
    assert result.top_precision.value == pytest.approx(0.5)
    assert result.kendall.value == pytest.approx(1 - 2 / 45)
    assert result.spearman.value == pytest.approx(1 - 6 * 2 / (10 * 99))
    assert result.spearman.low <= result.spearman.value <= result.spearman.high
    with pytest.raises(UserError, match="same two or more"):
        agreement(exact, exact[:3])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
def test_equal_weights_give_scipys_numbers(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    if len(set(x)) < 2 or len(set(y)) < 2:
        return
    result = agreement(x, y, resamples=2)
    assert result.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert result.kendall.value == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 4)), min_size=3, max_size=12))
def test_a_weight_of_three_is_three_copies(rows: list[tuple[int, int, int]]) -> None:
    x, y, w = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    if len(set(x)) < 2 or len(set(y)) < 2:
        return
    copies = w.astype(int)
    weighted = agreement(x, y, weights=w, resamples=2)
    repeated = agreement(np.repeat(x, copies), np.repeat(y, copies), resamples=2)
    assert weighted.spearman.value == pytest.approx(repeated.spearman.value, abs=1e-9)
    assert weighted.kendall.value == pytest.approx(repeated.kendall.value, abs=1e-9)


def test_a_stratified_sample_estimates_the_population() -> None:
    generator = np.random.default_rng(0)
    n, per_stratum, sizes = 10_000, 100, (300, 700, 9_000)  # the top 3 %, the next 7 %, the rest
    errors, covered, without_weights = [], 0, []
    for seed in range(20):
        exact = generator.lognormal(sigma=2, size=n)
        approximate = exact * generator.lognormal(sigma=1, size=n)
        strata, weights = np.repeat(range(3), per_stratum), np.repeat(np.array(sizes) / per_stratum, per_stratum)
        groups = np.split(np.argsort(-approximate), np.cumsum(sizes)[:-1])
        rows = np.concatenate([generator.choice(group, per_stratum, replace=False) for group in groups])
        truth = float(stats.spearmanr(exact, approximate).statistic)
        result = agreement(
            exact[rows], approximate[rows], weights=weights, strata=strata, seed=seed, resamples=200
        ).spearman
        errors.append(result.value - truth)
        covered += result.low < truth < result.high
        without_weights.append(agreement(exact[rows], approximate[rows], resamples=2).spearman.value - truth)
    # Read as if it were a plain random sample, the sample is biased.
    assert abs(np.mean(errors)) < 0.01 < abs(np.mean(without_weights))
    assert covered >= 16  # of 20 intervals of 95 %


def test_resampling_keeps_what_each_stratum_stands_for() -> None:
    strata = np.array([0] * 5 + [1] * 7)
    weights = np.where(strata == 0, 2.0, 30.0)
    replicates = resampled_weights(12, weights=weights, strata=strata, seed=1, resamples=20)
    assert replicates[0] == pytest.approx(weights / weights.sum())
    assert replicates[:, :5].sum(axis=1) == pytest.approx(np.full(21, 10 / 220))
    assert len({tuple(row) for row in replicates.round(9).tolist()}) > 15


def test_advantage_is_the_difference_of_two_agreements() -> None:
    generator = np.random.default_rng(2)
    exact = generator.lognormal(size=200)
    good, bad = (exact * generator.lognormal(sigma=sigma, size=200) for sigma in (0.3, 2))
    spearman, precision = advantage(exact, good, bad, share=0.1)
    assert spearman.value == pytest.approx(agreement(exact, good).spearman.value - agreement(exact, bad).spearman.value)
    assert 0 < spearman.low < spearman.value < spearman.high
    assert precision.value > 0
    assert advantage(exact, good, good)[0].high == 0


def test_sign_agreement_by_hand() -> None:
    changes, predicted = np.array([4.0, -3.0, 2.0, -1.0]), np.array([1.0, -1.0, -1.0, -1.0])
    assert sign_agreement(changes, predicted).value == pytest.approx(0.75)
    assert sign_agreement(changes, predicted, share=0.5).value == pytest.approx(1.0)
    assert sign_agreement(changes, predicted, weights=np.array([1, 1, 6, 2])).value == pytest.approx(0.4)


# ---------------------------------------------------------------------------------------------------------------------
# The command's folder
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(model folder, data folder): a tiny model, and six questions in two splits."""
    model, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    for split, words in (("train", "red blue green"), ("heldout", "one two three")):
        rows = [
            {"id": f"{split}-{word}", "question": f"Say {word}.", "answer": word, "answers": [word]}
            for word in words.split()
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(model), str(data)


def validated(setup: tuple[str, str], out: Path, **changes: Any) -> list[dict[str, Any]]:
    options: dict[str, Any] = {
        "limit": 2, "score_limit": 3, "n_weights": 84, "batch_size": 1, "dtype": "float64", "resamples": 20,
    }  # fmt: skip
    return validation.validate_importance(*setup, out, **{**options, **changes})


def test_validation_writes_records_and_continues_where_it_stopped(setup: tuple[str, str], tmp_path: Path) -> None:
    records = validated(setup, tmp_path)
    of_all = [r for r in records if r["kind"] == "all"]
    assert {r["measured_on"] for r in records} == {"train", "heldout"}
    assert {r["n_scored"] for r in records} == {2, 3}
    same = next(r for r in of_all if (r["reduction"], r["n_scored"], r["measured_on"]) == ("signed_sum", 2, "train"))
    assert same["n"] == len((tmp_path / "changes-train.jsonl").read_text().splitlines())
    assert same["spearman"] > 0.5
    assert same["sign_agreement"] > 0.6
    about = read_json(tmp_path / "validation.json")
    assert about["data"]["train"]["packed"]
    assert about["noise_floor"] == 0

    file = tmp_path / "changes-train.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:50]))  # as if killed
    assert validated(setup, tmp_path) == records
    assert len(file.read_text().splitlines()) == len(lines)
    file.write_text("".join(lines[:50]) + lines[50][:7])  # inside a write
    assert validated(setup, tmp_path) == records
    assert file.read_text().splitlines(keepends=True) == lines
    file.write_text("".join(lines[:50]) + "{}\n")
    with pytest.raises(UserError, match=r"changes-train\.jsonl:51 is no measured change; delete the file"):
        validated(setup, tmp_path)
    file.write_text("".join(lines))

    with pytest.raises(UserError, match="other settings"):
        validated(setup, tmp_path, seed=1)


def test_the_noise_floor_of_float32(setup: tuple[str, str], tmp_path: Path) -> None:
    records = validated(setup, tmp_path, dtype="float32", splits=["train"], reductions=["signed_sum"])
    assert 0 < read_json(tmp_path / "validation.json")["noise_floor"] < 1e-5
    assert all(0 <= record["below_noise_floor_population"] <= 1 for record in records)
    assert len(list(validation.table(records))) == 2


def test_scored_weights_are_never_changed(setup: tuple[str, str], scores: Scores) -> None:
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    from palimpsest.ablation.exact import exact_changes, signed_products

    positions = sample_weights(scores, 42).positions
    exact_changes(model, make_batches(1), positions)
    signed_products(model, make_batches(1), positions)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
