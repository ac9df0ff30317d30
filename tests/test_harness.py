"""The exported text LLM in lm-evaluation-harness: the page's own local task, offline, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palimpsest.export.folders import export
from tiny import tiny_speech_lm

PAGE = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval; run `make harness`"),
]


def best_choice(model: torch.nn.Module, tokenizer: object, question: str, choices: list[str]) -> int:
    """The choice whose tokens have the highest summed log-probability after the prompt."""
    totals = []
    for choice in choices:
        start = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        ids = torch.tensor([start + tokenizer(f" {choice}")["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        totals.append(float(sum(logs[i - 1, ids[0, i]] for i in range(len(start), ids.shape[1]))))
    return max(range(len(choices)), key=totals.__getitem__)


def test_the_exported_llm_runs_in_the_harness(tmp_path: Path) -> None:
    model, processor = tiny_speech_lm(2)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", text_llm=tmp_path / "llm")
    (lines,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.S)
    (task,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
    (tmp_path / "questions.jsonl").write_text(lines)
    (tmp_path / "questions.yaml").write_text(task)
    (command,) = re.findall(r"^HF_HUB_OFFLINE=1 lm_eval (.*)$", PAGE, flags=re.M)
    arguments = command.replace("pretrained=lora-text", f"pretrained={tmp_path / 'llm'}").split()
    result = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments, "--output_path", "out", "--log_samples"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    questions = [json.loads(line) for line in lines.splitlines()]
    expected = [best_choice(plain, tokenizer, row["question"], row["choices"]) for row in questions]
    (log,) = (tmp_path / "out").rglob("samples_my_questions_*.jsonl")
    samples = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    found = [
        max(range(4), key=[float(answer[0]) for answer in sample["filtered_resps"]].__getitem__) for sample in samples
    ]
    assert found == expected
    (results,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["my_questions"]["acc,none"]
    right = [choice == row["answer"] for choice, row in zip(expected, questions, strict=True)]
    assert accuracy == pytest.approx(sum(right) / len(right))
