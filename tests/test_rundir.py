"""Steps: written once, skipped when nothing changed, run again when something did, never half there."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest import rundir
from palimpsest.files import (
    UserError,
    hash_value,
    read_json,
    read_jsonl,
    require_disk,
    write_json,
    write_jsonl,
    write_text,
)
from palimpsest.rundir import RunDir


def test_a_step_runs_once_and_again_when_its_inputs_change(tmp_path: Path) -> None:
    run, calls = RunDir(tmp_path / "run"), []

    def write(folder: Path) -> None:
        calls.append(folder)
        write_text(folder / "out.txt", str(len(calls)))

    first = run.step("a/b", {"x": 1}, write)
    again = run.step("a/b", {"x": 1}, write)
    assert (first.skipped, again.skipped, len(calls)) == (False, True, 1)
    assert first.fingerprint == again.fingerprint
    changed = run.step("a/b", {"x": 2}, write)
    assert not changed.skipped
    assert (run.path / "a/b/out.txt").read_text() == "2"
    assert not (run.path / ".working").exists()


def test_a_continued_study_began_when_its_first_step_did(tmp_path: Path) -> None:
    """Seconds: those of the steps that were there before; the others are in the continuation's own time."""
    run = RunDir(tmp_path)
    steps = [run.step(name, {}, lambda folder: None) for name in ("a", "b")]
    for name, began, took in (("a", "2026-01-02T00:00:00Z", 5.0), ("b", "2026-01-03T00:00:00Z", 7.0)):
        file = tmp_path / name / "step.json"
        assert read_json(file)["started"].endswith("Z")
        write_json(file, {**read_json(file), "started": began, "seconds": took})
    assert run.times(steps) == ("2026-01-02T00:00:00Z", 0.0)
    steps[0] = run.step("a", {}, pytest.fail)
    assert run.times(steps) == ("2026-01-02T00:00:00Z", 5.0)
    write_json(tmp_path / "provenance.json", {"started": "2026-01-01T00:00:00Z"})  # by an earlier recipe
    assert run.times(steps)[0] == "2026-01-01T00:00:00Z"
    write_text(tmp_path / "provenance.json", "{")
    assert run.times(steps)[0] == "2026-01-02T00:00:00Z"


def test_a_step_that_fails_leaves_no_output_and_continues_where_it_was(tmp_path: Path) -> None:
    run = RunDir(tmp_path)

    def fail(folder: Path) -> None:
        write_text(folder / "part.txt", "half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run.step("s", {"x": 1}, fail)
    assert not (tmp_path / "s").exists()
    seen = []
    run.step("s", {"x": 1}, lambda folder: seen.append((folder / "part.txt").read_text()))
    assert seen == ["half"]  # the same step with the same inputs finds what it had


def test_a_failed_step_with_other_inputs_starts_empty_and_what_was_done_stays_until_it_is_finished(
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path)
    for name in ("s", "s-t"):
        with pytest.raises(RuntimeError):
            run.step(name, {"x": 1}, _leave_and_fail)
    (left,) = run.begun_otherwise("s", {"x": 2})
    assert run.begun_otherwise("s", {"x": 1}) == []
    with pytest.raises(RuntimeError):
        run.step("s", {"x": 2}, _leave_and_fail)
    assert (left / "stale.txt").exists()  # for who undoes the change
    seen = []
    run.step("s", {"x": 3}, lambda folder: seen.extend(folder.iterdir()))
    assert seen == []
    assert run.begun_otherwise("s", {"x": 4}) == []
    assert [folder.name[:3] for folder in (tmp_path / ".working").iterdir()] == ["s-t"]  # another step's stays


def _leave_and_fail(folder: Path) -> None:
    write_text(folder / "stale.txt", "stale")
    raise RuntimeError


def test_the_old_output_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.step("s", {"x": 1}, lambda folder: write_text(folder / "out.txt", "old"))
    with pytest.raises(RuntimeError):
        run.step("s", {"x": 2}, _leave_and_fail)
    assert (tmp_path / "s" / "out.txt").read_text() == "old"


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.nan, math.inf, 1.5], "b": {"c": -math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.5], "b": {"c": None}}
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")


def test_lines_may_hold_any_character(tmp_path: Path) -> None:
    rows = [{"a": "one\u2028two\u0085three\nfour"}, {"a": ""}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "x.jsonl") == rows


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=5))
def test_a_hash_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert hash_value(value) == hash_value(dict(reversed(value.items())))


