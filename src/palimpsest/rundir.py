"""A run directory: the only interface between the steps of a study.

Every step owns one sub-directory and writes it under a temporary name, then renames it, together with a fingerprint
of everything that went in and the size and hash of every file that came out. A step whose fingerprint matches and whose
files are what it wrote is skipped; one whose inputs changed runs again, and so does one with a file that was cut short,
changed or removed. Killing the process at any moment, or the machine, therefore loses at most the step in progress.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from palimpsest.files import (
    UserError,
    existing,
    hash_file,
    hash_value,
    read_json,
    rename_folder,
    write_json,
    write_tables,
)
from palimpsest.records import BASE, TimingRecord

# ---------------------------------------------------------------------------------------------------------------------
# Layout: what lies where, for those who write it and those who read it
# ---------------------------------------------------------------------------------------------------------------------
ROOT = Path(__file__).parent  # of this package
RECIPES = ROOT / "recipes"  # those that ship
STUDY, RESULTS, PROVENANCE = "study.yaml", "results.json", "provenance.json"
FRAMES = "frames.json"  # what speech.features: auto came to
TOKENS = "tokens"  # folder of the speech tokens
STEP_FILE = "step.json"  # inside every step's directory: fingerprint, inputs, seconds
FILES_FILE = "files.json"  # beside it: every file of the step: bytes, sha256, time of change
SET_ASIDE = ".set-aside"  # steps of an earlier recipe
GIVEN = "given.json"  # methods/NAME/checkpoint/: which model stands in place of a trained one
MASKS = "masks.safetensors"  # base/importance_other/: its most important weights, where the scores are not kept
RECORDINGS = ".recordings.json"  # hashes of recordings that need not be read again (StudyData.found)
DROPPED = "dropped"  # data/dropped.jsonl: what was left out of training and held-out data, and why


def folder_of(model: str) -> str:
    """Where a model's steps live inside the run directory: the base's, or those of one training run."""
    return BASE if model == BASE else f"methods/{model}"


def run_labels(runs: Sequence[Path]) -> list[str]:
    """A name for each of several run directories: the folder's, numbered in their order where two have the same."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({1 + names[:i].count(name)})" for i, name in enumerate(names)]


def tokens_folder(k: int | None) -> str:
    """Of k speech tokens; None: of as many as the recipe says for all."""
    return TOKENS if k is None else f"{TOKENS}-{k}"


def models_in(run: Path) -> dict[str, Path]:
    """The folders of all models that a run directory has, the base first, the others by name."""
    methods = run / "methods"
    trained = sorted(path for path in methods.iterdir() if path.is_dir()) if methods.is_dir() else []
    base = [run / BASE] if (run / BASE).is_dir() else []
    return {path.name: path for path in (*base, *trained)}


def manifest_of(run: Path, group: str) -> Path:
    """The examples of a group: train, heldout or task-NAME."""
    return run / "data" / f"{group}.jsonl"


def checkpoint_of(run: Path, model: str) -> Path:
    return run / folder_of(model) / "checkpoint"


def has_checkpoint(run: Path, model: str) -> bool:
    """Whether a run's model is there: a whole one has a config, a light one or a blend its own file (models/)."""
    return any((checkpoint_of(run, model) / name).is_file() for name in ("config.json", "light.json", "blend.json"))


def samples_of(run: Path, model: str, task: str, modality: str) -> Path:
    return run / folder_of(model) / "samples" / f"{task}-{modality}" / "samples.jsonl"


def figures_in(run: Path) -> Path:
    """The folder of a run's figures. Raises UserError where a file has its name."""
    folder = run / "figures"
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is a file, and the folder of the run's figures has that name; move the file away.")
    return folder


def losses_of(run: Path, model: str, modality: str) -> Path:
    return run / folder_of(model) / "perplexity" / f"losses-{modality}.jsonl"


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """A finished step: where its output lies and what identifies it."""

    name: str
    path: Path
    fingerprint: str
    skipped: bool


