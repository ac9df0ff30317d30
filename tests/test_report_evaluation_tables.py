"""The tables of floors and of perplexity, on invented records."""

from __future__ import annotations

from palimpsest.report.tables import floors, perplexity
from report_fixture import invented_results


def cells(table, row: int) -> list[str]:  # type: ignore[no-untyped-def]
    return [cell.plain for cell in table.rows[row]]


def test_floors_of_the_main_rule_one_row_per_method() -> None:
    records = invented_results()["qa_floors"]
    other = [{**record, "metric": "substring", "value": 0.9} for record in records]
    table = floors(other + records, "token_sequence")  # type: ignore[arg-type]
    assert len(table.rows) == 2 * 6
    first = ["Base", "Llama Questions", "text", "300", "1.0 [0.5 to 2.0]", "0.0 [0.0 to 0.0]", "5.0 [2.5 to 10.0]"]
    assert cells(table, 0) == first
    assert cells(table, 1)[0] == "Full-FT"
    without = [record for record in records if record["floor"] != "unrelated"]
    assert cells(floors(without, "token_sequence"), 0)[4] == "–"  # type: ignore[arg-type]
    assert floors([], "token_sequence").rows == ()


def test_perplexity_by_modality() -> None:
    table = perplexity(invented_results()["perplexity"])  # type: ignore[arg-type]
    assert [column.title for column in table.columns] == ["Method", "T2T perplexity", "S2T perplexity"]
    assert cells(table, 0) == ["Base", "4.48", "–"]
    assert cells(table, 1) == ["Full-FT", "4.48", "not finite"]
    assert "text: 100 answers, 1234 tokens." in table.note
    assert perplexity([]).rows == ()
