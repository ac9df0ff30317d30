"""Tables: published columns in small parquet files written here; one's own CSV, parquet, folders, instruction sets."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from audio_files import encoded, tone, voice_assistant, wav, write_parquet
from palimpsest.data import parquet
from palimpsest.data.filters import Filters
from palimpsest.data.rows import Names, Row, identity_of
from palimpsest.data.sources import load_examples, open_table
from palimpsest.data.splits import Split, StudyData
from palimpsest.files import UserError, hash_value


def rows(source: str, split: str = "train", *, start: int = 0, only: Any = None, audio: bool = True) -> list[Row]:
    return list(open_table(source, split).read(start, only, audio))


# -- published sets ---------------------------------------------------------------------------------------------------
def test_voice_assistant(tmp_path: Path) -> None:
    turns = [
        ("1", "<USER>: What is the capital of France?", " Paris. ", wav()),
        ("2", "And of Spain?", "Madrid.", wav()),
        ("1", "Who are you?", "An assistant.", None),
        ("3", "And then?", "Nothing.", wav()),
    ]
    first, second, third, fourth = rows(f"voice_assistant:{voice_assistant(tmp_path / 'x.parquet', turns)}")
    assert first.question == "What is the capital of France?"
    assert (first.answer, first.answers, first.kind) == ("Paris.", ("Paris.",), "qa")
    assert first.audio == wav()
    assert [row.later_turn for row in (first, second, third, fourth)] == [False, True, False, True]
    assert third.audio is None
    assert "row 2" in second.where


def test_spoken_alpaca_takes_what_was_spoken_else_instruction_and_input(tmp_path: Path) -> None:
    columns = {
        "instruction": ["Add.", "Name a colour.", "Greet."],
        "input": ["2 and 3", "", None],
        "output": ["5", "Red", "Hello"],
        "speech_input": ["", "Name a color", None],
        "input_speaker": ["nova", "echo", None],
        "output_speaker": ["a", "b", "c"],
        "input_audio": [wav(), wav(), wav()],
    }
    path = write_parquet(tmp_path / "a.parquet", columns, "input_audio")
    assert [(row.question, row.answer, row.voice) for row in rows(f"spoken_alpaca:{path}")] == [
        ("Add.\n2 and 3", "5", "nova"),
        ("Name a color", "Red", "echo"),
        ("Greet.", "Hello", None),
    ]


@pytest.mark.parametrize(
    ("prefix", "names", "answers", "golds"),
    [
        ("llama_questions", ("question", "answer", "audio"), ["Paris", "4"], [("Paris",), ("4",)]),
        ("llama_questions", ("Questions", "Answer", "Audio"), ["Paris", "4"], [("Paris",), ("4",)]),
        ("spoken_web_questions", ("question", "answers", "audio"), [["a", "b"], ["c"]], [("a", "b"), ("c",)]),
        ("spoken_web_questions", ("Question", "answer", "question_audio"), ["a", "c"], [("a",), ("c",)]),
    ],
)
def test_question_sets_in_either_spelling(tmp_path: Path, prefix: str, names: Any, answers: Any, golds: Any) -> None:
    columns = {"url": ["u", "v"], names[0]: ["Q one?", "Q two?"], names[1]: answers, names[2]: [wav(), wav()]}
    path = write_parquet(tmp_path / "test-00000-of-00001.parquet", columns, names[2])
    examples = load_examples(f"{prefix}:{path}", "test", audio=tmp_path / "audio")
    assert [(e.question, e.answers, e.answer) for e in examples] == [
        ("Q one?", golds[0], golds[0][0]),
        ("Q two?", golds[1], golds[1][0]),
    ]
    assert examples[0].audio is not None
    assert examples[0].audio == examples[1].audio  # named by content
    assert soundfile.info(str(examples[0].audio)).samplerate == 16_000
    assert load_examples(f"{prefix}:{path}", "test")[0].audio is None  # as text only


def test_several_sources_are_one(tmp_path: Path) -> None:
    """Positions count on, wherever reading starts and whichever rows are asked for; faults name their own source."""
    turns = [("1", f"Is it {i}?", f"It is {i}.", wav(pitch=200 + i)) for i in range(5)]
    first = f"voice_assistant:{voice_assistant(tmp_path / 'x.parquet', turns)}"
    manifest = tmp_path / "own.jsonl"
    manifest.write_text(
        "".join(json.dumps({"id": f"o{i}", "question": f"O {i}?", "answer": "A"}) + "\n" for i in range(3))
    )
    both = f"{first} + {manifest}"
    table = open_table(both, "train")
    assert table.count() == 8
    assert [row.position for row in rows(both)] == list(range(8))
    assert [row.question for row in rows(both, start=4)] == ["Is it 4?", "O 0?", "O 1?", "O 2?"]
    assert [row.question for row in rows(both, only={1, 6})] == ["Is it 1?", "O 1?"]
    assert rows(both, only={1})[0].audio == wav(pitch=201)
    examples = load_examples(both, "train", audio=tmp_path / "audio")
    assert [e.id for e in examples[5:]] == ["o0", "o1", "o2"]
    assert len({e.id for e in examples}) == 8
    with pytest.raises(UserError, match="used twice"):
        load_examples(f"{manifest} + {manifest}", "train")
    with pytest.raises(UserError, match="does not exist"):
        open_table(f"{manifest} + {tmp_path / 'gone.jsonl'}", "train")


def test_missing_columns_are_named_with_those_found(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"question": ["a"], "text": ["b"]})
    found = r"no columns 'round', 'answer', 'question_audio' or 'audio'; found: question, text"
    with pytest.raises(UserError, match=found):
        rows(f"voice_assistant:{path}")
    with pytest.raises(UserError, match=r"x\.parquet.* no column 'answers' or 'answer'; found: question, text"):
        rows(str(path))


def hub_layout(folder: Path) -> Path:
    for split, n in (("train", 3), ("test", 1)):
        for shard in range(2):
            turns = [("1", f"{split} {shard} {i}?", "A.", wav()) for i in range(n)]
            voice_assistant(folder / "data" / f"{split}-0000{shard}-of-00002.parquet", turns)
    return folder


def test_a_local_copy_has_the_hub_s_splits(tmp_path: Path) -> None:
    source = f"voice_assistant:{hub_layout(tmp_path)}"
    assert [row.question for row in rows(source)] == [f"train {s} {i}?" for s in range(2) for i in range(3)]
    assert len(rows(source, "test")) == 2
    assert open_table(source, "test").count() == 2
    with pytest.raises(UserError, match="no split 'dev'; it has: train, test"):
        rows(source, "dev")
    with pytest.raises(UserError, match="does not exist"):
        rows(f"voice_assistant:{tmp_path / 'none'}")


def test_only_the_rows_asked_for_are_read_and_recordings_only_when_wanted(tmp_path: Path) -> None:
    source = f"voice_assistant:{hub_layout(tmp_path)}"
    assert [row.position for row in rows(source, start=4)] == [4, 5]
    assert [row.position for row in rows(source, only={1, 4})] == [1, 4]
    assert [row.position for row in rows(source, start=2, only={1, 4})] == [4]
    assert all(row.audio is None for row in rows(source, audio=False))
    with_audio, without = rows(source, only={4}), rows(source, only={4}, audio=False)
    assert with_audio[0].audio == wav()
    assert without[0].question == with_audio[0].question


def test_row_groups_without_a_row_that_is_asked_for_are_not_touched(tmp_path: Path) -> None:
    """The first group is made unreadable on the disk; reading the second must not notice."""
    turns = [("1", f"Q{i}?", "A.", wav()) for i in range(4)]
    path = voice_assistant(tmp_path / "x.parquet", turns, row_group_size=2)
    group = pq.ParquetFile(path).metadata.row_group(0)
    data = bytearray(path.read_bytes())
    for column in range(group.num_columns):
        start = group.column(column).dictionary_page_offset or group.column(column).data_page_offset
        data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    source = f"voice_assistant:{path}"
    assert [row.question for row in rows(source, start=2)] == ["Q2?", "Q3?"]
    assert [row.question for row in rows(source, only={3})] == ["Q3?"]
    with pytest.raises(UserError, match=r"x\.parquet cannot be read to its end"):
        rows(source)


def test_the_hub_is_asked_when_rows_are_read_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's part is to give URLs; here they lead to a file system in memory."""
    import fsspec

    asked = []
    local = voice_assistant(tmp_path / "x.parquet", [("1", f"Q{i}?", "A.", wav()) for i in range(3)])
    memory = fsspec.filesystem("memory")
    memory.pipe("/va.parquet", local.read_bytes())

    def files(name: str, revision: str | None, split: str) -> tuple[list[str], int]:
        asked.append((name, revision, split))
        return ["memory://va.parquet"], 3

    monkeypatch.setattr(parquet, "hub_files", files)
    table = open_table("gpt-omni/VoiceAssistant-400K@abc123", "train")
    assert asked == []
    assert table.identity == ["hub", "gpt-omni/VoiceAssistant-400K", "abc123", "train"]
    assert [row.question for row in table.read(1, None, True)] == ["Q1?", "Q2?"]
    assert len(list(table.read(0, {0}, True))) == 1
    assert table.count() == 3
    assert asked == [("gpt-omni/VoiceAssistant-400K", "abc123", "train")]


