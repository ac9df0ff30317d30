from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_files import BROKEN, encoded, tone, wav, write_parquet
from palimpsest.data.examples import Example, read_manifest, write_manifest
from palimpsest.data.sources import load_examples
from palimpsest.files import UserError

SHARED = Path(os.environ.get("PALIMPSEST_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def llama_folder(folder: Path, lines: list[str]) -> Path:
    """The published layout: carriage returns, no line end after the last line, 16 kHz recordings."""
    header = "Questions\tAnswer\tWav Filename"
    (folder / "llama_questions_300.tsv").write_bytes("\r\n".join([header, *lines]).encode())
    for number in range(1, len(lines) + 1):
        soundfile.write(folder / f"{number}.wav", np.zeros(160, np.float32), 16_000)
    return folder


LLAMA_LINES = [
    "Which bird is fastest? \tPeregrine falcon \t1.wav",
    '"Emma" was written by whom?\tJane Austen\t2.wav',
    "Which bird is fastest?\tPeregrine falcon\t3.wav",
]


def test_llama_questions_keeps_the_duplicate_and_drops_blanks(tmp_path: Path) -> None:
    first, second, third = load_examples(str(llama_folder(tmp_path, LLAMA_LINES)), "test")
    assert first.question == third.question == "Which bird is fastest?"
    assert first.answers == ("Peregrine falcon",)
    assert first.answer == "Peregrine falcon"
    assert second.question == '"Emma" was written by whom?'  # quotation marks are part of the question
    assert [first.id, second.id, third.id] == [f"llama_questions-{n}" for n in (1, 2, 3)]
    assert third.audio == tmp_path / "3.wav"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["Q?\t\t1.wav"], r"300\.tsv:2: a cell is empty"),
        (["Q?\tA"], r"300\.tsv:2: a cell is empty"),
        (["Q?\tA\t1.wav", "P?\tA\t1.wav"], r"300\.tsv:3: the recording 1\.wav is used twice"),
        (["Q?\tA\t9.wav"], r"9\.wav does not exist"),
    ],
)
def test_llama_questions_problems_are_told(tmp_path: Path, lines: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_examples(f"llama_questions:{llama_folder(tmp_path, lines)}", "test")


def test_llama_questions_needs_its_columns_its_table_and_its_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no split 'train'; it has: test"):
        load_examples(str(llama_folder(tmp_path, LLAMA_LINES)), "train")
    (tmp_path / "llama_questions_300.tsv").write_text("Questions\tAnswers\tWav Filename\n", encoding="utf-8")
    with pytest.raises(UserError, match="no column 'Answer'"):
        load_examples(str(tmp_path), "test")
    with pytest.raises(UserError, match=r"300\.tsv does not exist"):
        load_examples(f"llama_questions:{tmp_path / 'none'}", "test")


def web_folder(folder: Path, records: object) -> Path:
    (folder / "trainmodel.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


WEB = [
    {"qId": "wqr1", "qText": "what does jamaican people speak?", "answers": ["Jamaican Creole", "English "]},
    {"qId": "wqr2", "qText": "who is padmé?", "answers": ["Padmé Amidala"]},
]


def test_web_questions_trains_on_the_first_gold_and_scores_with_all(tmp_path: Path) -> None:
    first, second = load_examples(str(web_folder(tmp_path, WEB)), "train")
    assert first == Example(
        "web_questions-wqr1", "what does jamaican people speak?", ("Jamaican Creole", "English"), "Jamaican Creole"
    )
    assert second.answer == "Padmé Amidala"


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ({"a": 1}, "dict instead of a list"),
        ([WEB[0], {"qId": "x", "qText": "q"}], "record 2 lacks qId, qText or answers"),
        ([{"qId": "x", "qText": "q", "answers": []}], "record 1 lacks"),
        ([{"qId": "x", "qText": " ", "answers": ["a"]}], "record 1 lacks"),
        ([{"qId": "x", "qText": "q", "answers": [1]}], "record 1 lacks"),
        ([WEB[0], WEB[0]], "record 2 has the qId of another"),
    ],
)
def test_web_questions_problems_are_told(tmp_path: Path, records: object, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_examples(str(web_folder(tmp_path, records)), "train")


def test_web_questions_splits_and_broken_files(tmp_path: Path) -> None:
    web_folder(tmp_path, WEB)
    with pytest.raises(UserError, match="no split 'heldout'; it has: train, val, test"):
        load_examples(str(tmp_path), "heldout")
    with pytest.raises(UserError, match=r"val\.json does not exist"):
        load_examples(str(tmp_path), "val")
    (tmp_path / "trainmodel.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON"):
        load_examples(str(tmp_path), "train")


def numbered(folder: Path, n: int = 20, name: str = "train") -> Path:
    path = folder / f"{name}.jsonl"
    write_manifest(path, [Example(f"{i:03d}", f"Question {i}?", ("A",), "A") for i in range(n)])
    return path


def test_a_manifest_is_read_as_file_with_prefix_or_by_split_in_a_folder(tmp_path: Path) -> None:
    path = numbered(tmp_path)
    ways = [load_examples(source, "train") for source in (str(path), f"manifest:{path}", str(tmp_path))]
    assert ways[0] == ways[1] == ways[2]
    assert len(ways[0]) == 20
    with pytest.raises(UserError, match="no split 'test'; it has: train"):
        load_examples(str(tmp_path), "test")


def test_a_limit_takes_the_first_or_a_seeded_choice_that_grows(tmp_path: Path) -> None:
    source = str(numbered(tmp_path))

    def ids(limit: int | None, seed: int | None = None) -> list[str]:
        return [example.id for example in load_examples(source, "train", limit, seed)]

    assert ids(3) == ["000", "001", "002"]
    assert ids(5, seed=1) == ids(5, seed=1) != ids(5, seed=2)
    assert ids(5, seed=1) == sorted(ids(5, seed=1))  # in the set's own order
    assert set(ids(5, seed=1)) < set(ids(9, seed=1))
    assert ids(99, seed=1) == ids(None, seed=1) == ids(None)
    with pytest.raises(UserError, match="limit of 0"):
        ids(0)


def test_what_is_no_source_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'fact' does not exist; use facts, a manifest"):
        load_examples("fact", "train")
    with pytest.raises(UserError, match="holds no question set"):
        load_examples(str(tmp_path), "train")
    with pytest.raises(UserError, match=r"'web:.*' does not exist"):
        load_examples(f"web:{tmp_path}", "train")


def test_a_missing_recording_is_reported_with_file_and_line_where_it_is_asked_for(tmp_path: Path) -> None:
    lines = [Example(name, f"{name}?", ("A",), "A", tmp_path / "no.wav" if name == "b" else None) for name in "abc"]
    write_manifest(tmp_path / "m.jsonl", lines)
    (tmp_path / "t.csv").write_text("id,question,answer,audio\na,A?,x,\nb,B?,x,no.wav\n", encoding="utf-8")
    for file in ("m.jsonl", "t.csv"):
        line = 2 if file == "m.jsonl" else 3
        with pytest.raises(UserError, match=rf"{file}:{line}: the audio file .*no\.wav does not exist"):
            load_examples(str(tmp_path / file), "any")
        assert [e.id for e in load_examples(str(tmp_path / file), "any", 1)] == ["a"]


def test_every_source_keeps_what_a_manifest_says(tmp_path: Path) -> None:
    """Alone and joined to another: nothing of an example is lost on the way through rows."""
    example = Example("a~1", "A?", ("x", "y"), "It is x.", None, "anna", "k", "speed=1.1")
    write_manifest(tmp_path / "m.jsonl", [example])
    assert load_examples(str(tmp_path / "m.jsonl"), "train") == [example]
    assert load_examples(f"facts + {tmp_path / 'm.jsonl'}", "train")[-1] == example


def test_ids_never_hold_a_path(tmp_path: Path) -> None:
    for name in ("llama", "web"):
        (tmp_path / name).mkdir()
    llama_folder(tmp_path / "llama", LLAMA_LINES)
    web_folder(tmp_path / "web", WEB)
    for source, split in (("facts", "heldout"), (tmp_path / "llama", "test"), (tmp_path / "web", "train")):
        assert not any("/" in example.id for example in load_examples(str(source), split))


@pytest.mark.data
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the development data is not at {SHARED}")
def test_the_published_sets() -> None:
    llama = load_examples(f"llama_questions:{SHARED / 'llama_questions'}", "test")
    assert len({example.id for example in llama}) == 300
    assert Counter(Counter(example.question for example in llama).values()) == {1: 298, 2: 1}
    assert all(example.question == example.question.strip() for example in llama)
    sizes = {split: len(load_examples(str(SHARED / "web_questions"), split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 2834, "val": 755, "test": 2032}


def test_a_path_that_holds_a_plus_is_one_source(tmp_path: Path) -> None:
    folder = tmp_path / "a + b"
    folder.mkdir()
    (folder / "c + d.jsonl").write_text('{"id": "a", "question": "A?", "answer": "a"}\n')
    for source in (folder / "c + d.jsonl", f"manifest:{folder / 'c + d.jsonl'}"):
        assert [example.id for example in load_examples(str(source), "any")] == ["a"]


# -- recordings of questions that are asked in speech -----------------------------------------------------------------
FAULTS = {**BROKEN, "opposite channels": encoded(np.stack([tone(), -tone()], 1))}


@pytest.mark.parametrize("reason", FAULTS)
@pytest.mark.parametrize("inside", [True, False])
def test_a_faulty_recording_of_a_task_is_an_error_or_said_to_be_one(tmp_path: Path, reason: str, inside: bool) -> None:
    (tmp_path / "bad.wav").write_bytes(FAULTS[reason])
    (tmp_path / "good.wav").write_bytes(wav())
    cells = [wav(), FAULTS[reason]] if inside else ["good.wav", "bad.wav"]
    columns = {"id": ["g", "b"], "question": ["A?", "B?"], "answer": ["a", "b"], "audio": cells}
    source, folder = str(write_parquet(tmp_path / "t.parquet", columns, "audio")), tmp_path / "audio"
    found = "silent audio" if reason == "opposite channels" else reason
    with pytest.raises(UserError, match=rf"row 2: {found} \(.*\); correct or remove it, or, for a task, count it"):
        load_examples(source, "test", audio=folder)
    good, bad = load_examples(source, "test", audio=folder, faulty_audio="wrong")
    assert good.fault is None
    assert bad.fault is not None
    assert bad.fault.startswith(f"{found}: ")
    assert bad.audio is not None
    assert bad.audio.read_bytes() == FAULTS[reason]  # there is a recording: no voice speaks it instead
    # As text it does not matter, but for what a header says.
    assert [e.fault for e in load_examples(source, "test", faulty_audio="wrong")] == [None, None]


def test_a_fault_travels_in_the_manifest_and_its_file_is_not_opened(tmp_path: Path) -> None:
    example = Example("a", "A?", ("a",), "a", tmp_path / "gone.wav", fault="broken audio: gone")
    write_manifest(tmp_path / "m.jsonl", [example])
    assert read_manifest(tmp_path / "m.jsonl") == [example]
