"""Files appear whole or not at all; lines that grow survive a kill at any byte; tables read back as they were."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palimpsest import files
from palimpsest.files import (
    UserError,
    append_jsonl,
    drop_cut_line,
    locked,
    read_json,
    read_jsonl,
    read_lines,
    remove_left_over,
    rename_folder,
    replacing,
    system_failure,
    without_folders,
    working_folder,
    write_tables,
)

ROWS = [{"id": "a", "text": "one\u2028two\u0085three\nfour"}, {"id": "b", "text": ""}, {"id": "ä", "text": '"{'}]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


def test_what_is_written_replaces_the_old_when_all_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.bin"
    with replacing(path) as temporary:
        temporary.write_bytes(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half of the sec")
            raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["file.bin"]  # noqa: PTH208


def test_lines_continue_after_a_kill_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, ROWS[:2])
    whole_lines = path.stat().st_size
    assert append_jsonl(path, ROWS[2:]) == path.stat().st_size
    content = path.read_bytes()
    for size in range(whole_lines, len(content) + 1):
        path.write_bytes(content[:size])
        complete = 3 if size == len(content) else 2
        assert [row for _, row in read_lines(path, "delete it")] == ROWS[:complete]
        assert drop_cut_line(path) == (size not in (whole_lines, len(content)))
        append_jsonl(path, ROWS[complete:])
        assert path.read_bytes() == content
    assert read_jsonl(path) == ROWS
    assert read_lines(tmp_path / "none.jsonl", "delete it") == []
    assert not drop_cut_line(tmp_path / "none.jsonl")


def test_a_damaged_line_is_named_and_of_a_finished_file_a_cut_one_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \xff}\n{"a": 3}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2 is not JSON; delete it\."):
        read_lines(path, "delete it")
    path.write_bytes(b'{"a": 1}\n{"a"')
    assert len(read_lines(path, "delete it")) == 1
    with pytest.raises(UserError, match=r"rows\.jsonl:2 is not JSON"):
        read_lines(path, "delete it", finished=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(min_size=1), SCALARS | st.lists(st.dictionaries(st.text(max_size=3), SCALARS, max_size=3), max_size=4)
    )
)
def test_tables_read_back_with_a_record_a_line(tmp_path: Path, tables: dict[str, Any]) -> None:
    path = tmp_path / "results.json"
    write_tables(path, tables)
    assert read_json(path) == tables
    n_records = sum(len(table) for table in tables.values() if isinstance(table, list))
    lines = path.read_text(encoding="utf-8").split("\n")
    n_of_tables = sum(2 if isinstance(table, list) and table else 1 for table in tables.values())
    assert len(lines) == n_records + max(1, n_of_tables) + 3  # the brackets, and nothing after the last line feed
    path.write_text(json.dumps(tables), encoding="utf-8")  # the form of earlier versions is the same value
    assert read_json(path) == tables


HOLD = """
import sys
from pathlib import Path
from palimpsest.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_with_who_holds_the_folder_and_a_kill_gives_it_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"is in use by another palimpsest \(process {holder.pid} on .*, since"):
            locked(folder).__enter__()
        holder.kill()
    assert (folder / ".lock").exists()  # what a kill leaves keeps nobody out
    with locked(folder):
        (folder / "result").write_text("")
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_folder_is_locked_once_within_a_process_and_goes_where_nothing_came_of_it(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(UserError, match="by this process already"):
        locked(tmp_path / "run").__enter__()
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()  # an empty folder of the user's stays


def test_what_is_no_folder_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot be written to \(.*\); give another folder with --out"):
            locked(path).__enter__()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "", "runs/a.json"), "runs/a.json cannot be written (No space left on device); make"),
        (OSError(errno.EFBIG, ""), "A file cannot be written (File too large); make room"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "A file cannot be written (No space left"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 11 vs 10"),
            "A file cannot be written",
        ),
        (OSError(errno.ENAMETOOLONG, "", "xx"), "xx cannot be used (File name too long); correct the name"),
        (OSError(errno.ENOENT, "", "x"), None),
        (ValueError("no"), None),
    ],
)
def test_an_error_of_the_system_is_a_sentence_and_another_error_is_not(error: Exception, sentence: str | None) -> None:
    found = system_failure(error)
    assert found is None if sentence is None else str(found).startswith(sentence)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/ada/models/mine", "…/mine"),
        ("/home/ada/models/mine/", "…/mine"),
        ("~/mine", "…/mine"),
        ("llama_questions:/data/ada/llama", "llama_questions:…/llama"),
        ("web_questions:~/web", "web_questions:…/web"),
        ("org/name", "org/name"),
        ("models/mine", "models/mine"),
        ("embedded:whisper-tiny.en", "embedded:whisper-tiny.en"),
        ("facts", "facts"),
    ],
)
def test_a_name_that_others_read_has_no_folders_of_this_machine(name: str, shown: str) -> None:
    assert without_folders(name) == shown


def test_what_ended_processes_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone, here = ended.stdout.strip(), os.getppid()
    for name in (f".model.{gone}.tmp", f".model.{here}.tmp", f".other.{gone}.tmp", ".model.x.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f".a.wav.{gone}-7.tmp").touch()
        (tmp_path / name / f".a.wav.{here}-7.tmp").touch()
    working = working_folder(tmp_path / "model")
    names = {working.name, f".model.{here}.tmp", f".other.{gone}.tmp", ".model.x.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == names
    (working / "weights").touch()
    rename_folder(working, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["weights"]
    remove_left_over(tmp_path / f".other.{gone}.tmp")
    assert [path.name for path in (tmp_path / f".other.{gone}.tmp").iterdir()] == [f".a.wav.{here}-7.tmp"]


def test_a_large_file_is_hashed_once_and_again_when_anything_changed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGE_BYTES", 4)
    monkeypatch.setattr(files, "SETTLED_NS", 20_000_000)
    read: list[str] = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or original(file, kind))
    path = tmp_path / "weights"

    def hashed() -> str:
        found = files.hash_file(path)
        assert found == hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    path.write_bytes(b"abcde")
    hashed()
    hashed()
    assert len(read) == 2, "it was written just now, and could be written again within the same tick of the clock"
    time.sleep(0.03)
    assert hashed() == hashed()
    assert len(read) == 3
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"abcdx")  # of the same size, with its old time put back
    os.utime(path, ns=times)
    hashed()
    assert len(read) == 4
    time.sleep(0.03)
    path.write_bytes(b"abc")  # small: read every time
    hashed()
    hashed()
    assert len(read) == 6
