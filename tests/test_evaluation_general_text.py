"""General text: what is read, that every token is predicted once, nats per byte against a count by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from palimpsest.comparison.general_text_pairs import general_text_comparisons
from palimpsest.data.texts import Text, read_texts, texts_version
from palimpsest.evaluation.general_text import (
    TextLoss,
    read_text_losses,
    summarise_text,
    text_losses,
    windows,
    write_text_losses,
)
from palimpsest.evaluation.own_text import beginning
from palimpsest.files import UserError
from tiny import VOCAB, tiny_llama, tiny_tokenizer


# -- reading -----------------------------------------------------------------------------------------------------------
def test_paragraphs_or_lines_of_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffOne\nline é. \r\n\r\n \t\n\nTwo.\n".encode())
    assert [text.text for text in read_texts(str(tmp_path / "a.txt"))] == ["One\nline é.", "Two."]
    (tmp_path / "b.txt").write_text("One\nTwo\n  Three\n")
    found = read_texts(str(tmp_path / "b.txt"))
    assert [text.text for text in found] == ["One", "Two", "Three"]
    assert len({text.document for text in found}) == 3
    assert [text.text for text in read_texts(str(tmp_path / "b.txt"), limit=2)] == ["One", "Two"]
    assert texts_version(found) != texts_version(found[:2])


def test_json_lines_and_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "One", "document": "a"}, {"text": " "}, {"text": "Two", "document": "a"}]
    rows.append({"text": "Three\u2028still", "document": None})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        found = read_texts(str(tmp_path / name))
        assert [(text.text, text.document) for text in found] == [
            ("One", "a"), ("Two", "a"), ("Three\u2028still", "#2"),
        ]  # fmt: skip


def test_a_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["One", "Two"]}), tmp_path / "it.parquet")
    asked: list[Any] = []

    def hub_files(*question: Any) -> tuple[list[str], None]:
        asked.append(question)
        return [str(tmp_path / "it.parquet")], None

    monkeypatch.setattr("palimpsest.data.texts.hub_files", hub_files)
    assert [text.text for text in read_texts("owner/name@main", "validation")] == ["One", "Two"]
    assert asked == [("owner/name", "main", "validation")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', r"a\.jsonl:2: 'text' is no text but 3"),
        ("a.jsonl", '{"text": "x"}\n{"x": 3}\n', r"a\.jsonl:2: 'text' is no text but None"),
        ("a.txt", "One text.\n", r"holds 1 texts of 1 documents, and an interval needs two"),
        ("a.txt", "", r"holds 0 texts"),
        ("a.txt", b"\xff\xfe\x00", r"is not UTF-8"),
        ("b/c/d.txt", None, r"d\.txt' does not exist; give a file of text"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, content: Any, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=said):
        read_texts(str(tmp_path / name))


# -- losses ------------------------------------------------------------------------------------------------------------
def texts(*words: str) -> list[Text]:
    return [Text(str(i), word, f"#{i}") for i, word in enumerate(words)]


def test_every_token_is_predicted_once() -> None:
    assert list(windows([1, 2, 3, 4, 5], [9], 2)) == [([9], [1, 2]), ([2], [3, 4]), ([4], [5])]
    assert list(windows([1, 2], [9], 2)) == [([9], [1, 2])]


def test_nats_per_token_and_byte_by_hand() -> None:
    uniform = tiny_llama(tied=False)
    with torch.no_grad():
        uniform.lm_head.weight.zero_()  # every token has the probability 1 / 300
    # The tokenizer has a token a byte: é takes two, the euro sign three.
    given = texts("é a", "€", "abc")
    losses = text_losses(uniform, tiny_tokenizer(), given, window=2)
    assert [(it.n_tokens, it.n_bytes, it.n_windows) for it in losses] == [(4, 4, 2), (3, 3, 2), (3, 3, 2)]
    assert [it.loss for it in losses] == pytest.approx([n * math.log(VOCAB) for n in (4, 3, 3)], rel=1e-6)
    record = summarise_text(losses, "m", "t", seed=0)
    assert record["per_byte"] == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert record["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
    assert (record["n_texts"], record["n_documents"], record["n_windows"], record["n_long"]) == (3, 3, 6, 3)


def test_against_the_model_s_own_logits_whatever_the_batch() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    given = texts("a much longer text of several windows", "b", "short")
    one, five = (text_losses(model, tokenizer, given, window=10, batch_size=size) for size in (1, 5))
    for text, a, b in zip(given, one, five, strict=True):
        ids = tokenizer(text.text, add_special_tokens=False)["input_ids"]
        expected = 0.0
        for start in range(0, len(ids), 10):
            row = [*(beginning(tokenizer) if start == 0 else [ids[start - 1]]), *ids[start : start + 10]]
            log_p = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            expected -= sum(float(log_p[i, id]) for i, id in enumerate(row[1:]))
        assert a.loss == pytest.approx(expected, rel=1e-5)
        assert b.loss == pytest.approx(expected, rel=1e-5)
    assert [it.n_windows for it in one] == [4, 1, 1]


def test_a_window_that_the_model_has_no_positions_for() -> None:
    with pytest.raises(UserError, match="2048 positions, too few for windows of 2048 tokens; give --window 2047"):
        text_losses(tiny_llama(), tiny_tokenizer(), texts("a", "b"), window=2048)


def loss(name: str, nats: float, n_tokens: int, n_bytes: int, document: str | None = None) -> TextLoss:
    return TextLoss(name, document or name, nats, n_tokens, n_bytes, 1)


def test_documents_are_drawn_as_wholes() -> None:
    parts = [loss("0", 1, 1, 1, "a"), loss("1", 9, 1, 1, "a"), loss("2", 6, 2, 2, "b")]
    record = summarise_text(parts, "m", "t", seed=0)
    assert (record["n_documents"], record["loss"]) == (2, 4.0)
    assert (record["loss_ci_low"], record["loss_ci_high"]) == (3.0, 5.0)  # document b alone, document a alone


def test_models_are_compared_on_the_same_documents(tmp_path: Path) -> None:
    base = [loss(f"{i}", 10 + i, 5, 10) for i in range(8)]
    same = list(base)
    worse = [loss(f"{i}", 12 + i + 0.01 * (i % 2), 5, 10) for i in range(8)]
    other_tokens = [loss(f"{i}", 12 + i, 7, 10) for i in range(8)]
    rows = general_text_comparisons(("b", base), {"same": same, "worse": worse, "other": other_tokens}, "wiki")
    assert [row["verdict"] for row in rows] == ["no difference shown", "worse", "worse"]
    assert rows[0]["left_out"] == "nothing separates them"
    assert rows[1]["difference"] == pytest.approx(0.2005)
    assert rows[1]["per_token_difference"] == pytest.approx(0.401)
    assert rows[2]["per_token_difference"] is None
    assert rows[2]["difference"] == pytest.approx(0.2)
    with pytest.raises(UserError, match="worse and b were measured on other texts"):
        general_text_comparisons(("b", base), {"worse": worse[:-1]}, "wiki")
    write_text_losses(tmp_path / "it.jsonl", worse)
    assert read_text_losses(tmp_path / "it.jsonl") == worse
