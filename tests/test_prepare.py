"""`palimpsest data prepare` and `inspect`: a folder that every command takes; killed at any point it ends the same."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audio_files import BROKEN, encoded, tone, voice_assistant, wav
from palimpsest.data import prepare
from palimpsest.data.examples import Example, read_manifest, write_manifest
from palimpsest.data.filters import Filters
from palimpsest.data.inspection import inspect_data
from palimpsest.data.prepare import prepare_data
from palimpsest.data.sources import load_examples
from palimpsest.data.voices import VOICES, Voice
from palimpsest.files import UserError
from tones import load_tone, one


def buzz(text: str, speed: float, seed: int) -> tuple[Any, int]:
    """A voice for tests: pitch from the text, too long for "%"."""
    seconds = 31 if "%" in text else 0.5
    return tone(seconds, 8_000, pitch=200 + len(text)).astype(np.float32), 8_000


def load_buzz() -> Any:
    return buzz


@pytest.fixture(autouse=True)
def voices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VOICES, "buzz", Voice("buzz", lambda: "1", load_buzz))


def run(source: str, out: Path, **options: Any) -> list[str]:
    return list(prepare_data(source, out, **{"split": "train", "voice": "buzz", "workers": 1, **options}))


def mixed(folder: Path, n: int = 20) -> str:
    """Good rows, every third without a recording; then one of each fault and a later turn."""
    good = [("1", f"Question {i}?", f"Answer {i}.", wav(pitch=200 + i) if i % 3 else None) for i in range(n)]
    bad = [("1", f"{reason}?", "A.", audio) for reason, audio in BROKEN.items()]
    rest = [("2", "And?", "A.", wav()), ("1", "50 %?", "A.", None), ("1", "Last?", "A.", wav())]
    return f"voice_assistant:{voice_assistant(folder / 'x.parquet', [*good, *bad, *rest], row_group_size=5)}"


def content(out: Path) -> dict[str, Any]:
    """All files of a prepared folder."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_a_prepared_folder_is_a_source(tmp_path: Path) -> None:
    lines = run(mixed(tmp_path), tmp_path / "out")
    assert lines[1] == "27 rows read, 21 kept, 6 dropped"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audio", "dropped", "prepared", "train.jsonl"]
    examples = load_examples(str(tmp_path / "out"), "train")
    assert [e.question for e in examples] == [*(f"Question {i}?" for i in range(20)), "Last?"]
    assert [e.voice for e in examples[:3]] == ["buzz", None, None]
    assert {soundfile.info(str(e.audio)).samplerate for e in examples} == {16_000}
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped/train.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in dropped) == sorted([*BROKEN, "later turn", "cannot be spoken"])
    assert all(row["id"].startswith("voice_assistant-") and "row 2" in row["where"] for row in dropped[:2])
    (tmp_path / "out").rename(tmp_path / "moved")
    assert len(read_manifest(tmp_path / "moved" / "train.jsonl", require_audio=True)) == 21


def test_prepared_again_it_keeps_everything(tmp_path: Path) -> None:
    run(mixed(tmp_path), tmp_path / "one")
    run(str(tmp_path / "one"), tmp_path / "two")
    assert (tmp_path / "two/dropped/train.jsonl").read_text() == ""
    one, two = (load_examples(str(tmp_path / name), "train") for name in ("one", "two"))
    assert [(e.id, e.question, e.answer) for e in one] == [(e.id, e.question, e.answer) for e in two]


def test_a_second_call_does_nothing_and_other_options_are_refused(tmp_path: Path) -> None:
    source = mixed(tmp_path)
    first = run(source, tmp_path / "out")
    before = content(tmp_path / "out")
    assert run(source, tmp_path / "out")[1:] == first[1:]
    assert content(tmp_path / "out") == before
    with pytest.raises(UserError, match="was prepared with limit None, now it is 3"):
        run(source, tmp_path / "out", limit=3)
    mixed(tmp_path, 21)
    with pytest.raises(UserError, match="from a source that has changed since"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file, _: file.write_text("".join(file.read_text().splitlines(True)[:-1])), "rows where"),
        (lambda _, recording: recording.write_bytes(b""), "is empty or not there any more"),
        (lambda _, recording: recording.unlink(), "is empty or not there any more"),
    ],
)
def test_a_prepared_folder_that_was_damaged_is_not_called_finished(tmp_path: Path, damage: Any, said: str) -> None:
    source, out = mixed(tmp_path), tmp_path / "out"
    run(source, out)
    damage(out / "train.jsonl", min(out.rglob("*.flac")))
    with pytest.raises(UserError, match=f"{said}.*delete {out} and prepare it again"):
        run(source, out)


