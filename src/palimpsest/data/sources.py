"""Question sets by name or path: `load_examples` reads one as it is, `open_table` row by row for filters and splits.

| source | what | splits |
|---|---|---|
| `facts` | the built-in set: short questions of common knowledge, without audio | train, heldout |
| `PATH.jsonl` | a manifest, see records.py | one file is one split, whatever its name |
| `PATH/` with `SPLIT.jsonl` files | a folder of manifests | the names of the files |
| `PATH.csv`, `PATH.parquet`, `csv:PATH`, `parquet:PATH` | a table of one's own, see own.py | one file is one split |
| `PATH/` with `SPLIT.csv` or parquet files | tables of one's own | the names of the files |
| `PATH/` with recordings and texts | a folder of recordings, see own.py | its sub-folders, or the folder |
| `alpaca:PATH.json` | an instruction set: instruction, input, output | one file is one split |
| `PATH/` with `llama_questions_300.tsv` | Llama Questions, with audio | test |
| `PATH/` with `test.json` … | WebQuestions, text only | train, val, test |
| `gpt-omni/VoiceAssistant-400K` and others | published spoken sets on the hub, see published.py | as there |
| `voice_assistant:PATH` and others | local parquet files of these sets | as there; one file is one split |

| `SOURCE + SOURCE` | several of the above, one after the other, in the same split | those they share |

Files and folders are recognized by what they hold; `manifest:PATH`, `audio_folder:PATH`, `llama_questions:PATH` and
`web_questions:PATH` say it outright.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from palimpsest.data.examples import Example, check_audio, read_manifest
from palimpsest.data.filters import Dropped, Filters, refuse, store, text_problem
from palimpsest.data.local import METADATA, alpaca, audio_folder, is_audio_folder, own_csv, own_parquet
from palimpsest.data.published import HUB, SCHEMAS, hub_table, local_table
from palimpsest.data.rows import Names, Row, Table, joined, listed
from palimpsest.files import UserError

FACTS = Path(__file__).parent / "facts"
JOIN = " + "
LLAMA_TABLE = "llama_questions_300.tsv"
LLAMA_COLUMNS = ("Questions", "Answer", "Wav Filename")
WEB_FILES = {"train": "trainmodel.json", "val": "val.json", "test": "test.json"}

ReadWhole = Callable[[Path, str, bool], list[Example]]  # path, split, check the recordings


def load_examples(
    source: str, split: str, limit: int | None = None, seed: int | None = None, audio: Path | None = None
) -> list[Example]:
    """Read one split of a question set as it is, in its own order: what is faulty in it is an error.

    Later turns of published conversations are passed over. For data that needs filtering use `palimpsest data prepare`.

    Args:
        source: see the table above.
        split: e.g. "train", "heldout" or "test"; a manifest file is one split and takes any name.
        limit: at most this many examples; with None all.
        seed: with None the first `limit` are kept, with a number a random choice, in which a smaller limit
            keeps a part of what a larger one keeps.
        audio: folder for recordings that stand inside a table; with None they are left out, for text only.

    Raises:
        UserError: the source or split does not exist, or its content is not as expected.
    """
    if limit is not None and limit < 1:
        raise UserError(f"A limit of {limit} examples was asked of {source}; use a limit of 1 or more, or none.")
    found = _find(source, split)
    if not isinstance(found, Table):
        examples = found(True)
        return [examples[i] for i in choose(len(examples), limit, seed)]
    names, positions = Names(found), {}
    for row in found.read(0, None, False):
        if (name := _meant(row, names, source)) is not None:
            positions[row.position] = name
            if seed is None and len(positions) == limit:
                break
    if not positions:
        raise UserError(f"{found.where} holds no example; check the source.")
    order = list(positions)
    chosen = {order[i] for i in choose(len(order), limit, seed)}
    return [
        row.example(positions[row.position], _recording(row, audio, source))
        for row in found.read(0, chosen, audio is not None)
    ]


def choose(n: int, limit: int | None, seed: int | None) -> list[int]:
    """Which of `n` examples a limit keeps, ascending: the first, or with a seed a random choice."""
    order = list(range(n))
    if seed is not None and limit is not None:
        random.Random(seed).shuffle(order)
    return sorted(order[:limit])


def open_table(source: str, split: str) -> Table:
    """One split of a source, row by row; recordings are not looked at. Raises UserError where it does not exist.

    A hub source is asked for only when rows are read.
    """
    found = _find(source, split)
    if isinstance(found, Table):
        return found
    return listed(source, f"{source}, split {split}", partial(_rows, found, source))


def _rows(read_whole: Callable[[bool], list[Example]], source: str) -> Iterator[Row]:
    for position, e in enumerate(read_whole(False)):
        where = f"{source}: example {e.id!r}"
        yield Row(position, where, e.question, e.answers, e.answer, e.id, e.audio, voice=e.voice, kind=e.kind)


def _meant(row: Row, names: Names, source: str) -> str | None:
    """The row's id, None for one to pass over. Raises UserError for a faulty one, whatever its length."""
    name = names(row)
    problem = text_problem(row, NO_LIMITS)
    if problem is None:
        return name
    dropped = Dropped(name, row.where, *problem)
    if dropped.is_fault:
        raise refuse(dropped, f"{source} with `palimpsest data prepare`,")
    return None


