"""What a recipe will need, before anything runs: parameters, memory, disk and time per method.

`plan` reads configs and, where it lies on this machine, the data; it loads no weights, speaks nothing and fetches no
data. The formulas are in memory.py and, with what was measured against them, in docs/machines.md.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le
from typing_extensions import Doc

from palimpsest.config import StudyConfig
from palimpsest.data.examples import Example
from palimpsest.data.in_loop import FRAME_BYTES, FramesChoice, choose_frames
from palimpsest.files import UserError, free_bytes
from palimpsest.planning.memory import (
    ACCUMULATED,
    Batch,
    Decoder,
    Encoder,
    Memory,
    Setup,
    encoder_flops,
    memory,
    recomputed_flops,
    step_flops,
)
from palimpsest.planning.needs import (
    StepDisk,
    StepMemory,
    checkpoint_bytes,
    disk_of_steps,
    forward_memory,
    importance_memory,
    importance_that_fits,
    recogniser_bytes,
    trainer_bytes,
)
from palimpsest.records import BASE
from palimpsest.training.remedies import OWN, Replay

if TYPE_CHECKING:
    from palimpsest.data.splits import Split
    from palimpsest.planning.sizes import Gpu
    from palimpsest.training.methods import Method
    from palimpsest.training.settings import Settings

GB = 1e9
UTILISATION = 0.4  # of the GPU's published FLOP/s that training reaches; an assumption, --utilisation changes it
BANDWIDTH_SHARE = 0.7  # of its published bandwidth that the optimizer's step reaches
SECONDS_PER_CHARACTER = 0.07  # of a spoken question: 0.071 in hibari's facts, 0.067 in Llama Questions
FLAC = 18_000  # bytes of a second of speech, 16 bits at 16 kHz: 17,400 in LibriSpeech
N_WIDE = 8  # float64 numbers of each token and entry of the vocabulary while two distributions are compared
SAMPLE = 2000  # examples whose lengths are read; a random choice stands for more
CHARACTERS_PER_TOKEN = 4  # of English text, where there is no tokenizer to count with
PROMPT_TOKENS = 64  # of a chat template and its instruction, likewise
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PUBLISHED_ROWS = {
    "gpt-omni/VoiceAssistant-400K": 470_054,
    "GSQA/spoken-alpaca-gpt4": 51_349,
    "fixie-ai/llama-questions": 300,
    "chiyuanhsiao/spoken-web-questions": 2032,
    "fixie-ai/spoken-web-questions": 2032,
}


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say: the machine, and of data that is not on this one, how much there is of it."""

    gpu: Annotated[str | None, Doc("H200, H100, A100-80GB, …; without it this machine.")] = None
    n_gpus: Annotated[int, Ge(1), Doc("Sharded over so many (FSDP2).")] = 1
    memory: Annotated[float | None, Doc("GB of one device, instead of the GPU's own.")] = None
    shape: Annotated[str | None, Doc("Built-in language model: llama-3.2-1b, llama-3.1-8b, …")] = None
    config: Annotated[Path | None, Doc("config.json in place of the language model's.")] = None
    utilisation: Annotated[float, Ge(0.01), Le(1), Doc("Share of the GPU's FLOP/s reached.")] = UTILISATION
    examples: Annotated[int | None, Ge(1), Doc("Of training data that is not here.")] = None
    question_seconds: Annotated[float, Ge(0.1), Le(30), Doc("Likewise: mean length of speech.")] = 6.0
    answer_tokens: Annotated[int, Ge(1), Doc("Likewise: mean length of answers.")] = 100
    longest_answer: Annotated[int, Ge(1), Doc("Likewise: the longest.")] = 400


@dataclass(frozen=True)
class Lengths:
    """Of training examples, a row each: (tokens of the prompt without speech or question, question's tokens as text,
    seconds of its speech, tokens of the answer)."""

    n: int  # examples there are; `rows` may be a sample of them
    rows: tuple[tuple[int, int, float, int], ...]
    origin: str
    written: float  # seconds of speech of an example that the study writes, on average: what is no file of its own yet

    def sequences(
        self, config: StudyConfig, modality: str, stack: int | None = None, codec: float | None = None
    ) -> list[tuple[int, int, int]]:
        """(sequence, speech positions, answer) of each row, in tokens; stack: frames of a position, if not the study's.

        Of speech tokens those that collapse are among them: they are left out by the mask, and take their room.
        codec: tokens a second, in the place of frames; a codec pads nothing.
        """
        stack = stack or config.speech.stack_factor
        whole = math.floor if config.speech.length == "pad_to_30s" else math.ceil
        found = []
        for frame, question, seconds, answer in self.rows:
            if modality == "text":
                found.append((frame + question + answer, 0, answer))
            else:
                positions = whole(_frames(config, seconds) / stack) if codec is None else math.ceil(seconds * codec)
                found.append((frame + positions + answer, positions, answer))
        return found