class Killed(BaseException):
    pass


def killing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """The `at`-th call of `owner.name` kills the process."""
    calls = 0
    original: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        *((prepare, "store", at) for at in (1, 9, 17)),
        *((prepare._Part, "append", at) for at in (1, 2, 4, 5)),  # between the parts of one note
        *((prepare, "write_json", at) for at in (1, 2, 4)),
        *((Path, "replace", at) for at in (12, 25, 26, 27, 28)),  # the last three rename the parts and write the report
        (Path, "unlink", 1),
    ],
)
def test_killed_anywhere_it_continues_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int
) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 8)
    source = mixed(tmp_path)
    run(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        killing(patch, owner, name, at)
        with pytest.raises(Killed):
            run(source, tmp_path / "killed")
    run(source, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_what_a_killed_run_had_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 8)
    source = mixed(tmp_path)
    with monkeypatch.context() as patch:
        killing(patch, prepare, "store", 15)
        with pytest.raises(Killed):
            run(source, tmp_path / "out")
    taken: list[int] = []
    original = prepare.take
    monkeypatch.setattr(prepare, "take", lambda row, *rest: taken.append(row.position) or original(row, *rest))
    run(source, tmp_path / "out")
    assert taken == list(range(16, 27))


def test_as_many_cores_as_one_likes_leave_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 8)
    source = mixed(tmp_path)
    monkeypatch.setattr("palimpsest.data.cores.MORE", 0)  # one thread
    run(source, tmp_path / "one")
    monkeypatch.setattr("palimpsest.data.cores.MORE", 15)
    run(source, tmp_path / "many")
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_equal_recordings_are_stored_by_several_threads_at_once(tmp_path: Path) -> None:
    turns = [("1", f"Q {i}?", "A.", wav()) for i in range(64)]
    run(f"voice_assistant:{voice_assistant(tmp_path / 'x.parquet', turns)}", tmp_path / "out")
    assert len({example.audio for example in load_examples(str(tmp_path / "out"), "train")}) == 1
    assert len(list((tmp_path / "out/audio").rglob("*"))) == 2  # the file in its folder


def test_no_folder_has_a_name_for_every_row(tmp_path: Path) -> None:
    run(mixed(tmp_path), tmp_path / "out")
    stored = [path.relative_to(tmp_path / "out/audio") for path in (tmp_path / "out/audio").rglob("*.flac")]
    assert len(stored) == 21
    assert all(path.parts == (path.name[:2], path.name) for path in stored)


def test_one_pool_of_workers_speaks_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 8)
    monkeypatch.setitem(VOICES, "tone", Voice("tone", one, load_tone))
    pools: list[int] = []
    original = prepare.pool
    monkeypatch.setattr(prepare, "pool", lambda n: pools.append(n) or original(n))
    source = mixed(tmp_path)
    run(source, tmp_path / "many", voice="tone", workers=2)
    assert pools == [2]
    run(source, tmp_path / "one", voice="tone")
    assert content(tmp_path / "many/audio") == content(tmp_path / "one/audio")


def test_equal_rows_keep_their_ids_through_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 2)
    turns = [("1", "Same?", "A.", wav(pitch=200 + 10 * i)) for i in range(5)]
    source = f"voice_assistant:{voice_assistant(tmp_path / 'x.parquet', turns)}"
    with monkeypatch.context() as patch:
        killing(patch, prepare, "store", 4)
        with pytest.raises(Killed):
            run(source, tmp_path / "out")
    run(source, tmp_path / "out")
    ids = [e.id for e in load_examples(str(tmp_path / "out"), "train")]
    assert ids == [ids[0], *(f"{ids[0]}-{i}" for i in range(2, 6))]


def test_a_limit_counts_what_is_kept(tmp_path: Path) -> None:
    bad = [("1", f"B{i}?", "A.", b"none") for i in range(5)]
    good = [("1", f"G{i}?", "A.", wav()) for i in range(5)]
    source = f"voice_assistant:{voice_assistant(tmp_path / 'x.parquet', bad + good)}"
    run(source, tmp_path / "out", limit=3)
    assert [e.question for e in load_examples(str(tmp_path / "out"), "train")] == ["G0?", "G1?", "G2?"]


