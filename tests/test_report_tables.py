"""The tables of the report against records written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palimpsest.files import write_text
from palimpsest.report import structure_tables, tables
from palimpsest.report.inputs import read_inputs
from palimpsest.report.paper import SOURCE_LABEL
from palimpsest.report.table import Table, to_csv, to_latex, to_markdown
from report_fixture import accuracy_row, comparison_row, invented_results, make_run, probe_row


def _deactivation(condition: str, perplexity: float | None, seed: int | None = None) -> Any:
    return {
        "model": "base",
        "modality": "text",
        "condition": condition,
        "ratio": 0.0 if condition == "base" else 0.03,
        "scope": "global",
        "seed": seed,
        "reduction": "signed_sum",
        "n_removed": 0,
        "n_examples": 10,
        "n_tokens": 99,
        "loss": 1.0,
        "perplexity": perplexity,
    }


def _row(table: Table, index: int) -> list[str]:
    return [cell.plain for cell in table.rows[index]]


def test_deactivation_shows_the_median_and_the_range_of_the_random_masks() -> None:
    records = [
        _deactivation("base", 4.0),
        _deactivation("top", 120_000.0),
        _deactivation("bottom", None),
        _deactivation("random", 7.0, seed=1),
        _deactivation("random", 8.0, seed=2),
        _deactivation("random", 12.0, seed=3),
    ]
    table = tables.deactivation(records)
    assert _row(table, 0) == [
        "measured here",
        "Base",
        "text",
        "3",
        "global, signed_sum",
        "4.00",
        "1.20e5",
        "not finite",
        "8.00 [ln ratio 0.693, 0.560 to 1.10; 3 masks]",  # ln 2, ln 7/4, ln 3
    ]
    # Two masks of four orders of magnitude: the middle of the logarithms, not the mean of the perplexities.
    records = [_deactivation("base", 4.0), _deactivation("random", 4.0, seed=1), _deactivation("random", 4e4, seed=2)]
    assert _row(tables.deactivation(records), 0)[-1] == "400 [ln ratio 4.61, 0 to 9.21; 2 masks]"
    records[2] = _deactivation("random", None, seed=2)
    assert _row(tables.deactivation(records), 0)[-1] == "not finite [ln ratio ∞, 0 to ∞; 2 masks]"
    assert "text: 10 examples, 99 tokens." in table.note


def test_every_scope_has_a_row_of_its_own_with_the_whole_model_beside_it() -> None:
    records: Any = [
        {**_deactivation(condition, perplexity, seed), "scope": scope}
        for scope, top, masks in (("global", 8e4, (8.0, 32.0)), ("per_matrix", 400.0, (4.0, 9.0)))
        for condition, perplexity, seed in (("base", 4.0, None), ("top", top, None), *(("random", m, m) for m in masks))
    ]
    first, second = (_row(tables.deactivation(records), i) for i in (0, 1))
    assert first[4:7] == ["global, signed_sum", "4.00", "80000"]
    assert second[4:7] == ["per_matrix, signed_sum", "4.00", "400"]
    assert [row[-1].split(" [")[0] for row in (first, second)] == ["16.0", "6.00"]  # √(8 · 32), √(4 · 9)
    assert [row[-1][-8:] for row in (first, second)] == ["2 masks]"] * 2


def test_random_masks_of_several_training_runs_are_set_against_their_own_whole_model() -> None:
    by_run = {"full": (4.0, 8.0), "full-seed1": (6.0, 24.0)}
    records: Any = []
    for run, (whole, without) in by_run.items():
        for condition, value in (("base", whole), ("random", without)):
            records.append({**_deactivation(condition, value, seed=1), "model": "full", "run": run})
    row = _row(tables.deactivation(records), 0)
    assert row[5] == "5.00 [4.00 to 6.00; 2 seeds]"
    assert row[-1] == "13.9 [ln ratio 1.04, 0.693 to 1.39; 2 masks]"  # ln 2 and ln 4; sqrt(8 · 24)


def test_published_rows_are_marked_in_the_page_and_in_every_copy() -> None:
    results: Any = invented_results()
    for table in (
        tables.deactivation(results["deactivation"]),
        tables.accuracy(results["qa"], "token_sequence"),
        tables.lora_rank(results["qa"], "token_sequence", {"lora_r8": 8}),
    ):
        assert table.published
        for index, row in enumerate(table.rows):
            assert row[0].text == (SOURCE_LABEL if index in table.published else tables.OURS)
        for copy in (to_csv(table), to_markdown(table), to_latex(table)):
            assert copy.count("published (Wang et al.)") == len(table.published)


def test_numbers_from_the_digest_carry_their_mark() -> None:
    top = [row[6].text for row in tables.deactivation([]).rows]
    assert top == ["1.14e5 *", "2.68e5 *", "2.72e5 *", "2.60e5 *"]
    assert "* from a secondary digest" in tables.deactivation([]).note


def test_accuracy_puts_modalities_side_by_side_under_one_scoring_rule() -> None:
    other: Any = accuracy_row("base", "facts", "text", 299) | {"metric": "substring"}
    records: Any = [
        other,
        accuracy_row("base", "facts", "text", 60),
        accuracy_row("full", "facts", "text", 30),
        accuracy_row("full", "facts", "speech", 0),
    ]
    table = tables.accuracy(records, "token_sequence", "Some-LM")
    base, full = _row(table, 0), _row(table, 1)
    # Wilson, 60 of 300: centre (0.2 + 0.0064) / 1.0128, half-width 0.0452
    assert base == ["measured here", "facts", "Some-LM", "Base", "20.0 [15.9 to 24.9; n 300]", "–", "–"]
    assert full[3:6] == ["Full-FT", "10.0 [7.1 to 13.9; n 300]", "0.0 [0.0 to 1.3; n 300]"]
    assert len(table.rows) - len(table.published) == 2


def test_accuracy_details_keep_every_scoring_rule_and_count_failures() -> None:
    records: Any = [
        accuracy_row("base", "facts", "text", 60),
        accuracy_row("base", "facts", "text", 90) | {"metric": "a"},
    ]
    table = tables.accuracy_details(records)
    records[1] |= {"n_refusal": 4, "n_loop": 3, "n_cut": 7, "source": "published (someone)"}
    table = tables.accuracy_details(records)
    assert _row(table, 0)[4:] == ["a 1", "300", "90", "30.0 [25.1 to 35.4]", "2", "4", "3", "1", "7"]
    assert _row(table, 1)[4:] == ["token_sequence 1", "300", "60", "20.0 [15.9 to 24.9]", "2", "–", "–", "1", "–"]
    assert [_row(table, i)[0] for i in (0, 1)] == ["published (someone)", "measured here"]


def test_every_accuracy_row_says_whether_it_was_published_or_measured_here() -> None:
    records: Any = [accuracy_row("base", "llama_questions", modality, 60) for modality in ("text", "cascade")]
    table = tables.accuracy(records, "token_sequence")
    said = [_row(table, i)[0] for i in range(len(table.rows))]
    assert said == ["measured here"] + ["published (Wang et al.)"] * (len(said) - 1)
    systems = {_row(table, i)[2] for i in range(len(table.rows))}
    assert {"Moshi, 7B", "GLM-4-Voice, 9B"} <= systems
    assert [column.title for column in table.columns][-3:] == ["T2T %", "S2T %", "Cascade %"]
    more: Any = [*records, accuracy_row("full", "llama_questions", "text_asr", 33)]
    wider = tables.accuracy(more, "token_sequence")
    assert [column.title for column in wider.columns][-1] == "Transcript %"
    assert _row(wider, 1)[-1].startswith("11.0 [")
    assert _row(wider, 2)[-4:] == [*_row(table, 1)[-3:], "–"]


def test_published_rows_stand_apart_where_nothing_was_trained(tmp_path: Path) -> None:
    """Of a diagnosis: its own accuracies would be lost among 22 of other models."""
    run = make_run(tmp_path, without={"maps", "samples", "data", "study.yaml"})
    for kind, n_published in (("full", 22), ("given", 0)):
        write_text(run / "study.yaml", f"methods: {{full: {{kind: {kind}}}}}\n")
        found = tables.tables_of(read_inputs(run))
        assert len(found["accuracy"].published) == n_published
        assert ("accuracy_published" in found) == (n_published == 0)
    theirs = found["accuracy_published"]
    assert len(theirs.rows) == len(theirs.published) == 22
    assert theirs.title.startswith("Published: Accuracy from typed")
    assert len(found["deactivation_published"].rows) == 4


def test_the_probe_has_a_row_per_kind_and_two_columns_per_model() -> None:
    records: Any = [probe_row("full", "all", 30, 60, -0.5), *(probe_row("base", k, 45, 60, 2.0) for k in ("all", "x"))]
    table = tables.probe(records)
    assert [column.title for column in table.columns] == [
        "Pairs", "n", "Base %", "Base, margin", "Full-FT %", "Full-FT, margin",
    ]  # fmt: skip
    assert _row(table, 0) == ["all", "60", "75.0 [70.0 to 80.0]", "2.00", "50.0 [45.0 to 55.0]", "-0.500"]
    assert _row(table, 1)[-2:] == ["–", "–"]


def test_lora_ranks_show_only_methods_with_a_rank() -> None:
    records: Any = [accuracy_row("lora_r8", "facts", "text", 60), accuracy_row("full", "facts", "text", 60)]
    table = tables.lora_rank(records, "token_sequence", {"lora_r8": 8})
    ours = [_row(table, index) for index in range(len(table.rows)) if index not in table.published]
    assert ours == [["measured here", "facts", "–", "8", "20.0 [15.9 to 24.9; n 300]", "–"]]
    assert len(table.published) == 6


def test_comparisons_write_points_and_both_p_values() -> None:
    table = tables.comparisons([comparison_row("facts", "base", "full", -0.2, 0.0001)])  # type: ignore[list-item]
    assert _row(table, 0)[3:] == [
        "Base",
        "Full-FT",
        "300",
        "40",
        "10",
        "−20.0 [−25.0 to −15.0]",
        "< 0.001",
        "< 0.001",
        "–",
    ]
    told = {**comparison_row("facts", "base", "full", -0.2, 0.0001), "n_family": 6, "left_out": None}
    idle = {**told, "left_out": "equal by construction"}
    made = tables.comparisons([told, idle])  # type: ignore[list-item]
    assert [_row(made, index)[-1] for index in (0, 1)] == ["6", "equal by construction"]


def test_clustering_takes_medians_and_leaves_out_undefined_scores() -> None:
    records: Any = [
        {
            "model": "base",
            "of": "importance",
            "name": f"m{index}",
            "layer": index,
            "kind": "q",
            "measure": "top5_rows",
            "value": value,
            "null_mean": 0.1,
            "null_std": 0.01,
            "z": z,
        }
        for index, (value, z) in enumerate(((0.2, 2.0), (0.3, 20.0), (0.9, None)))
    ]
    # median of 0.2, 0.3, 0.9; median of 2, 20; one of the two defined z is above 3
    assert _row(structure_tables.clustering(records), 0)[4:] == ["3", "0.300", "0.100", "11.0", "50"]


def test_delta_summarises_by_method_and_kind() -> None:
    records: Any = [
        {
            "method": "lora",
            "name": f"m{index}",
            "layer": index,
            "kind": "q",
            "relative_norm": norm,
            "overlap_with_importance": overlap,
            "overlap_by_chance": 0.03,
        }
        for index, (norm, overlap) in enumerate(((0.01, 0.1), (0.02, 0.2), (0.06, 0.3)))
    ]
    row = _row(structure_tables.delta(records), 0)
    assert row == ["LoRA", "q", "3", "0.0200 [0.0100 to 0.0600]", "20.0", "3.0", "–", "–"]


def test_layers_show_one_reduction_of_whole_layers() -> None:
    def record(model: str, layer: int, kind: str, reduction: str, share: float) -> Any:
        return {
            "model": model,
            "modality": "text",
            "reduction": reduction,
            "layer": layer,
            "kind": kind,
            "total": 10 * share,
            "mean": 1.0,
            "share": share,
            "n_parameters": 5,
        }

    records = [
        record("full", 0, "all", "fisher", 0.25),
        record("base", 1, "all", "fisher", 0.75),
        record("base", 0, "q", "fisher", 0.1),
        record("base", 0, "all", "signed_sum", 0.5),
    ]
    (table,) = structure_tables.layers(records, "text", "fisher")
    assert [column.title for column in table.columns] == ["Layer", "Base, %", "Base, sum", "Full-FT, %", "Full-FT, sum"]
    assert _row(table, 0) == ["0", "–", "–", "25.00", "2.50"]
    assert _row(table, 1) == ["1", "75.00", "7.50", "–", "–"]


def test_importance_by_layer_of_many_models_is_two_tables() -> None:
    """So that one fits on paper."""
    record = {
        "modality": "text", "reduction": "fisher", "layer": 0, "kind": "all", "total": 2.5, "mean": 1.0, "share": 0.25,
        "n_parameters": 5,
    }  # fmt: skip
    records: Any = [{**record, "model": f"m{i}"} for i in range(9)]
    shares, sums = structure_tables.layers(records, "text", "fisher")
    assert (shares.name, sums.name) == ("layers_text", "layers_text_sum")
    assert _row(shares, 0) == ["0", *["25.00"] * 9]
    assert _row(sums, 0) == ["0", *["2.50"] * 9]


def test_claims_stand_beside_the_papers_evidence_with_a_worded_verdict() -> None:
    claim: Any = {
        "claim": 5,
        "statement": "s",
        "measure": "m",
        "value": None,
        "ci_low": None,
        "ci_high": None,
        "verdict": "undecided",
    }
    decided, left = tables.claims([{**claim, "value": 0.06}])
    row = _row(decided, 0)
    assert row[:6] == ["5", "s", "? undecided", "m", "0.0600", ""]
    assert row[6].startswith("Table 2 (published):")
    assert not left.rows


def test_claims_that_do_not_apply_stand_apart_and_say_why() -> None:
    common: Any = {"statement": "s", "measure": "m", "ci_low": None, "ci_high": None}
    rows: Any = [
        {**common, "claim": 1, "value": 2.0, "verdict": "holds"},
        {**common, "claim": 4, "value": None, "verdict": "undecided"},
        {**common, "claim": 5, "value": 0.1, "verdict": "undecided"},  # measured, and not enough
    ]
    decided, left = tables.claims(rows, ["base", "full", "mine"])
    assert [row[0].text for row in decided.rows] == ["1", "5"]
    assert [row[0].text for row in left.rows] == ["4"]
    assert (
        left.title
        == "1 of 3 claims does not apply to this run: it has no Layer-LR and no LoRA; the notes say what each needs"
    )


def test_timings_add_up() -> None:
    table = structure_tables.timings(
        [
            {"step": "a", "seconds": 30.0, "peak_rss_bytes": 1_500_000_000},
            {"step": "b", "seconds": 60.0, "peak_rss_bytes": 2_000_000_000},
        ]
    )
    assert _row(table, 0) == ["a", "30.0 s", "1.50"]
    assert table.note.startswith("1 min 30 s in all.")


def test_structure_tables_show_whole_models_with_their_intervals() -> None:
    results: Any = invented_results()
    summary = structure_tables.clustering_summary(results["clustering_summary"])
    assert [column.title for column in summary.columns] == ["Of", "Model", "top5_rows", "top5_columns"]
    assert _row(summary, 0) == ["importance", "Base", "5.00 [4.50 to 5.50]", "5.00 [4.50 to 5.50]"]
    assert [_row(summary, i)[0] for i in range(1, 5)] == ["change", "change", "change of rank 8", "change of rank 8"]
    unmeasured = [
        row | ({"ratio": None, "ci_low": None, "ci_high": None} if row["measure"] == "top5_columns" else {})
        for row in results["clustering_summary"]
    ]
    table = structure_tables.clustering_summary(unmeasured)
    assert [column.title for column in table.columns] == ["Of", "Model", "top5_rows"]  # no column of dashes
    overlap = structure_tables.mask_overlap(results["mask_overlap"])
    assert _row(overlap, 0) == ["Full-FT", "Base", "3", "40.0 [35.0 to 45.0]", "60.0", "3.0"]
    assert len(overlap.rows) == 3
    assert _row(structure_tables.correlations(results["correlations"]), 0)[2:5] == ["3", "1.00", "0.333"]


def test_floors_of_the_main_rule_one_row_per_method() -> None:
    records = invented_results()["qa_floors"]
    other = [{**record, "metric": "substring", "value": 0.9} for record in records]
    table = tables.floors(other + records, "token_sequence")  # type: ignore[arg-type]
    assert len(table.rows) == 2 * 6
    first = ["Base", "Llama Questions", "text", "300", "1.0 [0.5 to 2.0]", "0.0 [0.0 to 0.0]", "5.0 [2.5 to 10.0]"]
    assert _row(table, 0) == first
    assert _row(table, 1)[0] == "Full-FT"
    without = [record for record in records if record["floor"] != "unrelated"]
    assert _row(tables.floors(without, "token_sequence"), 0)[4] == "–"  # type: ignore[arg-type]
    assert tables.floors([], "token_sequence").rows == ()


def test_perplexity_by_modality() -> None:
    table = tables.perplexity(invented_results()["perplexity"])  # type: ignore[arg-type]
    assert [column.title for column in table.columns] == ["Method", "T2T perplexity", "S2T perplexity"]
    assert _row(table, 0) == ["Base", "4.48", "–"]
    assert _row(table, 1) == ["Full-FT", "4.48", "not finite"]
    assert "text: 100 answers, 1234 tokens." in table.note
    assert tables.perplexity([]).rows == ()
