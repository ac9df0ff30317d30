"""The README's commands run as written (the demo and the study: in the slow tests); its links: test_docs.py."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.S)
LONG = ("make demo", "palimpsest study", "palimpsest report")
AFTER_THE_DEMO = ("--audio question.wav", "palimpsest export")


def in_temporary_folder(command: str, folder: Path) -> list[str]:
    """The README's `runs/…` folders go to `folder`; `palimpsest` is the one under test."""
    words = [str(folder / word) if word.startswith("runs/") else word for word in shlex.split(command)]
    assert words[0] == "palimpsest"
    return [sys.executable, "-m", "palimpsest.cli", *words[1:]]


def test_the_commands_in_order(tmp_path: Path) -> None:
    short = [c for c in COMMANDS if not c.startswith(LONG) and not any(part in c for part in AFTER_THE_DEMO)]
    assert len(short) >= 4
    for command in short:
        result = subprocess.run(in_temporary_folder(command, tmp_path), cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        if "capital of France" in command:
            assert "Paris" in result.stdout


@pytest.mark.slow
def test_the_study_the_report_and_a_spoken_question(tmp_path: Path) -> None:
    import soundfile
    import soxr
    from hibari import Hibari

    commands = [c for c in COMMANDS if c.startswith(("palimpsest study", "palimpsest report"))]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(in_temporary_folder(command, tmp_path), cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "runs/quick/report.html").stat().st_size < 15e6
    audio = tmp_path / "question.wav"
    soundfile.write(audio, soxr.resample(Hibari()("What is the capital of France?", seed=0), 24_000, 16_000), 16_000)
    asked = [c for c in COMMANDS if "--audio question.wav" in c]
    assert len(asked) == 2  # the speech LLM that comes with palimpsest, and one that the study trained
    for ask in asked:
        words = in_temporary_folder(ask.replace("runs/demo", "runs/quick"), tmp_path)
        words[words.index("question.wav")] = str(audio)
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout.strip()
    (export,) = [c.replace("runs/demo", "runs/quick") for c in COMMANDS if c.startswith("palimpsest export")]
    subprocess.run(in_temporary_folder(export, tmp_path), cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "runs/lora-text/model.safetensors").exists()
    assert (tmp_path / "runs/lora-speech/README.md").exists()


def test_the_script_with_the_callback_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import palimpsest
    from tiny import tiny_llama, tiny_tokenizer

    monkeypatch.setattr(palimpsest, "load_language_model", lambda name: (tiny_llama(), tiny_tokenizer()))
    monkeypatch.chdir(tmp_path)
    fewer = PYTHON[0].replace("max_steps=200", "max_steps=2").replace("every=100", "every=2")
    names = {"texts": [f"Text {i}." for i in range(4)]}
    exec(fewer, names)
    watching: Any = names["watching"]
    assert [measured.step for measured in watching.history] == [0, 2]
    assert watching.history[-1].logged()["retention_kl_plain"] > 0


def test_the_python_example_runs() -> None:
    import torch

    from tiny import tiny_llama

    example = PYTHON[1]
    ids = torch.randint(5, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    names = {"model": tiny_llama(), "batches": batches}
    exec(example, names)
    optimizer = names["optimizer"]
    assert sorted({round(group["scale"], 3) for group in optimizer.param_groups}) == [0.6, 1.0]
