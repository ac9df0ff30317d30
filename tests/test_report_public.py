"""What pages and cards say of the machine they were made on: nothing but last parts of paths."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path

import pytest
import yaml

from palimpsest.comparison.pairs import pair_runs
from palimpsest.files import read_json, write_json, write_text
from palimpsest.report import page as html
from palimpsest.report.inputs import read_inputs
from palimpsest.report.public import public, without_paths
from palimpsest.report.side_by_side import write_comparison
from palimpsest.rundir import run_labels
from report_fixture import make_run

ADA = "/home/ada lovelace"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("see /srv/data/b.json.", "see …/b.json."),
        ("Error opening '/home/ada lovelace/x/a b.wav': no", "Error opening '…/a b.wav': no"),
        ("facts:/data/ada/llama/ and ~/models/llm", "facts:…/llama and …/llm"),
        ("(/a/b/c.json:12)", "(…/c.json:12)"),
        ("https://huggingface.co/a/b, and/or 1/2 3/4", "https://huggingface.co/a/b, and/or 1/2 3/4"),
        ("meta-llama/Llama-3.2-1B, data/task-facts.jsonl", "meta-llama/Llama-3.2-1B, data/task-facts.jsonl"),
        ("…/llama is there, / is not", "…/llama is there, / is not"),
    ],
)
def test_paths_in_a_sentence(text: str, said: str) -> None:
    assert without_paths(text) == said


def test_known_folders_may_have_spaces() -> None:
    assert without_paths(f"{ADA}/my run holds no answers", Path(f"{ADA}/my run")) == "…/my run holds no answers"
    assert without_paths(f"{Path.home()}/x y/z holds", Path(Path.home())) == "…/x y/z holds"


def test_a_configuration_names_the_last_parts() -> None:
    value = {
        "models": {"language_model": f"{ADA}/my llm", "encoder": "openai/whisper-tiny.en"},
        "tasks": [f"llama_questions:{ADA}/q", f"{ADA}/a b.jsonl + ~/c.jsonl", 3, None],
    }
    assert public(value) == {
        "models": {"language_model": "…/my llm", "encoder": "openai/whisper-tiny.en"},
        "tasks": ["llama_questions:…/q", "…/a b.jsonl + …/c.jsonl", 3, None],
    }


def local_run(folder: Path) -> Path:
    """A run whose recipe, provenance, data and errors name folders of this machine."""
    run = make_run(folder)
    study = {"name": "x", "models": {"language_model": f"{ADA}/llm"}, "data": {"train": {"source": f"{ADA}/q r.jsonl"}}}
    study["evaluation"] = {"tasks": [{"name": "facts", "source": f"alpaca:{Path.home()}/tasks/facts"}]}
    write_text(run / "study.yaml", yaml.safe_dump(study))
    provenance = read_json(run / "provenance.json")
    provenance["models"]["language_model"]["name"] = f"{ADA}/llm"
    provenance["data"]["train"]["voices"] = [f"own:{ADA}/voice"]
    write_json(run / "provenance.json", provenance)
    manifest = run / "data" / "task-facts.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["audio"] = f"{ADA}/rec.wav"
    (run / "data" / "broken.wav").write_bytes(b"RIFF")
    rows[1] |= {"audio": "broken.wav", "voice": f"{ADA}/voice"}
    write_text(manifest, "".join(json.dumps(row) + "\n" for row in rows))
    (run / "maps" / "delta.npz").unlink()
    (run / "maps" / "delta.npz").mkdir()  # cannot be read: the system's sentence has the whole path
    return run


def test_a_report_has_no_folder_user_or_host(tmp_path: Path) -> None:
    page = html.render(read_inputs(local_run(tmp_path / "my run")))
    assert "maps/delta.npz cannot be read" in page
    for private in (str(tmp_path), "lovelace", "/home/", str(Path.home()), f"/{getpass.getuser()}/"):
        assert private not in page, private
    if len(platform.node()) > 3:
        assert platform.node() not in page
    for shown in ("…/llm", "…/q r.jsonl", "alpaca:…/facts", "own:…/voice", "rec.wav, outside the run directory"):
        assert shown in page
    assert "palimpsest report &#39;my run&#39;" in page


def test_a_comparison_has_no_folder_either(tmp_path: Path) -> None:
    runs = [local_run(tmp_path / name / "run") for name in ("ada", "bob")]
    for run in runs:
        (run / "base" / "samples" / "facts-text" / "samples.jsonl").unlink(missing_ok=True)
    page = write_comparison(runs, pair_runs(runs), tmp_path / "c.html").read_text(encoding="utf-8")
    for private in (str(tmp_path), "lovelace", "/home/", str(Path.home())):
        assert private not in page, private
    assert "run (2)" in page


def test_runs_of_one_name_are_numbered() -> None:
    assert run_labels([Path("a/run"), Path("b/x"), Path("b/run")]) == ["run (1)", "x", "run (2)"]
