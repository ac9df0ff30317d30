"""Question sets by name or path, read into examples: one function, `load_examples`.

| source | what | splits |
|---|---|---|
| `facts` | the built-in set: short questions of common knowledge, without audio | train, heldout |
| `PATH.jsonl` | a manifest, see records.py | one file is one split, whatever its name |
| `PATH/` with `SPLIT.jsonl` files | a folder of manifests | the names of the files |
| `PATH/` with `llama_questions_300.tsv` | Llama Questions, with audio | test |
| `PATH/` with `test.json` … | WebQuestions, text only | train, val, test |

Files and folders are recognized by what they hold; `manifest:PATH`, `llama_questions:PATH` and
`web_questions:PATH` say it outright.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from palimpsest.data.records import Example, check_audio, read_manifest
from palimpsest.rundir import UserError

FACTS = Path(__file__).parent / "facts"
LLAMA_TABLE = "llama_questions_300.tsv"
LLAMA_COLUMNS = ("Questions", "Answer", "Wav Filename")
WEB_FILES = {"train": "trainmodel.json", "val": "val.json", "test": "test.json"}


def load_examples(source: str, split: str, limit: int | None = None, seed: int | None = None) -> list[Example]:
    """Read one split of a question set, in its own order.

    Args:
        source: see the table above.
        split: e.g. "train", "heldout" or "test"; a manifest file is one split and takes any name.
        limit: at most this many examples; with None all.
        seed: with None the first `limit` are kept, with a number a random choice, in which a smaller limit
            keeps a part of what a larger one keeps.

    Raises:
        UserError: the source or split does not exist, or its content is not as expected.
    """
    if limit is not None and limit < 1:
        raise UserError(f"A limit of {limit} examples was asked of {source}; use a limit of 1 or more, or none.")
    reader, path = _find_reader(source)
    examples = reader(path, split)
    if limit is not None:
        order = list(range(len(examples)))
        if seed is not None:
            random.Random(seed).shuffle(order)
        examples = [examples[index] for index in sorted(order[:limit])]
    return examples


def _find_reader(source: str) -> tuple[Callable[[Path, str], list[Example]], Path]:
    if source == "facts":
        return _read_manifests, FACTS
    prefix, colon, rest = source.partition(":")
    if colon and prefix in READERS:
        return READERS[prefix], Path(rest).expanduser()
    path = Path(source).expanduser()
    if path.is_file() or (path.is_dir() and any(path.glob("*.jsonl"))):
        return _read_manifests, path
    if (path / LLAMA_TABLE).is_file():
        return _read_llama_questions, path
    if any((path / name).is_file() for name in WEB_FILES.values()):
        return _read_web_questions, path
    found = "holds no question set that is known" if path.is_dir() else "does not exist"
    raise UserError(
        f"The source {source!r} {found}; use facts, a manifest (.jsonl), a folder of Llama Questions or WebQuestions, "
        f"or one of the prefixes {', '.join(READERS)} followed by a colon and a path."
    )


def _read_manifests(path: Path, split: str) -> list[Example]:
    """A manifest file, or the one named after the split in a folder."""
    if not path.is_dir():
        return read_manifest(path)
    file = path / f"{split}.jsonl"
    if not file.is_file():
        present = ", ".join(sorted(other.stem for other in path.glob("*.jsonl"))) or "none"
        raise UserError(f"{path} has no split {split!r}; it has: {present}.")
    return read_manifest(file)


def _read_llama_questions(path: Path, split: str) -> list[Example]:
    """The table and its recordings. Gold answers are kept as published, blanks around them dropped.

    The published table has carriage returns, trailing blanks, and one question twice with two recordings. Ids
    are made of the recordings' names, so both stay.
    """
    if split != "test":
        raise UserError(f"Llama Questions has no split {split!r}; it has: test.")
    table = path / LLAMA_TABLE
    # Split by hand: quotation marks are part of a question, which the csv module would take for quoting.
    rows = [line.split("\t") for line in _read_text(table).split("\n")]
    header = [name.strip() for name in rows[0]]
    missing = [name for name in LLAMA_COLUMNS if name not in header]
    if missing:
        raise UserError(f"{table} has no column {missing[0]!r}; its first line must be {', '.join(LLAMA_COLUMNS)}.")
    columns = [header.index(name) for name in LLAMA_COLUMNS]
    examples: dict[str, Example] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        cells = [row[column].strip() if column < len(row) else "" for column in columns]
        if not all(cells):
            raise UserError(f"{table}:{number}: a cell is empty; every line needs {', '.join(LLAMA_COLUMNS)}.")
        question, answer, wav = cells
        example = Example(f"llama_questions-{Path(wav).stem}", question, (answer,), answer, audio=path / wav)
        if example.id in examples:
            raise UserError(f"{table}:{number}: the recording {wav} is used twice; give each line its own.")
        examples[example.id] = example
    check_audio(examples.values())
    return list(examples.values())


def _read_web_questions(path: Path, split: str) -> list[Example]:
    """Records {"qId", "qText", "answers"}; the target sentence is the first gold answer."""
    if split not in WEB_FILES:
        raise UserError(f"WebQuestions has no split {split!r}; it has: {', '.join(WEB_FILES)}.")
    file = path / WEB_FILES[split]
    try:
        records = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON ({error}); download it again.") from error
    if not isinstance(records, list):
        raise UserError(f"{file} holds a {type(records).__name__} instead of a list of records; download it again.")
    examples: dict[str, Example] = {}
    for number, record in enumerate(records, start=1):
        example = _web_example(record)
        if example is None or example.id in examples:
            problem = "lacks qId, qText or answers" if example is None else f"has the qId of another, {example.id}"
            raise UserError(f"{file}: record {number} {problem}; correct or remove it.")
        examples[example.id] = example
    return list(examples.values())


def _web_example(record: Any) -> Example | None:
    """None for a record that is not as published."""
    if not isinstance(record, dict) or not isinstance(record.get("answers"), list):
        return None
    texts = [record.get("qId"), record.get("qText"), *record["answers"]]
    if len(texts) < 3 or not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    name, question, *golds = (text.strip() for text in texts)
    return Example(f"web_questions-{name}", question, tuple(golds), golds[0])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path of the question set.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again.") from error


READERS: dict[str, Callable[[Path, str], list[Example]]] = {
    "manifest": _read_manifests,
    "llama_questions": _read_llama_questions,
    "web_questions": _read_web_questions,
}