def _frames(config: StudyConfig, seconds: float) -> float:
    """Encoder frames of an utterance."""
    return 1500.0 if config.speech.length == "pad_to_30s" else min(seconds, 30.0) * 50


@dataclass(frozen=True)
class MethodPlan:
    """One method: its setup, its largest batch, and what follows."""

    name: str
    setup: Setup
    batch: Batch
    memory: Memory
    tokens: float  # of one epoch, padding counted
    steps: int  # of the optimizer, in all
    flops: float  # of all epochs
    checkpoint: int  # bytes on disk
    while_training: int  # bytes on disk that go away again


@dataclass(frozen=True)
class Written:
    """Text that the base writes token by token: every new token of a batch reads all weights."""

    name: str  # of the step
    tokens: float  # new ones
    flops: float
    reads: int  # of all weights


@dataclass(frozen=True)
class Plan:
    config: StudyConfig
    methods: tuple[MethodPlan, ...]
    lengths: Lengths
    origins: dict[str, str]
    codec: float | None  # tokens a second, where methods read those of a codec
    frames: FramesChoice
    features: int  # bytes of encoder frames of the training data on disk
    other_features: int  # of held-out and task questions
    audio: int  # bytes of recordings that the study writes
    encoding_flops: float  # of the training data, once
    encodings: float  # how often
    scores: int  # bytes on disk of one model's importance
    setup: Setup  # of the study's first method, with the base as its language model
    steps: tuple[StepMemory, ...]  # of the study but training
    disk: tuple[StepDisk, ...]  # of weights and scores
    importance_flops: float  # of all models, and of the base on other questions
    importance_bf16: bool  # its arithmetic
    written: tuple[Written, ...]  # what the base writes, to be trained on
    capacity: int  # bytes of one device
    device: str  # in words
    gpu: Gpu | None


def make_plan(config: StudyConfig, options: Assumptions) -> Plan:
    """Raises UserError for a model, GPU or data set that cannot be had."""
    from palimpsest.planning.sizes import blank_decoder, codec_tokens, decoder_sizes, encoder_sizes, find_gpu

    gpu = find_gpu(options.gpu) if options.gpu else None
    capacity, device, kind = device_of(config, options.memory, gpu)
    decoder, decoder_origin = decoder_sizes(config.models.language_model, options.shape, options.config)
    encoder, encoder_origin = encoder_sizes(config.models.encoder)
    read = config.speech.tokens
    codec, codec_origin = (None, "none") if read is None or read.codec is None else codec_tokens(read.codec)
    lengths = read_lengths(config, options)
    autocast = _computes_bfloat16(config, kind, here=gpu is None and options.memory is None)
    frames = fmean(_frames(config, row[2]) for row in lengths.rows)
    of_frame = encoder.dim * FRAME_BYTES
    # Those held out by their number are taken out of the training data.
    features = round((lengths.n - (config.data.heldout_examples or 0)) * frames * of_frame) if config.trains else 0
    cache = config.speech.feature_cache
    choice = choose_frames(
        config.speech.features,
        frame_bytes=features,
        free=free_bytes(Path.cwd() if cache is None else Path(cache).expanduser()),
        reads=config.speech_reads,
    )
    in_loop = choice.path == "loop"
    others = [measured for measured in (_read_split(config, split, options) for split in _others(config)) if measured]
    other_frames = (config.data.heldout_examples or 0) * frames
    other_frames += sum(other.n * fmean(_frames(config, row[2]) for row in other.rows) for other in others)
    how = {"autocast": autocast, "device": kind, "n_gpus": options.n_gpus, "in_loop": in_loop}

    def blank() -> Any:
        return blank_decoder(config.models.language_model, options.shape, options.config)[0]

    setups = setups_of(config, decoder, encoder, blank, **how)
    # The first method's, without inserted layers.
    base = replace(next(iter(setups.values())), decoder=decoder, new_layers=0, new_parameters=0)
    trained = {name: setup for name, setup in setups.items() if setup.method not in ("given", "blend")}
    methods = tuple(_plan_method(config, lengths, name, setup, codec) for name, setup in trained.items())
    n_steps = {method.name: float(method.steps) for method in methods}
    exact = _computes_bfloat16(config, kind, here=gpu is None and options.memory is None, exact=True)
    passes = 2 + sum(config.measures(run, "importance") for run in config.runs)
    in_parts = [_spoken_rows(config, lengths, name, codec) for name in config.methods if config.has_parts(name)]
    return Plan(
        config=config,
        methods=methods,
        setup=base,
        steps=_memory_of_steps(config, lengths, others, base, setups, exact, capacity, codec),
        disk=tuple(disk_of_steps(config, decoder, setups, n_steps, options.n_gpus)),
        importance_flops=passes * _importance_flops(config, lengths, base, lengths.sequences(config, "text"))
        + sum(_importance_flops(config, lengths, base, rows) for rows in in_parts),
        importance_bf16=exact or config.models.dtype == "bfloat16",
        written=tuple(_written(config, lengths, base)),
        lengths=lengths,
        origins={"language model": decoder_origin, "encoder": encoder_origin, "codec": codec_origin},
        codec=codec,
        frames=choice,
        features=0 if in_loop else features,
        other_features=round(other_frames * of_frame),
        audio=round(FLAC * sum(part.n * part.written for part in _spoken(config, lengths, others))),
        encoding_flops=encoder_flops(encoder, lengths.n * frames, frames),
        encodings=config.speech_reads if in_loop else float(config.trains),
        scores=ACCUMULATED * decoder.matrices * len(config.importance.keep),
        capacity=capacity,
        device=device,
        gpu=gpu,
    )