def test_a_full_disk_is_told_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB but .* GB free"):
        require_disk(tmp_path, 10**18, "The cache")


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used as a run directory"):
        RunDir(tmp_path / "file")


def test_what_a_finished_step_differs_in_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.outdated("s", {"x": 1}) == []
    run.step("s", {"x": 1, "y": (1, 2), "code": "a"}, lambda folder: None)
    assert run.outdated("s", {"x": 1, "y": [1, 2], "code": "a"}) == []
    assert run.outdated("s", {"x": 1, "y": [1, 2], "code": "b"}) == ["code"]
    assert run.outdated("s", {"x": 2, "z": 0, "y": [1, 2], "code": "a"}) == ["x", "z"]


def _same_time(file: Path, content: str) -> None:
    """Written over without another time of change, as a fault of the disk would."""
    stat = file.stat()
    file.write_text(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: (folder / "in/a.txt").write_text("fir"), "in/a.txt has 3 bytes where 5 were written"),
    "emptied": (lambda folder: (folder / "in/a.txt").write_text(""), "in/a.txt has 0 bytes where 5 were written"),
    "changed": (lambda folder: _same_time(folder / "in/a.txt", "other"), "in/a.txt was changed"),
    "removed": (lambda folder: (folder / "in/a.txt").unlink(), "in/a.txt is missing"),
    "list cut": (lambda folder: (folder / "files.json").write_text("{"), "files.json is damaged"),
    "list removed": (lambda folder: (folder / "files.json").unlink(), "files.json is damaged"),
    "record emptied": (lambda folder: (folder / "step.json").write_text(""), "step.json is damaged"),
    "record no text": (lambda folder: (folder / "step.json").write_bytes(b"\xff\xfe{"), "step.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_step_whose_files_are_not_what_it_wrote_is_named_and_made_again(tmp_path: Path, damage: str) -> None:
    def write(folder: Path) -> None:
        write_text(folder / "in" / "a.txt", "first")

    RunDir(tmp_path).step("a/b", {"x": 1}, write)
    assert RunDir(tmp_path).damage("a/b") is None
    assert RunDir(tmp_path).step("a/b", {"x": 1}, write).skipped
    change, sentence = DAMAGES[damage]
    change(tmp_path / "a/b")
    run = RunDir(tmp_path)  # a new start looks again
    assert run.damage("a/b") == sentence
    assert run.finished("a/b", {"x": 1}) is None
    assert not run.step("a/b", {"x": 1}, write).skipped
    assert (tmp_path / "a/b/in/a.txt").read_text() == "first"
    assert RunDir(tmp_path).damage("a/b") is None


def test_a_large_file_is_read_again_only_if_its_time_of_change_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "TRUSTED_BYTES", 4)
    RunDir(tmp_path).step("s", {}, lambda folder: write_text(folder / "a.txt", "first"))
    _same_time(tmp_path / "s/a.txt", "other")
    assert RunDir(tmp_path).damage("s") is None  # what this rule costs; docs/run-directory.md says it
    (tmp_path / "s/a.txt").write_text("third")
    assert RunDir(tmp_path).damage("s") == "a.txt was changed"


def test_a_copy_is_whole_and_a_step_of_an_earlier_version_is_taken_as_it_is(tmp_path: Path) -> None:
    RunDir(tmp_path / "a").step("s", {}, lambda folder: write_text(folder / "a.txt", "first"))
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # other times of change
    assert RunDir(tmp_path / "b").damage("s") is None
    record = read_json(tmp_path / "b/s/step.json")
    del record["files"]
    write_json(tmp_path / "b/s/step.json", record)
    (tmp_path / "b/s/files.json").unlink()
    assert RunDir(tmp_path / "b").finished("s", {}) is not None


def test_steps_of_an_earlier_recipe_are_set_aside_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in ("base/importance", "methods/lora/probe", "methods/lora/samples/x-text"):
        run.step(name, {}, lambda folder: write_text(folder / "a.txt", "first"))
    shutil.copytree(tmp_path / "base/importance", tmp_path / "mine")  # someone's copy is no step of that name
    assert run.set_aside(["base/importance"]) == ["methods/lora/probe", "methods/lora/samples/x-text"]
    assert (tmp_path / ".set-aside/methods/lora/probe/a.txt").read_text() == "first"
    assert not (tmp_path / "methods").exists()
    assert (tmp_path / "mine").exists()
    assert run.finished("base/importance", {}) is not None
    assert run.set_aside(["base/importance"]) == []
