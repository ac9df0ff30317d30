"""A run directory: the only interface between the steps of a study.

Every step owns one sub-directory and writes it under a temporary name, then renames it, together with a fingerprint
of everything that went in. A step whose fingerprint matches is skipped; one whose inputs changed runs again.
Killing the process at any moment therefore loses at most the step in progress.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

SCHEMA = 1
RESULT_TABLES = (
    "deactivation",
    "qa",
    "qa_floors",
    "voices",
    "perplexity",
    "comparisons",
    "probe",
    "layers",
    "shift",
    "clustering",
    "clustering_summary",
    "delta",
    "mask_overlap",
    "correlations",
    "training",
    "seeds",
    "seed_comparisons",
    "claims",
    "timings",
)
STEP_FILE = "step.json"  # inside every step's directory: fingerprint, inputs, seconds


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where, what to do. The command line prints it, exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Record types of results.json: flat, one row each. Fields are only ever added.
# ---------------------------------------------------------------------------------------------------------------------
Modality = Literal["text", "speech", "cascade", "text_asr"]  # how a question is put: docs/glossary.md


class DeactivationRecord(TypedDict):
    """Perplexity of `model` after zeroing `n_removed` weights (condition `base`: none removed, ratio 0)."""

    model: str
    modality: str
    condition: str  # base | top | bottom | random
    ratio: float
    scope: str  # global | per_layer | per_matrix
    seed: int | None  # of the random mask
    reduction: str  # of the importance scores that ranked the weights
    n_removed: int
    n_examples: int
    n_tokens: int
    loss: float  # nats per supervised token
    perplexity: float


class QARecord(TypedDict):
    method: str
    task: str
    modality: str
    n: int
    correct: int
    accuracy: float  # in [0, 1]
    ci_low: float
    ci_high: float
    metric: str
    metric_version: str
    n_empty: int  # answered, but without a letter or digit
    n_failed: int  # could not be answered; counted as wrong
    n_refusal: NotRequired[int]  # added after the first results were written
    n_loop: NotRequired[int]
    source: NotRequired[str]  # measured: by this version, here; published: taken from a paper


class ComparisonRecord(TypedDict):
    """Paired: the same questions answered by a and by b; `difference` = accuracy(b) − accuracy(a)."""

    task: str
    modality: str
    metric: str
    method_a: str
    method_b: str
    n: int
    only_a: int
    only_b: int
    difference: float
    ci_low: float
    ci_high: float
    p_value: float  # McNemar, exact
    p_holm: float  # Holm-corrected over the table


class LayerRecord(TypedDict):
    model: str
    modality: str
    reduction: str
    layer: int
    kind: str  # q k v o gate up down, or "all"
    total: float  # sum of importance
    mean: float  # per parameter
    share: float  # of the model's total
    n_parameters: int


class ShiftRecord(TypedDict):
    """How far the layer-wise distribution of `model` lies from that of `reference`."""

    model: str
    reference: str
    modality: str
    reduction: str
    measure: str
    value: float
    ci_low: float | None
    ci_high: float | None
    noise_floor: float | None  # the same measure between the reference and itself scored on other data


class ClusteringRecord(TypedDict):
    """Concentration of one matrix on rows or columns, beside what the same entries give when shuffled."""

    model: str
    of: str  # importance | mask (its top ratio) | delta | delta_rank<r> (best approximation of rank r)
    name: str
    layer: int
    kind: str
    measure: str
    value: float
    null_mean: float  # entries shuffled; of delta_rank<r>: random singular vectors
    null_std: float
    z: float
    within_rows_mean: NotRequired[float | None]  # entries shuffled within their rows; None where that changes nothing
    within_rows_std: NotRequired[float | None]
    within_rows_z: NotRequired[float | None]
    within_columns_mean: NotRequired[float | None]
    within_columns_std: NotRequired[float | None]
    within_columns_z: NotRequired[float | None]


class DeltaRecord(TypedDict):
    method: str
    name: str
    layer: int
    kind: str
    relative_norm: float  # ‖W_tuned − W_base‖ / ‖W_base‖, Frobenius
    overlap_with_importance: float  # share of the largest changes that hit the base model's most important weights
    overlap_by_chance: float
    effective_rank: NotRequired[float]  # of the change, see ClusteringRecord's measure of that name
    energy_top1: NotRequired[float]  # share of ‖ΔW‖² in its largest singular direction
    energy_top8: NotRequired[float]
    energy_top24: NotRequired[float]


class ClaimRecord(TypedDict):
    claim: int
    statement: str
    measure: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    verdict: str  # holds | fails | undecided
    note: NotRequired[str]


class TimingRecord(TypedDict):
    step: str
    seconds: float
    peak_rss_bytes: int


# ---------------------------------------------------------------------------------------------------------------------
# Atomic files and hashes
# ---------------------------------------------------------------------------------------------------------------------
def write_text(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Non-finite numbers become null: the files are strict JSON."""
    write_text(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; run the step of the study that writes it first.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run the study again.") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): it also splits at U+2028 and U+0085, which may stand inside a JSON string.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_value(value: Any) -> str:
    """SHA-256 of the value's canonical JSON; anything that is not JSON is an error."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def code_version(*packages: str) -> str:
    """Hash of the sources of the named sub-packages or modules, so that changed code runs its steps again."""
    root = Path(__file__).parent
    files: list[Path] = []
    for package in packages:
        path = root / package
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return hash_value([[str(file.relative_to(root)), hash_file(file)] for file in files])[:16]


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def require_disk(folder: Path, n_bytes: int, what: str) -> None:
    """Raise UserError now rather than in the middle of a write."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < n_bytes:
        raise UserError(
            f"{what} needs {n_bytes / 1e9:.2f} GB but {folder} has {free / 1e9:.2f} GB free; "
            "free some space or choose another folder with --out."
        )


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
        existing = _existing(path)
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{path} cannot be used as a run directory: {existing} is no writable folder.")
        self.path = path

    def step(self, name: str, inputs: Mapping[str, Any], write: Callable[[Path], None]) -> Step:
        """Run `write(folder)` unless `name` is there already with the same `inputs`.

        `inputs` must be JSON and hold everything the output depends on: configuration, hashes of input files,
        fingerprints of earlier steps, the code version. `write` gets an empty temporary folder — or, when the same
        step with the same inputs was interrupted, that folder as it was left, so that a long step can continue.
        """
        if (done := self.finished(name, inputs)) is not None:
            return done
        target, fingerprint = self.path / name, hash_value(inputs)
        working = self.path / ".working" / f"{name.replace('/', '__')}-{fingerprint[:16]}"
        for stale in working.parent.glob(f"{name.replace('/', '__')}-*"):
            if stale != working:
                shutil.rmtree(stale)
        working.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        write(working)
        seconds = time.perf_counter() - started
        write_json(
            working / STEP_FILE,
            {
                "step": name,
                "fingerprint": fingerprint,
                "inputs": inputs,
                "seconds": seconds,
                "peak_rss_bytes": peak_rss_bytes(),
            },
        )
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        working.rename(target)
        with suppress(OSError):
            working.parent.rmdir()  # only when empty
        return Step(name, target, fingerprint, skipped=False)

    def finished(self, name: str, inputs: Mapping[str, Any]) -> Step | None:
        """The step if it is there with the same `inputs`, else None."""
        target, fingerprint = self.path / name, hash_value(inputs)
        return Step(name, target, fingerprint, skipped=True) if self._fingerprint(target) == fingerprint else None

    @staticmethod
    def _fingerprint(target: Path) -> str | None:
        file = target / STEP_FILE
        if not file.exists():
            return None
        return str(read_json(file).get("fingerprint"))

    def timings(self, names: Iterable[str]) -> list[TimingRecord]:
        records: list[TimingRecord] = []
        for name in names:
            file = self.path / name / STEP_FILE
            if file.exists():
                step = read_json(file)
                records.append({"step": name, "seconds": step["seconds"], "peak_rss_bytes": step["peak_rss_bytes"]})
        return records


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
        "code": code_version("."),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it; may be empty."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