def _spoken(config: StudyConfig, train: Lengths, others: Sequence[Lengths]) -> list[Lengths]:
    return [*([train] if config.trains else []), *(others if config.speaks else [])]


def setups_of(
    config: StudyConfig, decoder: Decoder, encoder: Encoder, blank: Callable[[], Any] | None = None, **how: Any
) -> dict[str, Setup]:
    """What each method of a recipe trains, and how: `how` are the fields of Setup that the machine decides.

    in_loop: whether training encodes speech as it goes. blank: makes the language model without its weights, in which a
    tuner of peft counts what it trains; None: the recipe's.
    """
    from palimpsest.models.loading import blank_language_model
    from palimpsest.planning.sizes import decoder_of
    from palimpsest.training.methods import added_parameters

    blank = blank or partial(blank_language_model, config.models.language_model)
    training, machine = config.training, {"device": "cpu", "n_gpus": 1, "in_loop": False, **how}
    # A sharded head is not there as a whole for the fused kernel.
    fused = machine["n_gpus"] == 1 and machine["device"] == "cuda"
    wanted = training.liger is True or (training.liger == "auto" and find_spec("liger_kernel") is not None)

    def of_decoder(method: Method) -> dict[str, Any]:
        if method.kind == "peft":
            return {"decoder": decoder, "tuner_parameters": added_parameters(blank(), method)}
        if method.new_layers is None:
            return {"decoder": decoder}
        grown = blank()
        new = added_parameters(grown, method)
        return {"decoder": decoder_of(grown), "new_layers": method.new_layers, "new_parameters": new}

    return {
        name: Setup(
            **of_decoder(method),
            encoder=encoder,
            method=method.kind,
            rank=method.rank,
            modality=method.modality,
            stack_factor=config.stack_factor(name),
            adaptor_hidden=config.speech.adaptor_hidden_size,
            speech_tokens=config.n_rows(method),
            weight_bytes=4 if config.models.dtype == "float32" else 2,
            checkpointing=training.gradient_checkpointing,
            accumulation=training.accumulation,
            fused_loss=fused and wanted and method.distill is None,
            distill=method.distill is not None,
            pull=None if method.pull is None else method.pull.by,
            slow=0.0 if method.slow is None else method.slow.top,
            **{**machine, "in_loop": machine["in_loop"] and method.modality == "speech"},
        )
        for name, method in config.methods.items()
    }


