"""Question sets by name or path: `open_table` opens any of them row by row, `load_examples` reads one as it is.

docs/data.md lists the sources and their splits. Files and folders are recognized by what they hold; a prefix says it
outright. `SOURCE + SOURCE` is several, one after the other, in the same split.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from palimpsest.data.examples import Example, require_good_audio, require_limit
from palimpsest.data.filters import NO_LIMITS, Problem, decode, store, store_as_it_is, take
from palimpsest.data.local import (
    LLAMA_TABLE,
    METADATA,
    WEB_FILES,
    alpaca,
    audio_folder,
    is_audio_folder,
    llama_questions,
    manifest,
    own_csv,
    web_questions,
)
from palimpsest.data.parquet import HUB, hub_table, local_table
from palimpsest.data.rows import Names, Table, joined
from palimpsest.files import UserError

FACTS = Path(__file__).parent / "facts"
JOIN = " + "
FaultyAudio: TypeAlias = Literal["error", "wrong"]

Reader = Callable[[Path, str], Table]  # path, split → its rows


def load_examples(
    source: str,
    split: str,
    limit: int | None = None,
    seed: int | None = None,
    audio: Path | None = None,
    faulty_audio: FaultyAudio = "error",
) -> list[Example]:
    """Read one split of a question set as it is, in its own order: what is faulty in it is an error.

    Later turns of published conversations are passed over. For data that needs filtering use `palimpsest data prepare`.

    Args:
        source: a name, path or prefix of docs/data.md.
        split: e.g. "train", "heldout" or "test"; a manifest file is one split and takes any name.
        limit: at most this many examples; with None all.
        seed: with None the first `limit` are kept, with a number a random choice, in which a smaller limit
            keeps a part of what a larger one keeps.
        audio: folder for recordings that stand inside a table, for questions that are to be asked in speech: then every
            recording is decoded and checked. With None only text is asked for: those inside tables are left out, of
            files the header is looked at.
        faulty_audio: what follows from a recording that is broken, silent, cut short, shorter than 0.2 s or longer than
            30 s: an "error", or the example gets a `fault` and counts as "wrong" when it is asked in speech.

    Raises:
        UserError: the source or split does not exist, or its content is not as expected.
    """
    require_limit(limit, source)
    table = open_table(source, split)
    names, strict = Names(table), f"{source} with `palimpsest data prepare`,"
    chosen: dict[int, str] | None = None  # position → id, where not simply the first are taken
    if limit is not None and seed is not None:
        rows = table.read(0, None, False)
        found = ((row.position, take(row, names(row), NO_LIMITS, strict=strict)) for row in rows)
        usable = [(position, example.id) for position, example in found if isinstance(example, Example)]
        chosen = dict(usable[i] for i in choose(len(usable), limit, seed))

    place, faults = "", list[str]()  # of the row being taken

    def keep(recording: Path | bytes) -> Path | Problem | None:
        if audio is None:
            return recording if isinstance(recording, Path) else None
        if isinstance(recording, Path):
            found = decode(recording, NO_LIMITS)
            kept = found if isinstance(found, tuple) else recording
        else:
            kept = store(recording, audio, NO_LIMITS)
        if isinstance(kept, Path):
            return kept
        if faulty_audio == "error":
            raise UserError(
                f"{place}: {kept[0]} ({kept[1]}); correct or remove it, or, for a task, count it as wrong with "
                "--faulty-audio wrong (in a recipe: faulty_audio: wrong)."
            )
        faults.append(": ".join(kept))
        return recording if isinstance(recording, Path) else store_as_it_is(recording, audio)

    examples: list[Example] = []
    for row in table.read(0, chosen, audio is not None):
        name = names(row) if chosen is None else chosen[row.position]
        place, faults = row.where, []
        example = take(row, name, NO_LIMITS, keep, strict)
        if isinstance(example, Example):
            example = replace(example, fault=faults[0] if faults else None)
            if faulty_audio == "error":
                require_good_audio(example, row.where)
            examples.append(example)
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{table.where} holds no example; check the source.")
    return examples


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
    if len(parts := parts_of(source)) > 1:
        return joined([open_table(part, split) for part in parts])
    if (table := hub_table(source, split)) is not None:
        return table
    reader, path = _reader(source)
    table = reader(path, split)
    return table if table.name else replace(table, name=source, where=f"{source}, split {split}")


def parts_of(source: str) -> list[str]:
    """The sources that are one with JOIN between them; a path that holds JOIN in a name is one source."""
    whole = any(Path(path).expanduser().exists() for path in (source, source.partition(":")[2]) if path)
    return [source] if whole else [part.strip() for part in source.split(JOIN)]


def is_on_hub(source: str) -> bool:
    """Whether the hub is asked for a source, or for a part of it."""
    return any(part.partition("@")[0] in HUB for part in parts_of(source))


def _reader(source: str) -> tuple[Reader, Path]:
    """What reads the source, by its prefix or by what the file or folder holds."""
    if source == "facts":
        return manifest, FACTS
    prefix, _, rest = source.partition(":")
    if prefix in READERS and prefix != source:
        return READERS[prefix], Path(rest).expanduser()
    path = Path(source).expanduser()
    if (kind := _kind(path)) is not None:
        return READERS[kind], path
    found = "holds no question set that is known" if path.is_dir() else "does not exist"
    raise UserError(
        f"The source {source!r} {found}; use facts, a manifest (.jsonl), a table (.csv, .parquet), a folder of "
        f"recordings, of Llama Questions or of WebQuestions, a hub name ({', '.join(HUB)}), "
        f"or one of the prefixes {', '.join(READERS)} followed by a colon and a path."
    )


def _kind(path: Path) -> str | None:
    if path.is_file():
        suffix = path.suffix.lower()[1:]
        return suffix if suffix in ("csv", "parquet") else "manifest"
    if not path.is_dir():
        return None
    signs: dict[str, Callable[[], bool]] = {
        "manifest": lambda: any(file.name not in METADATA for file in path.glob("*.jsonl")),
        "audio_folder": lambda: is_audio_folder(path),
        "llama_questions": lambda: (path / LLAMA_TABLE).is_file(),
        "web_questions": lambda: any((path / name).is_file() for name in WEB_FILES.values()),
        "parquet": lambda: _is_parquet(path),
        "csv": lambda: any(path.glob("*.csv")),
    }
    return next((kind for kind, is_it in signs.items() if is_it()), None)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" or (
        path.is_dir() and not (path / LLAMA_TABLE).is_file() and any(path.rglob("*.parquet"))
    )


def _llama_questions(path: Path, split: str) -> Table:
    return local_table("llama_questions", path, split) if _is_parquet(path) else llama_questions(path, split)


READERS: dict[str, Reader] = {
    "manifest": manifest,
    "llama_questions": _llama_questions,
    "web_questions": web_questions,
    "csv": own_csv,
    "parquet": partial(local_table, "table"),
    "audio_folder": audio_folder,
    "alpaca": alpaca,
    **{kind: partial(local_table, kind) for kind in ("voice_assistant", "spoken_alpaca", "spoken_web_questions")},
}
