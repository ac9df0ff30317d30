"""The exported text LLM in lm-evaluation-harness: the page's own local task, offline, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palimpsest.data.examples import Example
from palimpsest.evaluation.audio_llm import audio_llm_answerer
from palimpsest.evaluation.spoken import recording_answerer
from palimpsest.export.folders import export
from palimpsest.files import UserError
from palimpsest.models.loading import load_audio_llm, load_language_model, load_speech_lm
from palimpsest.models.prompts import PromptStyle
from tiny import tiny_llama, tiny_speech_lm, tiny_tokenizer
from tiny_audio import save_tiny_audio_llm

PAGE = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
OWN_TASK = PAGE.split("\n### A task of your own, offline\n")[1].split("\n#")[0]

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
    (lines,) = re.findall(r"```json\n(.*?)```", OWN_TASK, flags=re.S)
    (task,) = re.findall(r"```yaml\n(.*?)```", OWN_TASK, flags=re.S)
    (tmp_path / "questions.jsonl").write_text(lines)
    (tmp_path / "questions.yaml").write_text(task)
    (command,) = re.findall(r"^HF_HUB_OFFLINE=1 lm_eval (.*)$", OWN_TASK, flags=re.M)
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


# -- palimpsest's own model class --------------------------------------------------------------------------------------
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
GREEDY = "generation_kwargs: {until: [zz], max_gen_toks: 6, do_sample: false}"


@pytest.mark.parametrize("kind", ["speech_lm", "qwen2_audio"])
def test_the_model_class_in_text_and_in_speech(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of each sort, against answers and log-probabilities computed here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from palimpsest.evaluation import harness

    folder = tmp_path / "model"
    if kind == "speech_lm":
        for part in tiny_speech_lm(2):
            part.save_pretrained(folder)
    else:
        save_tiny_audio_llm(kind, folder)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(3):
        file = tmp_path / f"{i}.wav"
        soundfile.write(file, rng.normal(0, 0.1, 8_000 + 800 * i), 16_000)
        rows.append({"question": f"What is {i}?", "choices": ["a", "bc", "d"], "answer": i, "audio": str(file)})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choose = 'doc_to_choice: "{{choices}}"'
    for name, output, text, more in (
        ("choose", "multiple_choice", "Question: {{question}}\\nAnswer:", choose),
        ("write", "generate_until", "Question: {{question}}\\nAnswer:", GREEDY),
        ("hear", "generate_until", "<audio>What is said?", f"doc_to_audio: [audio]\n{GREEDY}"),
    ):
        task = TASK.format(name=name, rows=tmp_path / "rows.jsonl", kind=output, text=text, more=more)
        (tmp_path / f"{name}.yaml").write_text(task)
    found = simple_evaluate(
        model="palimpsest",
        model_args={"pretrained": str(folder)},
        tasks=["choose", "write", "hear"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )["samples"]

    plain, tokenizer = load_language_model(str(folder))
    for row, sample in zip(rows, found["choose"], strict=True):
        answers = [float(one[0]) for one in sample["filtered_resps"]]
        assert max(range(3), key=answers.__getitem__) == best_choice(plain, tokenizer, row["question"], row["choices"])
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 3, "pad_token_id": 0}
    for row, sample in zip(rows, found["write"], strict=True):
        ids = torch.tensor([tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]])
        written = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(written, skip_special_tokens=True)

    model, processor = (load_speech_lm if kind == "speech_lm" else load_audio_llm)(str(folder))
    examples = [Example(str(i), "", (), "", Path(row["audio"])) for i, row in enumerate(rows)]
    if kind == "speech_lm":
        processor.style = PromptStyle(speech_instruction="What is said?")
        answer = recording_answerer(model, processor, 6)
    else:
        answer = audio_llm_answerer(model, processor, 6, instruction="What is said?")
    wanted = [given.response for given in (*answer(examples[:2], "speech"), *answer(examples[2:], "speech"))]
    assert [sample["resps"][0][0] for sample in found["hear"]] == wanted
    assert len(set(wanted)) > 1

    asked = harness.PalimpsestLM(str(folder), batch_size=2)
    samples, rate = soundfile.read(rows[0]["audio"], dtype="float32")
    forms = [rows[0]["audio"], {"path": rows[0]["audio"], "bytes": Path(rows[0]["audio"]).read_bytes()}]
    forms += [{"path": rows[0]["audio"]}, {"array": samples, "sampling_rate": rate}]
    six = {"max_gen_toks": 6}
    requests = [request("What is said?", six, {"audio": [form]}) for form in forms]
    assert asked.generate_until(requests) == [wanted[0]] * 4
    cut = wanted[0][1:2]
    assert asked.generate_until([request("What is said?", {**six, "until": cut}, {"audio": forms[:1]})]) == [
        wanted[0][: wanted[0].find(cut)]
    ]
    for call, message in (
        (("What?", {"do_sample": True}, {"audio": forms[:1]}), "answered greedily"),
        (("What?", {}, {"audio": forms}), "has 4 recordings"),
        (("What?", {}, {"audio": [3]}), "gave a int, which is no recording"),
        (("<audio> A <audio> B", {}, {"audio": forms[:1]}), "leave out few-shot examples"),
    ):
        with pytest.raises(UserError, match=message):
            asked.generate_until([request(*call)])
    with pytest.raises(UserError, match="not measured"):
        asked.loglikelihood([request("What?", " It", {"audio": forms[:1]})])
    turn = {"role": "user", "content": "<audio>What is said?"}
    assert asked.apply_chat_template([turn]) == turn["content"]
    with pytest.raises(UserError, match="further turns"):
        asked.apply_chat_template([{"role": "system", "content": "Be brief."}, turn])


def test_a_model_that_takes_no_audio(tmp_path: Path) -> None:
    from palimpsest.evaluation.harness import PalimpsestLM

    tiny_llama(eos_token_id=3).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes no audio"):
        PalimpsestLM(str(tmp_path)).generate_until([request("What?", {}, {"audio": ["a.wav"]})])


def request(*arguments: object) -> SimpleNamespace:
    """What the class reads of the harness's own `Instance`."""
    return SimpleNamespace(args=arguments)