def _memory_of_steps(
    config: StudyConfig,
    lengths: Lengths,
    others: Sequence[Lengths],
    base: Setup,
    setups: Mapping[str, Setup],
    exact: bool,
    capacity: int,
    codec: float | None,
) -> tuple[StepMemory, ...]:
    """Memory of every kind of step but training, with the keys that would make room where one does not fit.

    exact: whether importance and deactivation compute in bfloat16; the others do as training does. codec: tokens a
    second.
    """
    setup = max(setups.values(), key=lambda it: it.decoder.parameters)  # inserted layers make it larger than the base
    measured = replace(base, autocast=exact)
    batch = _largest_batch(config.training, lengths.sequences(config, "text"), 1, budget=False)
    found = []
    # Of the base alone where no other model is measured: points of curves need not be.
    scored, deactivated = (
        any(config.measures(run, what) for run in config.runs) for what in ("importance", "deactivation")
    )
    for tuned in (False, True) if scored else (False,):
        step = importance_memory(config, measured, batch, tuned=tuned)
        if step.peak > capacity:
            step = replace(step, remedy=importance_that_fits(config, measured, batch, capacity, tuned=tuned))
        found.append(step)
    in_parts = []
    for name in filter(config.has_parts, config.methods):
        of = _largest_batch(config.training, _spoken_rows(config, lengths, name, codec), 1, budget=False)
        rows = base.decoder.vocabulary + setups[name].speech_tokens
        step = importance_memory(config, measured, of, tuned=True, rows=rows)
        if step.peak > capacity:
            remedy = importance_that_fits(config, measured, of, capacity, tuned=True, rows=rows)
            step = replace(step, remedy=remedy)
        in_parts.append(step)
    found += [max(in_parts, key=lambda step: step.peak)] if in_parts else []

    asked_as = "text" if config.models.encoder is None else "speech"

    def asked_in(part: Lengths) -> list[tuple[int, int, int]]:
        """As the method that has the longest prompts is asked."""
        reads = {(config.stack_factor(name), _codec_of(config, name, codec)) for name in config.methods}
        every = [part.sequences(config, asked_as, *read) for read in reads]
        return max(every, key=lambda rows: sum(row[0] for row in rows))

    longest, most = (max(row[k] for row in asked_in(lengths)) for k in (0, 2))
    questions = [row[0] - row[2] for part in (lengths, *others) for row in asked_in(part)]
    limit = config.evaluation.max_new_tokens
    recogniser = 0 if config.models.asr is None else recogniser_bytes(setup.encoder)
    size, asked = config.deactivation.batch_size, config.evaluation.batch_size
    forward: list[tuple[str, str, int, dict[str, Any]]] = [
        ("deactivation", "deactivation", size, {"setup": measured, "length": longest, "columns": most, "cached": 0,
                                          "tuned": deactivated}),
        ("perplexity", "deactivation", size, {"setup": setup, "length": longest, "columns": most, "cached": 0}),
        ("answers", "evaluation", asked, {"setup": setup, "length": max(questions), "columns": 1,
                                          "cached": max(questions) + limit}),
        ("cascade", "evaluation", asked, {"setup": setup, "length": max(questions), "columns": 1,
                                          "cached": max(questions) + limit, "beside": recogniser, "tuned": False}),
    ]  # fmt: skip
    forward = forward if recogniser else forward[:-1]
    if config.drift is not None:
        forward += _drift_steps(config, replace(setup, autocast=exact), max(row[0] for row in lengths.rows))
    for name, section, rows, sizes in forward:
        step = forward_memory(name, rows=rows, **sizes)
        if step.peak > capacity:
            fits = next((n for n in range(rows, 0, -1) if forward_memory(name, rows=n, **sizes).peak <= capacity), None)
            step = replace(step, remedy=None if fits is None else f"{section}.batch_size: {fits}")
        found.append(step)
    return tuple(found)


