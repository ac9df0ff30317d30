"""`palimpsest evaluate` on a tiny model: what it writes and prints, and what it refuses before loading anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from palimpsest.commands import ask, evaluate
from palimpsest.data.collate import Collator, batches
from palimpsest.data.sources import load_examples
from palimpsest.evaluation import judge
from palimpsest.evaluation.answers import models_in_folder, text_answerer
from palimpsest.evaluation.perplexity import perplexity, read_losses
from palimpsest.files import UserError, read_json, read_jsonl
from palimpsest.models.prompts import PromptStyle
from tiny import tiny_llama, tiny_speech_lm, tiny_tokenizer


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(folder of a tiny causal LM, manifest of ten questions)."""
    folder = tmp_path_factory.mktemp("setup")
    tiny_llama(eos_token_id=3).save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    rows = [
        {"id": f"q{i}", "question": f"What is {i}?", "answer": f"It is {i}.", "answers": [str(i)]} for i in range(10)
    ]
    (folder / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "llm"), str(folder / "numbers.jsonl")


def evaluated(setup: tuple[str, str], out: Path, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "split": "test",
        "modality": "text",
        "asr": "",
        "limit": None,
        "max_new_tokens": 4,
        "batch_size": 3,
        **changes,
    }
    lines: Iterator[str] = evaluate.run(evaluate.Options(*setup, out, **options))
    return list(lines)


def test_a_speech_llm_is_asked_in_text_with_its_own_system_turn(setup: tuple[str, str], tmp_path: Path) -> None:
    model, processor = tiny_speech_lm()
    processor.style = PromptStyle(system="Be brief.")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    language_model, tokenizer = model.language_model, processor.tokenizer
    examples = load_examples(setup[1], "test")
    wanted = [
        a.response for a in text_answerer(language_model, tokenizer, 4, PromptStyle("Be brief."))(examples, "text")
    ]
    assert wanted != [a.response for a in text_answerer(language_model, tokenizer, 4)(examples, "text")]

    evaluated((str(tmp_path / "model"), setup[1]), tmp_path / "out", perplexity=True)
    assert [row["response"] for row in read_jsonl(tmp_path / "out" / "samples-text.jsonl")] == wanted
    assert ask.answer(ask.Options(str(tmp_path / "model"), text=examples[0].question, max_new_tokens=4)) == wanted[0]
    by_hand = perplexity(language_model, batches(Collator(processor, "text"), examples, 3, "cpu"))
    found = read_json(tmp_path / "out" / "results-text.json")["perplexity"][0]["perplexity"]
    assert found == pytest.approx(by_hand.perplexity)


def test_accuracy_floors_and_perplexity(setup: tuple[str, str], tmp_path: Path) -> None:
    lines = evaluated(setup, tmp_path, perplexity=True)
    results = read_json(tmp_path / "results-text.json")
    assert set(results) == {"schema", "qa", "qa_floors", "seconds_per_question", "perplexity", "compute"}
    assert {(r["floor"], r["metric"]) for r in results["qa_floors"]} >= {("unrelated", "token_sequence_numbers")}
    primary = next(line for line in lines if line.startswith("token_sequence_numbers"))
    assert "unrelated" in primary
    assert "echoed 100.0 % [72.2, 100.0]" in primary, "every gold stands in its own question"
    (row,) = results["perplexity"]
    binding, losses = read_losses(tmp_path / "losses-text.jsonl")
    assert (binding["task"], binding["n"], list(losses.samples)) == ("numbers", 10, [f"q{i}" for i in range(10)])
    assert row["n_tokens"] == sum(sample.n_tokens for sample in losses.samples.values())
    assert row["perplexity"] == pytest.approx(math.exp(losses.total_loss / losses.n_tokens))
    assert any(line.startswith("perplexity ") for line in lines)
    assert any(line.startswith("answers that are ") for line in lines)


def test_answers_cut_at_the_limit_are_warned_of(setup: tuple[str, str], tmp_path: Path) -> None:
    lines = evaluated(setup, tmp_path / "cut")
    rows = read_jsonl(tmp_path / "cut" / "samples-text.jsonl")
    n_cut = sum(row["cut"] for row in rows)
    assert n_cut > 0, "a random model ends no answer within four tokens but by chance"
    assert {record["n_cut"] for record in read_json(tmp_path / "cut" / "results-text.json")["qa"]} == {n_cut}
    said = f"warning: {n_cut} of 10 answers ({10 * n_cut} %) were cut at 4 new tokens"
    assert [line.startswith(said) for line in lines if line.startswith("warning")] == [True]
    assert any(line.endswith(f"cut: {n_cut}") for line in lines)


