"""Inputs that are nearly right: each ends with a right result or with one sentence and exit code 2.

    python tests/reliability/fuzz.py --n 1000

Every input is made from a valid one by one to three random changes, to its bytes or, where it is JSON or YAML, to its
values, and given to the command that reads it. A traceback, another exit code, several sentences, no end in a minute or
a result that is not strict JSON is a fault: it is printed with the number that makes the same input again
(--only KIND --first NUMBER --n 1).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
import yaml

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork would lose its threads
sys.path.insert(0, str(Path(__file__).parents[1]))

from reliability.child import start
from reliability.jobs import write_inputs

SECONDS = 60
VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        0.5,
        2**70,
        float("nan"),
        float("inf"),
        "",
        " ",
        "x" * 5000,
        "\0",
        "\x1b[31m",
        "../../x",
        "None",
    ),
    *([], {}, [None], [[[]]], {"a": {}}, ["a", "b"], "\ud800", "🙂", "-0", "1e999"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Changes
# ---------------------------------------------------------------------------------------------------------------------
def change_bytes(content: bytes, rng: random.Random) -> bytes:
    at, n = rng.randint(0, len(content)), rng.choice([1, 1, 2, 8, 64, 1000])
    noise = bytes(rng.randrange(256) for _ in range(min(n, 64)))
    return rng.choice(
        [
            content[:at],
            content[:at] + content[at + n :],
            content[:at] + noise + content[at:],
            content[:at] + noise + content[at + len(noise) :],
            content[:at] + bytes(n) + content[at + n :],
            content[:at] + content[at : at + n] + content[at:],
            content[at:] + content[:at],
            b"",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        ]
    )


def change_value(value: Any, rng: random.Random) -> Any:
    """The same with one node replaced, removed, renamed or put twice; the choice goes down from the root."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, made = rng.choice(list(value)), dict(value)
        what = rng.random()
        if what < 0.15:
            del made[key]
        elif what < 0.25:
            made[rng.choice(["", f"{key}s", key.upper(), "answer", "audio", "id"])] = made.pop(key)
        else:
            made[key] = change_value(value[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, made_list = rng.randrange(len(value)), list(value)
        what = rng.random()
        if what < 0.1:
            del made_list[at]
        elif what < 0.2:
            made_list.insert(at, made_list[at])
        else:
            made_list[at] = change_value(value[at], rng)
        return made_list
    return rng.choice(VALUES)


def change(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    try:
        if file.suffix == ".json" and rng.random() < 0.7:
            content = json.dumps(change_value(json.loads(content), rng)).encode()
        elif file.suffix == ".yaml" and rng.random() < 0.7:
            content = yaml.safe_dump(change_value(yaml.safe_load(content), rng)).encode()
        elif file.suffix == ".jsonl" and rng.random() < 0.7:
            lines = content.splitlines()
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(change_value(json.loads(lines[at]), rng)).encode()
            content = b"\n".join(lines) + b"\n"
        else:
            content = change_bytes(content, rng)
    except (ValueError, IndexError, yaml.YAMLError):  # changed before into what is none
        content = change_bytes(content, rng)
    file.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of input
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """A folder with a valid input, which of its files are changed, and the command that reads it."""

    valid: Path
    changed: tuple[str, ...]  # patterns of file names
    arguments: Callable[[Path], list[str]]  # folder of the changed input -> command line
    share: float = 1.0  # of the inputs: some commands take longer


def kinds(folder: Path) -> dict[str, Kind]:
    inputs = folder / "inputs"
    inputs.mkdir()
    write_inputs(inputs)
    llm, heldout = inputs / "llm", str(inputs / "heldout.jsonl")

    def only(name: str, *files: Path) -> Path:
        made = folder / name
        made.mkdir()
        for file in files:
            shutil.copy(file, made / file.name)
        return made

    sounds = sorted(inputs.glob("heldout*.wav"))
    manifest = only("manifest", inputs / "heldout.jsonl", *sounds)
    rows = [json.loads(line) for line in (inputs / "heldout.jsonl").read_text().splitlines()]
    table = only("csv", *sounds)
    cells = [[row["id"], row["question"], row["answer"], row["audio"]] for row in rows]
    lines = [["id", "question", "answer", "audio"], *cells]
    (table / "t.csv").write_text("".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines))
    parquet = only("parquet")
    columns = {key: [row[key] for row in rows] for key in ("id", "question", "answer")}
    audio = [{"bytes": (inputs / row["audio"]).read_bytes(), "path": row["audio"]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.table({**columns, "audio": audio}), parquet / "t.parquet")
    flac = only("flac")
    with (flac / "m.jsonl").open("w") as file:
        for row in rows:
            soundfile.write(flac / f"{row['id']}.flac", np.sin(np.arange(16_000) / 9) / 2, 16_000)
            file.write(json.dumps({**row, "audio": f"{row['id']}.flac"}) + "\n")
    scores, answers = folder / "scores", folder / "answers"
    on = ("--data", heldout, "--split", "heldout")
    made_by(
        folder,
        "importance",
        "--model",
        str(llm),
        *on,
        "--limit",
        "4",
        "--batch-size",
        "2",
        "--out",
        str(scores / "scores"),
    )
    asked = ("--task", heldout, "--split", "heldout", "--max-new-tokens", "4")
    for name in ("a", "b"):
        made_by(folder, "evaluate", "--model", str(llm), *asked, "--perplexity", "--out", str(answers / name))

    def inspect(path: str) -> Callable[[Path], list[str]]:
        return lambda at: ["data", "inspect", str(at / path)]

    def evaluate(at: Path) -> list[str]:
        return ["evaluate", "--model", str(at), *asked, "--limit", "2", "--out", str(at / "out")]

    deactivate = ("deactivate", "--model", str(llm), *on, "--limit", "2", "--random-seeds", "1")
    return {
        "manifest": Kind(manifest, ("*.jsonl",), inspect("heldout.jsonl")),
        "csv": Kind(table, ("*.csv",), inspect("t.csv")),
        "parquet": Kind(parquet, ("*.parquet",), inspect("t.parquet")),
        "wav": Kind(manifest, ("*.wav",), inspect("heldout.jsonl")),
        "flac": Kind(flac, ("*.flac",), inspect("m.jsonl")),
        "recipe": Kind(
            only("recipe", inputs / "recipe.yaml"), ("*.yaml",), lambda at: ["plan", str(at / "recipe.yaml")]
        ),
        "scores": Kind(
            scores, ("*",), lambda at: [*deactivate, "--scores", str(at / "scores"), "--out", str(at / "out")]
        ),
        "checkpoint": Kind(llm, ("*",), evaluate),
        "template": Kind(llm, ("tokenizer_config.json", "*.jinja"), evaluate, 0.5),
        "samples": Kind(
            answers,
            ("*.json", "*.jsonl"),
            lambda at: ["compare", str(at / "a"), str(at / "b"), "--out", str(at / "out")],
        ),
    }


def made_by(folder: Path, *arguments: str) -> None:
    child = start(folder / "log", list(arguments))
    if child.wait() != 0:
        raise SystemExit(f"a valid input is refused: {' '.join(arguments)}: {child.said.read_text()}")


# ---------------------------------------------------------------------------------------------------------------------
# Trials
# ---------------------------------------------------------------------------------------------------------------------
def fault_of(kind: Kind, number: int, at: Path) -> tuple[str, str | None]:
    """(refused or accepted, what is wrong with that) of the input with this number."""
    rng = random.Random(number)
    shutil.copytree(kind.valid, at)
    files = sorted({path for pattern in kind.changed for path in at.rglob(pattern) if path.is_file()})
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        change(rng.choice(files), rng)
    child = start(at.with_suffix(".log"), kind.arguments(at))
    code = child.wait(SECONDS)
    child.kill()
    said = child.said.read_text(errors="replace")
    if "Traceback" in said:
        return "fault", f"traceback: {said.strip().splitlines()[-1][:300]}"
    if code == 2:
        sentences = [line for line in said.splitlines() if line.startswith("palimpsest: ")]
        planned = kind.arguments(at)[0] == "plan" and not sentences  # "does not fit" is a table and exit code 2
        return "refused", None if planned or len(sentences) == 1 else f"not one sentence: {said[-300:]}"
    if code is None:
        return "fault", f"no end in {SECONDS} s"
    if code != 0:
        return "fault", f"exit code {code}: {said[-300:]}"
    for file in sorted((at / "out").rglob("*.json")):
        try:
            json.loads(file.read_text(), parse_constant=_refuse)
        except ValueError as error:
            return "fault", f"{file.name} is not strict JSON: {error}"
    return "accepted", None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="inputs in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--only", action="append", help="these kinds of input")
    options = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        found = kinds(Path(temporary))
        chosen = {name: found[name] for name in options.only or found}
        shares = sum(kind.share for kind in chosen.values())
        for name, kind in chosen.items():
            counts: Counter[str] = Counter()
            for number in range(options.first, options.first + max(1, round(options.n * kind.share / shares))):
                with tempfile.TemporaryDirectory(dir=temporary) as at:
                    outcome, fault = fault_of(kind, number, Path(at) / "input")
                counts["fault" if fault else outcome] += 1
                if fault:
                    print(f"  FAULT {name} {number}: {fault}", flush=True)
            faults += counts["fault"]
            print(f"{name}: {', '.join(f'{n} {what}' for what, n in sorted(counts.items()))}", flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
