"""The published numbers agree with themselves: every check below is a fact of the tables, counted by hand."""

from __future__ import annotations

from palimpsest.report import paper


def _cell(table: tuple[paper.AccuracyRow, ...], size: str, method: str, task: str) -> paper.AccuracyRow:
    (row,) = (
        row for row in table if (row.system, row.size, row.method, row.task) == ("LLaMA-Omni", size, method, task)
    )
    return row


def _number(value: paper.Value | None) -> float:
    assert value is not None
    return value.value


def test_table_1_orders_the_conditions_and_flags_only_the_top_column() -> None:
    assert [(row.model, row.modality) for row in paper.TABLE_1] == [
        ("1B", "speech"),
        ("1B", "text"),
        ("8B", "speech"),
        ("8B", "text"),
    ]
    for row in paper.TABLE_1:
        assert row.base.value < row.bottom.value < row.random.value < row.top.value
        assert row.top.certainty == "digest"
        assert {row.base.certainty, row.bottom.certainty, row.random.certainty} == {"paper"}


def test_table_1_column_sums() -> None:
    # 2.08 + 3.65 + 1.75 + 3.12; 2.18 + 3.81 + 1.76 + 3.19; 3.85 + 6.39 + 3.54 + 5.47
    assert round(sum(row.base.value for row in paper.TABLE_1), 2) == 10.60
    assert round(sum(row.bottom.value for row in paper.TABLE_1), 2) == 10.94
    assert round(sum(row.random.value for row in paper.TABLE_1), 2) == 19.25
    assert sum(row.top.value for row in paper.TABLE_1) == 114e3 + 268e3 + 272e3 + 260e3


def test_table_2_has_eleven_systems_on_two_tasks() -> None:
    assert len(paper.TABLE_2) == 22
    assert sum(row.t2t is not None for row in paper.TABLE_2) == 16  # the three outside systems have none
    assert sum(row.s2t is not None for row in paper.TABLE_2) == 18  # nor have the two untrained models
    # column sums by hand: LQ T2T, LQ S2T, WQ T2T, WQ S2T
    sums = {
        task: (
            round(sum(_number(row.t2t) for row in paper.TABLE_2 if row.task == task and row.t2t), 1),
            round(sum(_number(row.s2t) for row in paper.TABLE_2 if row.task == task and row.s2t), 1),
        )
        for task in ("llama_questions", "web_questions")
    }
    assert sums == {"llama_questions": (621.7, 620.3), "web_questions": (402.0, 306.2)}


def test_table_2_carries_the_orders_of_claims_5_and_6() -> None:
    for size in ("1B", "8B"):
        for task in ("llama_questions", "web_questions"):
            base, full, layer_lr, lora = (
                _cell(paper.TABLE_2, size, method, task) for method in ("base", "full", "layer_lr", "lora")
            )
            assert _number(base.t2t) > _number(layer_lr.t2t) >= _number(lora.t2t) > _number(full.t2t)
            assert _number(lora.s2t) > _number(layer_lr.s2t) > _number(full.s2t)


def test_table_3_agrees_with_table_2_at_rank_16() -> None:
    assert [row.rank for row in paper.TABLE_3] == [8, 8, 16, 16, 24, 24]
    for row in paper.TABLE_3:
        if row.rank == 16:
            same = _cell(paper.TABLE_2, "8B", "lora", row.task)
            assert (row.t2t, row.s2t) == (same.t2t, same.s2t)


def test_every_claim_has_its_place_in_the_paper() -> None:
    assert [reference.claim for reference in paper.CLAIMS] == list(range(1, 9))
    assert all(reference.where and reference.published for reference in paper.CLAIMS)
    assert paper.Value(0.4, "digest") == paper.LAYER_LR_LAMBDA
    assert paper.LORA_RANKS["8B"].certainty == "paper"