def test_hub_files_come_from_datasets(tmp_path: Path) -> None:
    """`datasets` treats a folder like a hub repository: the same builder, the same splits."""
    from palimpsest.data.parquet import hub_files

    files, _ = hub_files(str(hub_layout(tmp_path)), None, "train")
    assert [Path(file).name for file in files] == [f"train-0000{i}-of-00002.parquet" for i in range(2)]
    with pytest.raises(UserError, match="no split 'x'; it has: train, test"):
        hub_files(str(tmp_path), None, "x")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("question,answer\na,b\n")
    with pytest.raises(UserError, match="stored as csv, not as parquet"):
        hub_files(str(tmp_path / "csv"), None, "train")
    with pytest.raises(UserError, match="cannot be opened"):
        hub_files(str(tmp_path / "none"), None, "train")


def test_without_the_package_datasets_it_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"question": ["a"], "answer": ["b"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'palimpsest-llm\[hub\]'"):
        rows(str(path))


def test_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        rows(str(tmp_path / "x.parquet"))


def test_memory_stays_bounded_whatever_the_number_of_rows(tmp_path: Path) -> None:
    """2000 rows of 64 kB, 128 MB, in row groups of 100 as the hub's audio sets are: no more than two are in memory."""
    recording = bytes(64_000)
    turns = [("1", f"Question {i}?", "A.", recording + str(i).encode()) for i in range(2_000)]
    path = voice_assistant(tmp_path / "x.parquet", turns, row_group_size=100, compression=None, use_dictionary=False)
    del turns
    assert path.stat().st_size > 100e6
    before, most, n = pa.total_allocated_bytes(), 0, 0
    for row in open_table(f"voice_assistant:{path}", "train").read(0, None, True):
        assert isinstance(row.audio, bytes)
        n += 1
        most = max(most, pa.total_allocated_bytes() - before)
    assert n == 2_000
    assert most < 2 * 100 * 64_000


# -- ids --------------------------------------------------------------------------------------------------------------
def test_ids_from_content_do_not_depend_on_order_and_equal_rows_are_counted(tmp_path: Path) -> None:
    turns = [("1", question, "A.", wav()) for question in ("One?", "Two?", "One?", "Three?")]

    def ids(name: str, turns: Any) -> list[str]:
        table = open_table(f"voice_assistant:{voice_assistant(tmp_path / name, turns)}", "train")
        names = Names(table)
        return [names(row) for row in table.read(0, None, False)]

    forward, backward = ids("a.parquet", turns), ids("b.parquet", turns[::-1])
    assert len(set(forward)) == 4
    assert forward[2] == f"{forward[0]}-2"
    assert set(forward) == set(backward)
    table = open_table(f"voice_assistant:{tmp_path / 'a.parquet'}", "train")
    names = Names(table, taken=forward[:2])  # as after an interruption
    assert [names(row) for row in table.read(2, None, False)] == forward[2:]


# -- one's own --------------------------------------------------------------------------------------------------------
def write_csv(path: Path, *records: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(records)
    return path


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "q.wav").write_bytes(wav())
    path = write_csv(
        tmp_path / "d.csv",
        ["id", "Question", "answers", "audio", "voice"],
        ["a", 'Who said "yes, we can"?', "Barack Obama | Obama", "q.wav", "anna"],
        ["b", "Two\nlines?", "x", "", ""],
    )
    first, second = load_examples(str(path), "any")
    assert (first.id, first.question, first.voice) == ("a", 'Who said "yes, we can"?', "anna")
    assert first.answers == ("Barack Obama", "Obama")
    assert first.answer == "Barack Obama"
    assert first.audio == tmp_path / "q.wav"
    assert second.question == "Two\nlines?"
    assert second.audio is None
    assert load_examples(f"csv:{tmp_path}", "d") == load_examples(str(tmp_path), "d") == [first, second]
    with pytest.raises(UserError, match="no split 'e'; it has: d"):
        load_examples(f"csv:{tmp_path}", "e")


def test_csv_without_ids_and_with_one_answer_that_holds_a_bar(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", ["question", "answer"], ["a?", "x | y"], ["a?", "x | y"])
    first, second = load_examples(str(path), "any")
    assert first.answers == ("x | y",)
    assert first.id.startswith("table-")
    assert second.id == f"{first.id}-2"


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ([["question", "reply"], ["a", "b"]], r"d\.csv has no column 'answers' or 'answer'; found: question, reply"),
        ([["id", "question", "answer"], ["a", "b", "c"], ["a", "d", "e"]], r"d\.csv:3: the id 'a' is used twice"),
        ([["question", "answer"], ["a", "b"], ["", "c"]], r"d\.csv:3: empty question"),
        ([["question", "answer"], ["a", " "]], r"d\.csv:2: empty answer"),
        ([["question", "answer", "audio"], ["a", "b", "no.wav"]], r"no\.wav does not exist"),
        ([["question", "answer"]], "holds no example"),
    ],
)
def test_read_as_it_is_a_faulty_csv_is_an_error(tmp_path: Path, records: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_examples(str(write_csv(tmp_path / "d.csv", *records)), "any")


def test_csv_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"question,answer\n\xff\xfe,b\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_examples(str(tmp_path / "d.csv"), "any")


def test_own_parquet_with_lists_paths_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    columns = {
        "id": ["p", "q"], "question": ["A?", "B?"], "answers": [["x", "y"], ["z"]], "answer": ["It is x.", None],
        "audio": ["a.wav", wav(pitch=300)],
    }  # fmt: skip
    path = write_parquet(tmp_path / "d.parquet", columns, "audio")
    first, second = load_examples(str(path), "any", audio=tmp_path / "audio")
    assert (first.id, first.answer, first.answers) == ("p", "It is x.", ("x", "y"))
    assert first.audio == tmp_path / "a.wav"
    assert second.answer == "z"
    assert second.audio is not None
    assert second.audio.is_relative_to(tmp_path / "audio")


def test_recordings_that_a_parquet_table_names_are_looked_at(tmp_path: Path) -> None:
    """Spoken again under the same name, they are other data, although the table has not changed."""
    columns = {"question": ["A?", "B?"], "answer": ["x", "y"], "audio": ["a.wav", "b.wav"]}
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(wav())
    path = write_parquet(tmp_path / "d.parquet", columns)
    table = open_table(str(path), "train")
    assert table.identity is None
    assert [row.audio for row in table.read(0, None, False)] == [tmp_path / "a.wav", tmp_path / "b.wav"]
    whole = Split(str(path), "train")

    def inputs() -> str:
        return hash_value(StudyData(whole, 1, {}, Filters(), strict=False, seed=0).inputs())

    before, of_table, seen = inputs(), identity_of(table), list[str]()
    assert before == inputs()
    for name in ("a.wav", "b.wav"):  # one of which is held out
        (tmp_path / name).write_bytes(wav(pitch=300))
        assert inputs() not in (before, *seen)
        seen.append(inputs())
    assert of_table != identity_of(table)
    inside = voice_assistant(tmp_path / "x.parquet", [("1", "Q?", "A.", wav())])
    assert open_table(f"voice_assistant:{inside}", "train").identity is not None  # a table that holds its recordings


def test_a_folder_of_recordings_with_texts_beside_them(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.wav").write_bytes(wav())
    (tmp_path / "a.txt").write_text("What is it?\n\nIt is\na tone.\n")
    (tmp_path / "b.json").write_text(json.dumps({"question": "Which?", "answers": ["x", "y"], "voice": "bob"}))
    first, second, third = rows(str(tmp_path))
    assert (first.id, first.question, first.answer) == ("a", "What is it?", "It is a tone.")
    assert (second.answers, second.voice, second.audio) == (("x", "y"), "bob", tmp_path / "b.wav")
    assert third.question == ""  # for the filters to tell
    with pytest.raises(UserError, match=r"c\.wav: empty question"):
        load_examples(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_with_metadata_in_splits(tmp_path: Path, name: str) -> None:
    for split in ("train", "test"):
        folder = tmp_path / split
        folder.mkdir()
        (folder / "a.flac").write_bytes(encoded(tone(), file_format="FLAC"))
        if name.endswith("csv"):
            write_csv(folder / name, ["file_name", "question", "answer"], ["a.flac", f"{split}?", "x"])
        else:
            (folder / name).write_text(json.dumps({"file_name": "a.flac", "question": f"{split}?", "answer": "x"}))
    (example,) = load_examples(str(tmp_path), "test")
    assert (example.question, example.audio) == ("test?", tmp_path / "test" / "a.flac")
    with pytest.raises(UserError, match="no split 'dev'; its folders: test, train"):
        load_examples(str(tmp_path), "dev")


def test_metadata_without_file_names(tmp_path: Path) -> None:
    write_csv(tmp_path / "metadata.csv", ["question", "answer"], ["a", "b"])
    with pytest.raises(UserError, match="no column 'file_name'; found: question, answer"):
        load_examples(str(tmp_path), "train")


def test_instruction_sets_join_instruction_and_input(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    records = [
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        {"dataset": "d", "instruction": "Greet.", "output": "Hi."},
    ]
    path.write_text(json.dumps(records))
    first, second = load_examples(f"alpaca:{path}", "any")
    assert (first.question, first.answer) == ("Add.\n2 and 3", "5")
    assert second.question == "Greet."
    path.write_text(json.dumps([{"prompt": "a", "output": "b"}]))
    with pytest.raises(UserError, match="no column 'instruction'; found: output, prompt"):
        load_examples(f"alpaca:{path}", "any")
    path.write_text("{}")
    with pytest.raises(UserError, match="must hold a list"):
        load_examples(f"alpaca:{path}", "any")
    path.write_text("[")
    with pytest.raises(UserError, match="not valid JSON"):
        load_examples(f"alpaca:{path}", "any")


# -- read as it is ----------------------------------------------------------------------------------------------------
def test_later_turns_are_passed_over_and_limits_count_what_is_left(tmp_path: Path) -> None:
    turns = [(str(1 + i % 2), f"Q{i}?", "A.", wav()) for i in range(10)]
    source = f"voice_assistant:{voice_assistant(tmp_path / 'x.parquet', turns)}"
    questions = [e.question for e in load_examples(source, "train")]
    assert questions == [f"Q{i}?" for i in range(0, 10, 2)]
    assert [e.question for e in load_examples(source, "train", 2)] == questions[:2]
    chosen = [e.question for e in load_examples(source, "train", 3, seed=1)]
    assert chosen == [q for q in questions if q in chosen]
    assert {e.question for e in load_examples(source, "train", 2, seed=1)} < set(chosen)


def test_a_broken_recording_in_a_table_is_an_error_in_a_question_set(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"question": ["a"], "answer": ["b"], "audio": [b"none"]}, "audio")
    with pytest.raises(UserError, match=r"row 1: broken audio"):
        load_examples(f"llama_questions:{path}", "test", audio=tmp_path / "audio")
    assert len(load_examples(f"llama_questions:{path}", "test")) == 1  # as text it does not matter


# -- forms of cells ---------------------------------------------------------------------------------------------------
SQUAD = {"text": ["Paris", "City of Light"], "answer_start": [3, 9]}
TRIVIA = {"value": "Paris", "aliases": ["Paris", "City of Light"], "type": "WikipediaEntity"}


@pytest.mark.parametrize(
    ("column", "cell", "golds"),
    [
        ("answers", SQUAD, ("Paris", "City of Light")),
        ("answer", TRIVIA, ("Paris", "City of Light")),
        ("answer", ["Paris", "City of Light"], ("Paris", "City of Light")),
        ("answers", [{"text": "Paris"}, {"text": "City of Light"}], ("Paris", "City of Light")),
        ("answers", '["Paris", "City of Light"]', ("Paris", "City of Light")),
        ("answers", json.dumps(SQUAD), ("Paris", "City of Light")),
        ("answers", "['Paris', \"d'Or\"]", ("Paris", "d'Or")),  # as Python prints a list
        ("answers", "[unclear]", ("[unclear]",)),
        ("answer", 4.0, ("4",)),
        ("answer", 2.50, ("2.5",)),
        ("answer", 1e20, ("100000000000000000000",)),
        ("answer", 1e-7, ("0.0000001",)),
        ("answer", 1969, ("1969",)),
        ("answers", [4.0, 5.5], ("4", "5.5")),
        ("answer", "4.0", ("4.0",)),  # a text is what it is
        ("answer", '{"a": 1}', ('{"a": 1}',)),
        ("answer", "[1, 2]", ("[1, 2]",)),
    ],
)
def test_gold_strings_are_read_from_every_known_form(tmp_path: Path, column: str, cell: Any, golds: Any) -> None:
    path = write_parquet(tmp_path / "d.parquet", {"question": ["Q?"], column: [cell]})
    (example,) = load_examples(str(path), "any")
    assert (example.answers, example.answer) == (golds, golds[0])


def test_numbers_of_32_bits_keep_their_digits_and_gaps_are_no_answers(tmp_path: Path) -> None:
    columns = {"question": ["A?", "B?"], "answer": pa.array([0.1, float("nan")], pa.float32())}
    path = write_parquet(tmp_path / "d.parquet", columns)
    assert [(row.answers, row.answer) for row in rows(str(path))] == [(("0.1",), "0.1"), ((), "")]
    with pytest.raises(UserError, match=r"row 2: empty answer"):
        load_examples(str(path), "any")


@pytest.mark.parametrize(
    ("column", "cell", "problem"),
    [
        ("answers", {"span": "Paris", "score": 1}, "row 1: the answer is a mapping with the keys 'span', 'score'"),
        ("answers", [["Paris"]], "row 1: the answer is a list; write it as the text"),
        ("answers", "Paris | Texas", r"row 1: the answers 'Paris \| Texas' hold a vertical bar, .* give a list"),
        ("answer", True, "row 1: the answer is true or false; write it"),
        ("answer", b"Paris", "row 1: the answer is bytes; write it"),
        ("answers", "['Paris' 'City of Light']", r"row 1: .* begins as a list but is no JSON; write it as \["),
        ("answer", '["Paris", "City of Light"]', "row 1: .* looks like a list of gold strings; call the column"),
        ("answer", json.dumps(TRIVIA), "row 1: .* looks like a list of gold strings"),
    ],
)
def test_other_forms_of_answers_are_refused(tmp_path: Path, column: str, cell: Any, problem: str) -> None:
    path = write_parquet(tmp_path / "d.parquet", {"question": ["Q?"], column: [cell]})
    with pytest.raises(UserError, match=problem):
        rows(str(path))


def test_a_question_or_a_target_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", {"question": [["a", "b"]], "answer": ["x"]})
    with pytest.raises(UserError, match="row 1: the question is a list"):
        rows(str(path))
    path = write_parquet(tmp_path / "d.parquet", {"question": ["Q?"], "answers": [["x"]], "answer": [["y", "z"]]})
    with pytest.raises(UserError, match="row 1: the answer is a list"):
        rows(str(path))
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(json.dumps([{"instruction": "Add.", "output": ["5", "five"]}]))
    with pytest.raises(UserError, match="record 1: the output is a list"):
        rows(f"alpaca:{alpaca}")


def test_gold_strings_in_cells_of_a_csv(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "d.csv",
        ["question", "answers", "answer"],
        ["A?", '["Paris", "City of Light"]', "It is Paris."],
        ["B?", "['Paris | Texas']", "It is."],
        ["C?", "4.0", "4.0"],
        ["D?", "4.0 | four", "4.0 of them."],
        ["E?", "NaN", ""],
    )
    found = [(row.answers, row.answer) for row in rows(str(path))]
    assert found[:2] == [(("Paris", "City of Light"), "It is Paris."), (("Paris | Texas",), "It is.")]
    assert found[2:] == [(("4",), "4"), (("4.0", "four"), "4.0 of them."), ((), "")]
    path = write_csv(tmp_path / "e.csv", ["question", "answer"], ["A?", "4.0"], ["B?", '["a", "b"]'])
    with pytest.raises(UserError, match=r"e\.csv:3: the answer '\[\"a\", \"b\"\]' looks like a list"):
        rows(str(path))
    path = write_csv(tmp_path / "f.csv", ["question", "answers"], ["A?", "['a' 'b']"])
    with pytest.raises(UserError, match=r"f\.csv:2: .* is no JSON"):
        rows(str(path))


@pytest.mark.parametrize("cells", [["A?", "Rome", "Milan"], ["A?"]])
def test_a_csv_row_of_another_length_than_the_header_is_refused(tmp_path: Path, cells: list[str]) -> None:
    path = write_csv(tmp_path / "d.csv", ["question", "answer"], ["B?", "b"], cells)
    with pytest.raises(UserError, match=rf"d\.csv:3: {len(cells)} cells, the first line has 2; put"):
        rows(str(path))


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", ["question", "answer", "Answer"], ["A?", "a", "b"])
    with pytest.raises(UserError, match=r"d\.csv has the column 'answer' twice"):
        rows(str(path))


# -- forms of recordings ----------------------------------------------------------------------------------------------
def test_samples_in_a_table_are_a_recording(tmp_path: Path) -> None:
    samples = tone(0.5, 8_000)
    columns = {"question": ["A?"], "answer": ["a"], "audio": [{"array": list(samples), "sampling_rate": 8_000}]}
    path = write_parquet(tmp_path / "d.parquet", columns)
    (row,) = rows(str(path))
    assert isinstance(row.audio, bytes)
    found, rate = soundfile.read(io.BytesIO(row.audio), dtype="float64")
    assert rate == 8_000
    assert np.array_equal(found, samples.astype(np.float32))
    (example,) = load_examples(str(path), "any", audio=tmp_path / "audio")
    assert example.audio is not None
    assert soundfile.info(str(example.audio)).frames == 8_000  # half a second at 16 kHz


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ({"array": [0.1, 0.2]}, "sampling_rate is None"),
        ({"array": [0, 3000, -32768], "sampling_rate": 16_000}, "1 dimensions of type int64; give one channel"),
        ({"array": [0.5, 3000.0], "sampling_rate": 16_000}, "array goes up to 3000; scale it"),
        ({"array": [[0.1], [0.2]], "sampling_rate": 16_000}, "2 dimensions"),
        ([0.1, 0.2], "a list without its rate"),
        ({"file": "x.wav"}, "a mapping with the keys 'file'"),
        ("data:audio/wav;base64,UklGRg==", r"the recording is an address \(data:…\); save it as a file"),
        ("https://example.org/x.wav", r"an address \(https://…\)"),
        ("../../etc/x.wav", r"the path '\.\./\.\./etc/x\.wav' leaves the folder"),
        ("a/../../x.wav", "leaves the folder"),
    ],
)
def test_a_recording_in_another_form_is_refused(tmp_path: Path, cell: Any, problem: str) -> None:
    path = write_parquet(tmp_path / "d.parquet", {"question": ["A?"], "answer": ["a"], "audio": [cell]})
    with pytest.raises(UserError, match=f"row 1: .*{problem}"):
        rows(str(path))


def test_a_path_that_leaves_its_folder_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(wav())
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "m.jsonl").write_text('{"id": "a", "question": "A?", "answer": "a", "audio": "../x.wav"}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:1: the path '\.\./x\.wav' leaves the folder .*set; move"):
        rows(f"manifest:{folder / 'm.jsonl'}")
    table = write_csv(folder / "d.csv", ["question", "answer", "audio"], ["A?", "a", "../x.wav"])
    with pytest.raises(UserError, match=r"d\.csv:2: the path '\.\./x\.wav' leaves"):
        rows(str(table))
    write_csv(folder / "metadata.csv", ["file_name", "question", "answer"], ["../x.wav", "A?", "a"])
    with pytest.raises(UserError, match=r"metadata\.csv:2: the path"):
        rows(f"audio_folder:{folder}")
    # Absolute ones are kept, and so are those that come back.
    table = write_csv(folder / "d.csv", ["question", "answer", "audio"], ["A?", "a", str(tmp_path / "x.wav")])
    assert rows(str(table))[0].audio == tmp_path / "x.wav"
    table = write_csv(folder / "d.csv", ["question", "answer", "audio"], ["A?", "a", "a/../x.wav"])
    assert rows(str(table))[0].audio == folder / "a" / ".." / "x.wav"


@pytest.mark.parametrize("name", ["audio_path", "wav", "path", "File_Name", "question_audio", "recordings", "speech"])
def test_recordings_in_a_column_that_is_not_read_are_an_error(tmp_path: Path, name: str) -> None:
    table = write_csv(tmp_path / "d.csv", ["question", "answer", name], ["A?", "a", "x.wav"])
    with pytest.raises(UserError, match=rf"d\.csv has no column 'audio' but '{name}', which is not read; rename"):
        rows(str(table))
    path = write_parquet(tmp_path / "d.parquet", {"question": ["A?"], "answer": ["a"], name: [wav()]}, name)
    with pytest.raises(UserError, match=f"no column 'audio' but '{name}'"):
        rows(str(path))
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "A.", "output": "a", name: "x.wav"}]))
    with pytest.raises(UserError, match=f"no column 'audio' but '{name}'"):
        rows(f"alpaca:{tmp_path / 'alpaca.json'}")


def test_columns_that_only_sound_like_recordings_are_passed_over(tmp_path: Path) -> None:
    names = ["wavelength", "part_of_speech", "soundness", "profile", "xpath"]
    table = write_csv(tmp_path / "d.csv", ["question", "answer", *names], ["A?", "a", *names])
    assert len(rows(str(table))) == 1
    both = write_csv(tmp_path / "e.csv", ["question", "answer", "audio", "answer_audio"], ["A?", "a", "", "b.wav"])
    assert len(rows(str(both))) == 1  # there is an audio column: the other is something else


def test_recordings_in_a_format_that_is_not_decoded_are_rows_too(tmp_path: Path) -> None:
    for name in ("a.wav", "b.m4a"):
        (tmp_path / name).write_bytes(wav() if name == "a.wav" else b"\x00\x00\x00\x20ftypM4A ")
        (tmp_path / name).with_suffix(".txt").write_text("What?\nThat.\n")
    assert [row.audio for row in rows(str(tmp_path))] == [tmp_path / "a.wav", tmp_path / "b.m4a"]
    with pytest.raises(UserError, match=r"b\.m4a cannot be read .*convert it to WAV or FLAC"):
        load_examples(str(tmp_path), "train")
