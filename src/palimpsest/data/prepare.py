"""`palimpsest data prepare`: any source → a folder with a manifest and its audio, a source for every command.

    OUT/SPLIT.jsonl            the manifest
    OUT/audio/??/*.flac        16 kHz mono, named by content, in folders of the first two digits
    OUT/dropped/SPLIT.jsonl    what was left out: id, where it stood, reason, detail
    OUT/prepared/SPLIT.json    source, options, counts

Rows are read, filtered, written and spoken a chunk at a time: of each row only its id stays in memory. After each chunk
its end is noted; started again with the same options, the work continues there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from palimpsest.data.cores import in_threads, n_cores
from palimpsest.data.examples import Example, require_limit
from palimpsest.data.filters import Dropped, Filters, Problem, counts, refuse_fault, require_some, store, take
from palimpsest.data.rows import Names, Row, identity_of
from palimpsest.data.sources import open_table
from palimpsest.data.speech import pool, speak
from palimpsest.data.splits import spoken_or_dropped
from palimpsest.data.voices import find_voices
from palimpsest.files import UserError, append_jsonl, is_file, read_json, read_jsonl, remove_left_over, write_json
from palimpsest.progress import Reporter

CHUNK = 512  # rows between two notes of how far the work is
NO_VOICE = "none"  # questions without a recording stay text


def prepare_data(
    source: str,
    out: Path,
    *,
    split: str,
    limit: int | None = None,
    strict: bool = False,
    voice: str = "hibari",
    workers: int | None = None,
    filters: Filters | None = None,
) -> Iterator[str]:
    """Write the manifest folder `out`; yields lines about the result.

    Args:
        limit: the first so many examples that pass the filters.
        strict: a faulty row is an error instead of being left out.
        voice: speaks what has no recording; "none" leaves it as text.
        workers: processes that speak, by default one for each core; recordings are stored by as many cores.

    Raises:
        UserError: a source that cannot be read, a folder that was prepared with other options, nothing left.
    """
    require_limit(limit, source)
    limits = filters or Filters()
    table = open_table(source, split)
    options = {
        **{"source": source, "split": split, "identity": identity_of(table), "voice": voice},
        **{"limit": limit, "strict": strict, "filters": asdict(limits)},
    }
    work = _Work(out, split, options)
    if work.is_finished:
        yield f"{out} was prepared before with these options"
        yield from _summary(read_json(work.report))
        return
    if voice != NO_VOICE:
        for speaker in find_voices(voice):
            speaker.version()  # a voice that is not installed is an error before the rows are read

    def keep(recording: Path | bytes) -> Path | Problem:
        return store(recording, work.audio, limits)

    def say(examples: Sequence[Example]) -> list[Example]:
        return speak(examples, work.audio, voice, speakers)

    def taken(named: tuple[Row, str]) -> tuple[int, Example | Dropped]:
        row, name = named
        return row.position + 1, take(row, name, limits, keep, reading)

    reading = table.where if strict else None
    cores = workers or n_cores()
    speaking = pool(cores) if cores > 1 else nullcontext(1)
    with speaking as speakers, Reporter(1).step(f"{source}, split {split}") as advance:
        names = Names(table, work.ids())
        rows, n_rows = table.read(work.n_rows, None, True), table.count()
        while limit is None or work.n_kept < limit:
            part = islice(rows, CHUNK if limit is None else min(CHUNK, limit - work.n_kept))
            found = list(in_threads(taken, ((row, names(row)) for row in part), cores))
            if not found:
                break
            position = found[-1][0]
            kept = [item for _, item in found if isinstance(item, Example)]
            dropped = [item for _, item in found if isinstance(item, Dropped)]
            if voice != NO_VOICE and any(example.audio is None for example in kept):
                kept, silent = spoken_or_dropped(kept, say)
                dropped += silent
                if reading is not None and silent:
                    refuse_fault(silent[0], reading)
            work.note(kept, dropped, position)
            advance(*((work.n_kept, limit) if limit is not None else (position, n_rows or position)))
    report = work.finish(table.where)
    yield f"{out / f'{split}.jsonl'}"
    yield from _summary(report)


def _summary(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['n_rows']} rows read, {report['n_kept']} kept, {sum(report['dropped'].values())} dropped"
    yield from (f"  {reason:<22} {n}" for reason, n in report["dropped"].items())


# ------------------------------------------------------------------------------------------------------------
# What is done
# ------------------------------------------------------------------------------------------------------------
@dataclass
class _Part:
    """A file of JSON lines that grows under another name than its last one."""

    final: Path
    size: int  # bytes at the last note

    @property
    def path(self) -> Path:
        return self.final.with_name(f".{self.final.stem}.part")

    def open(self) -> None:
        """Back to the last note: what was written after it by a killed run is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.size and not self.path.exists():
            self.final.replace(self.path)  # killed between renaming and removing the note
        with self.path.open("ab") as file:
            file.truncate(self.size)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        self.size = append_jsonl(self.path, rows)

    def rows(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8", newline="\n") as file:
            yield from map(json.loads, file)


class _Work:
    """The folder being prepared: how far it is, and with which options."""

    def __init__(self, out: Path, split: str, options: dict[str, Any]) -> None:
        if not split or any(character in split for character in "/\\"):
            raise UserError(f"The split {split!r} would name a file; give a name without slashes.")
        self.out, self.split, self.options = out, split, json.loads(json.dumps(options))
        self.audio, self.report = out / "audio", out / "prepared" / f"{split}.json"
        self.state = out / "prepared" / f".{split}.state.json"
        state = read_json(self.state) if self.state.exists() else {}
        self.is_finished = self.report.exists() and not state
        before = read_json(self.report) if self.is_finished else state
        for key, value in self.options.items() if before else ():
            if before["options"].get(key) != value:
                was = f"{before['options'].get(key)!r}, now it is {value!r}"
                what = "from a source that has changed since" if key == "identity" else f"with {key} {was}"
                raise UserError(f"{out} was prepared {what}; give another --out, or delete that folder.")
        self.n_rows, self.n_kept = state.get("n_rows", 0), state.get("n_kept", 0)
        # In the folder of the manifest, so that audio paths are relative to it from the start.
        self._kept = _Part(out / f"{split}.jsonl", state.get("kept_bytes", 0))
        self._left_out = _Part(out / "dropped" / f"{split}.jsonl", state.get("dropped_bytes", 0))
        self._parts = (self._left_out, self._kept)
        if self.is_finished:
            self._require_whole(before["n_kept"])
        if self._kept.final.exists() and not before:
            raise UserError(f"{self._kept.final} exists and was not made by this command; give another --out.")
        if state or (self.audio.is_dir() and not self.is_finished):
            remove_left_over(self.audio)
        for part in self._parts if state else ():
            part.open()

    def _require_whole(self, n_kept: int) -> None:
        """Raise UserError unless what was prepared before is still there: every row, every recording."""
        file, remedy = self._kept.final, f"delete {self.out} and prepare it again"
        rows = read_jsonl(file)
        if len(rows) != n_kept:
            raise UserError(f"{file} has {len(rows)} rows where {n_kept} were written; {remedy}.")
        for row in rows:
            recording = self.out / row["audio"] if row.get("audio") else None
            if recording is not None and not (is_file(recording) and recording.stat().st_size):
                raise UserError(f"The recording {recording} is empty or not there any more; {remedy}.")

    def ids(self) -> Iterator[str]:
        """Of all rows read so far."""
        return (row["id"] for part in self._parts if self.state.exists() for row in part.rows())

    def note(self, kept: Sequence[Example], dropped: Sequence[Dropped], n_rows: int) -> None:
        """`kept` and `dropped` are done, up to the row `n_rows`."""
        for part in () if self.state.exists() else self._parts:
            part.open()
        self._kept.append([example.to_row(self.out) for example in kept])
        self._left_out.append([item.to_row(self.split) for item in dropped])
        self.n_rows, self.n_kept = n_rows, self.n_kept + len(kept)
        state = {"n_rows": n_rows, "n_kept": self.n_kept, "options": self.options}
        write_json(self.state, {**state, "kept_bytes": self._kept.size, "dropped_bytes": self._left_out.size})

    def finish(self, where: str) -> dict[str, Any]:
        """Give the parts their names. Raises UserError when nothing was kept."""
        rows = self._left_out.rows() if self.state.exists() else ()
        dropped = counts(row["reason"] for row in rows)
        require_some(self.n_kept, dropped, where)
        report = {"options": self.options, "n_rows": self.n_rows, "n_kept": self.n_kept, "dropped": dropped}
        for part in self._parts:
            part.path.replace(part.final)
        write_json(self.report, report)
        self.state.unlink()  # last: with it gone the work is finished
        return report
