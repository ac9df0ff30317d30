"""A run, or several, as a folder that can be passed on: pages, records, figures, and no path or name of the machine.

    README.md                    what it is; front matter of a dataset card, or of a static Space
    index.html                   the report; of several runs the page that sets them side by side
    RUN/report.html              of several runs, each one's
    RUN/results.json, study.yaml, provenance.json
    RUN/tables/TABLE.parquet     every table of results.json that has rows
    RUN/figures/*.svg

The pages need no server and no network. Weights, scores, frames and recordings stay where they are; questions and
answers too, unless they are asked for. A folder that `palimpsest export` wrote is passed on as it is.
"""

from __future__ import annotations

import getpass
import html
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from palimpsest.files import UserError, rename_folder, working_folder, write_json, write_tables, write_text
from palimpsest.records import RESULT_TABLES, SCHEMA, Paired, Results
from palimpsest.report import summary
from palimpsest.report.across_runs import by_method
from palimpsest.report.figures import FIGURES, draw
from palimpsest.report.inputs import Inputs, read_inputs
from palimpsest.report.page import write_report
from palimpsest.report.public import last_parts, public
from palimpsest.report.side_by_side import write_comparison
from palimpsest.report.style import to_svg
from palimpsest.rundir import run_labels

Kind = Literal["dataset", "space", "model"]
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
TEXT = {".json", ".jsonl", ".md", ".yaml", ".html", ".svg", ".txt", ".jinja"}
COMMON = 4  # letters: a shorter name of a user or a machine stands in ordinary words
EMBEDDED = re.compile(r"base64,[^\"']*")  # recordings and pictures in a page
# Two parts below the root or a home folder; in a URL, a closing tag or “T2T/S2T” something else stands in front.
PATH = re.compile(r"(?<![\w/<.~:)…])(?<!\w['\"])(?:~|/[A-Za-z_][\w.+-]*)/[\w.@+-][^\s\"'<>]*")
OF_A_MODEL = {".json", ".safetensors", ".md", ".jinja", ".txt", ".model"}  # suffixes of what `palimpsest export` writes


@dataclass(frozen=True)
class Leak:
    """What a file says of the machine that it was made on."""

    file: Path
    what: str


