"""The examples of a study: training and held-out data filtered and kept apart, task questions as they are.

In this order, so that the result does not depend on how the rows are ordered:

1. text filters on every row of the two sources (filters.py);
2. held-out examples: a split of its own, or the `heldout_examples` rows of the training source whose ids have the
   smallest hash, which neither the order of the rows nor other rows change;
3. training rows whose question stands in the held-out data, or is asked by a task, are left out;
4. limits: a seeded choice of what is left;
5. audio filters on the rows chosen; a row that fails is left out and not replaced, so that repairing it moves no other.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from palimpsest.data.cores import in_threads
from palimpsest.data.examples import Example
from palimpsest.data.filters import (
    IN_HELDOUT,
    IN_TASK,
    Dropped,
    Filters,
    Problem,
    counts,
    decode,
    normalised_question,
    require_some,
    store,
    take,
)
from palimpsest.data.notes import Found, Notes
from palimpsest.data.rows import Names, Row, Table, identity_of
from palimpsest.data.sources import FaultyAudio, choose, is_on_hub, load_examples, open_table
from palimpsest.files import UserError, hash_file, hash_value, is_file
from palimpsest.progress import Advance

TRAIN, HELDOUT = "train", "heldout"
READING = ".reading-"  # begins the names of notes


@dataclass(frozen=True)
class Split:
    """One split of a source, as a recipe names it."""

    source: str  # facts, a manifest, a table, a folder of recordings, a hub name …: docs/data.md
    split: str
    limit: Annotated[int, Ge(1)] | None = None
    voice: str | list[str] | None = None  # instead of speech.voice, for this split alone


@dataclass(frozen=True)
class TaskSplit(Split):
    """The questions of a task."""

    faulty_audio: FaultyAudio = "error"  # "wrong": a question whose recording cannot be asked is kept, and not right


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What is left of a row after its text was read: enough to choose, little enough to keep for every row."""

    position: int
    id: str
    question: str  # hash of the normalised question


def heldout_ids(ids: Sequence[str], n: int) -> set[str]:
    """The `n` ids with the smallest hash. An id added to `ids` moves at most one other."""
    return set(heapq.nsmallest(n, ids, key=lambda name: (hash_value(name), name)))