def _drift_steps(config: StudyConfig, setup: Setup, frame: int) -> list[tuple[str, str, int, dict[str, Any]]]:
    """As the other steps that run forward. frame: tokens of a prompt without its question."""
    from palimpsest.evaluation.drift import AT_ONCE
    from palimpsest.evaluation.own_text import MOST_OF_A_TURN

    assert config.drift is not None
    own, general, rows = config.drift.own_text, config.drift.general_text, config.drift.batch_size
    vocabulary, c = setup.decoder.vocabulary, setup.compute_bytes
    beside = setup.weight_bytes * setup.decoder.parameters  # the base, and its logits
    beside += rows * own.new_tokens * vocabulary * (c + 4) + N_WIDE * AT_ONCE * vocabulary * 8
    length = frame + MOST_OF_A_TURN + own.new_tokens
    found: list[tuple[str, str, int, dict[str, Any]]] = [
        ("drift", "drift", rows, {"setup": setup, "length": length, "columns": own.new_tokens, "cached": 0,
                                  "beside": beside}),
    ]  # fmt: skip
    if general.text is not None:
        sizes = {"setup": setup, "length": general.window + 1, "columns": general.window, "cached": 0}
        found.append(("general_text", "drift", rows, sizes))
    return found


def _importance_flops(
    config: StudyConfig, lengths: Lengths, setup: Setup, rows: Sequence[tuple[int, int, int]]
) -> float:
    """Of one pass over the questions that importance is measured on; rows: of `Lengths.sequences`."""
    n = config.importance.n_examples or max(2, lengths.n // 30)
    setup = replace(setup, method="full", modality="text", checkpointing=config.importance.gradient_checkpointing)
    length, answer = (fmean(row[k] for row in rows) for k in (0, 2))
    return step_flops(setup, n * length, length, 0, n * answer) + recomputed_flops(setup, n * length, length)


def _written(config: StudyConfig, lengths: Lengths, setup: Setup) -> Iterator[Written]:
    """Of the steps in which the base writes what methods are trained on."""
    from palimpsest.evaluation.own_text import BATCH, MOST_OF_A_TURN

    decoder = setup.decoder

    def step(name: str, groups: Sequence[tuple[int, float, int]], batch_size: int) -> Written:
        """groups: (texts, tokens of a prompt, new tokens)."""
        flops = 0.0
        for n, prompt, new in groups:
            length = prompt + new
            flops += n * length * (2 * decoder.matrices + 2 * decoder.layers * decoder.attention * length)
            flops += 2.0 * decoder.vocabulary * decoder.hidden * n * new
        reads = sum(-(-n // batch_size) * new for n, _, new in groups)
        return Written(name, sum(n * new for n, _, new in groups), flops, reads)

    trained = [method for method in config.methods.values() if method.trains]
    if any(config.answers_of(method) == "own" for method in trained):
        questions = fmean(length - answer for length, _, answer in lengths.sequences(config, "text"))
        asked = [(lengths.n, questions, config.evaluation.max_new_tokens)]
        yield step(f"{BASE}/own_answers", asked, config.evaluation.batch_size)
    own = [method.replay for method in trained if method.replay is not None and method.replay.text == OWN]
    if own:
        n, new = max(replay.n_texts for replay in own), max(replay.new_tokens for replay in own)
        frame = fmean(row[0] for row in lengths.rows)
        texts = [(n, 1, new), (n, frame, MOST_OF_A_TURN), (n, frame + MOST_OF_A_TURN, new)]
        yield step(f"{BASE}/replay_text", texts, BATCH)


# ---------------------------------------------------------------------------------------------------------------------
# Device, method, batch
# ---------------------------------------------------------------------------------------------------------------------
def device_of(
    config: StudyConfig, memory: float | None = None, gpu: Gpu | None = None
) -> tuple[int, str, Literal["cpu", "cuda"]]:
    """(bytes of one device, its name, its kind): what was asked for, or what this machine has."""
    import torch

    if memory is not None:
        return round(memory * GB), gpu.name if gpu else f"a GPU of {memory:g} GB", "cuda"
    if gpu is not None:
        return gpu.memory, gpu.name, "cuda"
    if config.models.device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.total_memory, f"this machine's {properties.name}", "cuda"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory", "cpu"


def _computes_bfloat16(config: StudyConfig, kind: str, *, here: bool, exact: bool = False) -> bool:
    """Whether training, or importance (`exact`), forms its products in bfloat16.

    A GPU that is not here is taken for Ampere or later.
    """
    from palimpsest.models.compute import choose_compute

    models = config.models
    if models.compute == "auto" and not here and not exact:
        return True
    return choose_compute(models.compute, kind, weights=models.dtype, exact=exact).dtype == "bfloat16"


def _codec_of(config: StudyConfig, name: str, codec: float | None) -> float | None:
    """Tokens a second, where a method reads those of the codec."""
    return codec if config.speech_of(name) == "tokens" else None


def _spoken_rows(config: StudyConfig, lengths: Lengths, name: str, codec: float | None) -> list[tuple[int, int, int]]:
    """`Lengths.sequences` of a method's spoken questions."""
    return lengths.sequences(config, "speech", config.stack_factor(name), _codec_of(config, name, codec))


def _plan_method(
    config: StudyConfig, lengths: Lengths, name: str, setup: Setup, codec: float | None = None
) -> MethodPlan:
    training = config.training
    rows = lengths.sequences(config, setup.modality, setup.stack_factor, _codec_of(config, name, codec))
    batch = _largest_batch(training, rows, setup.n_gpus)
    length = _padded_length(training, rows)
    tokens = length * lengths.n
    spoken, answers = (lengths.n * fmean(row[k] for row in rows) for k in (1, 2))
    flops = step_flops(setup, tokens, length, spoken, answers) + recomputed_flops(setup, tokens, length)
    batches = math.ceil(lengths.n / training.batch_size)
    if training.max_tokens is not None:
        batches = max(batches, math.ceil(tokens / training.max_tokens))
    needed = memory(setup, batch)
    if (replay := config.methods[name].replay) is not None:
        text, n_text = _text_batch(config, replay, lengths), replay.n_batches(batches)
        batches, of_text = batches + n_text, n_text * text.tokens
        tokens += of_text
        flops += step_flops(setup, of_text, text.length, 0, n_text * text.rows * text.supervised)
        flops += recomputed_flops(setup, of_text, text.length)
        on_device = replace(text, rows=-(-text.rows // setup.n_gpus))
        if memory(setup, on_device).peak > needed.peak:
            batch, needed = on_device, memory(setup, on_device)
    steps = max(1, math.ceil(math.ceil(batches / training.accumulation) * training.epochs))
    return MethodPlan(
        name=name,
        setup=setup,
        batch=batch,
        memory=needed,
        tokens=tokens,
        steps=steps,
        flops=flops * training.epochs,
        checkpoint=checkpoint_bytes(setup, light=config.kept_light(name)),
        while_training=trainer_bytes(setup) if training.checkpoint_every < steps else 0,
    )


def _text_batch(config: StudyConfig, replay: Replay, lengths: Lengths) -> Batch:
    """A batch of replayed text on one device, its rows as long as they may be."""
    from palimpsest.evaluation.own_text import MOST_OF_A_TURN

    training = config.training
    frame = max(row[0] for row in lengths.rows)
    length, supervised = replay.window, replay.window - 1
    if replay.text == OWN:
        length, supervised = frame + MOST_OF_A_TURN + replay.new_tokens, replay.new_tokens
    rows = training.batch_size
    if training.max_tokens is not None:
        length = min(length, training.max_tokens)
        rows = min(rows, training.max_tokens // length)
    return Batch(rows, length, positions=0, supervised=min(supervised, length - 1), columns=length)


def _largest_batch(training: Settings, rows: list[tuple[int, int, int]], n_gpus: int, *, budget: bool = True) -> Batch:
    """The batch that needs most memory on one device: as many rows as it takes, all as long as the longest example.

    budget: whether training.max_tokens holds, which is of training alone.
    """
    longest = max(length for length, _, _ in rows)
    answers = [answer for _, _, answer in rows]
    n_rows, supervised = training.batch_size, round(fmean(answers))
    if training.max_tokens is not None and budget:
        if longest > training.max_tokens:
            raise UserError(
                f"training.max_tokens is {training.max_tokens}, the longest example has {longest} tokens; raise it."
            )
        n_rows = min(n_rows, training.max_tokens // longest)
        supervised = max(answers)  # similar lengths come together, so all answers of a batch may be long
    return Batch(
        rows=-(-n_rows // n_gpus),  # every device takes its share of each batch
        length=longest,
        positions=max(spoken for _, spoken, _ in rows),
        supervised=supervised,
        columns=longest - min(length - answer for length, _, answer in rows),
    )


def _padded_length(training: Settings, rows: list[tuple[int, int, int]]) -> float:
    """Mean length of a sequence with its padding, in tokens."""
    lengths = [length for length, _, _ in rows]
    random.Random(0).shuffle(lengths)
    if training.max_tokens is not None:
        lengths.sort()
    batches = [lengths[i : i + training.batch_size] for i in range(0, len(lengths), training.batch_size)]
    return sum(len(batch) * max(batch) for batch in batches) / len(lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def read_lengths(config: StudyConfig, options: Assumptions) -> Lengths:
    """Lengths of the training examples: read where the data lies on this machine, else assumed from `options`."""
    train = config.data.train
    found = _read_split(config, train, options, options.examples)
    if found is None:
        raise UserError(f"{train.source} is not on this machine; give --examples, how many it will train on.")
    return found


def _others(config: StudyConfig) -> list[Split]:
    """What is spoken besides the training data and what is held out of it."""
    heldout = config.data.heldout
    return [*([] if heldout is None else [heldout]), *config.evaluation.tasks]


def _read_split(config: StudyConfig, split: Split, options: Assumptions, examples: int | None = None) -> Lengths | None:
    """Lengths of a split's examples; None where it is on a hub and nobody knows how many they are."""
    from palimpsest.data.sources import JOIN, load_examples

    parts = split.source.split(JOIN)
    if any(is_hub_name(part) for part in parts):
        rows_of = [PUBLISHED_ROWS.get(part.partition("@")[0]) for part in parts]
        published = None if None in rows_of else sum(n for n in rows_of if n is not None)
        n = examples or split.limit or published
        if n is None:
            return None
        source = "asked for" if examples else "data.train.limit" if split.limit else "rows published"
        row = (PROMPT_TOKENS, round(options.question_seconds / SECONDS_PER_CHARACTER / CHARACTERS_PER_TOKEN),
               options.question_seconds, options.answer_tokens)  # fmt: skip
        longest = (PROMPT_TOKENS, row[1] * 3, min(30.0, 3 * options.question_seconds), options.longest_answer)
        origin = (
            f"{n:,} examples ({source}); lengths assumed: questions of {options.question_seconds:g} s, answers of "
            f"{options.answer_tokens} tokens, the longest of {options.longest_answer}"
        )
        # One long example in a hundred.
        return Lengths(n, tuple([row] * 99 + [longest]), origin, options.question_seconds)

    there = load_examples(split.source, split.split, split.limit, seed=config.seed)
    sample = random.Random(0).sample(there, SAMPLE) if len(there) > SAMPLE else there
    count, by = _counter(config)
    rows = tuple(count(example) for example in sample)
    of = "" if len(sample) == len(there) else f" of a random {SAMPLE}"
    spoken = "" if all(example.audio for example in sample) else "; speech yet to be made at 0.07 s a character"
    written = fmean(0.0 if example.audio else row[2] for example, row in zip(sample, rows, strict=True))
    return Lengths(len(there), rows, f"{len(there):,} examples; lengths{of} counted {by}{spoken}", written)


def is_hub_name(source: str) -> bool:
    """`owner/name` where no such path exists."""
    if ":" in source or source.startswith((".", "/", "~")) or Path(source).exists():
        return False
    return source.count("/") == 1 and not source.endswith(SUFFIXES)


def _counter(config: StudyConfig) -> tuple[Callable[[Example], tuple[int, int, float, int]], str]:
    """A function from an example to its row of `Lengths`, and in words what it counts with.

    The model's tokenizer, if that is on this machine.
    """
    import soundfile

    from palimpsest.models.loading import load_tokenizer, text_source
    from palimpsest.models.processor import SpeechLMProcessor

    def seconds(example: Example) -> float:
        if example.audio is not None:
            return float(soundfile.info(str(example.audio)).duration)
        return SECONDS_PER_CHARACTER * len(example.question)

    where = text_source(config.models.language_model)
    if not Path(where).is_dir():
        per = CHARACTERS_PER_TOKEN
        return lambda e: (
            PROMPT_TOKENS, -(-len(e.question) // per), seconds(e), -(-len(e.answer) // per) + 1
        ), f"as {per} characters a token, without the tokenizer"  # fmt: skip
    processor = SpeechLMProcessor(load_tokenizer(where), None, style=config.prompt)
    frame = len(processor.speech_prompt(0))
    return lambda e: (
        frame, len(processor.text_prompt(e.question)) - frame, seconds(e), len(processor.answer(e.answer))
    ), "with the model's tokenizer"  # fmt: skip
