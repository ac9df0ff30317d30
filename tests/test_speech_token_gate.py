"""scripts/speech_token_gate.py: the error rate by hand, and what a second call does not do again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from palimpsest.models.speech_lm import SpeechAdaptor
from script_files import load_script
from tiny import save_tiny_models

SCRIPT = Path(__file__).parent.parent / "scripts/speech_token_gate.py"


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    return load_script("speech_token_gate")


@pytest.mark.parametrize(
    ("wanted", "found", "edits"),
    [([1, 2, 3], [1, 2, 3], 0), ([1, 2, 3], [], 3), ([], [5], 1), ([1, 2, 3], [2, 3], 1), ([1, 2, 3], [3, 1, 2], 2)],
)
def test_edit_distance(gate: ModuleType, wanted: list[int], found: list[int], edits: int) -> None:
    assert gate.edit_distance(wanted, found) == edits


def test_a_network_that_adds_nothing_and_never_sees_padding(gate: ModuleType) -> None:
    torch.manual_seed(0)
    adaptor = SpeechAdaptor(3, 8, 4, stack_factor=2)
    around = gate.InContext(adaptor, 4, 5)
    short, long = torch.randn(4, 3), torch.randn(12, 3)
    padded = torch.nn.utils.rnn.pad_sequence([short, long], batch_first=True)
    assert torch.equal(around(padded), adaptor(padded))
    torch.nn.init.normal_(around.out.weight)
    together = around(padded)
    assert torch.allclose(together[0, :2], around(short[None])[0], atol=1e-6)
    assert torch.allclose(together[1], around(long[None])[0], atol=1e-6)
    assert not torch.allclose(together[1], adaptor(padded)[1])


def test_every_reader_is_measured_once(
    gate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_models(tmp_path)
    rng = np.random.default_rng(0)
    for name, n in (("train", 12), ("test", 3)):
        rows = []
        for i in range(n):
            soundfile.write(tmp_path / f"{name}{i}.wav", rng.normal(0, 0.1, 16_000), 16_000)
            rows.append({"id": f"{name}{i}", "question": f"{i}?", "answer": "a", "audio": f"{name}{i}.wav"})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "gate"
    command = ["gate", "--train", str(tmp_path / "train.jsonl"), "--test", str(tmp_path / "test.jsonl")]
    command += ["--out", str(out), "--language-model", str(tmp_path / "llm"), "--encoder", str(tmp_path / "whisper")]
    command += ["--k", "4", "6", "--steps", "3", "--batch-size", "6", "--context", "--start", "adaptor"]
    monkeypatch.setattr(sys, "argv", [*command, "--readers", "frames", "tokens"])
    gate.main()
    first = json.loads((out / "gate.json").read_text())
    assert list(first) == [f"{n}{c}" for n in ("frames", "tokens-4", "tokens-6") for c in ("", "-context")]
    monkeypatch.setattr(sys, "argv", command)
    gate.main()
    names = [f"{n}{c}" for n in ("frames", "centroids-4", "tokens-4", "centroids-6", "tokens-6")
             for c in ("", "-context")]  # fmt: skip
    results = json.loads((out / "gate.json").read_text())
    assert list(results) == names
    assert {name: results[name] for name in first} == first  # made once
    monkeypatch.setattr(sys, "argv", [*command, "--readers", "tokens"])
    with pytest.raises(SystemExit):
        gate.main()
    assert "name frames in --readers" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", command)
    for name, result in results.items():
        assert (result["n"], result["n_train"]) == (3, 9), name  # 3 steps of 6: twice 9 of the 12
        assert result["interval"][0] <= result["token_error_rate"] <= result["interval"][1], name
        assert result["inputs"]["steps"] == 3
    assert results["tokens-6"]["n_parameters"] == 6 * 32  # rows and nothing else
    written = {name: (out / name / "result.json").stat().st_mtime_ns for name in names}
    assert (out / "gate.md").read_text().count("\n| ") == len(names)
    (out / "tokens-4/result.json").unlink()
    capsys.readouterr()
    gate.main()
    after = {name: (out / name / "result.json").stat().st_mtime_ns for name in names}
    assert {name for name in names if after[name] != written[name]} == {"tokens-4"}
    assert json.loads((out / "gate.json").read_text())["tokens-4"]["read"] == results["tokens-4"]["read"]
