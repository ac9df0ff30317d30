"""Families of tests: by hand, by simulation, and that what is equal by construction costs the others nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from palimpsest.comparison import pairs
from palimpsest.comparison.families import EQUAL, INSEPARABLE, REPEATS, corrected
from palimpsest.comparison.pairs import compare
from palimpsest.comparison.probe_pairs import probe_comparisons
from palimpsest.comparison.systems import read_systems
from palimpsest.comparison.training_runs import seed_comparisons
from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.files import write_jsonl
from palimpsest.intervals import mcnemar_exact
from palimpsest.rundir import folder_of

SAME = {"adaptor": "base"}


def row(a: str, b: str, p: float, task: str = "facts", modality: str = "text") -> dict[str, Any]:
    against = "the base" if "base" in (a, b) else "each other"
    return {
        "task": task, "modality": modality, "method_a": a, "method_b": b, "difference": 0.1, "ci_low": 0.0,
        "ci_high": 0.2, "p_value": p, "family": f"{modality}, against {against}",
    }  # fmt: skip


def answers(first: int, n: int = 20) -> dict[str, bool]:
    """The first questions right."""
    return {f"q{i}": i < first for i in range(n)}


def said(rows: list[Any], *fields: str) -> dict[tuple[str, str], Any]:
    return {(r["method_a"], r["method_b"]): tuple(r[field] for field in fields) for r in rows}


def test_families_by_hand() -> None:
    """Holm over 2, 1 and 1 tests instead of over 4."""
    rows = [
        row("base", "full", 0.01),
        row("base", "lora", 0.04),
        row("full", "lora", 0.03),
        row("base", "full", 0.02, modality="speech"),
    ]
    made = corrected(rows)
    assert [r["p_holm"] for r in made] == [2 * 0.01, 0.04, 0.03, 0.02]
    assert [r["n_family"] for r in made] == [2, 2, 1, 1]
    assert all(r["left_out"] is None for r in made)


def test_a_row_that_is_equal_by_construction_changes_no_other_p() -> None:
    """As text, the adaptor's model is the base: its rows against the base and against full are no tests of their own.

    By hand: Holm over base-full alone (0.03), over full-lora (0.02). Over the table it was 0.09 or more.
    """
    tests = [row("base", "full", 0.03), row("full", "lora", 0.02)]
    idle = [row("base", "adaptor", 0.7), row("adaptor", "full", 0.03)]
    for rows in (tests, [*tests, *idle], [*reversed(idle), *tests]):
        found = said(corrected(rows, SAME), "p_holm", "n_family", "left_out")
        assert found["base", "full"] == (0.03, 1, None)
        assert found["full", "lora"] == (0.02, 1, None)
    assert found["base", "adaptor"] == (0.7, 1, EQUAL)  # uncorrected
    assert found["adaptor", "full"] == (0.03, 1, REPEATS)  # that of base-full, whose family it names
    assert {r["family"] for r in corrected([*tests, *idle], SAME) if "full" in r["method_b"]} == {
        "text, against the base"
    }
    spoken = [row("base", "adaptor", 0.02, modality="speech"), row("base", "full", 0.03, modality="speech")]
    assert [r["n_family"] for r in corrected(spoken, SAME)] == [2, 2]  # in speech the adaptor is a model of its own


def test_two_adaptors_are_one_test_even_where_the_base_is_not_compared() -> None:
    same = {"adaptor": "base", "adaptor2": "base"}
    rows = [row("adaptor", "full", 0.02), row("adaptor2", "full", 0.02), row("adaptor", "adaptor2", 1.0)]
    made = corrected(rows, same)
    assert [r["left_out"] for r in made] == [None, REPEATS, EQUAL]
    assert [r["p_holm"] for r in made] == [0.02, 0.02, 1.0]


def test_a_row_that_nothing_separates_is_left_out_and_says_so() -> None:
    rows = compare(
        {"base": answers(10), "same": answers(10), "full": answers(3)}, task="t", modality="text", metric="m", seed=0
    )
    found = said(rows, "p_holm", "n_family", "left_out")
    assert found["base", "same"] == (1.0, 1, INSEPARABLE)
    assert found["base", "full"] == (mcnemar_exact(7, 0), 1, None)
    assert found["same", "full"] == (mcnemar_exact(7, 0), 1, None)  # no one said that they are the same model


@pytest.mark.parametrize("idle", [0, 4])
def test_family_wise_error_is_at_most_nominal(idle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 tables of equal methods: three tuned ones, `idle` adaptors, two tasks; a false difference in at most 5 %.

    In each declared family, and with difficulty shared as among real models. Monte-Carlo error 0.007.
    """
    monkeypatch.setattr(pairs, "compare_accuracies", lambda a, b, _: Fast(a[0], b[0]))
    random = np.random.default_rng(4)
    same = {f"adaptor{i}": "base" for i in range(idle)}
    false: dict[str, int] = {}
    for _ in range(1000):
        rows = []
        for task in ("x", "y"):
            chance = 1 / (1 + np.exp(-3 * random.standard_normal(200) + 1))
            right = {name: random.random(200) < chance for name in ("base", "full", "layer_lr", "lora")}
            right |= dict.fromkeys(same, right["base"])
            verdicts = {name: dict(enumerate(of.tolist())) for name, of in right.items()}
            rows += compare(verdicts, task=task, modality="text", metric="m", seed=0, same=same)  # type: ignore[arg-type]
        made = corrected(rows, same)
        for family in {r["family"] for r in made}:
            false[family] = false.get(family, 0) + any(r["p_holm"] <= 0.05 for r in made if r["family"] == family)
        assert {r["n_family"] for r in made} == {6}  # 3 methods or 3 pairs of them, on 2 tasks, whatever is idle
    assert set(false) == {"text, against the base", "text, against each other"}
    assert max(false.values()) / 1000 <= 0.05
    assert min(false.values()) > 0


