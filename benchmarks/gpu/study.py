"""The whole study of a recipe on one GPU of a machine without network, within a time limit.

    python benchmarks/gpu/study.py WORK --pack PARTS --recipe recipes/smollm2-135m.yaml --wheels WHEELS   # here
    PYTHONPATH=src python benchmarks/gpu/study.py WORK --unpack PARTS/part-00                             # there, each
    PYTHONPATH=src python benchmarks/gpu/study.py WORK --results OUT --minutes 25                         # there
    PYTHONPATH=src python benchmarks/gpu/study.py RUN --read OUT                                          # here

`--pack` makes the data of the recipe (speech is spoken here, where the voices are) and writes what the other machine
needs in parts of at most `--part-mb`, each in a folder of its own with the list of all parts and their SHA-256:
recordings as Ogg Opus (16 kHz; the study then is one on Opus speech, there and here), the embedded models' packages or
local model folders as they are, the wheels in WHEELS (what that machine lacks: pydantic, soundfile, soxr, gguf and what
they need), and the recipe, its sources now the packed manifests. `--set KEY=VALUE` changes the recipe.

`--unpack` copies one part and checks it; with the last one all are put together. Then, without a mode, the study runs
in WORK/run: first the base, then the training runs, `--workers` at a time, each a process of its own. Its stages are
`--first` methods once, all methods once, all methods twice, …; each ends with analysis, results.json and the report, so
what was finished in time is complete. When time is up the steps in progress stop where they are (training continues
from its last checkpoint), study.yaml is that of the last finished stage, and calling again continues. OUT gets the run
directory without weights, scores, features and audio, and the adaptor and LoRA weights of `--keep` methods, in pieces
of at most `--piece-mb`, after each stage; `--read` puts them together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

LIST = "parts.json"
MB = 10**6
RECORDED = "recorded"  # what stands for the voices in the packed recipe: every question has its recording
OPUS_LEVEL = 0.92  # libsndfile's compression level: about 26 kbit/s
LEFT_OUT = (".safetensors", ".npy", ".bin", ".pt", ".flac", ".wav", ".opus")
KEPT_OF_CHECKPOINTS = ("training.json", "layer_scales.json", "config.json", "step.json")
LEFT_OUT_FOLDERS = ("features", "trainer", ".working", "cache", "audio")
UNFINISHED = 3  # exit code of a worker whose time was up
END = 45.0  # seconds before the limit at which the steps in progress are stopped, for packing what there is


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the run and its inputs")
    parser.add_argument("--pack", type=Path, metavar="PARTS", help="write the parts")
    parser.add_argument("--unpack", type=Path, metavar="PART", help="take a part over")
    parser.add_argument("--read", type=Path, metavar="OUT", help="put results together in WORK")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/smollm2-135m.yaml"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="evaluation.batch_size=256 …")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for the other machine")
    parser.add_argument("--part-mb", type=float, default=55)
    parser.add_argument("--results", type=Path, metavar="OUT", help="folder for the results; default WORK/results")
    parser.add_argument("--piece-mb", type=float, default=15)
    parser.add_argument("--keep", nargs="*", default=[], metavar="METHOD", help="methods whose weights are results")
    parser.add_argument("--first", nargs="*", default=["full", "layer_lr", "lora"], help="methods of the first stage")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--workers", type=int, default=5, help="training runs at a time; 0: in this process")
    parser.add_argument("--cpu", action="store_true", help="allow a machine without CUDA")
    parser.add_argument("--only", nargs=2, metavar=("STAGE", "RUN"), help=argparse.SUPPRESS)  # what a worker gets
    options = parser.parse_args()
    started = time.monotonic()
    if options.pack:
        pack(options)
    elif options.unpack:
        unpack(options.unpack, options.work / "parts", options.work / "inputs")
    elif options.read:
        unpack(options.read, options.work.with_name(f".{options.work.name}-pieces"), options.work)
    else:
        run(options, started)


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------
def pack(options: argparse.Namespace) -> None:
    import yaml

    from palimpsest.config import load_config, parse_config
    from palimpsest.study import Study

    values = load_config(options.recipe).model_dump(mode="json")
    for change in options.set:
        key, _, value = change.partition("=")
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner[section]
        inner[last] = yaml.safe_load(value)
    config = parse_config(values, f"{options.recipe} with --set")
    study = Study(config, options.work / "data-run")
    study.ws.sources.check()
    study.data()

    work = options.work / "packing"
    shutil.rmtree(work, ignore_errors=True)
    for group, examples in study.ws.groups.items():
        write_opus(group, examples, work / "data")
    values["data"] = {**values["data"], "train": manifest("train"), "heldout": manifest("heldout")}
    values["data"]["heldout_examples"] = None
    values["speech"] |= {"augmentation": None, "voice": RECORDED, "feature_cache": None}  # all is spoken
    for task in values["evaluation"]["tasks"]:
        task |= manifest(f"task-{task['name']}")
    for role in ("language_model", "encoder", "asr", "adaptor"):
        if values["models"].get(role):
            values["models"][role] = take_model(values["models"][role], role, work)
    for wheel in sorted(options.wheels.glob("*.whl")) if options.wheels else []:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "site")
    parse_config(values, "the packed recipe")
    (work / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    names = write_parts(
        ((file, str(file.relative_to(work))) for file in files_in(work)), options.pack, options.part_mb, "part"
    )
    total = sum(file.stat().st_size for file in files_in(options.pack))
    print(f"{len(names)} parts in {options.pack}, {total / MB:.0f} MB; unpack each there, in any order")


def manifest(group: str) -> dict[str, Any]:
    return {"source": f"inputs/data/{group}.jsonl", "split": group, "limit": None, "voice": None}


def write_opus(group: str, examples: Iterable[Any], folder: Path) -> None:
    """FOLDER/GROUP.jsonl and the recordings as FOLDER/opus/HASH.opus; equal recordings once."""
    import dataclasses

    import soundfile

    from palimpsest.data.records import write_manifest
    from palimpsest.data.speech import SAMPLE_RATE, read_audio
    from palimpsest.rundir import hash_file

    (folder / "opus").mkdir(parents=True, exist_ok=True)
    packed = []
    for example in examples:
        path = folder / "opus" / f"{hash_file(example.audio)[:24]}.opus"
        if not path.exists():
            audio = read_audio(example.audio)
            soundfile.write(str(path), audio, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL)
        packed.append(dataclasses.replace(example, audio=path))
    write_manifest(folder / f"{group}.jsonl", packed)


def take_model(name: str, role: str, work: Path) -> str:
    """Copy what `name` needs into `work`; returns what the recipe calls it there."""
    from palimpsest.models.embedded import MODELS, PREFIX, SHIPPED

    if name.removeprefix(PREFIX) in SHIPPED:
        return name  # travels with the sources
    if name.startswith(PREFIX):
        model = MODELS[name.removeprefix(PREFIX)]
        for package in (model.package, *(part[0] for part in model.parts), "gguf"):
            copy_package(package, work / "site")
        return name
    if not Path(name).exists():
        sys.exit(f"models.{role} is {name}: only embedded models and local folders can be packed.")
    if role == "adaptor" and sum(file.stat().st_size for file in files_in(Path(name))) > 100 * MB:
        sys.exit(
            f"models.adaptor is {name}, with the whole language model; give what `palimpsest export --light` writes."
        )
    target = work / "models" / role
    if Path(name).is_dir():
        shutil.copytree(name, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, target)
    return f"inputs/models/{role}"


def copy_package(package: str, site: Path) -> None:
    import importlib.util

    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"The package {package} is not installed; install requirements/embedded.txt and gguf to pack it.")
    if not (site / package).exists():
        source = spec.submodule_search_locations[0]
        shutil.copytree(source, site / package, ignore=shutil.ignore_patterns("__pycache__"))


# ---------------------------------------------------------------------------------------------------------------------
# Parts: one tar, cut
# ---------------------------------------------------------------------------------------------------------------------
def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Cutter:
    """Takes a stream of bytes and writes it as files NAME-00, NAME-01 … of at most `size` bytes."""

    def __init__(self, folder: Path, size: int, name: str) -> None:
        self.folder, self.size, self.name = folder, size, name
        self.parts: list[dict[str, Any]] = []
        self.buffer = bytearray()

    def write(self, data: Any) -> int:
        self.buffer += data
        while len(self.buffer) >= self.size:
            self.cut(self.size)
        return len(data)

    def cut(self, n: int) -> None:
        piece = bytes(self.buffer[:n])
        del self.buffer[:n]
        name = f"{self.name}-{len(self.parts):02d}"
        (self.folder / name).mkdir(parents=True)
        (self.folder / name / f"{name}.bin").write_bytes(piece)
        digest = hashlib.sha256(piece).hexdigest()
        self.parts.append({"name": f"{name}.bin", "bytes": n, "sha256": digest})


def write_parts(files: Iterable[tuple[Path, str]], folder: Path, mb: float, name: str, mode: str = "w|") -> list[str]:
    """The files (path, name in the archive) as FOLDER/NAME-00/{NAME-00.bin, parts.json} …; replaces what was there."""
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    cutter = Cutter(temporary, int(mb * MB), name)
    with tarfile.open(fileobj=cutter, mode=mode) as archive:  # type: ignore[call-overload]
        for path, inside in files:
            archive.add(path, inside)
    if cutter.buffer:
        cutter.cut(len(cutter.buffer))
    listed = json.dumps({"parts": cutter.parts}, indent=1) + "\n"
    for part in cutter.parts:
        (temporary / Path(part["name"]).stem / LIST).write_text(listed, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(folder)
    return [part["name"] for part in cutter.parts]


def unpack(source: Path, kept: Path, target: Path) -> None:
    """Take over the parts in `source`, or in folders of it; once all are there, put them together in `target`.

    Exits for a part that is damaged or of another packing.
    """
    lists = sorted({*source.glob(LIST), *source.glob(f"*/{LIST}")})
    if not lists:
        sys.exit(f"{source} holds no {LIST}; give a folder that --pack or a run wrote.")
    parts = json.loads(lists[0].read_text(encoding="utf-8"))["parts"]
    kept.mkdir(parents=True, exist_ok=True)
    wanted = {part["name"]: part for part in parts}
    for file in sorted({*source.glob("*.bin"), *source.glob("*/*.bin")}):
        if file.name not in wanted or sha256(file) != wanted[file.name]["sha256"]:
            sys.exit(f"{file} is damaged or of another packing (its SHA-256 differs); copy it again.")
        shutil.copyfile(file, kept / file.name)
    for file in kept.glob("*.bin"):
        if file.name not in wanted or sha256(file) != wanted[file.name]["sha256"]:
            file.unlink()  # of an earlier packing, or cut short
    have = [part["name"] for part in parts if (kept / part["name"]).exists()]
    if len(have) < len(parts):
        print(f"{len(have)} of {len(parts)} parts are here")
        return
    working = target.with_name(f".{target.name}.new")
    shutil.rmtree(working, ignore_errors=True)
    with tarfile.open(fileobj=Joined([kept / name for name in have]), mode="r|*") as archive:  # type: ignore[call-overload]
        archive.extractall(working, filter="data")
    shutil.rmtree(target, ignore_errors=True)
    working.rename(target)
    shutil.rmtree(kept)
    print(f"all {len(parts)} parts are here; unpacked to {target}")


class Joined:
    """Files read one after the other as one."""

    def __init__(self, files: list[Path]) -> None:
        self.files = iter(files)
        self.open: BinaryIO | None = None

    def read(self, size: int = -1) -> bytes:
        data = b""
        while len(data) < size:
            if self.open is None:
                following = next(self.files, None)
                if following is None:
                    break
                self.open = following.open("rb")
            got = self.open.read(size - len(data))
            if not got:
                self.open.close()
                self.open = None
            data += got
        return data


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------
class OutOfTime(Exception):
    """The limit is near; the step in progress stops as if it had been killed."""


def run(options: argparse.Namespace, started: float) -> None:
    results = (options.results or options.work / "results").resolve()
    if not (options.work / "inputs" / "recipe.yaml").exists():
        sys.exit(f"{options.work} has no inputs; --unpack every part first.")
    os.chdir(options.work)  # so that study.yaml names its sources alike everywhere
    sys.path.append(str(Path("inputs/site").resolve()))
    os.environ["PALIMPSEST_CACHE"] = str(Path("cache").resolve())
    import torch

    from palimpsest.config import load_config
    from palimpsest.data.voices import VOICES, Voice

    VOICES[RECORDED] = Voice(RECORDED, lambda: "1", nothing_to_say)
    if not options.cpu and not torch.cuda.is_available():
        sys.exit("There is no CUDA device; --cpu allows a machine without one.")
    deadline = started + 60 * options.minutes - END
    stages = list(stages_of(load_config(Path("inputs/recipe.yaml")), options.first))
    if options.only:
        worker(stages[int(options.only[0])], options.only[1], deadline)
        return
    done = Done(stages)

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:.0f} s] {what}", flush=True)

    try:
        for number in range(done.n_stages, len(stages)):
            stage = stages[number]
            times = "once" if stage.seeds == 1 else f"{stage.seeds} times"
            say(f"stage {number + 1} of {len(stages)}: {', '.join(stage.methods)}, {times}")
            finish(stage, number, options, deadline, done)
            done.stage(number)
            give(Path("run"), results, options)
            say(f"results in {results}")
        say("the study is finished")
    except OutOfTime:
        say("time is up; call again to continue")
    finally:
        done.restore()
        give(Path("run"), results, options)


class Done:
    """What is finished, in WORK/done.json, so that a further call neither looks at it again nor undoes its analysis."""

    def __init__(self, stages: list[Any]) -> None:
        self.stages = stages
        self.recipe = sha256(Path("inputs/recipe.yaml")) + "".join(f" {len(stage.methods)}" for stage in stages)
        self.n_stages, self.runs = 0, set[str]()
        if Path("done.json").exists():
            said = json.loads(Path("done.json").read_text(encoding="utf-8"))
            if said["recipe"] == self.recipe:
                self.n_stages, self.runs = said["stages"], set(said["runs"])

    def stage(self, number: int) -> None:
        self.n_stages = number + 1
        self.write()

    def run(self, name: str) -> None:
        self.runs.add(name)
        self.write()

    def write(self) -> None:
        from palimpsest.rundir import write_json

        write_json(Path("done.json"), {"recipe": self.recipe, "stages": self.n_stages, "runs": sorted(self.runs)})

    def restore(self) -> None:
        """study.yaml is that of results.json, not that of the stage that was begun after it."""
        from palimpsest.config import dump_config
        from palimpsest.rundir import write_text

        if self.n_stages:
            write_text(Path("run/study.yaml"), dump_config(self.stages[self.n_stages - 1]))


def nothing_to_say() -> Any:
    sys.exit("A question of the packed data has no recording; pack it again.")


def stages_of(config: Any, first: list[str]) -> Iterator[Any]:
    """The recipe with the first methods once, all once, all twice …; each stage is a recipe of its own."""
    few = {name: method for name, method in config.methods.items() if name in first}
    if few and len(few) < len(config.methods):
        yield config.model_copy(update={"methods": few, "seeds": 1})
    for n in range(1, config.seeds + 1):
        yield config.model_copy(update={"seeds": n})


def finish(stage: Any, number: int, options: argparse.Namespace, deadline: float, done: Done) -> None:
    """One stage to its report. Raises OutOfTime."""
    from palimpsest.study import Study

    study = Study(stage, Path("run"), reporter(stage, deadline))
    if options.workers == 0:
        study.run()
        return
    study.check()
    study.base()
    study.ws.forget()
    study.ws.__dict__.pop("base", None)
    hold = Path("run/.working/held")  # keeps the folder while several processes make and leave theirs in it
    hold.parent.mkdir(parents=True, exist_ok=True)
    hold.touch()
    try:
        side_by_side([name for name in stage.runs if name not in done.runs], number, options, deadline, done)
    finally:
        hold.unlink()
        with suppress(OSError):
            hold.parent.rmdir()  # only when nothing was cut short
    Study(stage, Path("run"), reporter(stage, deadline)).run()


def side_by_side(names: list[str], number: int, options: argparse.Namespace, deadline: float, done: Done) -> None:
    """Every training run in a process of its own, `--workers` at a time. Raises OutOfTime; exits for a failed one."""
    Path("logs").mkdir(exist_ok=True)
    waiting, running = list(names), {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    environment |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    failed: list[str] = []
    while waiting or running:
        while waiting and len(running) < options.workers and not failed and time.monotonic() < deadline:
            name = waiting.pop(0)
            left = (deadline + END - time.monotonic()) / 60
            command = [sys.executable, str(SCRIPT), ".", "--only", str(number), name, "--minutes", f"{left:.3f}"]
            command += ["--first", *options.first, *(["--cpu"] if options.cpu else [])]
            log = Path("logs", f"{name}.txt").open("a", encoding="utf-8")  # noqa: SIM115 (closed with its process)
            running[name] = (subprocess.Popen(command, stdout=log, stderr=log, env=environment), log)
        for name, (process, log) in list(running.items()):
            if process.poll() is not None:
                log.close()
                del running[name]
                if process.returncode == 0:
                    done.run(name)
                failed += [name] if process.returncode not in (0, UNFINISHED) else []
        if time.monotonic() >= deadline and not running:
            raise OutOfTime
        time.sleep(0.2)
    if any(name not in done.runs for name in names) and not failed:
        raise OutOfTime  # the last workers stopped in time, but not at their end
    if failed:
        told = Path("logs", f"{failed[0]}.txt").read_text(encoding="utf-8").strip().splitlines()[-20:]
        sys.exit("\n".join([f"The training run {failed[0]} failed; the end of its log:", *told]))


def worker(stage: Any, name: str, deadline: float) -> None:
    from palimpsest.study import Study

    study = Study(stage, Path("run"), reporter(stage, deadline))
    try:
        study.base()  # done before: this only looks
        study.method(name)
    except OutOfTime:
        sys.exit(UNFINISHED)


def reporter(stage: Any, deadline: float) -> Any:
    """Says what a Reporter says, and raises OutOfTime at the first sign of life after the deadline."""
    from palimpsest.progress import Advance, Reporter
    from palimpsest.steps import n_steps

    class Timed(Reporter):
        @contextmanager
        def step(self, name: str) -> Iterator[Advance]:
            self.check()
            with super().step(name) as advance:

                def timed(done: int, total: int) -> None:
                    self.check()
                    advance(done, total)

                yield timed

        def check(self) -> None:
            if time.monotonic() >= deadline:
                raise OutOfTime

    return Timed(n_steps(stage))


def give(run: Path, results: Path, options: argparse.Namespace) -> None:
    """The run directory without what is large, and the kept weights, in pieces."""
    kept: list[tuple[Path, str]] = []
    for file in files_in(run):
        inside = file.relative_to(run)
        large = file.suffix in LEFT_OUT or set(inside.parts) & set(LEFT_OUT_FOLDERS)
        if not large and ("checkpoint" not in inside.parts or file.name in KEPT_OF_CHECKPOINTS):
            kept.append((file, str(inside)))
    kept += [(file, f"logs/{file.name}") for file in files_in(Path("logs"))]
    for method in options.keep:
        checkpoint = run / "methods" / method / "checkpoint"
        if (checkpoint / "model.safetensors").exists():
            kept.append(
                (adaptor_of(checkpoint, Path(f"adaptor-{method}.safetensors")), f"weights/adaptor-{method}.safetensors")
            )
        kept += [(file, f"weights/lora-{method}/{file.name}") for file in files_in(checkpoint / "adapter")]
    write_parts(kept, results, options.piece_mb, "piece", "w|gz")


def adaptor_of(checkpoint: Path, target: Path) -> Path:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
        names = [name for name in weights.keys() if name.startswith("adaptor.")]  # noqa: SIM118 (no mapping)
        save_file({name: weights.get_tensor(name) for name in names}, target)
    return target


SCRIPT = Path(__file__).resolve()

if __name__ == "__main__":
    main()