def test_strict_and_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 21: broken audio"):
        run(mixed(tmp_path), tmp_path / "strict", strict=True)
    silent = voice_assistant(tmp_path / "s.parquet", [("1", "Q?", "A.", BROKEN["silent audio"])])
    with pytest.raises(UserError, match=r"Nothing is left of .*s\.parquet \(1 silent audio\)"):
        run(f"voice_assistant:{silent}", tmp_path / "none")
    assert not (tmp_path / "none" / "train.jsonl").exists()


def test_as_text_only(tmp_path: Path) -> None:
    run("facts", tmp_path / "out", voice="none", limit=5)
    assert [e.audio for e in load_examples(str(tmp_path / "out"), "train")] == [None] * 5


def test_bad_options_leave_nothing_behind(tmp_path: Path) -> None:
    for options, problem in (
        ({"voice": "nobody"}, "no voice 'nobody'"),
        ({"limit": 0}, "limit of 0"),
        ({"split": "a/b"}, "no split"),
    ):
        with pytest.raises(UserError, match=problem):
            run("facts", tmp_path / "out", **options)
    with pytest.raises(UserError, match="does not exist"):
        run("fact", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    write_manifest(tmp_path / "out" / "train.jsonl", [Example("a", "Q?", ("A",), "A")])
    with pytest.raises(UserError, match="was not made by this command"):
        run("facts", tmp_path / "out")


def test_the_five_lines_of_the_docs(tmp_path: Path) -> None:
    """docs/data.md as written, but for the last command, whose like test_readme.py runs."""
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", page, flags=re.S)
    write, *commands, score = block.strip().splitlines()
    assert "palimpsest importance" in score
    subprocess.run(["bash", "-c", write], cwd=tmp_path, check=True)
    for command in commands:
        words = [sys.executable, "-m", "palimpsest.cli", *shlex.split(command)[1:]]
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    (example,) = load_examples(str(tmp_path / "prepared/mine"), "train")
    assert (example.answer, example.voice) == ("The capital of France is Paris.", "hibari")


# -- inspect ----------------------------------------------------------------------------------------------------------
def test_inspect_counts_and_measures(tmp_path: Path) -> None:
    for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        (tmp_path / f"{name}.wav").write_bytes(encoded(np.stack([tone(seconds, 44_100)] * 2, 1), 44_100))
    (tmp_path / "d.wav").write_bytes(b"none")
    rows = [Example(name, "One two three?", ("A b",), "A b", tmp_path / f"{name}.wav", "anna", "k") for name in "abcd"]
    write_manifest(tmp_path / "m.jsonl", [*rows, Example("e", "One?", ("A",), "A")])
    text = "\n".join(inspect_data(str(tmp_path / "m.jsonl"), split="any"))
    assert "5: 4 usable, 1 to be dropped" in text
    assert "broken audio           1\n      d: cannot be decoded" in text
    assert "recordings      3, 0.00 hours; 1 rows without" in text
    assert "question words  1  1  3  3  3" in text
    assert "seconds         1.00  1.10  2.00  2.90  3.00" in text
    assert "voices          anna 3" in text
    assert "kinds           k 3" in text
    with pytest.raises(UserError, match="broken audio"):
        list(inspect_data(str(tmp_path / "m.jsonl"), split="any", strict=True))
    short = "\n".join(inspect_data(str(tmp_path / "m.jsonl"), split="any", filters=Filters(max_audio_seconds=1.5)))
    assert "long audio             2" in short
    assert "3: 3 usable" in "\n".join(inspect_data(str(tmp_path / "m.jsonl"), split="any", limit=3))


def test_inspecting_what_is_all_dropped_shows_why_before_it_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"none")
    write_manifest(tmp_path / "m.jsonl", [Example("a", "Q?", ("A",), "A", tmp_path / "a.wav")])
    lines: list[str] = []
    with pytest.raises(UserError, match=r"Nothing is left .* \(1 broken audio\); correct the rows named above, or"):
        lines.extend(inspect_data(str(tmp_path / "m.jsonl"), split="any"))  # those before the error stay
    assert lines[0] == "rows            1: 0 usable, 1 to be dropped"
    assert "a: cannot be decoded" in lines[2]


def test_inspecting_a_prepared_folder_tells_what_was_dropped_before(tmp_path: Path) -> None:
    run(mixed(tmp_path), tmp_path / "out")
    text = "\n".join(inspect_data(str(tmp_path / "out"), split="train"))
    assert "21: 21 usable, 0 to be dropped" in text
    assert "dropped before  6, when it was prepared" in text
    assert "voices          not named 14, buzz 7" in text
