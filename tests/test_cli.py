"""The command line: help with an example everywhere; bad input ends with one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from forked import forked
from palimpsest.cli import app
from palimpsest.commands import ask
from palimpsest.evaluation.answers import Answer
from palimpsest.progress import printable
from tiny import tiny_speech_lm


def commands(application: typer.Typer, before: str = "") -> list[str]:
    """All commands below `application` as they are typed, those of sub-applications as "GROUP NAME"."""
    own = [before + (c.name or c.callback.__name__) for c in application.registered_commands if c.callback]
    groups = [(group.typer_instance, f"{before}{group.name} ") for group in application.registered_groups]
    return sorted([*own, *(name for instance, prefix in groups if instance for name in commands(instance, prefix))])


COMMANDS = commands(app)


IMPORTS = """
import scipy.stats, soundfile, torch.distributed.tensor, transformers.trainer
from transformers import AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM, WhisperModel
"""
COMMAND = """
import runpy, sys
sys.argv = ["palimpsest", *{arguments!r}]
runpy.run_module("palimpsest.cli", run_name="__main__", alter_sys=True)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`palimpsest …` in a process of its own; that its imports are all there is seen in test_readme.py."""
    return forked(IMPORTS, COMMAND.format(arguments=arguments))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"Example: palimpsest {command} " in re.sub(r"\s+", " ", result.output)


@pytest.mark.parametrize("group", ["", "data"])
def test_beside_each_command_stands_its_whole_first_sentence(group: str) -> None:
    result = CliRunner().invoke(app, [*group.split(), "--help"])
    listed = re.split(r"\n  (?=\S)", result.output.split("Commands:")[1].rstrip())[1:]
    said = {name: " ".join(about.split()) for name, _, about in (entry.partition(" ") for entry in listed)}
    assert {name.removeprefix(f"{group} ") for name in COMMANDS if (" " in name) == bool(group)} <= set(said)
    assert [
        it for it in said.values() if it.endswith("...") or it[-1] not in ".?" or it.count("(") != it.count(")")
    ] == []
    if not group:
        ranks = "Ablate a stratified sample of weights exactly (Eq. 1) and say how well each reduction ranks them."
        assert said["validate-importance"] == ranks
        assert said["probe"] == "Does a model find right continuations more likely than wrong ones?"


@pytest.fixture(scope="module")
def speech_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech_lm")
    model, processor = tiny_speech_lm()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def refused(result: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exit code 2 and one sentence on stderr, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("palimpsest: ")]
    assert len(lines) == 1, result.stderr
    for words in said:
        assert words in lines[0]


def test_ask_in_speech_and_in_text(speech_lm: Path, tmp_path: Path) -> None:
    audio = tmp_path / "q.wav"
    # another rate and two channels, as a phone would record
    soundfile.write(audio, np.random.default_rng(0).normal(0, 0.1, (44_100, 2)), 44_100)
    spoken = run("ask", "--model", str(speech_lm), "--audio", str(audio), "--max-new-tokens", "4")
    assert spoken.returncode == 0, spoken.stderr
    written = run("ask", "--model", str(speech_lm), "--text", "hello?", "--max-new-tokens", "4")
    assert written.returncode == 0, written.stderr


def test_bad_questions(speech_lm: Path, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("this is no audio")
    refused(run("ask", "--model", str(speech_lm), "--audio", str(tmp_path / "none.wav")), "none.wav")
    refused(run("ask", "--model", str(speech_lm), "--audio", str(tmp_path / "text.wav")), "text.wav")
    refused(run("ask", "--model", str(speech_lm)), "--audio FILE or with --text QUESTION")
    refused(run("ask", "--model", str(speech_lm), "--text", " "), "empty")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "JSON"),
        (json.dumps({"id": "a", "question": "Q?", "answer": " "}), "answer"),
        (json.dumps({"id": "a", "question": "Q?", "answer": "A", "audio": "gone.wav"}), "gone.wav"),
        (json.dumps({"id": "a", "question": "Q?", "answer": "A", "audio": "broken.wav"}), "broken.wav"),
    ],
)
def test_a_bad_manifest_names_file_and_line_and_writes_nothing(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    manifest = tmp_path / "data.jsonl"
    manifest.write_text(json.dumps({"id": "ok", "question": "Q?", "answer": "A"}) + "\n" + line + "\n")
    out = tmp_path / "out"
    result = run("evaluate", "--model", "embedded:smollm2-135m-instruct", "--task", str(manifest), "--out", str(out))
    refused(result, "data.jsonl:2", said)
    assert not out.exists()


def test_bad_models_and_recipes(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    out = str(tmp_path / "out")
    refused(run("importance", "--model", str(tmp_path / "model"), "--data", "facts", "--out", out), "no weights")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("nam: x\n")
    refused(run("study", str(recipe), "--out", out), "no key 'nam'; the nearest known key is 'name'")
    refused(run("report", str(tmp_path / "none")), "not a run directory")
    assert not (tmp_path / "out").exists()


def test_a_console_of_another_encoding_gets_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = '{"id": "%s", "question": "a?", "answer": "3", "audio": "%s"}\n'
    (tmp_path / "t.jsonl").write_text(row.replace(', "audio": "%s"', "") % "good" + row % ("1 → 你好", "none.wav"))
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    result = subprocess.run(
        [sys.executable, "-m", "palimpsest.cli", "data", "inspect", str(tmp_path / "t.jsonl")], capture_output=True
    )
    assert result.returncode == 0, result.stderr
    assert rb"1 \u2192 \u4f60\u597d: " in result.stdout


HOSTILE = "Paris\x1b]0;title\x07\x1b[2J\r\x9b31m \u202edrowssap\ud800\tend\nof it"
SHOWN = "Paris\\x1b]0;title\\x07\\x1b[2J\\r\\x9b31m \\u202edrowssap\\ud800\tend\nof it"


def test_a_terminal_does_not_obey_what_a_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "ask", lambda options: Answer(HOSTILE, 9))
    result = CliRunner().invoke(app, ["ask", "--text", "Capital?"], color=True)
    assert result.output == SHOWN + "\n"


def test_nor_what_an_error_quotes() -> None:
    result = run("ask", "--text", "Capital?", "--model", "no\x1b[2Jsuch")
    assert result.returncode == 2
    assert "no\\x1b[2Jsuch" in result.stderr
    assert "\x1b" not in result.stdout + result.stderr


@given(st.text())
def test_what_is_printed_holds_no_control_character_and_is_otherwise_the_text(text: str) -> None:
    shown = printable(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs") or c in "\n\t" for c in shown)
    assert printable(shown) == shown
    if all(unicodedata.category(c) not in ("Cc", "Cs", "Cf") for c in text):
        assert shown == text