@dataclass(frozen=True)
class StudyData:
    """Sources of a study and how they are split. Nothing is read before it is asked for."""

    train: Split
    heldout: Split | int  # a split of its own, or how many examples of the training source
    tasks: Mapping[str, Split]  # or TaskSplit
    filters: Filters
    strict: bool
    seed: int
    decontaminate: bool = True  # False: also train on questions that a task asks
    # Hashes of content by hashes of the same with the sizes and times of the recordings, which are not read where one
    # is there; `inputs` puts those that it has come to, known or not, into `found`.
    known: Mapping[str, str] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict, init=False)

    # -- what went in, for the fingerprint of the data step ----------------------------------------------------------
    def inputs(self) -> dict[str, Any]:
        """JSON that everything `read` returns follows from; large tables by name, size and time instead of content."""
        return {
            "filters": asdict(self.filters),
            "strict": self.strict,
            "seed": self.seed,
            "decontaminate": self.decontaminate,
            "heldout": self.heldout if isinstance(self.heldout, int) else self._split_inputs(HELDOUT, self.heldout),
            "train": self._split_inputs(TRAIN, self.train),
            "tasks": {name: self._task_inputs(name, task) for name, task in self.tasks.items()},
        }

    def _split_inputs(self, group: str, wanted: Split) -> list[Any]:
        identity = self._table(group).identity
        if identity is None and self.decontaminate and any(is_on_hub(task.source) for task in self.tasks.values()):
            # What is chosen depends on the task's questions, for which the hub would have to be asked.
            identity = identity_of(self._table(group))
        if identity is None:
            table, chosen = self._table(group), set(self._chosen_of(group))
            identity = self._content(lambda: (_as_it_is(row) for row in table.read(0, chosen, False)))
        return [identity, wanted.limit]

    def _task_inputs(self, name: str, task: Split) -> list[Any]:
        identity = open_table(task.source, task.split).identity
        if identity is None:
            identity = self._content(lambda: self._asked[name])
        return [identity, task.limit, _faulty_audio(task)]

    def _content(self, examples: Callable[[], Iterable[Example]]) -> str:
        """A hash of the examples and of what is in their recordings."""
        looked_at = _digest(map(_look, examples()))
        self.found[looked_at] = self.known.get(looked_at) or _digest(in_threads(_identity, examples()))
        return self.found[looked_at]

    # -- checks before the long work ----------------------------------------------------------------------------------
    def check(self) -> None:
        """Raises UserError for sources that do not exist, faulty tasks, and an empty split."""
        train, heldout = self.train, self.heldout
        if isinstance(heldout, Split) and (train.source, train.split) == (heldout.source, heldout.split):
            raise UserError(
                f"data.train and data.heldout are both the split {train.split!r} of {train.source}; "
                "held-out examples must not be trained on: give data.heldout_examples instead of data.heldout."
            )
        _ = self._asked, self._selection

    # -- reading ------------------------------------------------------------------------------------------------------
    def read(
        self, audio: Path, advance: Advance, notes: Path | None = None
    ) -> tuple[dict[str, list[Example]], list[tuple[str, Dropped]]]:
        """Examples by group (train, heldout, task-NAME), and what was left out of which group.

        Recordings inside tables are written to the folder `audio`; one that is there already is kept. With `notes`, a
        folder, it is noted there how far this is, and a call after a kill continues: no row of training or held-out
        data is read again. `forget_notes` when all that follows from the result is on the disk.
        Raises UserError for a faulty row in strict reading, and for a split of which nothing is left.
        """
        chosen, dropped = self._selection[0], [*self._selection[1]]

        def keep(recording: Path | bytes) -> Path | Problem:
            """Bytes of a table are written to the folder, a file stays where it is."""
            if isinstance(recording, bytes):
                return store(recording, audio, self.filters)
            found = decode(recording, self.filters)
            return found if isinstance(found, tuple) else recording

        groups: dict[str, list[Example]] = {TRAIN: [], HELDOUT: []}
        total, done = sum(map(len, chosen.values())), 0

        def taken(named: tuple[Row, str]) -> Found:
            row, name = named
            return row.position, take(row, name, self.filters, keep, self._strict)

        for source, table in self._tables.items():
            names = self._chosen_of(source)
            for position, found in _noting(table, names, taken, notes and notes / f"{READING}{source}"):
                group = names[position][0]
                if isinstance(found, Example):
                    groups[group].append(found)
                else:
                    dropped.append((group, found))
                done += 1
                advance(done, total)
        self._require_some(groups, dropped)
        for name, task in self.tasks.items():
            groups[f"task-{name}"] = self._ask(task, audio)
        return groups, dropped

    def _ask(self, task: Split, audio: Path | None = None) -> list[Example]:
        """The questions of a task; with `audio`, also the recordings that stand inside a table."""
        return load_examples(task.source, task.split, task.limit, self.seed, audio, _faulty_audio(task))

    @cached_property
    def _asked(self) -> dict[str, list[Example]]:
        """The questions of every task, as text."""
        return {name: self._ask(task) for name, task in self.tasks.items()}

    # -- choosing -----------------------------------------------------------------------------------------------------
    @cached_property
    def _selection(self) -> tuple[dict[str, list[_Chosen]], list[tuple[str, Dropped]]]:
        dropped: list[tuple[str, Dropped]] = []
        train = self._texts(TRAIN, dropped)
        if isinstance(self.heldout, int):
            if len(train) <= self.heldout:
                raise UserError(
                    f"data.heldout_examples is {self.heldout} but {self._table(TRAIN).where} has {len(train)} usable "
                    "examples, so none would be left to train on; take fewer."
                )
            taken = heldout_ids([item.id for item in train], self.heldout)
            heldout = [item for item in train if item.id in taken]
            train = [item for item in train if item.id not in taken]
        else:
            heldout = self._texts(HELDOUT, dropped)
            heldout = [heldout[i] for i in choose(len(heldout), self.heldout.limit, self.seed)]
        not_trained_on = self._asked_in_tasks()
        not_trained_on |= {item.question: (IN_HELDOUT, f"the same question as {item.id}") for item in heldout}
        for item in train:
            if item.question in not_trained_on:
                where = f"{self._table(TRAIN).where}, row {item.position + 1}"
                dropped.append((TRAIN, Dropped(item.id, where, *not_trained_on[item.question])))
        train = [item for item in train if item.question not in not_trained_on]
        train = [train[i] for i in choose(len(train), self.train.limit, self.seed)]
        chosen = {TRAIN: train, HELDOUT: heldout}
        self._require_some(chosen, dropped)
        return chosen, dropped

    def _asked_in_tasks(self) -> dict[str, Problem]:
        """By hash of the question: why a training example with it is left out."""
        return {
            _hash(example.question): (IN_TASK, f"the same question as {example.id} of the task {name}")
            for name, examples in (self._asked.items() if self.decontaminate else ())
            for example in examples
        }

    def _require_some(self, groups: Mapping[str, Sequence[Any]], dropped: Sequence[tuple[str, Dropped]]) -> None:
        for group, items in groups.items():
            left_out = counts(item.reason for of, item in dropped if of == group)
            require_some(len(items), left_out, f"{group} data of the study, from {self._table(group).where}")

    def _texts(self, group: str, dropped: list[tuple[str, Dropped]]) -> list[_Chosen]:
        """The rows whose text is fine; those that are not go to `dropped`."""
        table, kept = self._table(group), []
        names = Names(table)
        for row in table.read(0, None, False):
            found = take(row, names(row), self.filters, strict=self._strict)
            if isinstance(found, Example):
                kept.append(_Chosen(row.position, found.id, _hash(row.question)))
            else:
                dropped.append((group, found))
        return kept

    def _chosen_of(self, source: str) -> dict[int, tuple[str, str]]:
        """What is chosen of the table `source`: position → (group, id)."""
        groups = (TRAIN, HELDOUT) if isinstance(self.heldout, int) else (source,)
        return {item.position: (group, item.id) for group in groups for item in self._selection[0][group]}

    @property
    def _strict(self) -> str | None:
        return "the study's data" if self.strict else None

    def _table(self, group: str) -> Table:
        return self._tables[TRAIN if isinstance(self.heldout, int) else group]

    @cached_property
    def _tables(self) -> dict[str, Table]:
        tables = {TRAIN: open_table(self.train.source, self.train.split)}
        if isinstance(self.heldout, Split):
            tables[HELDOUT] = open_table(self.heldout.source, self.heldout.split)
        return tables


