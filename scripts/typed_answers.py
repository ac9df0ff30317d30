"""Typed answers of several systems to the same questions, over several tasks and all of them together.

    python scripts/typed_answers.py --out results/dose-restore/answers.json facts web_questions \\
        base=t2t/base/facts,t2t/base/web tuned=t2t/full/facts,t2t/full/web short=,t2t/short/web

NAME=FOLDER,FOLDER … are folders of `palimpsest evaluate`, one per task, in the order of the tasks; empty where a system
was not asked. OUT has, per task, the questions' ids and a 0 or 1 per system and question. The table that is printed is
made from OUT alone: of every two systems the accuracies, their difference on the same questions (paired bootstrap,
10,000 draws) and McNemar's exact test, Holm over the rows of a pair. `palimpsest compare` says the same of one task;
what it does not do is add tasks up, and set side by side questions that were put differently.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.files import UserError, read_json, read_jsonl, write_json
from palimpsest.intervals import holm, mcnemar_exact, paired_bootstrap, wilson

ALL = "all together"


def main() -> None:
    arguments = parse_arguments()
    try:
        write_json(arguments.out, read_answers(arguments.what))
        print("\n".join(table(read_json(arguments.out))))
    except UserError as error:
        sys.exit(str(error))


def read_answers(what: Sequence[str]) -> dict[str, Any]:
    """{task: {"ids": …, system: "0110…"}} of tasks and NAME=FOLDER,… as they are given."""
    tasks = [name for name in what if "=" not in name]
    found: dict[str, Any] = {task: {} for task in tasks}
    for system, _, folders in (name.partition("=") for name in what if "=" in name):
        if len(parts := folders.split(",")) != len(tasks):
            raise UserError(f"{system} has {len(parts)} folders and there are {len(tasks)} tasks; give one for each.")
        for task, folder in zip(tasks, parts, strict=True):
            if not folder:
                continue
            rows = list(read_jsonl(Path(folder) / "samples-text.jsonl"))
            ids = [row["id"] for row in rows]
            if found[task].setdefault("ids", ids) != ids:
                raise UserError(f"{folder} has other questions than the first system's folder of {task}.")
            found[task][system] = "".join(str(int(row["verdicts"][PRIMARY])) for row in rows)
    return found


def table(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: a row per pair of systems and task that both were asked, and one for all of these together."""
    by_most = sorted(answers.values(), key=len, reverse=True)  # their order is that of the task that most were asked
    systems = list(dict.fromkeys(name for task in by_most for name in task if name != "ids"))
    lines = [
        "| A | B | Questions | n | A, % | B, % | B − A, points | p, Holm |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for first, second in combinations(systems, 2):
        rows = list(_rows(answers, first, second))
        for (task, a, b, _), adjusted in zip(rows, holm([row[3] for row in rows]), strict=True):
            low, high = paired_bootstrap(a, b, seed=0)
            difference = f"{100 * (b.mean() - a.mean()):+.1f} \\[{100 * low:+.1f} to {100 * high:+.1f}\\]"
            shown = "\\< 0.001" if adjusted < 0.001 else f"{adjusted:.3f}"
            n = f"{len(a):,}".replace(",", "\u202f")
            cells = [first, second, task, n, _percent(a), _percent(b), difference.replace("-", "−"), shown]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rows(answers: Mapping[str, Mapping[str, Any]], first: str, second: str) -> Iterator[tuple[str, Any, Any, float]]:
    asked = {
        task: [np.array([int(c) for c in of[name]], dtype=float) for name in (first, second)]
        for task, of in answers.items()
        if first in of and second in of
    }
    if len(asked) > 1:
        asked[ALL] = [np.concatenate(sides) for sides in zip(*asked.values(), strict=True)]
    for task, (a, b) in asked.items():
        yield task, a, b, mcnemar_exact(int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum()))


def _percent(values: Any) -> str:
    low, high = wilson(int(values.sum()), len(values))
    return f"{100 * values.mean():.1f} \\[{100 * low:.1f} to {100 * high:.1f}\\]"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="tasks, then NAME=FOLDER,FOLDER …")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of right and wrong answers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
