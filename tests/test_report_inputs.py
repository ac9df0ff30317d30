"""Reading a run directory: whatever is absent or damaged becomes a line in `missing`, never an exception."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from palimpsest.files import UserError, write_json, write_text
from palimpsest.records import RESULT_TABLES
from palimpsest.report.inputs import (
    MAY_BE_EMPTY,
    OF_DRIFT,
    OF_FRONTIER,
    OF_SPEECH_TOKENS,
    SEED_LOSSES,
    main_metric,
    main_reduction,
    method_key,
    method_name,
    peak_layer,
    read_inputs,
)
from report_fixture import invented_results, make_run


def _missing(path: Path) -> str:
    return "\n".join(read_inputs(path).missing)


def test_a_whole_run_misses_nothing(tmp_path: Path) -> None:
    inputs = read_inputs(make_run(tmp_path))
    assert inputs.missing == ()
    empty = {table for table in RESULT_TABLES if not inputs.results[table]}  # type: ignore[literal-required]
    assert empty == MAY_BE_EMPTY - OF_DRIFT - OF_FRONTIER
    assert inputs.samples["full", "facts", "speech"][0]["id"] == "q0"
    assert inputs.importance_maps["base", "model.layers.8.mlp.up_proj.weight"].shape == (128, 96)


def test_an_empty_folder_is_read_and_every_part_named(tmp_path: Path) -> None:
    missing = _missing(tmp_path)
    for part in ("results.json", "provenance.json", "study.yaml", "importance.npz", "delta.npz", "sample"):
        assert part in missing


def test_no_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        read_inputs(tmp_path / "nothing")


@pytest.mark.parametrize("table", RESULT_TABLES)
def test_a_missing_table_is_named(tmp_path: Path, table: str) -> None:
    run = make_run(tmp_path, without={table, "maps"}, n_questions=1)
    if table in MAY_BE_EMPTY:
        assert f"“{table}”" not in _missing(run)
        write_text(run / "study.yaml", "seeds: 3\ndrift: {general_text: {text: a.txt}}\n")
    unasked = ("voices", "embeddings", SEED_LOSSES, *OF_SPEECH_TOKENS, *OF_FRONTIER)
    assert (f"“{table}”" in _missing(run)) == (table not in unasked)


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    make_run(tmp_path)
    write_text(tmp_path / "provenance.json", '{"python": ')
    write_text(tmp_path / "study.yaml", "a: [1, 2")
    (tmp_path / "maps" / "delta.npz").write_bytes((tmp_path / "maps" / "delta.npz").read_bytes()[:500])
    file = tmp_path / "base" / "samples" / "facts-text" / "samples.jsonl"
    write_text(file, file.read_text() + "not json\n[1]\n" + '{"id": "q"}\n')
    (tmp_path / "methods" / "full" / "samples" / "facts-text" / "samples.jsonl").write_bytes(b"\xff\xfe")
    missing = _missing(tmp_path)
    assert "provenance.json cannot be read" in missing
    assert "study.yaml cannot be read" in missing
    assert "maps/delta.npz cannot be read" in missing
    assert "base/samples/facts-text/samples.jsonl: 3 damaged lines" in missing
    assert "methods/full/samples/facts-text/samples.jsonl cannot be read" in missing
    assert "no sample answers of full for facts, text" in missing
    assert len(read_inputs(tmp_path).samples["base", "facts", "text"]) == 25


def test_a_damaged_record_is_left_out_alone(tmp_path: Path) -> None:
    results = invented_results()
    results["qa"][0].pop("accuracy")
    results["qa"][1]["n"] = "300"
    results["qa"][2]["accuracy"] = None
    results["qa"][3]["correct"] = True
    results["deactivation"][0]["perplexity"] = None  # was infinite: not damage
    write_json(tmp_path / "results.json", {"schema": 1, **results})
    inputs = read_inputs(tmp_path)
    assert len(inputs.results["qa"]) == len(results["qa"]) - 4
    assert len(inputs.results["deactivation"]) == len(results["deactivation"])
    assert f"4 of {len(results['qa'])} records of “qa” are left out (“accuracy” is missing)" in "\n".join(
        inputs.missing
    )


def test_the_note_of_a_claim_may_be_absent(tmp_path: Path) -> None:
    results = invented_results()
    del results["claims"][0]["note"]
    write_json(tmp_path / "results.json", {"schema": 1, **results})
    assert len(read_inputs(tmp_path).results["claims"]) == 8


@pytest.mark.parametrize("text", ["[]", "null", '"x"', '{"schema": 1, "qa": {}}', '{"schema": 2, "qa": [3]}'])
def test_results_of_the_wrong_shape(tmp_path: Path, text: str) -> None:
    write_text(tmp_path / "results.json", text)
    inputs = read_inputs(tmp_path)
    assert inputs.results["qa"] == []
    assert "results.json" in "\n".join(inputs.missing)


def test_maps_of_the_wrong_shape_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    good = np.ones((2, 3), np.float32)
    np.savez(
        tmp_path / "maps" / "importance.npz", **{"base|a": good, "base|b": good[0], "c": good, "d|e": good.astype(int)}
    )
    inputs = read_inputs(tmp_path)
    assert list(inputs.importance_maps) == [("base", "a")]
    assert sum("is not a two-dimensional map" in line for line in inputs.missing) == 3


def test_pickled_maps_are_refused(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    np.savez(tmp_path / "maps" / "delta.npz", **{"full|a": np.array([{"x": 1}], dtype=object)})
    assert "maps/delta.npz cannot be read" in _missing(tmp_path)


def test_order_and_names_of_methods() -> None:
    names = ["zeta", "lora_r16", "lora", "full", "lora_r8", "base", "layer_lr"]
    assert sorted(names, key=method_key) == ["base", "full", "layer_lr", "lora", "lora_r8", "lora_r16", "zeta"]
    assert [method_name(name) for name in ("full", "lora_r8", "zeta")] == ["Full-FT", "LoRA rank 8", "zeta"]


def test_the_claims_scoring_rule_and_reduction_are_preferred(tmp_path: Path) -> None:
    results = invented_results()
    results["qa"].insert(0, results["qa"][0] | {"metric": "substring"})
    results["layers"].insert(0, results["layers"][0] | {"reduction": "fisher"})
    write_json(tmp_path / "results.json", json.loads(json.dumps({"schema": 1, **results})))
    read = read_inputs(tmp_path).results
    assert (main_metric(read), main_reduction(read)) == ("token_sequence", "per_batch_abs")
    read["qa"], read["layers"], read["comparisons"] = read["qa"][:1], read["layers"][:1], []
    assert (main_metric(read), main_reduction(read)) == ("substring", "fisher")
    assert peak_layer(read["layers"], "base") == 0
