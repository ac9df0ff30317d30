"""palimpsest publish: what is in the folder, what is not, and what is sent."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError

from palimpsest.commands.publish import Options, run
from palimpsest.comparison.pairs import pair_runs
from palimpsest.export import publish as published
from palimpsest.export.publish import leaks, publish, push, write_parquet
from palimpsest.files import UserError, read_json, write_text
from report_fixture import make_run
from test_report_public import local_run

USER = "ada_the_user"


def test_the_folder_of_one_run(tmp_path: Path) -> None:
    source = make_run(tmp_path / "my run")
    out = publish([source], tmp_path / "out", pair_runs)
    assert {path.name for path in out.iterdir()} == {"README.md", "index.html", "my_run"}
    whole = read_json(source / "results.json")
    written = read_json(out / "my_run" / "results.json")
    assert {table: rows for table, rows in written.items() if table in whole} == whole
    assert not any(rows for table, rows in written.items() if table not in whole)
    for table, rows in whole.items():
        file = out / "my_run" / "tables" / f"{table}.parquet"
        assert file.exists() == bool(isinstance(rows, list) and rows)
        if file.exists():
            read = pq.read_table(file).to_pylist()
            assert [{k: v for k, v in row.items() if k in old} for row, old in zip(read, rows, strict=True)] == rows
    card = (out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert all((out / entry["data_files"]).is_file() for entry in front["configs"])
    assert len(front["configs"]) == len(list((out / "my_run" / "tables").iterdir()))
    page = (out / "index.html").read_text(encoding="utf-8")
    assert '<details class="sample"' not in page
    assert "<audio " not in page
    assert not [path for path in out.rglob("*") if path.suffix in (".jsonl", ".npz", ".safetensors", ".wav")]


def test_several_runs_have_a_page_each_that_the_first_links_to(tmp_path: Path) -> None:
    light = {"maps", "samples", "clustering", "delta", "mask_overlap"}
    runs = [make_run(tmp_path / name / "run", without=light) for name in ("a", "b")]
    out = publish(runs, tmp_path / "out", pair_runs, kind="space")
    page = (out / "index.html").read_text(encoding="utf-8")
    for name in ("run_1", "run_2"):
        assert f'href="{name}/report.html"' in page
        assert (out / name / "report.html").is_file()
    front = yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("static", "index.html")


def test_nothing_of_the_machine_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in recipe, provenance, data and errors, with samples too; what is put there afterwards is pointed at."""
    monkeypatch.setattr(getpass, "getuser", lambda: USER)
    out = publish([local_run(tmp_path / "my run")], tmp_path / "out", pair_runs, samples=True)
    assert '<details class="sample"' in (out / "index.html").read_text(encoding="utf-8")
    assert list(leaks(out)) == []
    for file in out.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for private in (b"lovelace", str(tmp_path).encode(), str(Path.home()).encode() + b"/"):
                assert private not in content, (file, private)
    write_text(out / "NOTE.md", f"See /home/ada/model, https://x.org/home/page and what {USER} said; data/train.jsonl.")
    assert [(str(leak.file), leak.what) for leak in leaks(out)] == [("NOTE.md", "/home/ada/model,"), ("NOTE.md", USER)]


def test_a_column_of_several_types_is_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{"point": 1e-4, "n": 1}, {"point": "q, v", "n": 2.5}, {"more": True}])
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == [
        {"point": "0.0001", "n": 1.0, "more": None},
        {"point": "q, v", "n": 2.5, "more": None},
        {"point": None, "n": None, "more": True},
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"what": ["run"]}, "Give a new folder"),
        ({"what": ["run"], "out": "full"}, "is there already"),
        ({"what": ["empty"], "out": "out"}, "is no run directory with results"),
        ({"what": ["run"], "out": "out", "push": True}, "--push needs a place"),
        ({"what": ["run"], "out": "out", "to": "here"}, "'here' is no place on the hub"),
        ({"what": ["model"], "out": "out", "to": "me/x"}, "is sent as it is"),
        ({"what": ["model"], "to": "me/x"}, "has no model card"),
    ],
)
def test_refusals_leave_nothing(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    make_run(tmp_path / "run")
    for folder in ("empty", "full", "model"):
        (tmp_path / folder).mkdir()
    write_text(tmp_path / "full" / "mine.txt", "mine")
    write_text(tmp_path / "model" / "config.json", "{}")
    paths = {key: tmp_path / options[key] for key in ("out",) if key in options}
    rest = {key: value for key, value in options.items() if key not in ("what", "out")}
    with pytest.raises(UserError, match=said):
        list(run(Options(what=[tmp_path / name for name in options["what"]], **paths, **rest)))
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


class Hub:
    """What is sent, instead of the hub."""

    def __init__(self, **_: Any) -> None:
        self.fails = False

    sent: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012

    def create_repo(self, place: str, **options: Any) -> None:
        self.sent.append((place, options))

    def upload_folder(self, **options: Any) -> Any:
        self.sent.append((options["repo_id"], options))
        return type("Sent", (), {"repo_url": f"https://hub/{options['repo_id']}"})


def test_it_is_sent_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "sent", [])
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    source = make_run(tmp_path / "run")

    def written(runs: list[Path], out: Path, *_: Any, **__: Any) -> Path:
        write_text(out / "README.md", "Runs.")
        return out

    monkeypatch.setattr(published, "publish", written)
    lines = list(run(Options([source], out=tmp_path / "dry", to="me/runs")))
    assert lines[-1] == "Would go to me/runs (dataset); give --push to send it."
    with pytest.raises(UserError, match="no token"):
        list(run(Options([source], out=tmp_path / "no-token", to="me/runs", push=True)))
    assert Hub.sent == []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    lines = list(run(Options([source], out=tmp_path / "space", to="me/runs", space=True, private=True, push=True)))
    assert lines[-1] == "Sent: https://hub/me/runs"
    created, uploaded = (options for _, options in Hub.sent)
    assert created == {"repo_type": "space", "private": True, "exist_ok": True, "space_sdk": "static"}
    assert uploaded["folder_path"] == tmp_path / "space"