class RunDir:
    """One study's directory.

    >>> run = RunDir(Path("runs/demo"))                                    # doctest: +SKIP
    >>> step = run.step("base/importance", {"model": digest}, write)       # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        # Made by the first step, so that bad input leaves nothing behind.
        parent = existing(path)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"{path} cannot be used as a run directory: {parent} is no writable folder.")
        self.path = path
        self._damage: dict[tuple[str, str], str | None] = {}  # (step, fingerprint) looked at before -> its damage

    def step(self, name: str, inputs: Mapping[str, Any], write: Callable[[Path], None]) -> Step:
        """Run `write(folder)` unless `name` is there already with the same `inputs`.

        `inputs` must be JSON and hold everything the output depends on: configuration, hashes of input files,
        fingerprints of earlier steps, the code version. `write` gets an empty temporary folder — or, when the same
        step with the same inputs was interrupted, that folder as it was left, so that a long step can continue. What
        a start with other inputs left of it stays until it is finished (`begun_otherwise`).
        """
        if (done := self.finished(name, inputs)) is not None:
            return done
        target, fingerprint = self.path / name, hash_value(inputs)
        working = self._working(name, fingerprint)
        working.mkdir(parents=True, exist_ok=True)
        begun, started = time.time(), time.perf_counter()
        write(working)
        seconds = time.perf_counter() - started
        write_tables(working / FILES_FILE, {file: _about(working / file) for file in _files_in(working)})
        write_json(
            working / STEP_FILE,
            {
                "step": name,
                "fingerprint": fingerprint,
                "inputs": inputs,
                "started": utc(begun),
                "seconds": seconds,
                "peak_rss_bytes": peak_rss_bytes(),
                "files": hash_file(working / FILES_FILE),
            },
        )
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        rename_folder(working, target)
        for stale in self.begun_otherwise(name, inputs):
            shutil.rmtree(stale)
        self._damage[name, fingerprint] = None
        with suppress(OSError):
            working.parent.rmdir()  # only when empty
        return Step(name, target, fingerprint, skipped=False)

    def _working(self, name: str, fingerprint: str) -> Path:
        return self.path / ".working" / f"{name.replace('/', '__')}-{fingerprint[:16]}"

    def begun_otherwise(self, name: str, inputs: Mapping[str, Any]) -> list[Path]:
        """What interrupted starts left of a step with other inputs than these."""
        mine = self._working(name, hash_value(inputs))
        pattern = re.compile(re.escape(name.replace("/", "__")) + r"-[0-9a-f]{16}")
        folders = sorted(mine.parent.iterdir()) if mine.parent.is_dir() else []
        return [folder for folder in folders if folder != mine and pattern.fullmatch(folder.name)]

    def finished(self, name: str, inputs: Mapping[str, Any]) -> Step | None:
        """The step if it is there with the same `inputs` and with its files as it wrote them, else None."""
        fingerprint = hash_value(inputs)
        if self._record(name).get("fingerprint") != fingerprint or self.damage(name) is not None:
            return None
        return Step(name, self.path / name, fingerprint, skipped=True)

    def outdated(self, name: str, inputs: Mapping[str, Any]) -> list[str]:
        """The inputs in which a finished step differs from `inputs`; [] where it is not there, or up to date."""
        record = self._record(name)
        if record.get("fingerprint", hash_value(inputs)) == hash_value(inputs):
            return []
        before = record.get("inputs", {})
        # As JSON, in which the file has them.
        return sorted(key for key in {*before, *inputs} if hash_value(before.get(key)) != hash_value(inputs.get(key)))

    def damage(self, name: str) -> str | None:
        """What is wrong with the files of a finished step: one was cut short, changed or removed; None: nothing.

        Of a step that an earlier version finished, without a list of its files, nothing is known to be wrong.
        """
        folder = self.path / name
        if not (folder / STEP_FILE).exists():
            return None
        record = self._record(name)
        if not record:
            return f"{STEP_FILE} is damaged"
        if "files" not in record:
            return None
        key = name, str(record["fingerprint"])
        if key not in self._damage:
            self._damage[key] = _damage(folder, record["files"])
        return self._damage[key]

    def _record(self, name: str) -> dict[str, Any]:
        """The content of a step's file; {} where there is none, or none that can be read."""
        record = _mapping(self.path / name / STEP_FILE)
        return record if "fingerprint" in record else {}

    def set_aside(self, made: Collection[str]) -> list[str]:
        """Move finished steps that are not among `made` to SET_ASIDE; their names. An earlier recipe made them."""
        steps = [file.parent.relative_to(self.path).as_posix() for file in sorted(self.path.rglob(STEP_FILE))]
        steps = [name for name in steps if not name.startswith(".")]
        old = [name for name in steps if name not in made and self._record(name).get("step") == name]
        for name in old:
            target = self.path / SET_ASIDE / name
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).rename(target)
            with suppress(OSError):  # the folders above that are empty now
                for above in (self.path / name).relative_to(self.path).parents[:-1]:
                    (self.path / above).rmdir()
        return old

    def times(self, steps: Iterable[Step]) -> tuple[str, float]:
        """Of a study that may have been continued: its first start, and the seconds that its `steps` of before took.

        The first start is the earliest that the steps and PROVENANCE know of; empty where none does.
        """
        records = {step: self._record(step.name) for step in steps}
        starts = [_mapping(self.path / PROVENANCE).get("started"), *(of.get("started") for of in records.values())]
        seconds = sum(of.get("seconds", 0.0) for step, of in records.items() if step.skipped)
        return min(filter(None, starts), default=""), seconds

    def timings(self, names: Iterable[str]) -> list[TimingRecord]:
        records: list[TimingRecord] = []
        for name in names:
            file = self.path / name / STEP_FILE
            if file.exists():
                step = read_json(file)
                records.append({"step": name, "seconds": step["seconds"], "peak_rss_bytes": step["peak_rss_bytes"]})
        return records


