"""Typed answers of several systems against those of a tuned model, over several tasks and all of them together.

    python scripts/typed_answers.py --out results/dose-restore/answers.json --cut facts web_questions \\
        base=t2t/base/facts,t2t/base/web short=,t2t/short/web tuned=t2t/full/facts,t2t/full/web

NAME=FOLDER,FOLDER … are folders of `palimpsest evaluate`, one per task, in the order of the tasks; empty where a system
was not asked. The last system is the tuned one. Training runs of one method, NAME, NAME-seed1, NAME-seed2 …, are one
system: its mean, clustered by question and by run. OUT has, per task, the questions' ids and of each system a 0 or 1
per question, the median number of words of an answer and how many answers were cut at the limit of new tokens. The
table that is printed is made from OUT alone: every system against the tuned one, their accuracies, the difference on
the same questions (paired bootstrap, 10,000 draws) and McNemar's exact test, both of several runs by a t test, Holm
over the rows of a pair.

A longer answer has more chances to hold the right words. With --cut each system also stands there as `NAME, cut`: each
answer cut to as many words as the tuned model has for that question. That is harder on it than fair, since the tuned
model ended where it wanted to.

With --modality speech the answers are those to spoken questions.

`palimpsest compare` says the same of one task; what it does not do is add tasks up, cut answers, and set side by side
questions that were put differently.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from markdown_cells import p_cell

from palimpsest.evaluation.scoring import PRIMARY, score
from palimpsest.files import UserError, read_json, read_jsonl, write_json
from palimpsest.intervals import Compared, accuracy_interval, compare_accuracies, holm
from palimpsest.records import method_of

ALL = "all together"


def main() -> None:
    arguments = parse_arguments()
    try:
        write_json(arguments.out, read_answers(arguments.what, cut=arguments.cut, modality=arguments.modality))
        print("\n".join(table(read_json(arguments.out))))
    except UserError as error:
        sys.exit(str(error))


def read_answers(what: Sequence[str], *, cut: bool = False, modality: str = "text") -> dict[str, Any]:
    """{"systems": […], "tasks": {task: {"ids": […], system: {"right": "0110…", "words": 8, "cut": 3}}}}."""
    tasks = [name for name in what if "=" not in name]
    given = [name.partition("=")[::2] for name in what if "=" in name]
    if not tasks or len(given) < 2:
        raise UserError("Nothing to set side by side: give a task, and NAME=FOLDER of two systems or more.")
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {task: {} for task in tasks}
    for system, folders in given:
        if len(parts := folders.split(",")) != len(tasks):
            raise UserError(f"{system} has {len(parts)} folders and there are {len(tasks)} tasks; give one for each.")
        for task, folder in zip(tasks, parts, strict=True):
            if folder:
                rows[task][system] = read_jsonl(Path(folder) / f"samples-{modality}.jsonl")
                if _ids(rows[task][system]) != _ids(next(iter(rows[task].values()))):
                    raise UserError(f"{folder} has other questions than the first system's folder of {task}.")
    systems = [system for system, _ in given]
    tuned = systems[-1]
    found: dict[str, Any] = {}
    for task, of in rows.items():
        if tuned not in of:
            raise UserError(f"{tuned}, the last system, was not asked {task}; give its folder.")
        found[task] = {"ids": _ids(of[tuned]), **{system: _answers(of[system]) for system in of}}
        lengths = [len(row["response"].split()) for row in of[tuned]]
        for system in (name for name in of if cut and name != tuned):
            shorter = [
                {**row, "response": response, "verdicts": score(response, row["answers"], row["question"])}
                for row, length in zip(of[system], lengths, strict=True)
                for response in [" ".join(row["response"].split()[:length])]
            ]
            found[task][f"{system}, cut"] = _answers(shorter)
    others = [name for system in systems[:-1] for name in (system, *([f"{system}, cut"] if cut else []))]
    return {"systems": [*others, tuned], "tasks": found}


def _ids(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row["id"] for row in rows]


def _answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "right": "".join(str(int(row["verdicts"][PRIMARY])) for row in rows),
        "words": median(len(row["response"].split()) for row in rows),
        "cut": sum(row["cut"] for row in rows),
    }


def table(answers: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: a row per system and task beside the tuned model, and one for all its tasks together."""
    runs: dict[str, list[str]] = {}
    for system in answers["systems"]:
        runs.setdefault(method_of(system)[0], []).append(system)
    tuned = method_of(answers["systems"][-1])[0]
    lines = [
        f"| A | Questions | n | Words of A, {tuned} | A, % | {tuned}, % | {tuned} − A, points | p, Holm |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for other in (name for name in runs if name != tuned):
        rows = list(_rows(answers["tasks"], runs[other], runs[tuned]))
        for (task, length, a, b, found), adjusted in zip(rows, holm([row[-1].p_value for row in rows]), strict=True):
            bounds = f"\\[{100 * found.low:+.1f} to {100 * found.high:+.1f}\\]"
            difference = f"{100 * found.difference:+.1f} {bounds}"
            n = f"{found.n:,}".replace(",", "\u202f")
            cells = [other, task, n, length, _percent(a), _percent(b), difference.replace("-", "−"), p_cell(adjusted)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rows(
    tasks: Mapping[str, Mapping[str, Any]], other: Sequence[str], tuned: Sequence[str]
) -> Iterator[tuple[str, str, Any, Any, Compared]]:
    """(task, median words of both, right answers of both, (runs, questions) of 0 and 1, their comparison)."""
    asked = {}
    for task, of in tasks.items():
        if all(name in of for name in (*other, *tuned)):
            sides = [np.array([[int(bit) for bit in of[it]["right"]] for it in names]) for names in (other, tuned)]
            words = (median(of[it]["words"] for it in names) for names in (other, tuned))
            asked[task] = ", ".join(f"{of_side:g}" for of_side in words), *sides
    if len(asked) > 1:
        _, first, second = zip(*asked.values(), strict=True)
        asked[ALL] = "", np.concatenate(first, axis=1), np.concatenate(second, axis=1)
    for task, (length, a, b) in asked.items():
        yield task, length, a, b, compare_accuracies(a, b, seed=0)


def _percent(right: Any) -> str:
    low, high = accuracy_interval(right)
    return f"{100 * right.mean():.1f} \\[{100 * low:.1f} to {100 * high:.1f}\\]"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="tasks, then NAME=FOLDER,FOLDER …, the tuned model last")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of right and wrong answers")
    parser.add_argument("--modality", choices=("text", "speech"), default="text", help="how they were asked")
    parser.add_argument("--cut", action="store_true", help="also answers cut to the tuned model's words")
    return parser.parse_args()


if __name__ == "__main__":
    main()
