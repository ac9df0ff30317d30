"""The probe of a method against the base's on the same pairs: by hand, and what it shows of a loss the pairs hide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palimpsest.comparison.probe_pairs import probe_comparisons
from palimpsest.files import UserError, write_jsonl
from palimpsest.intervals import mcnemar_exact
from palimpsest.report.tables import probe_comparisons as shown
from palimpsest.rundir import folder_of


def store(run: Path, name: str, losses: list[tuple[float, float]]) -> None:
    """Pairs of two kinds in turn, by (loss of the right, of the wrong continuation)."""
    rows = [
        {"id": f"p{i}", "kind": "ab"[i % 2], "right": right, "wrong": wrong, "correct": right < wrong}
        for i, (right, wrong) in enumerate(losses)
    ]
    write_jsonl(run / folder_of(name) / "probe" / "pairs.jsonl", rows)


def test_pairs_by_hand(tmp_path: Path) -> None:
    store(tmp_path, "base", [(1, 2)] * 8)
    store(tmp_path, "full", [(3, 2)] * 3 + [(2, 4)] * 5)
    rows = probe_comparisons(tmp_path, ["full"], {"full": 1}, 0)
    found = {row["kind"]: row for row in rows}
    assert list(found) == ["all", "a", "b"]
    whole = found["all"]
    assert (whole["only_base"], whole["only_method"], whole["difference"]) == (3, 0, -3 / 8)
    assert whole["p_value"] == whole["p_holm"] == mcnemar_exact(3, 0)
    assert whole["margin_difference"] == pytest.approx((3 * -1 + 5 * 2) / 8 - 1)
    assert whole["loss_right_difference"] == pytest.approx((3 * 2 + 5 * 1) / 8)
    assert (found["a"]["n"], found["a"]["only_base"], found["b"]["only_base"]) == (4, 2, 1)
    assert found["a"]["p_holm"] == found["b"]["p_holm"] == 1.0  # 2 · 0.5


def test_text_that_became_less_likely_shows_where_all_pairs_stay_right(tmp_path: Path) -> None:
    store(tmp_path, "base", [(1 + 0.01 * i, 3) for i in range(20)])
    store(tmp_path, "full", [(2 + 0.02 * i, 5) for i in range(20)])
    row = probe_comparisons(tmp_path, ["full"], {"full": 1}, 0)[0]
    assert (row["difference"], row["p_holm"]) == (0.0, 1.0)
    assert row["margin_difference"] > 0.5  # "rising"
    assert row["loss_right_ci_low"] > 1.0
    (line,) = [cells for cells in shown([row]).rows if cells[1].text == "all"]
    assert line[-1].text == "+1.095"


def test_training_runs_are_clustered(tmp_path: Path) -> None:
    for name, n in (("base", 6), ("full", 5), ("full-seed1", 3)):
        store(tmp_path, name, [(1, 2)] * n + [(2, 1)] * (8 - n))
    row: Any = probe_comparisons(tmp_path, ["full"], {"full": 2}, 0)[0]
    assert (row["n_seeds"], row["only_base"], row["difference"]) == (2, None, -0.25)
    assert row["ci_low"] < -0.25 < row["ci_high"]


def test_other_pairs_are_refused(tmp_path: Path) -> None:
    store(tmp_path, "base", [(1, 2)] * 4)
    store(tmp_path, "full", [(1, 2)] * 5)
    with pytest.raises(UserError, match="full and the base were probed with other pairs"):
        probe_comparisons(tmp_path, ["full"], {"full": 1}, 0)
