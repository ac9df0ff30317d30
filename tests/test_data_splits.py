"""The examples of a study: a split that order and additions do not move, nothing shared between train and held-out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_files import BROKEN, voice_assistant, wav
from palimpsest.data import parquet, splits
from palimpsest.data.examples import Example, write_manifest
from palimpsest.data.filters import Filters
from palimpsest.data.rows import Schema
from palimpsest.data.sources import load_examples
from palimpsest.data.splits import Split, StudyData, heldout_ids, speak_groups, spoken_or_dropped
from palimpsest.files import UserError

names = st.lists(st.text(min_size=1, max_size=6), unique=True, min_size=3, max_size=40)


@settings(max_examples=50, deadline=None)
@given(names, st.integers(1, 10), st.randoms())
def test_held_out_does_not_depend_on_order(ids: list[str], n: int, rng: random.Random) -> None:
    shuffled = rng.sample(ids, len(ids))
    assert heldout_ids(ids, n) == heldout_ids(shuffled, n)
    assert len(heldout_ids(ids, n)) == min(n, len(ids))


@settings(deadline=None)
@given(names, st.integers(1, 10))
def test_an_added_example_moves_at_most_one_other(ids: list[str], n: int) -> None:
    before, after = heldout_ids(ids[1:], n), heldout_ids(ids, n)
    assert len(before - after) <= 1
    assert after - before <= {ids[0]} or len(ids[1:]) < n


def manifest(folder: Path, name: str, examples: Sequence[tuple[str, str, Path | None]]) -> Split:
    path = folder / f"{name}.jsonl"
    write_manifest(path, [Example(i, question, ("A",), "A", audio) for i, question, audio in examples])
    return Split(str(path), name)


def study(train: Split, heldout: Split | int, **changes: Any) -> StudyData:
    options: dict[str, Any] = {"tasks": {}, "filters": Filters(), "strict": False, "seed": 0, **changes}
    return StudyData(train, heldout, **options)


def read(data: StudyData, folder: Path) -> tuple[dict[str, list[str]], list[tuple[str, str, str]]]:
    groups, dropped = data.read(folder / "audio", lambda *_: None)
    ids = {group: [example.id for example in examples] for group, examples in groups.items()}
    return ids, [(group, item.id, item.reason) for group, item in dropped]


def numbered(n: int) -> list[tuple[str, str, Path | None]]:
    return [(f"e{i}", f"Question {i}?", None) for i in range(n)]


def test_held_out_examples_are_taken_out_of_the_training_source(tmp_path: Path) -> None:
    groups, dropped = read(study(manifest(tmp_path, "all", numbered(40)), 10), tmp_path)
    assert len(groups["heldout"]) == 10
    assert set(groups["heldout"]) == heldout_ids([f"e{i}" for i in range(40)], 10)
    assert groups["train"] == [f"e{i}" for i in range(40) if f"e{i}" not in groups["heldout"]]
    assert dropped == []
    few, _ = read(study(Split(str(tmp_path / "all.jsonl"), "all", limit=7), 10), tmp_path)
    assert few["heldout"] == groups["heldout"]  # a limit is of what is left for training
    assert len(few["train"]) == 7
    assert set(few["train"]) < set(groups["train"])


def test_held_out_needs_something_left_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"heldout_examples is 5 but .* has 5 usable examples"):
        study(manifest(tmp_path, "all", numbered(5)), 5).check()


def test_a_question_of_held_out_is_never_trained_on(tmp_path: Path) -> None:
    train = manifest(tmp_path, "train", [("a", "What is it?", None), ("b", "what is IT", None), ("c", "Else?", None)])
    heldout = manifest(tmp_path, "heldout", [("h", "What is it?!", None)])
    groups, dropped = read(study(train, heldout), tmp_path)
    assert groups == {"train": ["c"], "heldout": ["h"]}
    assert dropped == [("train", "a", "question in held-out"), ("train", "b", "question in held-out")]
    strict, _ = read(study(train, heldout, strict=True), tmp_path)  # no fault of the data
    assert strict == groups


def test_a_question_asked_twice_does_not_stand_on_both_sides(tmp_path: Path) -> None:
    rows = [(f"{side}{i}", f"Question {i}?", None) for i in range(20) for side in "xy"]
    groups, dropped = read(study(manifest(tmp_path, "all", rows), 8), tmp_path)
    asked = {name[1:] for name in groups["heldout"]}
    assert not asked & {name[1:] for name in groups["train"]}
    assert len(groups["train"]) + len(groups["heldout"]) + len(dropped) == 40
    assert dropped


def test_a_question_of_a_task_is_not_trained_on(tmp_path: Path) -> None:
    """Ten of forty are asked, spelled a little otherwise; two of them are held out, which is no training."""
    train = manifest(tmp_path, "train", numbered(40))
    task = manifest(tmp_path, "task", [(f"k{i}", f"  question {i} ??", None) for i in range(0, 40, 4)])
    plain, none = read(study(train, 10, decontaminate=False, tasks={"t": task}), tmp_path)
    assert none == []
    groups, dropped = read(study(train, 10, tasks={"t": task}), tmp_path)
    asked = {f"e{i}" for i in range(0, 40, 4)}
    assert groups["heldout"] == plain["heldout"]
    assert groups["train"] == [name for name in plain["train"] if name not in asked]
    assert dropped == [("train", name, "question in task") for name in plain["train"] if name in asked]
    strict, _ = read(study(train, 10, strict=True, tasks={"t": task}), tmp_path)  # no fault of the data
    assert strict == groups
    details = [item.detail for _, item in study(train, 10, tasks={"t": task}).read(tmp_path, lambda *_: None)[1]]
    assert all("of the task t" in detail for detail in details)
    # Only what is asked: a limit of the task gives back the rest.
    one = Split(task.source, "any", limit=1)
    assert len(read(study(train, 10, tasks={"t": one}), tmp_path)[1]) <= 1


def test_a_task_of_the_training_questions_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    source = manifest(tmp_path, "all", numbered(8))
    with pytest.raises(UserError, match=r"\(6 question in task\).*data\.decontaminate: false"):
        study(source, 2, tasks={"t": source}).check()


def test_inputs_follow_the_questions_of_tasks(tmp_path: Path) -> None:
    train, task = manifest(tmp_path, "train", numbered(20)), manifest(tmp_path, "task", [("k", "Else?", None)])
    before = study(train, 5, tasks={"t": task}).inputs()
    assert study(train, 5, tasks={"t": task}).inputs() == before
    assert study(train, 5, tasks={"t": task}, decontaminate=False).inputs() != before
    manifest(tmp_path, "task", [("k", "Question 3?", None)])
    assert study(train, 5, tasks={"t": task}).inputs() != before


def test_inputs_with_a_task_on_the_hub_do_not_ask_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hub(*_: Any) -> list[str]:
        raise AssertionError("asked")

    monkeypatch.setattr("palimpsest.data.parquet.hub_files", no_hub)
    train = manifest(tmp_path, "train", numbered(20))
    data = study(train, 5, tasks={"t": Split("fixie-ai/llama-questions@abc", "test")})
    before = data.inputs()
    with pytest.raises(AssertionError, match="asked"):
        data.check()
    manifest(tmp_path, "train", numbered(21))  # any row may be the one that takes a dropped one's place
    assert study(train, 5, tasks=data.tasks).inputs() != before


@pytest.fixture
def faulty(tmp_path: Path) -> tuple[Split, Path]:
    """Ten good rows, then one of each fault, then a later turn."""
    good = [("1", f"Question {i}?", "A.", wav(pitch=300 + 20 * i)) for i in range(10)]
    bad = [("1", f"{reason}?", "A.", audio) for reason, audio in BROKEN.items()]
    texts = [("1", "", "A.", wav()), ("1", "No answer?", "", wav()), ("1", "w " * 101, "A.", wav())]
    path = voice_assistant(tmp_path / "x.parquet", [*good, *bad, *texts, ("2", "And?", "A.", wav())])
    return Split(f"voice_assistant:{path}", "train"), path


def test_faulty_rows_are_dropped_and_listed(faulty: tuple[Split, Path], tmp_path: Path) -> None:
    data = study(faulty[0], 3)
    groups, dropped = read(data, tmp_path)
    reasons = sorted(reason for _, _, reason in dropped)
    assert reasons == sorted([*BROKEN, "empty question", "empty answer", "long question", "later turn"])
    assert len(groups["train"]) + len(groups["heldout"]) == 10
    assert len(list((tmp_path / "audio").rglob("*.flac"))) == 10


def test_strict_names_the_first_fault_but_not_later_turns(faulty: tuple[Split, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 15: empty question"):
        study(faulty[0], 3, strict=True).check()
    good = [("1", f"Question {i}?", "A.", wav()) for i in range(4)]
    path = voice_assistant(tmp_path / "audio.parquet", [*good, ("2", "And?", "A.", wav()), ("1", "S?", "A.", b"x")])
    data = study(Split(f"voice_assistant:{path}", "train"), 1, strict=True)
    data.check()
    with pytest.raises(UserError, match="row 6: broken audio"):
        read(data, tmp_path)


def test_a_split_of_which_nothing_is_left(tmp_path: Path) -> None:
    rows = [("1", f"Q{i}?", "A.", BROKEN["silent audio"]) for i in range(3)] + [("1", "", "A.", wav())]
    path = voice_assistant(tmp_path / "x.parquet", rows)
    heldout = manifest(tmp_path, "heldout", numbered(2))
    data = study(Split(f"voice_assistant:{path}", "train"), heldout)
    with pytest.raises(UserError, match=r"train data .*x\.parquet \(3 silent audio, 1 empty question\)"):
        read(data, tmp_path)


def test_missing_audio_is_dropped_from_training_and_refused_in_a_task(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    rows = [("a", "One?", tmp_path / "a.wav"), ("b", "Two?", tmp_path / "gone.wav"), ("c", "Three?", None)]
    train, heldout = manifest(tmp_path, "train", rows), manifest(tmp_path, "heldout", numbered(2))
    groups, dropped = read(study(train, heldout), tmp_path)
    assert groups["train"] == ["a", "c"]
    assert dropped == [("train", "b", "broken audio")]
    with pytest.raises(UserError, match=r"gone\.wav does not exist"):
        study(heldout, train, tasks={"t": train}).check()


def test_the_limit_does_not_read_recordings_it_leaves_out(faulty: tuple[Split, Path], tmp_path: Path) -> None:
    train = Split(faulty[0].source, "train", limit=4)
    _, dropped = read(study(train, 3), tmp_path)
    assert len(list((tmp_path / "audio").rglob("*.flac"))) + sum(r in BROKEN for *_, r in dropped) == 4 + 3


def test_inputs_change_with_what_goes_in_and_only_then(tmp_path: Path) -> None:
    source = manifest(tmp_path, "all", numbered(20))
    before = study(source, 5).inputs()
    assert study(source, 5).inputs() == before
    for other in (study(source, 6), study(source, 5, seed=1), study(source, 5, filters=Filters(silence_peak=0.1))):
        assert other.inputs() != before
    manifest(tmp_path, "all", numbered(21))
    assert study(source, 5).inputs() != before


def test_inputs_of_a_hub_source_do_not_ask_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hub(*_: Any) -> list[str]:
        raise AssertionError("asked")

    monkeypatch.setattr("palimpsest.data.parquet.hub_files", no_hub)
    hub = Split("gpt-omni/VoiceAssistant-400K", "train")
    assert study(hub, 5).inputs() == study(hub, 5).inputs()
    assert study(Split(f"{hub.source}@abc", "train"), 5).inputs() != study(hub, 5).inputs()
    with pytest.raises(AssertionError, match="asked"):
        study(hub, 5).check()


def test_a_second_reading_gives_the_same_and_writes_nothing(faulty: tuple[Split, Path], tmp_path: Path) -> None:
    first = read(study(faulty[0], 3), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "audio").rglob("*")}
    assert read(study(faulty[0], 3), tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "audio").rglob("*")} == times


# -- many rows --------------------------------------------------------------------------------------------------------
class Killed(BaseException):
    pass


def hub_set(folder: Path, monkeypatch: pytest.MonkeyPatch, n: int = 40, group: int = 5) -> Split:
    """A set that is read as from the hub: questions with recordings, one of them silent, in row groups of `group`."""
    turns = [("1", f"Question {i}?", f"Answer {i}.", wav(pitch=200 + i)) for i in range(n)]
    turns[7] = ("1", "Silent?", "A.", BROKEN["silent audio"])
    path = voice_assistant(folder / "hub.parquet", turns, row_group_size=group)
    monkeypatch.setattr("palimpsest.data.parquet.hub_files", lambda *_: ([str(path)], n))
    return Split("gpt-omni/VoiceAssistant-400K", "train")


def recordings_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of the rows whose recording is handed on, from now on."""
    positions: list[int] = []
    original = Schema.row

    def row(self: Schema, position: int, where: str, cells: Mapping[str, Any], folder: Path) -> Any:
        if cells.get("audio") is not None:
            positions.append(position)
        return original(self, position, where, cells, folder)

    monkeypatch.setattr(Schema, "row", row)
    return positions