def _faulty_audio(task: Split) -> FaultyAudio:
    return task.faulty_audio if isinstance(task, TaskSplit) else TaskSplit.faulty_audio


def _hash(question: str) -> str:
    return hash_value(normalised_question(question))[:16]


def _noting(
    table: Table, names: Mapping[int, tuple[str, str]], taken: Callable[[tuple[Row, str]], Found], path: Path | None
) -> Iterator[Found]:
    """What becomes of the rows of a table, in order; `names`: position → (group, id).

    With `path` it is noted there, and what was noted before is not read again.
    """
    start = 0
    notes = None if path is None else Notes(path, _digest([position, *names[position]] for position in names))
    for position, found in notes or ():
        yield position, found
        start = position + 1
    rows = ((row, names[row.position][1]) for row in table.read(start, set(names), True))
    for position, found in in_threads(taken, rows):
        if notes is not None:
            notes.add(position, found)
        yield position, found
    if notes is not None:
        notes.write()


def forget_notes(folder: Path) -> None:
    for path in folder.glob(f"{READING}*"):
        path.unlink()


def _as_it_is(row: Row) -> Example:
    return Example.of(row, row.id or "", row.audio)


def _digest(values: Iterable[Any]) -> str:
    """A hash of JSON values one after the other, which are not held at once."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(hash_value(value).encode())
    return digest.hexdigest()


def _identity(example: Example) -> list[Any]:
    recording = hash_file(example.audio) if example.audio is not None and is_file(example.audio) else None
    return [*_texts(example), recording]


def _look(example: Example) -> list[Any]:
    """As `_identity`, but without reading the recording."""
    stat = example.audio.stat() if example.audio is not None and is_file(example.audio) else None
    return [*_texts(example), stat and [stat.st_size, stat.st_mtime_ns]]


def _texts(example: Example) -> list[Any]:
    texts = [example.id, example.question, example.answer, list(example.answers)]
    return [*texts, example.voice, example.kind, str(example.audio)]


# ------------------------------------------------------------------------------------------------------------
# Speaking what has no recording
# ------------------------------------------------------------------------------------------------------------
Say = Callable[[Sequence[Example]], list[Example]]
SayGroups = Callable[[Mapping[str, Sequence[Example]]], dict[str, list[Example]]]


def speak_groups(
    groups: Mapping[str, list[Example]], say: SayGroups, strict: bool
) -> tuple[dict[str, list[Example]], list[tuple[str, Dropped]]]:
    """Every group with its questions spoken; what cannot be spoken is left out of training and held-out data.

    Raises UserError where a task's question cannot be spoken, or, in strict reading, any.
    """
    try:
        return say(groups), []
    except UserError:
        if strict:
            raise
    result: dict[str, list[Example]] = {}
    dropped: list[tuple[str, Dropped]] = []
    for key, group in groups.items():
        say_one = partial(_say_one, say, key)
        if key in (TRAIN, HELDOUT):
            result[key], silent = spoken_or_dropped(group, say_one)
            dropped += [(key, item) for item in silent]
        else:
            result[key] = say_one(group)
    return result, dropped


def _say_one(say: SayGroups, key: str, examples: Sequence[Example]) -> list[Example]:
    return say({key: examples})[key]


def spoken_or_dropped(examples: Sequence[Example], say: Say) -> tuple[list[Example], list[Dropped]]:
    """`say(examples)`, or where it refuses some of them: all others, and why each of those was left out.

    `say` keeps what it has spoken, so that asking again costs little. Raises UserError when it can say nothing at all,
    the empty list included: then the voice is at fault.
    """
    say([])
    try:
        return say(examples), []
    except UserError:
        spoken, dropped = _without_silent(examples, say)
        if not spoken:
            raise
        return spoken, dropped


def _without_silent(examples: Sequence[Example], say: Say) -> tuple[list[Example], list[Dropped]]:
    """The halves of what `say` refuses are asked for, and their halves, down to those that it refuses by themselves."""
    try:
        return say(examples), []
    except UserError as error:
        if len(examples) == 1:
            (silent,) = examples
            return [], [Dropped(silent.id, f"example {silent.id!r}", "cannot be spoken", str(error))]
    middle = len(examples) // 2
    first, rest = (_without_silent(half, say) for half in (examples[:middle], examples[middle:]))
    return first[0] + rest[0], first[1] + rest[1]
