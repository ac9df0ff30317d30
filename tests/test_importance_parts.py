"""Importance of layers, old rows and new rows apart, on spoken questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.analysis.parts import ROWS, estimate_parts, in_layers_alone, part_records
from palimpsest.commands import deactivate, importance
from palimpsest.data.collate import batches
from palimpsest.data.examples import write_manifest
from palimpsest.files import UserError
from palimpsest.importance.scores import Scores
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.gate import close_gate
from palimpsest.models.speech_lm import SPEECH_POSITION
from palimpsest.training.methods import Method, add_lora
from spoken import spoken_tokens, token_speech_lm
from test_speech_tokens import IDS, K, prompts, token_lm
from tiny import VOCAB, save_tiny_models, tiny_llama, tiny_speech_lm


def test_parts_are_those_of_a_vocabulary_that_grew() -> None:
    """Against transformers' own resized embedding, |θ · g| / N by hand; no head is tied to the rows."""
    ours = token_lm(collapse=False, tied=False)
    batch = {**prompts(IDS[:1]), "labels": torch.full((1, 11), -100)}
    batch["labels"][0, 9:] = torch.tensor([61, 62])
    rows = {row["part"]: row for row in part_records("it", estimate_parts(ours, [batch], ("signed_sum",)))}

    grown = tiny_llama(tied=False, eos_token_id=3)
    grown.resize_token_embeddings(VOCAB + K, mean_resizing=False)
    embedding = grown.get_input_embeddings().weight
    embedding.data[VOCAB:] = ours.adaptor.get_parameter("rows.weight").detach()
    logits = grown(torch.tensor([[1, 40, *[VOCAB + token for token in IDS[0]], 60, 61, 62]])).logits[0, 8:10, :VOCAB]
    torch.nn.functional.cross_entropy(logits, torch.tensor([61, 62]), reduction="sum").backward()
    score = (embedding.detach() * embedding.grad).abs() / 2  # two supervised tokens
    layers = [(it.detach() * it.grad).abs().sum() / 2 for it in scored_parameters(grown).values()]
    by_hand = {"layers": sum(layers), "old_rows": score[:VOCAB].sum(), "new_rows": score[VOCAB:].sum()}
    whole = sum(by_hand.values())
    assert list(rows) == list(by_hand)
    for part, total in by_hand.items():
        assert rows[part]["total"] == pytest.approx(float(total), rel=1e-3)
        assert rows[part]["share"] == pytest.approx(float(total / whole), rel=1e-3)
        assert rows[part]["mean"] == pytest.approx(rows[part]["total"] / rows[part]["n_parameters"])
    assert (rows["new_rows"]["n_rows"], rows["new_rows"]["n_reached"]) == (K, len(set(IDS[0])))
    assert (rows["old_rows"]["n_rows"], rows["old_rows"]["n_reached"]) == (VOCAB, len({1, 40, 60, 61}))  # 62 ends it
    assert rows["old_rows"]["n_parameters"] == VOCAB * 32
    assert rows["layers"]["n_rows"] is None


def made(n_batches: int) -> Scores:
    """Sums 6, 3 and 1 of layers, old rows and new rows, in each of `n_batches` batches the same."""
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.tensor([[1.0, 2.0, 3.0]]),
        "model.embed_tokens.weight": torch.tensor([[1.0, 1.0], [0.0, 1.0]]),
        ROWS: torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]]),
    }
    parameters = [{"name": name, "shape": list(it.shape), "dtype": "float32"} for name, it in tensors.items()]
    metadata = {"parameters": parameters, "reductions": {"per_batch_abs": ""}}
    totals = np.array([[6.0, 3.0, 1.0]] * n_batches)
    return Scores(metadata, {"per_batch_abs": tensors}, totals, np.ones(n_batches, dtype=np.int64))


def test_records_by_hand() -> None:
    rows = part_records("it", made(10))
    assert [(row["part"], row["total"], row["share"], row["mean"]) for row in rows] == [
        ("layers", 6.0, 0.6, 2.0), ("old_rows", 3.0, 0.3, 0.75), ("new_rows", 1.0, 0.1, pytest.approx(1 / 6)),
    ]  # fmt: skip
    assert [(row["n_rows"], row["n_reached"]) for row in rows] == [(None, None), (2, 2), (3, 2)]
    for row in rows:  # every batch says the same
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((row["share"], row["share"]))
    assert {row["ci_low"] for row in part_records("it", made(9))} == {None}  # too few batches
    uneven = made(10)
    uneven.batch_totals[0] = [10.0, 0.0, 0.0]
    low, high = part_records("it", uneven)[2]["ci_low"], part_records("it", uneven)[2]["ci_high"]
    assert low is not None
    assert high is not None
    assert low < 0.09 < high == pytest.approx(0.1)
    assert in_layers_alone(uneven, False).names == uneven.names[1:]
    assert in_layers_alone(uneven).batch_totals[:2].tolist() == [[10.0], [6.0]]


