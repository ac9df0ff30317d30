from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.data.examples import MAX_AUDIO_SECONDS, Example, read_manifest, require_good_audio, write_manifest
from palimpsest.files import UserError

GOOD = {"id": "a", "question": "What is two plus two?", "answer": "Four."}


def manifest(folder: Path, *lines: object) -> Path:
    path = folder / "m.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def wav(path: Path, seconds: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(int(seconds * 16_000), np.float32), 16_000)
    return path


def test_answer_alone_is_the_gold_and_answers_alone_give_the_target(tmp_path: Path) -> None:
    only_golds = {"id": "b", "question": "Q?", "answers": ["four", "4"]}
    both = {"id": "c", "question": "Q?", "answer": "It is four.", "answers": ["four", "4"], "kind": "sum"}
    first, second, third = read_manifest(manifest(tmp_path, GOOD, only_golds, both))
    assert (first.answer, first.answers) == ("Four.", ("Four.",))
    assert (second.answer, second.answers) == ("four", ("four", "4"))
    assert (third.answer, third.answers, third.kind) == ("It is four.", ("four", "4"), "sum")
    assert first.audio is None
    assert first.kind is None


def test_blanks_carriage_returns_byte_order_mark_and_empty_lines_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": " a ", "question": "Q? ", "answer": " A"}\r\n\r\n')
    assert read_manifest(path) == [Example("a", "Q?", ("A",), "A")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{not json}", "not valid JSON"),
        ("[1, 2]", "list instead of a JSON object"),
        ({"question": "Q?", "answer": "A"}, '"id" is missing'),
        ({"id": " ", "question": "Q?", "answer": "A"}, '"id" is empty'),
        ({"id": 7, "question": "Q?", "answer": "A"}, '"id" is 7 but must be a string'),
        ({"id": "b", "answer": "A"}, '"question" is missing'),
        ({"id": "b", "question": "", "answer": "A"}, '"question" is empty'),
        ({"id": "b", "question": "Q?"}, 'neither "answer" nor "answers"'),
        ({"id": "b", "question": "Q?", "answer": "  "}, '"answer" is empty'),
        ({"id": "b", "question": "Q?", "answers": []}, '"answers" is empty'),
        ({"id": "b", "question": "Q?", "answers": ["x", " "]}, "holds an empty string"),
        ({"id": "b", "question": "Q?", "answers": "x"}, "must be a list of strings"),
        ({"id": "b", "question": "Q?", "answers": ["x", 4]}, "must be a list of strings"),
        ({"id": "b", "question": "Q?", "answer": ["x"]}, "must be a string"),
        ({"id": "b", "qestion": "Q?", "answer": "A"}, 'did you mean "question"'),
        ({"id": "b", "question": "Q?", "answer": "A", "zzz": 1}, 'unknown key "zzz"; use id, question'),
        ({"id": "a", "question": "Q?", "answer": "A"}, "already used on line 1"),
        ({"id": "b", "question": "Q?", "answer": "A", "audio": "no.wav"}, "does not exist"),
    ],
)
def test_a_bad_line_is_told_with_file_and_line(tmp_path: Path, line: object, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        read_manifest(manifest(tmp_path, GOOD, "", line))
    assert "m.jsonl:3: " in str(caught.value)
    assert problem in str(caught.value)


def test_lines_beyond_the_limit_are_checked_too(tmp_path: Path) -> None:
    path = manifest(tmp_path, GOOD, GOOD | {"id": "b"})
    assert [example.id for example in read_manifest(path, limit=1)] == ["a"]
    with pytest.raises(UserError, match="already used"):
        read_manifest(manifest(tmp_path, GOOD, GOOD), limit=1)
    with pytest.raises(UserError, match="limit of 0"):
        read_manifest(path, limit=0)


def test_missing_empty_or_binary_manifests_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="holds no example"):
        read_manifest(manifest(tmp_path, "", ""))
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_manifest(tmp_path / "m.jsonl")


def test_audio_is_relative_to_the_manifest_and_its_header_is_read(tmp_path: Path) -> None:
    wav(tmp_path / "audio" / "a.wav")
    row = GOOD | {"audio": "audio/a.wav", "voice": "someone"}
    (example,) = read_manifest(manifest(tmp_path, row), require_audio=True)
    assert example.audio == tmp_path / "audio" / "a.wav"
    assert example.voice == "someone"

    (tmp_path / "audio" / "a.wav").write_bytes(b"no audio")
    with pytest.raises(UserError, match=r"m\.jsonl:1: the audio file .*a\.wav cannot be read"):
        read_manifest(manifest(tmp_path, row))
    with pytest.raises(UserError, match='has no "audio"'):
        read_manifest(manifest(tmp_path, GOOD), require_audio=True)


def test_empty_and_overlong_audio_are_refused(tmp_path: Path) -> None:
    example = Example("a", "Q?", ("A",), "A", audio=wav(tmp_path / "a.wav", MAX_AUDIO_SECONDS))
    require_good_audio(example, "Example 'a'")
    require_good_audio(Example("b", "Q?", ("A",), "A"), "Example 'b'")
    wav(tmp_path / "a.wav", MAX_AUDIO_SECONDS + 0.1)
    with pytest.raises(UserError, match=r"Example 'a': .*lasts 30\.1 s"):
        require_good_audio(example, "Example 'a'")
    wav(tmp_path / "a.wav", MAX_AUDIO_SECONDS + 0.01)
    with pytest.raises(UserError, match=r"lasts 30\.01 s, longer than the limit of 30 s"):
        require_good_audio(example, "Example 'a'")
    wav(tmp_path / "a.wav", 0)
    with pytest.raises(UserError, match="is empty"):
        require_good_audio(example, "Example 'a'")


def test_a_folder_with_manifest_and_audio_can_be_moved(tmp_path: Path) -> None:
    inside = Example("a", "Q?", ("A",), "A", audio=wav(tmp_path / "old" / "audio" / "a.wav"))
    outside = Example("b", "Q?", ("A",), "A", audio=wav(tmp_path / "elsewhere" / "b.wav"))
    write_manifest(tmp_path / "old" / "m.jsonl", [inside, outside])
    moved = tmp_path / "deeper" / "new"
    moved.parent.mkdir()
    (tmp_path / "old").rename(moved)
    first, second = read_manifest(moved / "m.jsonl", require_audio=True)
    assert first.audio == moved / "audio" / "a.wav"
    assert second.audio == outside.audio


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)
example = st.builds(
    Example,
    id=text,
    question=text,
    answers=st.lists(text, min_size=1, max_size=3).map(tuple),
    answer=text,
    audio=st.none(),
    voice=st.none() | text,
    kind=st.none() | text,
)


@given(st.lists(example, min_size=1, max_size=5, unique_by=lambda item: item.id))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, examples: list[Example]) -> None:
    """Any text, with line separators such as U+2028 inside strings too."""
    path = tmp_path_factory.mktemp("manifest") / "m.jsonl"
    write_manifest(path, examples)
    assert read_manifest(path) == examples


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"id": "a", "question": "Q?", "answer": "A", "answer": "B"}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:1: the key 'answer' is there twice; remove one of the two"):
        read_manifest(tmp_path / "m.jsonl")