def test_a_model_folder_is_sent_as_it_is_unless_it_names_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "sent", [])
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    write_text(tmp_path / "model" / "config.json", '{"_name_or_path": "/home/ada/llama"}')
    write_text(tmp_path / "model" / "README.md", "A model.")
    options = Options([tmp_path / "model"], to="me/model", push=True)
    with pytest.raises(UserError, match=r"config.json .* says '/home/ada/llama', which is of this machine"):
        list(run(options))
    assert Hub.sent == []
    write_text(tmp_path / "model" / "config.json", "{}")
    assert list(run(options))[-1] == "Sent: https://hub/me/model"
    assert Hub.sent[-1][1]["repo_type"] == "model"


def test_what_the_hub_refuses_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Hub, place: str, **_: Any) -> None:
        raise HfHubHTTPError("403 Forbidden", response=Mock(headers={}))

    monkeypatch.setattr(Hub, "create_repo", refuses)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"The hub did not take .* as me/x .*403 Forbidden"):
        push(tmp_path / "out", "me/x", "dataset", private=False)


def test_relative_paths_of_local_models_and_texts_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the recipe, in records and in the pages; a hub's name stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "llm").mkdir(parents=True)
    for name in ("a", "b"):
        source = make_run(tmp_path / name, without={"maps", "samples", "clustering", "delta", "mask_overlap"})
        study = {"name": name, "models": {"language_model": "acme/llm", "encoder": "openai/whisper-tiny.en"}}
        study["drift"] = {"general_text": {"text": "../acme/memo.txt"}}
        write_text(source / "study.yaml", yaml.safe_dump(study))
        results = read_json(source / "results.json")
        results["claims"][0]["note"] = "see /gpfs/acme/q.json"
        write_text(source / "results.json", json.dumps(results))
    out = publish([Path("a"), Path("b")], tmp_path / "out", pair_runs)
    for file in out.rglob("*"):
        assert not file.is_file() or b"acme/" not in file.read_bytes(), file
    written = (out / "a" / "study.yaml").read_text(encoding="utf-8")
    assert "…/memo.txt" in written
    assert "…/llm" in written
    assert "openai/whisper-tiny.en" in written


def test_the_name_of_the_user_inside_another_and_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    write_text(tmp_path / "log.Alice.1.json", "{}")
    write_text(tmp_path / "a.json", '{"method": "full_alice", "other": "malice", "at": "/nfs/team/x and S2T/T2T"}')
    assert sorted((str(it.file), it.what) for it in leaks(tmp_path)) == [
        ("a.json", "/nfs/team/x"),
        ("a.json", "alice"),
        ("log.Alice.1.json", "Alice"),
    ]


def test_names_that_are_not_looked_for_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr("platform.node", lambda: "vm")
    monkeypatch.setattr(Path, "home", lambda: Path("/root"))
    source = make_run(tmp_path / "run", without={"maps", "samples", "clustering", "delta"})
    said = list(run(Options([source], out=tmp_path / "out")))[-2:]
    assert said == [
        "  No path of this machine, and not alice, in the files' names, and in those of them that are text.",
        "  Not looked for, being too short or too common: root, vm.",
    ]


def test_a_user_without_a_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number."""
    monkeypatch.setattr(getpass, "getuser", Mock(side_effect=KeyError("getpwuid(): uid not found: 1234")))
    monkeypatch.setattr("platform.node", lambda: "tower")
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert published.names_here() == (["tower"], [])


def test_runs_get_a_folder_each(tmp_path: Path) -> None:
    assert published._folder_names(["a b", "a_b", "+++", "index.html"]) == ["a_b", "a_b-2", "run", "index.html-run"]


def test_of_a_model_folder_only_what_export_writes_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "sent", [])
    write_text(tmp_path / "model" / "config.json", "{}")
    write_text(tmp_path / "model" / ".env", "TOKEN=1")
    with pytest.raises(UserError, match=r"\.env is nothing that palimpsest export writes"):
        push(tmp_path / "model", "me/x", "model", private=False)
    (tmp_path / "model" / ".env").unlink()
    (tmp_path / "model" / "more.txt").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"more\.txt is nothing that"):
        push(tmp_path / "model", "me/x", "model", private=False)
    assert Hub.sent == []


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"schema": 1, "qa": "x", "claims": ["y"]}'])
def test_damaged_results_are_no_traceback(tmp_path: Path, content: bytes) -> None:
    source = make_run(tmp_path / "run", without={"maps", "samples"})
    (source / "results.json").write_bytes(content)
    out = publish([source], tmp_path / "out", pair_runs)
    assert "results.json" in (out / "index.html").read_text(encoding="utf-8")
