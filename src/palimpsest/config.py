"""The configuration of a study: pydantic models, frozen and strict.

An unknown key is an error that names the nearest known one; a value out of range is an error that names the key.
Nothing is rewritten silently: what the file says is what runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from palimpsest.files import UserError, differences, in_words
from palimpsest.records import method_of, run_name

Fraction = float


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Models(_Strict):
    """Hub names, local folders, or `embedded:` names."""

    language_model: str
    encoder: str
    asr: str | None = None  # the cascade's recogniser; none: no cascade
    adaptor: str | None = None  # a speech LLM whose adaptor every method starts from; none: a fresh one
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"  # "auto": CUDA if there is one, else CPU


class Augmentation(_Strict):
    """Changed copies of every training utterance; each change is drawn anew from its range for each copy."""

    copies: int = Field(1, ge=1)
    speed: tuple[float, float] | None = None  # factor; pitch goes with it
    noise_snr_db: tuple[float, float] | None = None  # white noise, dB below the utterance's mean power
    reverberation: float | None = Field(None, ge=0.15, le=0.8)  # s, the time in which the sound falls by 60 dB

    @model_validator(mode="after")
    def _ranges(self) -> Augmentation:
        if self.speed is None and self.noise_snr_db is None and self.reverberation is None:
            raise ValueError("augmentation changes nothing; give speed, noise_snr_db or reverberation")
        if self.speed is not None and not 0.5 <= self.speed[0] <= self.speed[1] <= 2:
            raise ValueError(f"speed {list(self.speed)} must be a range [low, high] within 0.5 and 2")
        if self.noise_snr_db is not None and not -10 <= self.noise_snr_db[0] <= self.noise_snr_db[1] <= 60:
            raise ValueError(f"noise_snr_db {list(self.noise_snr_db)} must be a range [low, high] within -10 and 60")
        return self


class Speech(_Strict):
    length: Literal["trim", "pad_to_30s"] = "trim"
    stack_factor: int = Field(5, ge=1)
    adaptor_hidden_size: int = Field(2048, ge=1)
    calibrate_adaptor: bool = False  # True: start from standardised inputs and the embedding's spread
    voice: str | list[str] = "hibari"  # speaks what has no recording; of a list, each example takes one by its id
    augmentation: Augmentation | None = None  # of the training utterances
    feature_cache: str | None = None  # folder of encoder frames that several studies share; none: in the run directory


class Prompt(_Strict):
    system: str | None = None  # None: whatever the chat template writes by itself
    speech_instruction: str = "Answer the question asked in the speech."


class Split(_Strict):
    source: str  # facts, a manifest, a table, a folder of recordings, a hub name …: docs/data.md
    split: str
    limit: int | None = Field(None, ge=1)
    voice: str | list[str] | None = None  # instead of speech.voice, for this split alone


class FiltersConfig(_Strict):
    """Limits beyond which an example of training and held-out data is left out; docs/data.md."""

    max_question_words: int = Field(100, ge=1)
    max_answer_words: int = Field(1000, ge=1)
    max_answer_characters: int = Field(8000, ge=1)
    min_audio_seconds: float = Field(0.2, ge=0)
    max_audio_seconds: float = Field(30.0, gt=0, le=30)
    silence_peak: float = Field(0.001, ge=0, lt=1)  # of 1, full scale


class Data(_Strict):
    train: Split
    heldout: Split | None = None  # perplexity in the deactivation experiment
    heldout_examples: int | None = Field(None, ge=1)  # instead: so many of train, by a stable hash of their ids
    strict: bool = False  # True: a faulty example is an error instead of being left out and listed
    filters: FiltersConfig = FiltersConfig()

    @model_validator(mode="after")
    def _one_heldout(self) -> Data:
        if (self.heldout is None) == (self.heldout_examples is None):
            raise ValueError("give exactly one of heldout (a split) and heldout_examples (how many of train)")
        return self


class MethodConfig(_Strict):
    kind: Literal["adaptor", "full", "layer_lr", "lora"]
    learning_rate: float = Field(2e-5, gt=0)
    adaptor_learning_rate: float | None = Field(None, gt=0)
    lambda_: float = Field(0.4, ge=0, le=1)
    rank: int = Field(8, ge=1)
    alpha: int | None = Field(None, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    importance: Literal["measured", "shuffled", "inverted"] = "measured"  # layer_lr; the others are controls
    modality: Literal["speech", "text"] = "speech"  # how the training questions are put; text is a control
    targets: tuple[str, ...] | None = None  # lora: names of linear layers; None: all of every transformer layer

    @model_validator(mode="after")
    def _sense(self) -> MethodConfig:
        if self.importance != "measured" and self.kind != "layer_lr":
            raise ValueError(f"importance {self.importance!r} belongs to kind layer_lr; {self.kind} does not use it")
        if self.modality == "text" and self.kind == "adaptor":
            raise ValueError("kind adaptor with modality text would train nothing; use speech, or another kind")
        return self


class AdaptorFirst(_Strict):
    epochs: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    target: Literal["answer", "repeat"] = "answer"  # repeat: the model writes down the question it hears
    instruction: str = "Repeat what is said in the speech."  # beside the speech, with target repeat


class Align(_Strict):
    epochs: int = Field(4, ge=1)
    learning_rate: float = Field(1e-3, gt=0)


class Training(_Strict):
    epochs: float = Field(3.0, gt=0)
    batch_size: int = Field(32, ge=1)
    accumulation: int = Field(1, ge=1)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    checkpoint_every: int = Field(500, ge=1)
    bf16: bool = False
    gradient_checkpointing: bool = False
    max_tokens: int | None = Field(None, ge=1)  # of a batch, padding counted; batch_size then limits its rows
    compile: bool = False  # torch.compile
    liger: bool | Literal["auto"] = "auto"  # head and loss in one kernel; auto: where it is installed, on CUDA
    eval_every: int | None = Field(None, ge=1)  # optimizer steps between perplexities of data.heldout
    report_to: tuple[str, ...] = ()  # loggers of transformers, such as tensorboard and wandb
    align: Align | None = None  # the adaptor's outputs with the embeddings of the words, before all else
    adaptor_first: AdaptorFirst | None = None  # a phase of its own for the adaptor, before the method


class Importance(_Strict):
    n_examples: int | None = Field(None, ge=2)  # of the training data; None: 1/30 of it (the paper)
    batch_size: int = Field(8, ge=1)
    reduction: Literal["signed_sum", "per_batch_abs"] = "signed_sum"  # the one Eq. 3 and deactivation use


class Deactivation(_Strict):
    ratio: Fraction = Field(0.03, gt=0, lt=1)
    scope: Literal["global", "per_layer", "per_matrix"] = "global"
    random_seeds: int = Field(3, ge=1)
    n_examples: int | None = Field(None, ge=1)  # of the held-out data; None: all
    batch_size: int = Field(8, ge=1)


class Analysis(_Strict):
    shuffles: int = Field(3, ge=1)  # of each null of rank clustering
    rank_draws: int = Field(5, ge=0)  # shuffles for the nulls of the effective rank; 0: it has none
    bootstrap: int = Field(1000, ge=100)


# What the runs of a method after its first may be spared; clustering: with it parameter change and overlap of masks.
SeedMeasure = Literal["importance", "clustering", "deactivation", "probe"]


class EvaluationTask(Split):
    name: str


class Evaluation(_Strict):
    tasks: tuple[EvaluationTask, ...] = Field(min_length=1)
    max_new_tokens: int = Field(32, ge=1)
    batch_size: int = Field(16, ge=1)
    probe: bool = True  # the retention probe of every model: seconds each
    text_asr: bool = False  # also ask the tuned models the recogniser's transcripts; needs models.asr


class StudyConfig(_Strict):
    """One study: what is trained, on what, how it is measured."""

    name: str
    seed: int = Field(0, ge=0)
    seeds: int = Field(1, ge=1)  # training runs of every method
    seeds_measure: tuple[SeedMeasure, ...] = get_args(
        SeedMeasure
    )  # besides accuracy and perplexity, after the first run
    models: Models
    speech: Speech = Speech()
    prompt: Prompt = Prompt()
    data: Data
    methods: dict[str, MethodConfig] = Field(min_length=1)
    training: Training = Training()
    importance: Importance = Importance()
    deactivation: Deactivation = Deactivation()
    analysis: Analysis = Analysis()
    evaluation: Evaluation

    @model_validator(mode="after")
    def _names(self) -> StudyConfig:
        for name in self.methods:
            if name == "base" or not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"the method name {name!r} must be letters, digits, - and _, and not 'base'")
            if self.seeds > 1 and method_of(name) != (name, 0):
                raise ValueError(f"the method name {name!r} is that of a run of {method_of(name)[0]!r}; choose another")
        if "importance" not in self.seeds_measure and {"clustering", "deactivation"} & set(self.seeds_measure):
            raise ValueError("seeds_measure names clustering or deactivation, which need importance; add importance")
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

    @property
    def runs(self) -> dict[str, MethodConfig]:
        """Every training run by its folder in methods/: the first run of each method, then the second of each …"""
        return {run_name(name, i): method for i in range(self.seeds) for name, method in self.methods.items()}

    def number_of(self, run: str) -> int:
        """Which run of its method it is, from 0; the base is trained in none, and counts as 0."""
        return 0 if run in self.methods else method_of(run)[1]

    def measures(self, run: str, what: SeedMeasure) -> bool:
        """Whether a run is measured in a way that those after a method's first may be spared."""
        return self.number_of(run) == 0 or what in self.seeds_measure


def load_config(path: Path) -> StudyConfig:
    """Read a recipe. Raises UserError, one sentence, for anything wrong in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"The recipe {path} cannot be read ({error.strerror}); `ls recipes` shows those that ship."
        ) from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UserError(f"The recipe {path} must be a mapping of keys to values; see the recipes that ship.")
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], origin: str) -> StudyConfig:
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _keys_at(first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
            raise UserError(f"{origin}: there is no key {where!r}; the nearest known key is {near[0]!r}.") from error
        raise UserError(f"{origin}: {where or 'the recipe'}: {first['msg'].removeprefix('Value error, ')}.") from error


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The known keys of the section at `location` of a study; names of methods and numbers of tasks are passed over."""
    section: type[BaseModel] = StudyConfig
    for part in location:
        if str(part) not in section.model_fields:
            continue
        annotation: Any = section.model_fields[str(part)].annotation
        candidates = (annotation, *get_args(annotation))
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


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
