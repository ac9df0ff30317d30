"""The samples file of an evaluation: one JSON line per question, safe to append to, to kill and to resume.

Beside `NAME.jsonl` stands `NAME.json`, the binding: what the rows are answers of. Rows of another task
version, modality, model or length are refused, never mixed in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, TypedDict

from palimpsest.evaluation.scoring import words
from palimpsest.rundir import UserError, read_json, write_json


class SampleRow(TypedDict):
    """One line of a samples file."""

    id: str
    question: str
    answers: list[str]
    prompt: str | None  # as the model saw it, template included
    prompt_tokens: int | None
    transcript: str | None  # of a cascade: what the recogniser heard
    response: str
    n_new_tokens: int
    verdicts: dict[str, bool]  # per metric
    empty: bool  # answered, but without a letter or digit
    refusal: bool  # see `is_refusal`
    loop: bool  # see `is_loop`
    failed: bool  # no answer could be had; counted as wrong
    error: str | None
    seconds: float  # the batch's time divided by its size


def resume(
    out: Path, binding: Mapping[str, Any], ids: Set[str], notice: Callable[[str], None] | None = None
) -> list[SampleRow]:
    """The complete rows of an earlier run of the same evaluation; [] and a new binding where there is none.

    A last line that was cut short is removed from the file, so that appending can go on, and `notice` is told.

    Raises:
        UserError: the rows belong to another evaluation, or a complete line is not a row of a question in
        `ids`.
    """
    sidecar = out.with_suffix(".json")
    if not out.exists():
        write_json(sidecar, binding)
        return []
    before = read_json(sidecar)
    differing = [
        f"{key} {before.get(key)!r} instead of {value!r}" for key, value in binding.items() if before.get(key) != value
    ]
    if differing:
        raise UserError(f"{out} holds another evaluation ({', '.join(differing)}); delete it or write elsewhere.")
    content = out.read_bytes()
    complete = content.rfind(b"\n") + 1
    rows = [_parse(line, f"{out}:{number}") for number, line in enumerate(content[:complete].splitlines(), 1)]
    _require_known_once(rows, ids, out)
    if complete < len(content):  # killed in the middle of a line: that question is asked again
        with out.open("r+b") as file:
            file.truncate(complete)
        if notice is not None:
            notice(
                f"{out}:{len(rows) + 1} was cut in the middle; {len(rows)} answers are kept, this one is asked again."
            )
    return rows


def read_finished(out: Path) -> tuple[dict[str, Any], list[SampleRow]]:
    """The binding and the rows of an evaluation that ran to its end; changes nothing.

    Raises:
        UserError: there is none, a line is cut or damaged, rows are missing, or an id comes twice.
    """
    if not out.is_file():
        raise UserError(f"{out} does not exist; run the evaluation first.")
    binding = read_json(out.with_suffix(".json"))
    content = out.read_bytes()
    rows = [_parse(line, f"{out}:{number}") for number, line in enumerate(content.splitlines(), 1)]
    _require_known_once(rows, {row["id"] for row in rows}, out)
    if len(rows) != binding.get("n"):
        raise UserError(
            f"{out} holds {len(rows)} of {binding.get('n')} answers; run the evaluation again, it continues there."
        )
    return binding, rows


def to_line(row: SampleRow) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _parse(line: bytes, where: str) -> SampleRow:
    try:
        row = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{where} is not JSON; restore the file, or delete it and run again.") from error
    if not isinstance(row, dict) or row.keys() != SampleRow.__annotations__.keys():
        raise UserError(f"{where} is not a row of answers; restore the file, or delete it and run again.")
    return row  # type: ignore[return-value]


def _require_known_once(rows: list[SampleRow], ids: Set[str], out: Path) -> None:
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        if row["id"] in seen or row["id"] not in ids:
            what = "is there a second time" if row["id"] in seen else "is not in the task"
            raise UserError(
                f"{out}:{number}: the id {row['id']!r} {what}; restore the file, or delete it and run again."
            )
        seen.add(row["id"])


# ------------------------------------------------------------------------------------------------------------
# What went wrong in an answer, by plain rules over its words
# ------------------------------------------------------------------------------------------------------------
_REFUSAL = re.compile(
    r"(?:(?:i am|i m|im) )?(?:very )?(?:sorry|afraid|unable to|not able to|not sure)\b"
    r"|i (?:apologi[sz]e|can ?not|can t|could not|couldn t|(?:don t|do not) (?:know|have))\b"
    r"|as an ai\b|unfortunately\b|it is not possible to\b"
)


def is_refusal(response: str) -> bool:
    """Whether the response opens with an English apology or with not knowing or not being able to."""
    return _REFUSAL.match(" ".join(words(response))) is not None


def is_loop(response: str) -> bool:
    """Whether some run of words stands at least three times in a row, over at least six words in all."""
    spoken = words(response)
    for width in range(1, len(spoken) // 3 + 1):
        repeats = max(3, -(-6 // width))  # one word six times, two or more words three times
        for start in range(len(spoken) - width * repeats + 1):
            if spoken[start : start + width * repeats] == spoken[start : start + width] * repeats:
                return True
    return False
