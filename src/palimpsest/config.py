"""A recipe: one study as a value, frozen and strict. Nothing is rewritten silently: what the file says is what runs.

Its sections are the options of the rooms that use them; what only a study has is defined here. Bounds and unknown keys
are checked in options.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import BaseModel, ConfigDict, field_serializer, field_validator, model_validator

from palimpsest.data.augment import Augmentation
from palimpsest.data.filters import Filters
from palimpsest.data.in_loop import FramesWanted
from palimpsest.data.splits import Split, TaskSplit
from palimpsest.evaluation.drift_settings import Drift
from palimpsest.evaluation.tasks import NewTokensOption
from palimpsest.files import UserError, differences, in_words
from palimpsest.models.compute import DEVICE, Compute, WeightDtype
from palimpsest.models.given import is_audio_llm, takes_speech
from palimpsest.models.light import is_gated
from palimpsest.models.prompts import PromptStyle, written_out
from palimpsest.models.token_settings import SpeechInput, Tokens
from palimpsest.options import checked, nearest
from palimpsest.records import BASE, SCOPES, Modality, Scope, method_of, run_name
from palimpsest.rundir import RECIPES
from palimpsest.training.methods import WIDE, WITHOUT_RANK, Method
from palimpsest.training.settings import Settings


@dataclass(frozen=True)
class Models:
    """Hub names, local folders, or `embedded:` names."""

    language_model: str
    encoder: str | None = None  # none: a study of given models that are asked in text alone
    asr: str | None = None  # the cascade's recogniser; none: no cascade
    adaptor: str | None = None  # a speech LLM whose adaptor every method starts from; none: a fresh one
    dtype: WeightDtype = "float32"  # of the weights
    # Of the runs: whole models, or of adaptor, lora and inserted what was trained alone, beside the names of the rest.
    checkpoints: Literal["whole", "light"] = "whole"
    compute: Compute = "auto"  # of matrix products; auto: bfloat16 where the device multiplies it faster
    device: str = "auto"  # "auto": CUDA if there is one, else CPU

    def __post_init__(self) -> None:
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"there is no device {self.device!r}; give auto, cpu, cuda, cuda:0, mps or xpu")
        if self.dtype == "bfloat16" and self.compute == "float32":
            raise ValueError("compute float32 needs weights in float32; set dtype to float32, or compute to auto")


@dataclass(frozen=True)
class Speech:
    length: Literal["trim", "pad_to_30s"] = "trim"
    stack_factor: Annotated[int, Ge(1)] = 5
    adaptor_hidden_size: Annotated[int, Ge(1)] = 2048
    calibrate_adaptor: bool = False  # True: start from standardised inputs and the embedding's spread
    voice: str | list[str] = "hibari"  # speaks what has no recording; of a list, each example takes one by its id
    augmentation: Augmentation | None = None  # of the training utterances
    features: FramesWanted = "cache"  # of training recordings: kept, made in the loop, or what the disk allows
    feature_cache: str | None = None  # folder of encoder frames that several studies share; none: in the run directory
    tokens: Tokens | None = None  # for methods with speech: tokens, or centroids


@dataclass(frozen=True)
class Data:
    train: Split
    heldout: Split | None = None  # perplexity in the deactivation experiment
    heldout_examples: Annotated[int, Ge(1)] | None = None  # instead: so many of train, by a stable hash of their ids
    strict: bool = False  # True: a faulty example is an error instead of being left out and listed
    decontaminate: bool = True  # False: train also on questions that a task of evaluation asks
    # What methods learn to say: the answers of the data, or what the base says to the question as text.
    answers: Literal["gold", "own"] = "gold"
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        if (self.heldout is None) == (self.heldout_examples is None):
            raise ValueError("give exactly one of heldout (a split) and heldout_examples (how many of train)")


# Estimated in one pass; results.json has the layers and their shift by both.
StudyReduction = Literal["signed_sum", "per_batch_abs"]
STUDY_REDUCTIONS: tuple[StudyReduction, ...] = get_args(StudyReduction)


@dataclass(frozen=True)
class Importance:
    n_examples: Annotated[int, Ge(2)] | None = None  # questions; None: as many as 1/30 of the training data (the paper)
    # On which questions: the paper's are training questions, on which the loss of a tuned model may have collapsed.
    questions: Literal["train", "heldout"] = "train"
    batch_size: Annotated[int, Ge(1)] = 8
    reduction: StudyReduction = "signed_sum"  # the one Eq. 3 and deactivation use
    # Reductions whose score of every weight stays on disk; of the others the sums over parameters, as layers need them.
    keep: Annotated[tuple[StudyReduction, ...], MinLen(1)] = STUDY_REDUCTIONS
    accumulate: Literal["all", "kept"] = "all"  # kept: sums of per_batch_abs come from the batches' totals, if not kept
    keep_other: Literal["scores", "masks"] = "scores"  # of the base on other questions; masks: which weights are on top
    offload: Literal["none", "cpu", "disk"] = "none"  # where the sums are: on the device, in host memory, in files
    gradient_checkpointing: bool = False  # each layer's forward twice, its activations once at a time

    def __post_init__(self) -> None:
        if self.reduction not in self.keep:
            raise ValueError(f"keep has no {self.reduction}, which Eq. 3 and deactivation need (reduction); add it")
        if self.accumulate == "kept" and "signed_sum" not in self.keep:
            raise ValueError("accumulate: kept gives no sums of signed_sum, which keep leaves out; add it, or say all")


@dataclass(frozen=True)
class Deactivation:
    ratio: Annotated[float, Gt(0), Lt(1)] = 0.03
    scope: str | tuple[str, ...] = "global"  # one of SCOPES, or several of them, each measured by itself
    random_seeds: Annotated[int, Ge(1)] = 10  # random masks; what one of them does varies by orders of magnitude
    n_examples: Annotated[int, Ge(1)] | None = None  # of the held-out data; None: all
    batch_size: Annotated[int, Ge(1)] = 8

    def __post_init__(self) -> None:
        if wrong := [scope for scope in self.scopes if scope not in SCOPES]:
            raise ValueError(f"there is no scope {wrong[0]!r}; give {', '.join(SCOPES)}, or a list of them")
        if not self.scopes or len(set(self.scopes)) < len(self.scopes):
            raise ValueError(f"scope {list(self.scopes)} must name one or more of {', '.join(SCOPES)}, each once")

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """In the recipe's order; its first is the one whose value claim 1 shows."""
        return cast(tuple[Scope, ...], (self.scope,) if isinstance(self.scope, str) else self.scope)