def test_an_adaptor_is_a_part_too_and_a_gate_is_open_for_speech() -> None:
    model, _ = tiny_speech_lm()
    add_lora(model, Method("lora", 1e-3, rank=2, gate="speech"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([[1, 40, SPEECH_POSITION, SPEECH_POSITION, 60, 61, 62]]),
        "labels": torch.tensor([[-100] * 5 + [61, 62]]),
        "encoder_frames": torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(0)),
        "frame_counts": torch.tensor([10]),
    }
    always_on = part_records("it", estimate_parts(model, [batch], ("signed_sum",)))
    assert [row["part"] for row in always_on] == ["layers", "old_rows", "adaptor"]
    close_gate(model)
    assert part_records("it", estimate_parts(model, [batch], ("signed_sum",))) == always_on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ of speech tokens, the last of which is never said; questions.jsonl with recordings."""
    folder = tmp_path_factory.mktemp("spoken")
    examples, collator, tokenizer = spoken_tokens(folder)
    token_speech_lm(tokenizer).save_pretrained(folder / "model")
    collator.processor.save_pretrained(folder / "model")
    write_manifest(folder / "questions.jsonl", examples)
    return folder


def test_the_command_gives_the_parts_as_record_and_line(folder: Path, tmp_path: Path) -> None:
    model, data, out = str(folder / "model"), str(folder / "questions.jsonl"), tmp_path / "scores"
    options = importance.Options(model, data, out, modality="speech", batch_size=4, device="cpu")
    lines = list(importance.run(options))
    rows = json.loads((out / "parts.json").read_text())
    assert {row["reduction"] for row in rows} == {"signed_sum", "per_batch_abs"}
    signed = {row["part"]: row for row in rows if row["reduction"] == "signed_sum"}
    assert sum(row["share"] for row in signed.values()) == pytest.approx(1)
    assert signed["new_rows"]["n_rows"] - signed["new_rows"]["n_reached"] == 1  # the token that is never said
    (line,) = [line for line in lines if line.startswith("  new rows ")]
    assert f"{100 * signed['new_rows']['share']:6.2f} %" in line
    assert "5 of 6 rows reached" in line

    (tmp_path / "again").mkdir()
    examples, collator, tokenizer = spoken_tokens(tmp_path / "again")
    again = batches(collator, examples, 4, by_length=False)
    for row in part_records("it", estimate_parts(token_speech_lm(tokenizer), again, ("signed_sum",))):
        assert signed[row["part"]]["total"] == pytest.approx(row["total"], rel=1e-2)

    assert all(name.startswith("model.layers.") for name in Scores.open(out).names)
    assert set(Scores.open(out / "outside_layers").names) == {"model.embed_tokens.weight", ROWS}
    off = deactivate.Options(model, out, data, tmp_path / "off", split="train", random_seeds=0, device="cpu")
    assert list(deactivate.run(off))  # the scores of the layers are those of any command


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"reductions": "fisher,typo"}, "'typo' is not a reduction"), ({"offload": "FILE"}, "give cpu or a folder")],
)
def test_bad_options_are_refused_before_anything_is_spoken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], sentence: str
) -> None:
    data = folder / "questions.jsonl"
    monkeypatch.setattr("palimpsest.data.sources.load_examples", lambda *_args, **_options: pytest.fail("too late"))
    options: Any = {key: str(data) if value == "FILE" else value for key, value in wrong.items()}
    with pytest.raises(UserError, match=sentence):
        list(importance.run(importance.Options("m", str(data), tmp_path, modality="speech", **options)))


def test_what_takes_no_recordings_is_refused(folder: Path, tmp_path: Path) -> None:
    save_tiny_models(tmp_path)
    options = importance.Options(
        str(tmp_path / "llm"), str(folder / "questions.jsonl"), tmp_path / "scores", modality="speech"
    )
    with pytest.raises(UserError, match="takes no audio; score it with --modality text"):
        list(importance.run(options))