def _mapping(file: Path) -> dict[str, Any]:
    """What a JSON file holds; {} where there is none, or none that can be read."""
    with suppress(UserError, UnicodeDecodeError):
        content = read_json(file) if file.exists() else {}
        return content if isinstance(content, dict) else {}
    return {}


TRUSTED_BYTES = 16 * 2**20  # a larger file is read again only if its time of change is another,
TRUSTED_KINDS = (".flac",)  # and so is a recording: there may be very many


def _files_in(folder: Path) -> list[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path not in (STEP_FILE, FILES_FILE))


def _about(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"bytes": stat.st_size, "sha256": hash_file(file), "modified_ns": stat.st_mtime_ns}


def _damage(folder: Path, listed: str) -> str | None:
    """The first file in `folder` that is not as FILES_FILE, whose hash is `listed`, has it."""
    if not (folder / FILES_FILE).exists() or hash_file(folder / FILES_FILE) != listed:
        return f"{FILES_FILE} is damaged"
    for name, about in read_json(folder / FILES_FILE).items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        stat = file.stat()
        if stat.st_size != about["bytes"]:
            return f"{name} has {stat.st_size:,} bytes where {about['bytes']:,} were written"
        is_large = stat.st_size > TRUSTED_BYTES or file.suffix in TRUSTED_KINDS
        trusted = is_large and stat.st_mtime_ns == about["modified_ns"]
        if not trusted and hash_file(file) != about["sha256"]:
            return f"{name} was changed"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Provenance
# ---------------------------------------------------------------------------------------------------------------------
def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def provenance() -> dict[str, Any]:
    """Versions and hardware; torch is asked only if it is already imported."""
    versions = {}
    for package in ("palimpsest-llm", "torch", "transformers", "peft", "accelerate", "numpy", "safetensors"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    hardware: dict[str, Any] = {"machine": platform.machine(), "cpu": cpu_name(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None:
        hardware["threads"] = torch.get_num_threads()
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    with suppress(ValueError, OSError):
        hardware["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "hardware": hardware,
        "code": hash_value([[str(file.relative_to(ROOT)), hash_file(file)] for file in sorted(ROOT.rglob("*.py"))])[
            :16
        ],
    }


def utc(seconds: float) -> str:
    """A time in seconds since 1970 as ISO 8601, whose texts sort by time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def cpu_name() -> str:
    """The processor's name as the system gives it; may be empty."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