@dataclass(frozen=True)
class Analysis:
    shuffles: Annotated[int, Ge(1)] = 3  # of each null of rank clustering
    rank_draws: Annotated[int, Ge(0)] = 5  # shuffles for the nulls of the effective rank; 0: it has none
    bootstrap: Annotated[int, Ge(100)] = 1000


@dataclass(frozen=True, kw_only=True)
class EvaluationTask(TaskSplit):
    name: str

    def __post_init__(self) -> None:
        _require_name("task", self.name)


@dataclass(frozen=True)
class Evaluation:
    tasks: Annotated[tuple[EvaluationTask, ...], MinLen(1)]
    max_new_tokens: NewTokensOption = 64
    batch_size: Annotated[int, Ge(1)] = 16
    probe: bool = True  # the retention probe of every model: seconds each
    text_asr: bool = False  # also ask the tuned models the recogniser's transcripts; needs models.asr


# What can be left out after the first run of a method; clustering: with it parameter change and overlap of masks.
SeedMeasure = Literal["importance", "clustering", "deactivation", "probe", "drift"]
SEED_MEASURES: tuple[SeedMeasure, ...] = ("importance", "clustering", "deactivation", "probe")  # drift: if asked for
LIGHT = ("adaptor", "lora", "inserted")  # kinds of method that have a light checkpoint
OF_WEIGHTS: tuple[SeedMeasure, ...] = ("importance", "clustering", "deactivation")


@dataclass(frozen=True)
class Frontier:
    """Text kept against hearing gained: each curve is a method at several learning rates, weights, ranks or scales."""

    measure: tuple[SeedMeasure, ...] = ("drift",)  # of a curve's points, besides accuracy and perplexity