class Fast:
    """`Compared` without the bootstrap and the power, which are slow and not looked at here."""

    low, high = -1.0, 1.0

    def __init__(self, a: Any, b: Any) -> None:
        self.n = len(a)
        self.only_a, self.only_b = int(np.sum(a > b)), int(np.sum(b > a))
        self.p_value = exact(self.only_a, self.only_b)


exact = cache(mcnemar_exact)


def test_seeds_and_probe_leave_the_adaptor_out(tmp_path: Path) -> None:
    verdicts = {
        ("facts", "text"): {
            **{name: answers(12) for name in ("base", "adaptor", "adaptor-seed1")},
            "full": answers(2),
            "full-seed1": answers(3),
        }
    }
    found = said(seed_comparisons(["adaptor", "full"], 2, verdicts, 0, SAME), "left_out", "n_family", "p_holm")
    assert found["base", "adaptor"][0] == EQUAL
    assert found["base", "full"][:2] == (None, 1)
    assert found["adaptor", "full"][0] == REPEATS
    assert found["adaptor", "full"][2] >= found["base", "full"][2]

    for name, right in (("base", 6), ("adaptor", 6), ("full", 1)):
        losses = [{"id": f"p{i}", "kind": "ab"[i % 2], "right": 1, "wrong": 2, "correct": i < right} for i in range(8)]
        write_jsonl(tmp_path / folder_of(name) / "probe" / "pairs.jsonl", losses)
    rows = probe_comparisons(tmp_path, ["adaptor", "full"], {"adaptor": 1, "full": 1}, 0, SAME)
    assert {r["left_out"] for r in rows if r["method"] == "adaptor"} == {EQUAL}
    of_full = {r["kind"]: (r["n_family"], r["left_out"]) for r in rows if r["method"] == "full"}
    assert of_full == {"all": (1, None), "a": (2, None), "b": (2, None)}


def systems_in(run: Path) -> Iterator[tuple[str, bool]]:
    return ((s.label, s.text_of_base) for s in read_systems([run], PRIMARY))


def test_compare_reads_from_the_recipe_which_methods_train_an_adaptor_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_compare import study

    right = {"base": range(10), "adaptor": range(10), "adaptor-seed1": range(10), "full": range(3)}
    run = study(tmp_path / "run", {name: {"text": of} for name, of in right.items()})
    assert not any(unchanged for _, unchanged in systems_in(run))  # no recipe, nothing known
    recipe = {"methods": {"adaptor": {"kind": "adaptor"}, "full": {"kind": "full"}}}
    (run / "study.yaml").write_text(yaml.safe_dump(recipe))
    assert dict(systems_in(run)) == {"base": False, "adaptor": True, "adaptor-seed1": True, "full": False}
    systems = read_systems([run], PRIMARY)
    rows = pairs.accuracy_records(list(combinations(systems, 2)), PRIMARY, 0)
    found = said(rows, "left_out", "n_family")
    assert found["base", "full"] == (None, 1)
    assert found["base", "adaptor"][0] == found["adaptor", "adaptor-seed1"][0] == EQUAL
    assert {reason for (a, b), (reason, _) in found.items() if b == "full" and a != "base"} == {REPEATS}
    (run / "study.yaml").write_text("methods: [1]")
    assert not any(unchanged for _, unchanged in systems_in(run))