NO_LIMITS = Filters(max_question_words=10**9, max_answer_words=10**9, max_answer_characters=10**9)


def _recording(row: Row, folder: Path | None, source: str) -> Path | None:
    if row.audio is None or (folder is None and isinstance(row.audio, bytes)):
        return None
    if isinstance(row.audio, Path):
        check_audio([row.example(row.id or row.where, row.audio)])
        return row.audio
    assert folder is not None
    stored = store(row.audio, folder, NO_LIMITS)
    if isinstance(stored, Path):
        return stored
    raise refuse(Dropped("", row.where, *stored), f"{source} with `palimpsest data prepare`,")


def _find(source: str, split: str) -> Table | Callable[[bool], list[Example]]:
    """A table, or for sets that are read whole a function: whether to check the recordings → examples."""

    def whole(read: ReadWhole, path: Path) -> Callable[[bool], list[Example]]:
        return lambda check: read(path, split, check)

    if JOIN in source:
        return joined([open_table(part.strip(), split) for part in source.split(JOIN)])
    if source == "facts":
        return whole(_read_manifests, FACTS)
    if (table := hub_table(source, split)) is not None:
        return table
    prefix, colon, rest = source.partition(":")
    path = Path(rest if colon else source).expanduser()
    if colon and prefix in SCHEMAS and not (prefix in WHOLE and not _is_parquet(path)):
        return local_table(prefix, path, split)
    if colon and prefix in WHOLE:
        return whole(WHOLE[prefix], path)
    if colon and prefix in TABLES:
        return TABLES[prefix](path, split)
    path = Path(source).expanduser()
    if path.suffix.lower() in (".csv", ".parquet") and path.is_file():
        return TABLES[path.suffix.lower()[1:]](path, split)
    if path.is_file() or (path.is_dir() and any(file.name not in METADATA for file in path.glob("*.jsonl"))):
        return whole(_read_manifests, path)
    if path.is_dir() and is_audio_folder(path):
        return audio_folder(path, split)
    if (path / LLAMA_TABLE).is_file():
        return whole(_read_llama_questions, path)
    if any((path / name).is_file() for name in WEB_FILES.values()):
        return whole(_read_web_questions, path)
    if path.is_dir() and (_is_parquet(path) or any(path.glob("*.csv"))):
        return (own_parquet if _is_parquet(path) else own_csv)(path, split)
    found = "holds no question set that is known" if path.is_dir() else "does not exist"
    prefixes = ", ".join([*WHOLE, *TABLES, *(name for name in SCHEMAS if name not in WHOLE)])
    raise UserError(
        f"The source {source!r} {found}; use facts, a manifest (.jsonl), a table (.csv, .parquet), a folder of "
        f"recordings, of Llama Questions or of WebQuestions, a hub name ({', '.join(HUB)}), "
        f"or one of the prefixes {prefixes} followed by a colon and a path."
    )


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" or (
        path.is_dir() and not (path / LLAMA_TABLE).is_file() and any(path.rglob("*.parquet"))
    )


def _read_manifests(path: Path, split: str, check: bool) -> list[Example]:
    """A manifest file, or the one named after the split in a folder."""
    if not path.is_dir():
        return read_manifest(path, check=check)
    file = path / f"{split}.jsonl"
    if not file.is_file():
        present = ", ".join(sorted(other.stem for other in path.glob("*.jsonl"))) or "none"
        raise UserError(f"{path} has no split {split!r}; it has: {present}.")
    return read_manifest(file, check=check)


def _read_llama_questions(path: Path, split: str, check: bool) -> list[Example]:
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
    if check:
        check_audio(examples.values())
    return list(examples.values())


def _read_web_questions(path: Path, split: str, check: bool) -> list[Example]:
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


WHOLE: dict[str, ReadWhole] = {
    "manifest": _read_manifests,
    "llama_questions": _read_llama_questions,
    "web_questions": _read_web_questions,
}
TABLES: dict[str, Callable[[Path, str], Table]] = {
    "csv": own_csv,
    "parquet": own_parquet,
    "audio_folder": audio_folder,
    "alpaca": alpaca,
}