def groups_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(row group, whether with its recordings) of every reading, from now on."""
    groups: list[tuple[int, bool]] = []
    original = parquet._cells

    def cells(file: Any, group: int, columns: Mapping[str, str], *rest: Any) -> Any:
        groups.append((group, "audio" in columns))
        return original(file, group, columns, *rest)

    monkeypatch.setattr(parquet, "_cells", cells)
    return groups


def test_a_random_limit_reads_the_recordings_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hub_set(tmp_path, monkeypatch).source
    positions, groups = recordings_read(monkeypatch), groups_read(monkeypatch)
    data = study(Split(source, "train", limit=4), 3)
    groups_of, dropped = data.read(tmp_path / "audio", lambda *_: None)
    assert len(positions) == len(set(positions)) == 4 + 3 == sum(map(len, groups_of.values())) + len(dropped)
    with_audio = [group for group, audio in groups if audio]
    assert with_audio == sorted({position // 5 for position in positions})  # each once, the others not at all

    positions.clear(), groups.clear()
    asked = load_examples(source, "train", 3, seed=1, audio=tmp_path / "task", faulty_audio="wrong")
    assert len(positions) == len(asked) == 3
    assert [group for group, audio in groups if audio] == sorted({position // 5 for position in positions})


def test_a_row_group_is_not_read_beyond_the_last_row_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [("1", f"Question {i}?", "A.", wav(0.25)) for i in range(100)]
    path = voice_assistant(tmp_path / "one.parquet", turns, row_group_size=100)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 10)
    file, batches = parquet.open_parquet(str(path)), 0

    class Counted:
        @staticmethod
        def iter_batches(*arguments: Any, **options: Any) -> Any:
            nonlocal batches
            for batch in file.iter_batches(*arguments, **options):
                batches += 1
                yield batch

    columns = {"audio": "question_audio"}
    found = [n for n, _ in parquet._cells(Counted(), 0, columns, str(path), [3, 12, 25])]
    assert (found, batches) == ([3, 12, 25], 3)


@pytest.mark.parametrize("at", [3, 17, 33])
def test_an_interrupted_reading_of_a_hub_set_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr("palimpsest.data.notes.EVERY", 8)
    train = hub_set(tmp_path, monkeypatch)
    whole = study(train, 5).read(tmp_path / "whole" / "audio", lambda *_: None)
    (tmp_path / "killed").mkdir()

    def advance(done: int, _: int) -> None:
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        study(train, 5).read(tmp_path / "killed" / "audio", advance, notes=tmp_path / "killed")
    note = next((tmp_path / "killed").glob(".reading-*"))
    with note.open("ab") as file:
        file.write(b'[39, {"id": "cut')  # a line that a kill cut short
    positions = recordings_read(monkeypatch)
    again = study(train, 5).read(tmp_path / "killed" / "audio", lambda *_: None, notes=tmp_path / "killed")
    noted = (at - 1) // 8 * 8
    assert positions == list(range(noted, 40))

    def told(found: Any, folder: Path) -> Any:
        groups, dropped = found
        return {key: [example.to_row(folder) for example in group] for key, group in groups.items()}, dropped

    assert told(again, tmp_path / "killed") == told(whole, tmp_path / "whole")
    # Finished, and killed before the notes were forgotten: nothing is read.
    positions.clear()
    third = study(train, 5).read(tmp_path / "killed" / "audio", lambda *_: None, notes=tmp_path / "killed")
    assert (positions, third) == ([], again)
    # Another choice begins anew.
    other = study(Split(train.source, "train", limit=10), 5)
    other.read(tmp_path / "killed" / "audio", lambda *_: None, notes=tmp_path / "killed")
    assert len(positions) == 15


def test_recordings_are_not_hashed_again_and_a_changed_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(10):
        (tmp_path / f"{i}.wav").write_bytes(wav(pitch=200 + i))
    train = manifest(tmp_path, "train", [(f"e{i}", f"Q {i}?", tmp_path / f"{i}.wav") for i in range(10)])
    hashed: list[str] = []
    original = splits.hash_file
    monkeypatch.setattr(splits, "hash_file", lambda path: hashed.append(path.name) or original(path))
    first = study(train, 3)
    before = first.inputs()
    assert sorted(hashed) == [f"{i}.wav" for i in range(10)]

    hashed.clear()
    second = study(train, 3, known=first.found)
    assert (second.inputs(), hashed, second.found) == (before, [], first.found)

    same = (tmp_path / "4.wav").read_bytes()
    changed = bytearray(same)
    changed[-1] ^= 1
    (tmp_path / "4.wav").write_bytes(changed)  # as long as before; its time is another
    third = study(train, 3, known=first.found)
    assert third.inputs() != before
    assert sorted(hashed) == [f"{i}.wav" for i in range(10)]
    (tmp_path / "4.wav").write_bytes(same)  # a copy: another time, the same content
    assert study(train, 3, known=third.found).inputs() == before


# -- speaking ---------------------------------------------------------------------------------------------------------
def say(examples: Sequence[Example]) -> list[Example]:
    bad = [example.id for example in examples if "%" in example.question]
    if bad:
        raise UserError(f"{bad[0]} cannot be spoken")
    return [Example(e.id, e.question, e.answers, e.answer, Path(f"{e.id}.flac")) for e in examples]


def say_groups(groups: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    return {key: say(group) for key, group in groups.items()}


def test_what_cannot_be_spoken_is_left_out_of_training_but_refused_in_a_task() -> None:
    good, bad = Example("g", "Fine?", ("A",), "A"), Example("b", "%?", ("A",), "A")
    spoken, dropped = speak_groups(
        {"train": [good, bad], "heldout": [good], "task-t": [good]}, say_groups, strict=False
    )
    assert [e.id for e in spoken["train"]] == ["g"]
    assert [e.audio for e in spoken["task-t"]] == [Path("g.flac")]
    assert [(group, item.id, item.reason) for group, item in dropped] == [("train", "b", "cannot be spoken")]
    with pytest.raises(UserError, match="b cannot be spoken"):
        speak_groups({"train": [good, bad]}, say_groups, strict=True)
    with pytest.raises(UserError, match="b cannot be spoken"):
        speak_groups({"train": [good], "task-t": [bad]}, say_groups, strict=False)
    with pytest.raises(UserError, match="b cannot be spoken"):  # nothing at all: the voice may be at fault
        spoken_or_dropped([bad], say)


def test_what_cannot_be_spoken_is_found_in_a_few_calls() -> None:
    calls: list[int] = []

    def say_counted(examples: Sequence[Example]) -> list[Example]:
        calls.append(len(examples))
        return say(examples)

    examples = [Example(str(i), "%?" if i == 777 else "Fine?", ("A",), "A") for i in range(1024)]
    spoken, dropped = spoken_or_dropped(examples, say_counted)
    assert [e.id for e in spoken] == [str(i) for i in range(1024) if i != 777]
    assert [(item.id, item.reason) for item in dropped] == [("777", "cannot be spoken")]
    assert len(calls) <= 2 + 1 + 2 * 10  # none, all, and down the halves
