"""General text of the user's: plain text, JSON lines, parquet files or a hub set with a column `text`.

What is measured on it is the loss of the text as it is, so a text is kept to the letter; only line ends and the blank
space around it go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from palimpsest.data.parquet import BATCH_ROWS, hub_files, local_files, open_parquet
from palimpsest.data.rows import json_objects, open_text
from palimpsest.files import UserError, hash_value

PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
COLUMN, DOCUMENT = "text", "document"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Text:
    id: str
    text: str
    document: str  # texts of one document are alike, so an interval draws them together


def read_texts(source: str, split: str = "test", limit: int | None = None) -> list[Text]:
    """The texts of a source in their order, blank ones left out.

    Args:
        source: a .jsonl file of objects with "text" and perhaps "document"; a .parquet file or a folder of them with
            these columns; OWNER/NAME[@REVISION] of a hub set; any other file is plain text, one text a paragraph
            (blank lines between them), or one a line where no line is blank.
        split: of a folder or hub set.
        limit: only the first texts; None: all.

    Raises UserError for a source that is not there, a row whose text is no text, and fewer than two texts.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".jsonl":
        found = _of_lines(path)
    elif path.is_dir() or path.suffix.lower() == ".parquet":
        found = _of_parquet(local_files(path, split), source)
    elif path.is_file():
        found = ((f"{path}, text {n}", text, None) for n, text in enumerate(_of_plain(path), 1))
    elif HUB_NAME.fullmatch(source) and not path.exists():
        name, _, revision = source.partition("@")
        found = _of_parquet(hub_files(name, revision or None, split)[0], source)
    else:
        raise UserError(
            f"The text {source!r} does not exist; give a file of text, .jsonl or .parquet with a column {COLUMN!r}, or "
            "the name of a hub set."
        )
    whole = ((where, text.strip(), document) for where, text, document in found)
    kept = islice(((text, document) for _, text, document in whole if text), limit)
    texts = [Text(f"{n}", text, document or f"#{n}") for n, (text, document) in enumerate(kept)]
    if len({text.document for text in texts}) < 2:
        raise UserError(
            f"{source} holds {len(texts)} texts of {len({text.document for text in texts})} documents, and an interval "
            "needs two documents; separate paragraphs by blank lines, or give more text."
        )
    return texts


def texts_version(texts: Sequence[Text]) -> str:
    """Identifies the texts; losses on others are not comparable."""
    return hash_value([[text.text, text.document] for text in texts])[:12]


def windows(tokens: Sequence[int], before: Sequence[int], window: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, tokens predicted from it) of each window; every token is predicted once."""
    for start in range(0, len(tokens), window):
        yield list(before if start == 0 else tokens[start - 1 : start]), list(tokens[start : start + window])


Found = Iterator[tuple[str, str, str | None]]  # where it stands, text, document


def _of_plain(path: Path) -> list[str]:
    with open_text(path) as file:
        content = file.read().replace("\r\n", "\n")
    paragraphs = PARAGRAPH.split(content.strip())
    return paragraphs if len(paragraphs) > 1 else content.splitlines()


def _of_lines(path: Path) -> Found:
    for number, record in json_objects(path):
        yield _row(record, f"{path}:{number}")


def _row(record: dict[str, Any], where: str) -> tuple[str, str, str | None]:
    text, document = record.get(COLUMN), record.get(DOCUMENT)
    if not isinstance(text, str):
        raise UserError(f"{where}: {COLUMN!r} is no text but {text!r}; give every row a string there.")
    return where, text, None if document is None else str(document)


def _of_parquet(files: list[str], source: str) -> Found:
    n = 0
    for url in files:
        file = open_parquet(url)
        known = file.schema_arrow.names
        if COLUMN not in known:
            raise UserError(f"{source} has no column {COLUMN!r}, only {', '.join(known[:8])}; rename one of them.")
        columns = [column for column in (COLUMN, DOCUMENT) if column in known]
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            for record in batch.to_pylist():
                n += 1
                yield _row(record, f"{source}, row {n}")