def _require_name(what: str, name: str) -> None:
    """A name is that of a folder too."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"the {what} name {name!r} must be letters, digits, - and _")


class StudyConfig(BaseModel):
    """One study: what is trained, on what, how it is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    seed: Annotated[int, Ge(0)] = 0
    seeds: Annotated[int, Ge(1)] = 1  # training runs of every method
    seeds_measure: tuple[SeedMeasure, ...] = SEED_MEASURES  # besides accuracy and perplexity, after the first
    models: Models
    speech: Speech = Speech()
    prompt: PromptStyle = PromptStyle()
    data: Data
    methods: Annotated[dict[str, Method], MinLen(1)]
    training: Settings = Settings()
    importance: Importance = Importance()
    deactivation: Deactivation = Deactivation()
    analysis: Analysis = Analysis()
    evaluation: Evaluation
    drift: Drift | None = None  # to the base, on text of its own and of the user's; none: not measured
    frontier: Frontier = Frontier()

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt_as_text(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        known = [*(key.name for key in fields(PromptStyle)), "preset"]
        if unknown := next((key for key in value if key not in known), None):
            raise ValueError(f"there is no key {unknown!r}; the nearest known key is {nearest(str(unknown), known)!r}")
        written = written_out(value)
        if isinstance(written.get("date"), date):  # YAML reads one without quotes
            written["date"] = written["date"].isoformat()
        return written

    @field_validator("methods", mode="before")
    @classmethod
    def _curves(cls, value: Any) -> Any:
        """`over: {KEY: [VALUES]}` of a method makes a method of each value, the points of one curve."""
        if not isinstance(value, Mapping):
            return value
        methods: dict[Any, Any] = {}
        for name, method in value.items():
            points = (
                {name: method} if not isinstance(method, Mapping) or "over" not in method else _points(name, method)
            )
            if again := next((point for point in points if point in methods), None):
                raise ValueError(f"over makes a method {again!r}, and there is another of that name; rename one")
            methods |= points
        return methods

    @field_validator("training", mode="before")
    @classmethod
    def _one_seed(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "seed" in value:
            raise ValueError("there is no key 'seed' here: every seed of a study derives from its own; remove it")
        if isinstance(value, Mapping) and "compute" in value:
            raise ValueError("there is no key 'compute' here: models.compute decides for the whole study; set that one")
        return value

    @field_serializer("training")
    def _without_derived(self, value: Settings) -> dict[str, Any]:
        return {name: part for name, part in asdict(value).items() if name not in ("seed", "compute")}

    @model_validator(mode="before")
    @classmethod
    def _one_arithmetic(cls, value: Any) -> Any:
        """Recipes once had training.bf16, with all else in float32; without it, that is models.compute: float32."""
        if not isinstance(value, Mapping) or not isinstance(value.get("training"), Mapping):
            return value
        training = dict(value["training"])
        if "bf16" not in training:
            return value
        models = value.get("models")
        if training.pop("bf16") is not False or not isinstance(models, Mapping) or "compute" in models:
            raise ValueError(
                "there is no key training.bf16 any more, models.compute (auto, float32 or bfloat16) decides for the "
                "whole study; remove the one and set the other"
            )
        return {**value, "training": training, "models": {**models, "compute": "float32"}}

    @model_validator(mode="after")
    def _names(self) -> StudyConfig:
        for position, (name, method) in enumerate(self.methods.items()):
            for other in (method.of, method.norm_of):
                if other is not None and other not in [*self.methods][:position]:
                    points = [point for point, of in self.methods.items() if of.curve == other]
                    if points and other not in self.methods:
                        raise ValueError(
                            f"methods.{name} is of {other}, which is a curve; name a point of it ({', '.join(points)})"
                        )
                    raise ValueError(f"methods.{name} needs the method {other!r} in front of it; add it, or move it")
                kinds = ("blend", "adaptor")
                if other is not None and (self.methods[other].kind in kinds or self.gated(other)):
                    raise ValueError(f"methods.{name} is of {other}, which changes no weights of its own; name another")
                if other is not None and self.methods[other].kind == "inserted":
                    raise ValueError(f"methods.{name} is of {other}, which adds layers to the base's; name another")
            if name == BASE:
                raise ValueError(f"the method name {name!r} must be letters, digits, - and _, and not {BASE!r}")
            _require_name("method", name)
            if method_of(name) != (name, 0):  # tables would take it for one
                raise ValueError(
                    f"the method name {name!r} is that of a training run of {method_of(name)[0]!r}; choose another"
                )
            if method.curve == BASE:
                raise ValueError(f"methods.{name}.curve is {BASE!r}, which is the base's own place; choose another")
            if method.curve is not None:
                _require_name("curve", method.curve)
                alone = self.methods.get(method.curve)
                if alone is not None and alone.curve is None:
                    raise ValueError(
                        f"methods.{name}.curve is {method.curve!r}, the name of a method that is on no curve; give it "
                        f"curve: {method.curve} too, or choose another name"
                    )
        for key, measured in (("seeds_measure", self.seeds_measure), ("frontier.measure", self.frontier.measure)):
            if "importance" not in measured and {"clustering", "deactivation"} & set(measured):
                raise ValueError(f"{key} names clustering or deactivation, which need importance; add importance")
        if "drift" in self.seeds_measure and self.drift is None:
            raise ValueError(
                "seeds_measure names drift, and there is no section drift; add drift: {}, or remove it there"
            )
        adapters = {name: method for name, method in self.methods.items() if method.kind in ("lora", "peft")}
        merged = (name for name, method in adapters.items() if method.gate == "none")
        lora = next(merged, None)
        if lora is not None and self.models.dtype not in WIDE:
            raise ValueError(
                f"models.dtype {self.models.dtype} would round most of the update of methods.{lora} "
                f"({self.methods[lora].kind}) away when "
                "it is merged; use float32; models.compute can be bfloat16 all the same"
            )
        trained = next((name for name, method in self.methods.items() if method.trains), None)
        if self.models.encoder is None and (trained is not None or self.models.adaptor is not None):
            needs = "models.adaptor" if trained is None else f"methods.{trained} ({self.methods[trained].kind})"
            raise ValueError(f"{needs} needs models.encoder; only a study of given models can do without")
        self._require_tokens()
        given = next((name for name, method in self.methods.items() if method.kind == "given"), None)
        if given is not None and self.seeds > 1:
            raise ValueError(
                f"seeds: {self.seeds} trains every method so often, and methods.{given} is given; set seeds to 1, and "
                "give its other training runs as methods of their own"
            )
        if self.models.adaptor is not None and self.speech.calibrate_adaptor:
            raise ValueError("speech.calibrate_adaptor is for a fresh adaptor; that of models.adaptor brings its own")
        if self.models.adaptor is not None and self.training.align is not None:
            raise ValueError("training.align is for a fresh adaptor: it would calibrate that of models.adaptor anew")
        if self.evaluation.text_asr and self.models.asr is None:
            raise ValueError("evaluation.text_asr needs a recogniser; name one as models.asr")
        tasks = [task.name for task in self.evaluation.tasks]
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"evaluation.tasks names a task twice: {tasks}")
        return self

    def _require_tokens(self) -> None:
        reader = next((name for name, method in self.methods.items() if method.speech != "frames"), None)
        tokens = self.speech.tokens
        if reader is not None and tokens is None:
            raise ValueError(f"methods.{reader}.speech needs speech.tokens, which says how tokens are made; add it")
        if reader is None and tokens is not None:
            raise ValueError("speech.tokens is used by methods with speech: tokens (or centroids), and there is none")
        quantised = next((name for name, method in self.methods.items() if method.speech == "centroids"), None)
        if quantised is not None and tokens is not None and tokens.kind != "kmeans":
            raise ValueError(f"methods.{quantised}.speech: centroids needs speech.tokens of kind kmeans")
        sized = next((name for name, method in self.methods.items() if method.k is not None), None)
        if sized is not None and tokens is not None and tokens.kind != "kmeans":
            raise ValueError(f"methods.{sized}.k: a codec has the tokens that it has (speech.tokens.k); remove it")
        if tokens is not None and tokens.start == "adaptor" and self.models.adaptor is None:
            raise ValueError("speech.tokens.start: adaptor needs models.adaptor; name a speech LLM, or use embedding")

    def speech_of(self, run: str) -> SpeechInput:
        """What stands for speech in the prompts of a run."""
        return "frames" if run == BASE else self.runs[self.origin_of(run)].speech

    def stack_factor(self, run: str) -> int:
        """Encoder frames of a position of speech."""
        tokens = self.speech.tokens
        return tokens.frames if tokens is not None and self.speech_of(run) == "tokens" else self.speech.stack_factor

    def own_k(self, run: str) -> int | None:
        """How many speech tokens there are for a run, where that is not speech.tokens.k."""
        tokens, k = self.speech.tokens, None if run == BASE else self.runs[self.origin_of(run)].k
        return None if tokens is None or k == tokens.k else k

    @property
    def token_sizes(self) -> list[int | None]:
        """How many speech tokens there are for some method, each number once; None: speech.tokens.k."""
        return [*dict.fromkeys(self.own_k(name) for name, it in self.methods.items() if it.speech != "frames")]

    def n_rows(self, method: Method) -> int:
        """Rows of speech tokens that a method has in the adaptor's place."""
        tokens = self.speech.tokens
        return (method.k or tokens.k) if tokens is not None and method.speech == "tokens" else 0

    @property
    def collapses(self) -> bool:
        """Whether a method leaves out repeated speech tokens."""
        tokens = self.speech.tokens
        return tokens is not None and tokens.collapse and any(it.speech == "tokens" for it in self.methods.values())

    @property
    def speech_reads(self) -> float:
        """How often training reads each of its recordings: all epochs and phases of every run that takes speech."""
        training = self.training
        epochs = training.epochs + (training.adaptor_first.epochs if training.adaptor_first else 0)
        epochs += training.align.epochs if training.align else 0
        trained = (method for method in self.methods.values() if method.trains)
        return epochs * self.seeds * sum(method.modality == "speech" for method in trained)

    @property
    def trains(self) -> bool:
        """Whether any method does: of given models alone the training questions are read, and not spoken."""
        return any(method.trains for method in self.methods.values())

    def answers_of(self, method: Method) -> Literal["gold", "own"]:
        """What a method learns to say."""
        return method.answers or self.data.answers

    @property
    def speaks(self) -> bool:
        """Whether held-out and task questions are needed as speech: by a speech or audio LLM, or the recogniser."""
        parts = self.models.encoder, self.models.asr
        return any(part is not None for part in parts) or any(map(self.takes_recordings, self.methods))

    @property
    def runs(self) -> dict[str, Method]:
        """Every training run by its folder in methods/: the first run of each method, then the second of each …"""
        return {run_name(name, i): method for i in range(self.seeds) for name, method in self.methods.items()}

    def number_of(self, run: str) -> int:
        """Which run of its method it is, from 0; the base is trained in none, and counts as 0."""
        return 0 if run in self.methods else method_of(run)[1]

    def measures(self, run: str, what: SeedMeasure) -> bool:
        """Whether a run is measured in a way that may be left out after a method's first, and of a curve's points.

        Of a model that answers texts as its base does there is nothing to say of the weights behind them. One with
        inserted layers has all of the base's as they were, and others beside them that the base does not have.
        """
        if run != BASE and what in OF_WEIGHTS and (self.gated(run) or self.runs[run].kind == "inserted"):
            return False
        if run != BASE and self.runs[run].is_point and what not in self.frontier.measure:
            return False
        return self.number_of(run) == 0 or what in self.seeds_measure

    def has_parts(self, run: str) -> bool:
        """Whether importance is also measured on spoken questions, in parts: of the first run that reads tokens."""
        reads = run != BASE and self.runs[run].trains and self.speech_of(run) == "tokens" and self.number_of(run) == 0
        return reads and self.measures(run, "importance")

    def drift_measures(self, run: str) -> list[Literal["drift", "general_text"]]:
        """What is measured of a model where no training taught, in the order of a study's steps."""
        if self.drift is None or not self.measures(run, "drift"):
            return []
        drift: list[Literal["drift", "general_text"]] = [] if run == BASE else ["drift"]
        return drift if self.drift.general_text.text is None else [*drift, "general_text"]

    def asked_as(self, run: str) -> list[Modality]:
        """In what modalities a model is asked the questions of every task, in the order of a study's steps.

        The base answers what the recogniser understood (cascade), the tuned models that too if the recipe says so.
        """
        asked: list[Modality] = ["text"]
        if self.takes_speech(run) or self.takes_recordings(run):
            asked.append("speech")
        if run == BASE and self.models.asr is not None:
            asked.append("cascade")
        if run != BASE and self.evaluation.text_asr:
            asked.append("text_asr")
        return asked

    def gated(self, run: str) -> bool:
        """Whether a run has adapters for speech alone: its language model is the base, to the bit."""
        method = self.runs[run]
        return method.gate != "none" or (method.checkpoint is not None and is_gated(Path(method.checkpoint)))

    def origin_of(self, run: str) -> str:
        """Of a blend the run that it takes a part of; any other is its own."""
        of = self.runs[run].of
        return run if of is None else run_name(of, self.number_of(run))

    def kept_light(self, run: str) -> bool:
        """Whether a run's checkpoint holds only what was trained; full and layer_lr train all there is, and of peft's
        tuners a light folder holds LoRA alone.

        Of a gated LoRA always: there are no weights that it could be merged into.
        """
        method = self.runs[run]
        return method.gate != "none" or (self.models.checkpoints == "light" and method.kind in LIGHT)

    def takes_speech(self, run: str) -> bool:
        """Whether a model can be asked through frames of the study's encoder: not one tuned on text, and the base only
        where the recipe names an adaptor. Of a given one its files say so.
        """
        if run == BASE:
            return self.models.adaptor is not None
        method = self.runs[self.origin_of(run)]
        if method.checkpoint is not None and (self.models.encoder is None or not takes_speech(method.checkpoint)):
            return False
        return method.modality == "speech"

    def takes_recordings(self, run: str) -> bool:
        """Whether a model answers recordings as they are: a given audio LLM, which has an encoder of its own."""
        method = self.runs[run] if run != BASE else None
        if method is None or method.checkpoint is None or method.modality != "speech":
            return False
        return is_audio_llm(method.checkpoint)


def _points(name: str, method: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods of a curve by name: `full` over learning_rate 2e-4 is `full-2e-4`, of replay.share 0.2 `full-0_2`."""
    over = method["over"]
    rest = {key: value for key, value in method.items() if key != "over"}
    if not isinstance(over, Mapping) or len(over) != 1:
        raise ValueError(f"{name}.over must be one key of the method with its values, as learning_rate: [1e-5, 1e-4]")
    key, values = next(iter(over.items()))
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{name}.over.{key} must be a list of two or more values")
    if "curve" in rest or key == "curve":
        raise ValueError(f"{name} has both over and curve; over names the curve after the method, so remove curve")
    if key == "rank" and rest.get("kind") in WITHOUT_RANK:  # else the same training several times
        raise ValueError(f"{name}.over.rank: kind {rest['kind']} does not use it")
    outer, _, inner = str(key).partition(".")
    if outer in rest and not (inner and isinstance(rest[outer], Mapping) and inner not in rest[outer]):
        raise ValueError(f"{name}.{key} stands both in over and beside it; remove one")
    points = {}
    for value in values:
        part = {inner: value, **rest.get(outer, {})} if inner else value
        points[f"{name}-{_in_a_name(value)}"] = {**rest, outer: part, "curve": name}
    if len(points) < len(values):
        raise ValueError(f"{name}.over.{key} names a value twice, or two that are the same in a name: {values}")
    return points


def _in_a_name(value: Any) -> str:
    """0.0002 and "2e-4" as 2e-4; what a folder's name cannot hold becomes _."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    if isinstance(value, float) and value and abs(value) < 0.01:
        text = f"{value:e}"
        mantissa, _, exponent = text.partition("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return re.sub(r"[^A-Za-z0-9-]+", "_", text).strip("_")


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: the library would take the last of two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # what it brings may be given again
                continue
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def load_config(path: Path) -> StudyConfig:
    """Read a recipe. Raises UserError, one sentence, for anything wrong in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"The recipe {path} cannot be read ({error.strerror}); those that ship are in {RECIPES}."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"The recipe {path} is not text in UTF-8 ({error}); save it as such.") from error
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UserError(f"The recipe {path} must be a mapping of keys to values; see the recipes that ship.")
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], origin: str) -> StudyConfig:
    return checked(StudyConfig, values, origin)


def require_same_recipe(config: StudyConfig, file: Path) -> None:
    """Raise UserError if `file`, the study.yaml of a run directory, holds another configuration.

    A file that is not there is none; a key that came with a later version counts with its default.
    """
    if not file.exists():
        return
    remedy = "give --changed to run again what the change touches, or another --out"
    try:
        old = load_config(file)
    except UserError as error:
        raise UserError(f"{file} is of another version and cannot be compared ({error}); {remedy}.") from error
    found = differences(old.model_dump(mode="json"), config.model_dump(mode="json"))
    if found:
        raise UserError(f"{file.parent} holds a study of another recipe ({in_words(found)}); {remedy}.")


def dump_config(config: StudyConfig) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