def test_ask_says_that_its_answer_was_cut_and_refuses_a_model_that_is_not_finite(
    setup: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ask.Options(setup[0], text="What is 7?", max_new_tokens=2)
    assert list(ask.run(options)) == [ask.answer(options)]
    assert "note: the answer was cut at 2 new tokens; raise --max-new-tokens.\n" in capsys.readouterr().err
    model = tiny_llama(eos_token_id=3)
    model.model.embed_tokens.weight.data[9, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"weight model\.embed_tokens\.weight is not finite \(1 of 9,600"):
        ask.answer(ask.Options(str(tmp_path / "nan"), text="What is 7?"))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight"):
        evaluated((str(tmp_path / "nan"), setup[1]), tmp_path / "out")
    assert not (tmp_path / "out" / "results-text.json").exists()


def test_by_default_an_answer_has_64_tokens() -> None:
    from palimpsest.config import load_config

    assert evaluate.Options("m", "t", Path("o")).max_new_tokens == ask.Options().max_new_tokens == 64
    recipes = Path(evaluate.__file__).parents[1] / "recipes"
    assert all(load_config(file).evaluation.max_new_tokens >= 64 for file in recipes.glob("*.yaml"))


def test_a_judge_stands_beside_the_rules(
    setup: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(setup, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples-text.jsonl").read_text("utf-8").splitlines()]
    unclear, right = [row for row in rows if not row["empty"]][:2]

    def complete(_: judge.Judge, content: str) -> str:
        if unclear["question"] in content:
            return "hard to say"
        return "CORRECT" if right["question"] in content else "INCORRECT"

    monkeypatch.setattr(judge, "_complete", complete)
    monkeypatch.setattr(judge, "ATTEMPTS", 1)
    lines = evaluated(setup, tmp_path, judge_url="http://localhost/v1", judge_model="m")
    results = read_json(tmp_path / "results-text.json")
    row = next(row for row in results["qa"] if row["metric"] == "llm_judge")
    assert (row["n"], row["correct"], row["metric_version"]) == (10, 1, f"{judge.PROMPT_VERSION}:m")
    assert list(results["judge"]["failed"]) == [unclear["id"]]
    assert any(line.startswith(f"not judged, counted as wrong: 1 ({unclear['id']})") for line in lines)
    again = evaluated(setup, tmp_path, judge_url=None)
    assert not any("llm_judge" in line for line in again), "off unless asked for"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_url": "http://localhost/v1"}, "both --judge-url and --judge-model"),
        ({"judge_model": "m"}, "both --judge-url and --judge-model"),
        ({"judge_url": "localhost", "judge_model": "m"}, "no http address"),
        ({"modality": "cascade", "perplexity": True}, "cascade has no perplexity"),
    ],
)
def test_bad_options_are_refused_first(
    setup: tuple[str, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluated(setup, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "q0", "question": "Q?", "answers": []}, "empty"),
        ({"id": "q0", "question": "Q?", "answers": ["?"]}, "no gold answer with a letter or digit"),
        ({"id": "q1", "question": "Q?", "answer": "A"}, "'q1' is already used"),
    ],
)
def test_golds_and_ids(setup: tuple[str, str], tmp_path: Path, line: dict[str, Any], message: str) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"id": "q1", "question": "Q?", "answer": "A"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        evaluated((setup[0], str(manifest)), tmp_path / "out")


def test_samples_of_another_task_are_refused_and_kept(setup: tuple[str, str], tmp_path: Path) -> None:
    evaluated(setup, tmp_path)
    before = (tmp_path / "samples-text.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"holds another evaluation \(task_version .*; delete it or write elsewhere"):
        evaluated(setup, tmp_path, limit=5)
    assert (tmp_path / "samples-text.jsonl").read_bytes() == before


def test_a_folder_is_of_one_model(setup: tuple[str, str], tmp_path: Path) -> None:
    """Losses of the model before do not stay beside the answers of the next one."""
    out, other = tmp_path / "out", tmp_path / "other"
    evaluated(setup, out, perplexity=True)
    tiny_llama(1, eos_token_id=3).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    for file in out.glob("samples-text.*"):
        file.unlink()
    before = (out / "losses-text.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"losses-text\.json is of another model; give each"):
        evaluated((str(other), setup[1]), out)
    assert not (out / "samples-text.jsonl").exists()
    assert (out / "losses-text.jsonl").read_bytes() == before
    evaluated((str(other), setup[1]), out, perplexity=True)  # which writes them anew
    assert (out / "losses-text.jsonl").read_bytes() != before
    assert len(models_in_folder(out)) == 1


def test_a_cut_line_is_asked_again_and_said(
    setup: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [row["correct"] for row in (evaluated(setup, tmp_path), read_json(tmp_path / "results-text.json"))[1]["qa"]]
    file = tmp_path / "samples-text.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    capsys.readouterr()
    evaluated(setup, tmp_path)
    assert "was cut in the middle; 9 answers are kept" in capsys.readouterr().err
    assert [row["correct"] for row in read_json(tmp_path / "results-text.json")["qa"]] == whole


def test_a_recording_that_says_nothing_is_an_error_or_counts_as_wrong(tmp_path: Path) -> None:
    model, processor = tiny_speech_lm()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 8_000)
    recordings = {"a": noise, "b": 0 * noise, "c": noise[::-1], "d": np.stack([noise, -noise], 1)}
    for name, samples in recordings.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000)
    rows = [{"id": n, "question": "What?", "answer": "It.", "audio": f"{n}.wav"} for n in recordings]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setup = str(tmp_path / "model"), str(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match=r"t\.jsonl:2: silent audio .* count it as wrong with --faulty-audio wrong"):
        evaluated(setup, tmp_path / "out", modality="speech")
    assert not (tmp_path / "out" / "samples-speech.jsonl").exists()

    lines = evaluated(setup, tmp_path / "out", modality="speech", faulty_audio="wrong", perplexity=True)
    rows = read_jsonl(tmp_path / "out" / "samples-speech.jsonl")
    assert [row["failed"] for row in rows] == [False, True, False, True]
    assert [row["n_new_tokens"] for row in rows if row["failed"]] == [0, 0]  # not asked
    results = read_json(tmp_path / "out" / "results-speech.json")
    assert {(record["n"], record["n_failed"]) for record in results["qa"]} == {(4, 2)}
    assert results["perplexity"][0]["n_examples"] == 2
    assert sum(line.startswith(("failed: b: silent audio: its peak", "failed: d: silent audio")) for line in lines) == 2
    evaluated(setup, tmp_path / "text", faulty_audio="error")  # in text nothing is wrong
