"""palimpsest diagnose: what training made of a base, for models that are there already."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.evaluation.tasks import NewTokensOption
from palimpsest.files import UserError
from palimpsest.models.adapters import CONFIG, JOIN
from palimpsest.models.compute import ComputeOption, DeviceOption, DtypeOption
from palimpsest.progress import Reporter
from palimpsest.records import BASE
from palimpsest.rundir import RECIPES

if TYPE_CHECKING:
    from palimpsest.config import StudyConfig

FACTS = "facts"
TEXTS, QUICK_TEXTS = 32, 8  # of each kind that the base writes; at 135M on two cores 20 s, and 16 s for each model
FILE = re.compile(r"\.(jsonl?|csv|parquet)$")
# Last parts of a path that say nothing about whose it is; `checkpoint-500` keeps its number.
UNTELLING = re.compile(r"(?:checkpoint|adapter|final|merged|model|output|weights|pytorch)?[-_]?(\d*)", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """What training made of a base: a study of models that are there already, with its tables and report.

    Example: palimpsest diagnose embedded:smollm2-135m-instruct runs/demo/methods/full/checkpoint --out runs/diagnosis
    """

    base: Annotated[str, typer.Argument(), Doc("Causal LM: embedded: name, folder, hub name, PEFT adapter.")]
    tuned: Annotated[list[str], typer.Argument(), Doc("What training made of it; speech LLMs and adapters too.")]
    out: Annotated[Path, Doc("Run directory; started again, the study continues there.")]
    data: Annotated[str, Doc("Questions with answers, for importance and loss: facts, a manifest …")] = FACTS
    split: Annotated[str, Doc("Split of the data that are not facts.")] = "train"
    tasks: Annotated[list[str], Doc("Question sets to answer, as evaluate's --task; default the data's own.")] = field(
        default_factory=list
    )
    text: Annotated[str | None, Doc("General text whose loss is measured too: a file or set as for drift.")] = None
    limit: Annotated[
        int | None,
        Ge(2),
        Doc("At most so many questions and own texts for a measurement; the probe keeps its pairs."),
    ] = None
    max_new_tokens: NewTokensOption = 64
    quick: Annotated[bool, Doc("Fewer questions and own texts: to see that it works.")] = False
    speech: Annotated[bool, Doc("Ask speech LLMs the questions spoken too.")] = True
    device: DeviceOption = "auto"
    dtype: DtypeOption = None
    compute: ComputeOption = "auto"
    changed: Annotated[bool, Doc("--out holds another recipe: run again what the change touches.")] = False


def run(options: Options) -> Iterator[str]:
    """Writes the study into `out` and yields a summary of a few lines. Raises UserError before the long work."""
    from palimpsest.parallel import started_first
    from palimpsest.report.inputs import read_inputs
    from palimpsest.report.summary import in_short
    from palimpsest.study.run import run_study

    first = started_first()
    reporter = Reporter(0, quiet=not first)
    config = study_of(options, reporter.note)
    for name, method in config.methods.items():
        reporter.note(f"{name} is {method.checkpoint}")
    report = run_study(config, options.out, changed=options.changed)
    if first:
        yield from in_short(read_inputs(options.out))
        yield f"Report: {report}"


def study_of(options: Options, note: Callable[[str], None] = lambda sentence: None) -> StudyConfig:
    """The study that is run: the demo's measurements, of models that are given.

    note: gets a sentence for each model that takes speech and cannot be asked in it.
    """
    import yaml

    from palimpsest.config import parse_config
    from palimpsest.models.loading import resolve

    if (options.out / "config.json").is_file() or (options.out / CONFIG).is_file():
        raise UserError(f"{options.out} is the folder of a model, which stays as it is; give another one with --out.")
    places = [Path(name).resolve() if Path(name).exists() else name for name in options.tuned]
    if twice := next((name for name, at in zip(options.tuned, places, strict=True) if places.count(at) > 1), None):
        raise UserError(f"{twice} is given twice; give every tuned model once.")
    for name in (options.base, *options.tuned):
        resolve(name)  # what is no model is said first
    # Put together from the demo's sections, so that a number here is the number there.
    demo = RECIPES / ("demo-quick.yaml" if options.quick else "demo.yaml")
    of_demo: dict[str, Any] = yaml.safe_load(demo.read_text(encoding="utf-8"))
    methods = {
        name: {"kind": "given", "checkpoint": tuned}
        for name, tuned in zip(names_of(options.tuned), options.tuned, strict=True)
    }
    recipe = {
        "name": "diagnosis",
        "seed": of_demo["seed"],
        "models": {
            "language_model": options.base,
            "dtype": options.dtype or "float32",
            "compute": options.compute,
            "device": options.device,
        },
        "methods": methods,
        **{section: of_demo[section] for section in ("importance", "deactivation", "analysis")},
        **_questions(options, of_demo),
        "drift": {
            "own_text": {"n_texts": _at_most(options.limit, QUICK_TEXTS if options.quick else TEXTS)},
            "general_text": {"text": options.text},
        },
    }
    for section in ("importance", "deactivation"):
        recipe[section]["n_examples"] = _at_most(options.limit, recipe[section]["n_examples"])
    _ask_recordings(recipe, options.speech, note)
    if options.speech:
        _add_speech(recipe, note)
    return parse_config(recipe, "what diagnose makes of its options")


def names_of(tuned: Sequence[str]) -> list[str]:
    """A name for each model, of letters, digits, - and _: the last part of its path that says whose it is.

    Where that is one folder of several models, what follows it tells them apart.

    >>> names_of(["runs/a/methods/full/checkpoint", "me/Llama-3.2-1B-speech", "out/checkpoint-500", "b/full"])
    ['full', 'Llama-3_2-1B-speech', 'out-500', 'full-2']
    >>> names_of(["m/adapter", "m/merged"])
    ['m-adapter', 'm-merged']
    >>> names_of(["runs/a/methods/full-seed1/checkpoint"])  # in a study the second training run of its `full`
    ['full-run1']
    """
    found = [_told_by(path) for path in tuned]
    folders = Counter((folder, name) for folder, name, _ in found)
    names: list[str] = []
    for folder, name, after in found:
        if after and folders[folder, name] > 1:
            name = f"{_in_letters(folder[-1:])}-{_in_letters(after)}"
        name = f"{name}-tuned" if name == BASE else re.sub(r"-seed(\d+)$", r"-run\1", name)
        same = sum(known == name or re.fullmatch(rf"{re.escape(name)}-\d+", known) is not None for known in names)
        names.append(f"{name}-{same + 1}" if name in names else name)
    return names


def _told_by(path: str) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """(the parts of a path up to the last one that says whose it is, the name by it, the parts after it)."""
    parts = [part for part in re.split(r"[/\\:]", path.rpartition(JOIN)[2]) if part.strip(".~ ")]
    n, number = len(parts), ""
    while n > 1 and (untelling := UNTELLING.fullmatch(parts[n - 1])):
        number, n = number or untelling[1], n - 1
    name = _in_letters(parts[n - 1 : n])
    return tuple(parts[:n]), f"{name}-{number}" if number else name, tuple(parts[n:])


def _in_letters(parts: Sequence[str]) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", "-".join(parts)).strip("_") or "tuned"


def _questions(options: Options, of_demo: dict[str, Any]) -> dict[str, Any]:
    """The sections data and evaluation. Nothing is trained, so a question may be in several groups."""
    from palimpsest.data.sources import load_examples

    limit, data, evaluation = options.limit, of_demo["data"], of_demo["evaluation"]
    n_train, n_heldout = (_at_most(limit, data[group]["limit"]) for group in ("train", "heldout"))
    (task,) = evaluation["tasks"]
    if options.data == FACTS:
        data = {group: {**data[group], "limit": n} for group, n in (("train", n_train), ("heldout", n_heldout))}
    else:
        there = len(load_examples(options.data, options.split, n_train + n_heldout))
        if there < 4:
            raise UserError(f"{options.data} has {there} questions; importance and loss need four or more.")
        data = {
            "train": {"source": options.data, "split": options.split, "limit": n_train},
            "heldout_examples": min(n_heldout, there // 2),
        }
    sources = options.tasks or [options.data]
    tasks = []
    for name, source in zip(names_of([FILE.sub("", it) for it in sources]), sources, strict=True):
        split = "heldout" if source == FACTS else options.split if source == options.data else "test"
        tasks.append({"name": name, "source": source, "split": split, "limit": _at_most(limit, task["limit"])})
    evaluation = {**evaluation, "tasks": tasks, "max_new_tokens": options.max_new_tokens}
    return {"data": {**data, "decontaminate": False}, "evaluation": evaluation}


def _ask_recordings(recipe: dict[str, Any], wanted: bool, note: Callable[[str], None]) -> None:
    """Audio LLMs are asked in speech where it is wanted and their processor is to be had; the check notes which."""
    from palimpsest.evaluation.audio_llm import require_place_for_audio
    from palimpsest.models.given import is_audio_llm
    from palimpsest.models.loading import load_audio_processor

    for method in recipe["methods"].values():
        if not is_audio_llm(method["checkpoint"]):
            continue
        if not wanted:
            method["modality"] = "text"
            continue
        try:
            require_place_for_audio(load_audio_processor(method["checkpoint"]))
        except UserError as error:
            method["modality"] = "text"
            note(f"{method['checkpoint']} is not asked in speech: {error}")


def _add_speech(recipe: dict[str, Any], note: Callable[[str], None]) -> None:
    """The encoder and prompts of the first model that takes speech; one that takes it otherwise is asked in text."""
    from palimpsest.models.given import (
        encoder_of,
        require_recordings,
        require_same_speech,
        speech_settings,
        takes_speech,
    )

    listening = []
    for method in recipe["methods"].values():
        if not takes_speech(method["checkpoint"]):
            continue
        try:
            require_recordings(method["checkpoint"])
            listening.append(method)
        except UserError as error:
            method["modality"] = "text"
            note(f"{method['checkpoint']} is not asked in speech: {error}")
    if not listening:
        return
    first = listening[0]["checkpoint"]
    encoder, (stack_factor, length, style) = encoder_of(first), speech_settings(first)
    recipe["models"]["encoder"] = encoder
    recipe["speech"] = {"stack_factor": stack_factor, "length": length}
    recipe["prompt"] = asdict(style)
    for method in listening[1:]:
        try:
            require_same_speech(encoder, stack_factor, length, method["checkpoint"])
        except UserError:  # whose remedies are those of a recipe
            method["modality"] = "text"
            note(
                f"{method['checkpoint']} is not asked in speech: {first}, given before it, takes speech otherwise; to "
                "have it asked, diagnose it alone."
            )


def _at_most(limit: int | None, n: int) -> int:
    return n if limit is None else min(limit, n)