# ---------------------------------------------------------------------------------------------------------------------
# Making the folder
# ---------------------------------------------------------------------------------------------------------------------
def publish(
    runs: Sequence[Path],
    out: Path,
    paired: Callable[[list[Path]], Paired],
    *,
    kind: Kind = "dataset",
    samples: bool = False,
) -> Path:
    """Write the folder `out` and return its path; at once, so that a killed call leaves none.

    paired: sets several runs against each other, `palimpsest.comparison.pairs.pair_runs`.
    samples: questions, answers and recordings stand in the pages.

    Raises UserError, before anything is written, where `out` is not empty, a run is none, or pyarrow is missing.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError("Records as parquet need pyarrow; pip install 'palimpsest-llm[hub]'.") from error
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give an empty or a new folder with --out.")
    for run in runs:
        if not (run / "results.json").is_file():
            raise UserError(f"{run} is no run directory with results (results.json); give the --out of a study.")
    names = dict(zip(_folder_names(run_labels(runs)), runs, strict=True))
    working = working_folder(out.absolute())
    try:
        read = {name: _impersonal(read_inputs(run)) for name, run in names.items()}
        for name, inputs in read.items():
            _write_run(inputs, working / name)
            page = working / name / "report.html" if len(runs) > 1 else working / "index.html"
            write_report(names[name], page, samples=samples, audio=samples, inputs=inputs)
        if len(runs) > 1:
            pages = [f"{name}/report.html" for name in names]
            write_comparison(runs, paired(list(runs)), working / "index.html", pages=pages, read=list(read.values()))
        write_text(working / "README.md", _card(read, kind, samples))
        rename_folder(working, out.absolute())
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return out


def _folder_names(labels: Sequence[str]) -> list[str]:
    """Of letters, digits, _, - and ., each once, and none that a file of the folder has.

    >>> _folder_names(["a b", "a_b", "+++", "README.md"])
    ['a_b', 'a_b-2', 'run', 'README.md-run']
    """
    names: list[str] = []
    for label in labels:
        name = re.sub(r"[^\w.-]+", "_", label).strip("_.") or "run"
        name = f"{name}-run" if name in ("README.md", "index.html") else name
        others = [f"{name}-{i}" for i in range(2, len(labels) + 1)]
        names.append(next(it for it in (name, *others) if it not in names))
    return names


def _impersonal(inputs: Inputs) -> Inputs:
    """Without paths of local models and data that are written as relative ones, in the recipe and in records."""
    config = last_parts(inputs.config)
    return replace(
        inputs,
        config=config,
        config_text=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        provenance=last_parts(inputs.provenance),
        results=cast(Results, {table: last_parts(public(rows)) for table, rows in inputs.results.items()}),
    )


def _write_run(inputs: Inputs, folder: Path) -> None:
    """The records of a run, without the folders of the machine."""
    (folder / "tables").mkdir(parents=True)
    (folder / "figures").mkdir()
    write_tables(folder / "results.json", {"schema": SCHEMA, **inputs.results})
    for table in RESULT_TABLES:
        if rows := inputs.results[table]:  # type: ignore[literal-required]
            write_parquet(folder / "tables" / f"{table}.parquet", rows)
    write_json(folder / "provenance.json", inputs.provenance)  # public already, as the configuration is
    write_text(folder / "study.yaml", inputs.config_text)
    for name in FIGURES:
        if (drawing := draw(name, inputs)) is not None:
            write_text(folder / "figures" / f"{name}.svg", to_svg(drawing))


def write_parquet(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Flat records as a table. A column whose values are of several types holds them as text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            columns[name] = pa.array([None if it is None else str(it) for it in values])
    pq.write_table(pa.table(columns), file)


def _card(runs: Mapping[str, Inputs], kind: Kind, samples: bool) -> str:
    """README.md: the front matter that a hub reads, then what the folder holds."""
    front: dict[str, Any] = {"tags": ["palimpsest", "speech-llm", "parameter-importance"]}
    if kind == "space":
        front |= {"title": " and ".join(runs), "sdk": "static", "app_file": "index.html", "pinned": False}
    else:
        front["configs"] = [
            {"config_name": f"{name}.{table}", "data_files": f"{name}/tables/{table}.parquet"}
            for name, inputs in runs.items()
            for table in RESULT_TABLES
            if inputs.results[table]  # type: ignore[literal-required]
        ]
    held = "with questions and answers" if samples else "without questions and answers"
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {', '.join(runs)}", "", "Runs of [palimpsest](https://pypi.org/project/palimpsest-llm/):", ""]
    lines += [f"- **{name}**: {summary.scale(by_method(inputs))}" for name, inputs in runs.items()]
    lines += [
        "",
        f"`index.html` shows them, from disk too, {held}. `results.json` has every table as flat records, `tables/`",
        "the same as parquet; `study.yaml` is the recipe, `provenance.json` has versions, seeds, hashes and hardware.",
        "Weights, scores and recordings are not here. Of local models and data the last part of their path is named.",
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# What would leave the machine
# ---------------------------------------------------------------------------------------------------------------------
def leaks(folder: Path) -> Iterator[Leak]:
    """Absolute paths, and the names of the user, the home folder and the machine, in the files that are text."""
    known, _ = names_here()
    letters = "A-Za-z0-9"  # ada in full_ada, not in canada
    words = re.compile("|".join(rf"(?<![{letters}]){re.escape(it)}(?![{letters}])" for it in known) or r"(?!)", re.I)
    for file in files_in(folder):
        if match := words.search(str(file.relative_to(folder))):
            yield Leak(file.relative_to(folder), match[0])
        if file.suffix in TEXT:
            text = EMBEDDED.sub("", file.read_text(encoding="utf-8", errors="replace"))
            text = html.unescape(text) if file.suffix in (".html", ".svg") else text
            found = [*PATH.finditer(text), *words.finditer(text)]
            for what in dict.fromkeys(match[0] for match in found):
                yield Leak(file.relative_to(folder), what)


def names_here() -> tuple[list[str], list[str]]:
    """The names of the user, the home folder and the machine: those that are looked for, and those too common."""
    names = {Path.home().name, platform.node()} - {""}
    with suppress(KeyError, OSError):  # a container may run as a user without a name
        names.add(getpass.getuser())
    known = [name for name in sorted(names) if len(name) >= COMMON and name not in ("root", "localhost")]
    return known, [name for name in sorted(names) if name not in known]


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def listing(folder: Path) -> Iterator[str]:
    """Every file with its size, then the sum."""
    files = files_in(folder)
    for file in files:
        yield f"  {_size(file.stat().st_size):>9}  {file.relative_to(folder)}"
    yield f"  {_size(sum(file.stat().st_size for file in files)):>9}  in {len(files)} files"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 10**5 else f"{n_bytes / 1e3:.1f} kB"


# ---------------------------------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------------------------------
def require_place(place: str) -> None:
    if not REPOSITORY.fullmatch(place):
        raise UserError(f"{place!r} is no place on the hub; give USER/NAME.")


def push(folder: Path, place: str, kind: Kind, *, private: bool) -> str:
    """Upload the folder as it is and return its address.

    Raises UserError without a token, for a folder that names the machine, and for what the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    require_place(place)
    if found := next(leaks(folder), None):
        raise UserError(f"{found.file} in {folder} says {found.what!r}, which is of this machine; nothing was sent.")
    foreign = [file for file in files_in(folder) if file.is_symlink() or file.suffix not in OF_A_MODEL]
    if kind == "model" and foreign:
        raise UserError(f"{foreign[0]} is nothing that palimpsest export writes; remove it. Nothing was sent.")
    if get_token() is None:
        raise UserError("There is no token of the hub here; run `hf auth login`, or set HF_TOKEN. Nothing was sent.")
    options: dict[str, Any] = {"space_sdk": "static"} if kind == "space" else {}
    api = HfApi(library_name="palimpsest")
    try:
        api.create_repo(place, repo_type=kind, private=private, exist_ok=True, **options)
        sent = api.upload_folder(
            repo_id=place, repo_type=kind, folder_path=folder, commit_message=f"{folder.name}, by palimpsest publish"
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The hub did not take {folder} as {place} ({reason}); it may have part of it.") from error
    return str(sent.repo_url)
