"""What a recipe will need, reported before anything runs: parameters, memory, disk and time per method.

`plan` reads configs and, where it lies on this machine, the data; it loads no weights, speaks nothing and fetches no
data. The formulas are in `training.budget` and, with what was measured against them, in docs/plan.md.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from palimpsest.config import StudyConfig
from palimpsest.files import UserError

if TYPE_CHECKING:
    from palimpsest.planning.memory import Batch, Memory, Setup
    from palimpsest.planning.sizes import Gpu

GB = 1e9
UTILISATION = 0.4  # of the GPU's published FLOP/s that training reaches; an assumption, --utilisation changes it
BANDWIDTH_SHARE = 0.7  # of its published bandwidth that the optimizer's step reaches
SECONDS_PER_CHARACTER = 0.07  # of a spoken question: 0.071 in hibari's facts, 0.067 in Llama Questions
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
class Options:
    """What the command line adds to a recipe."""

    gpu: str | None = None
    n_gpus: int = 1
    memory: float | None = None  # GB of one device
    shape: str | None = None
    config: Path | None = None
    utilisation: float = UTILISATION
    # Of data that is not on this machine:
    examples: int | None = None
    question_seconds: float = 6.0
    answer_tokens: int = 100
    longest_answer: int = 400


@dataclass(frozen=True)
class Lengths:
    """Of training examples, a row each: (tokens of the prompt without speech or question, question's tokens as text,
    seconds of its speech, tokens of the answer)."""

    n: int  # examples there are; `rows` may be a sample of them
    rows: tuple[tuple[int, int, float, int], ...]
    origin: str

    def row(self, i: int, modality: str, positions: int | None, stack: int) -> tuple[int, int, int]:
        """(sequence, speech positions, answer) of example i, tokens; `positions` if every utterance has as many."""
        frame, question, seconds, answer = self.rows[i]
        if modality == "text":
            return frame + question + answer, 0, answer
        spoken = positions if positions is not None else math.ceil(min(seconds, 30.0) * 50 / stack)
        return frame + spoken + answer, spoken, answer


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
class Plan:
    config: StudyConfig
    methods: tuple[MethodPlan, ...]
    lengths: Lengths
    origins: dict[str, str]
    features: int  # bytes of encoder frames of the training data
    encoding_flops: float
    scores: int  # bytes on disk of one model's importance
    capacity: int  # bytes of one device
    device: str  # in words
    gpu: Gpu | None


def make_plan(config: StudyConfig, options: Options) -> Plan:
    """Raises UserError for a model, GPU or data set that cannot be had."""
    from palimpsest.planning.memory import encoder_flops, memory
    from palimpsest.planning.sizes import decoder_sizes, encoder_sizes, find_gpu

    gpu = find_gpu(options.gpu) if options.gpu else None
    capacity, device, kind = _device(config, options, gpu)
    decoder, decoder_origin = decoder_sizes(config.models.language_model, options.shape, options.config)
    encoder, encoder_origin = encoder_sizes(config.models.encoder)
    lengths = read_lengths(config, options)
    positions = 1500 // config.speech.stack_factor if config.speech.length == "pad_to_30s" else None

    methods = []
    for name in config.methods:
        setup = _setup(config, name, decoder, encoder, kind, options.n_gpus)
        batch = largest_batch(config, lengths, setup, positions)
        weights = setup.weight_bytes * (decoder.parameters + encoder.parameters + setup.adaptor_parameters)
        tokens, flops = _arithmetic(config, lengths, setup, positions)
        steps = _steps(config, lengths.n, tokens)
        saves = config.training.checkpoint_every < steps
        methods.append(
            MethodPlan(
                name=name,
                setup=setup,
                batch=batch,
                memory=memory(setup, batch),
                tokens=tokens,
                steps=steps,
                flops=flops * config.training.epochs,
                checkpoint=weights,
                # Two checkpoints of the Trainer are kept and a third is being written.
                while_training=3 * (weights + 2 * setup.weight_bytes * setup.trainable) if saves else 0,
            )
        )
    frames = [1500.0 if positions is not None else min(row[2], 30.0) * 50 for row in lengths.rows]
    n_frames = lengths.n * fmean(frames)
    return Plan(
        config=config,
        methods=tuple(methods),
        lengths=lengths,
        origins={"language model": decoder_origin, "encoder": encoder_origin},
        features=round(n_frames * encoder.dim * 2),
        encoding_flops=encoder_flops(encoder, n_frames, fmean(frames)),
        scores=2 * 4 * decoder.matrices,
        capacity=capacity,
        device=device,
        gpu=gpu,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Device, method, batch
# ---------------------------------------------------------------------------------------------------------------------
def _device(config: StudyConfig, options: Options, gpu: Gpu | None) -> tuple[int, str, Any]:
    """(bytes of one device, its name, "cpu" or "cuda"): what was asked for, or what this machine has."""
    import os

    import torch

    if options.memory is not None:
        return round(options.memory * GB), gpu.name if gpu else f"a GPU of {options.memory:g} GB", "cuda"
    if gpu is not None:
        return gpu.memory, gpu.name, "cuda"
    if config.models.device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.total_memory, f"this machine's {properties.name}", "cuda"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory", "cpu"


def _setup(config: StudyConfig, name: str, decoder: Any, encoder: Any, device: Any, n_gpus: int) -> Setup:
    from palimpsest.planning.memory import Setup

    method, training = config.methods[name], config.training
    return Setup(
        decoder=decoder,
        encoder=encoder,
        method=method.kind,
        rank=method.rank,
        modality=method.modality,
        stack_factor=config.speech.stack_factor,
        adaptor_hidden=config.speech.adaptor_hidden_size,
        weight_bytes=4 if config.models.dtype == "float32" else 2,
        autocast=training.bf16,
        checkpointing=training.gradient_checkpointing,
        accumulation=training.accumulation,
        # A sharded head is not there as a whole for the fused kernel.
        fused_loss=n_gpus == 1 and device == "cuda" and _fused(training.liger),
        device=device,
        n_gpus=n_gpus,
    )


def _fused(liger: bool | str) -> bool:
    return liger is True or (liger == "auto" and find_spec("liger_kernel") is not None)


def largest_batch(config: StudyConfig, lengths: Lengths, setup: Setup, positions: int | None) -> Batch:
    """The batch that needs most memory on one device: as many rows as it takes, all as long as the longest example."""
    from palimpsest.planning.memory import Batch

    training = config.training
    rows = [lengths.row(i, setup.modality, positions, setup.stack_factor) for i in range(len(lengths.rows))]
    longest = max(length for length, _, _ in rows)
    n_rows = training.batch_size
    budget: int | None = training.max_tokens
    if budget is not None:
        if longest > budget:
            raise UserError(f"training.max_tokens is {budget}, the longest example has {longest} tokens; raise it.")
        n_rows = min(n_rows, budget // longest)
    n_rows = -(-n_rows // setup.n_gpus)  # every device takes its share of each batch
    shortest_prompt = min(length - answer for length, _, answer in rows)
    return Batch(
        rows=n_rows,
        length=longest,
        positions=max(spoken for _, spoken, _ in rows),
        # Under a token budget similar lengths come together, so all answers of a batch may be long.
        supervised=max(a for _, _, a in rows) if budget is not None else round(fmean(a for _, _, a in rows)),
        columns=longest - shortest_prompt,
    )


def _arithmetic(config: StudyConfig, lengths: Lengths, setup: Setup, positions: int | None) -> tuple[float, float]:
    """(tokens with padding, FLOPs) of one epoch."""
    from palimpsest.planning.memory import recomputed_flops, step_flops

    rows = [lengths.row(i, setup.modality, positions, setup.stack_factor) for i in range(len(lengths.rows))]
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    if config.training.max_tokens is not None:
        order.sort(key=lambda i: rows[i][0])
    size = config.training.batch_size
    padded = 0.0
    for start in range(0, len(order), size):
        group = order[start : start + size]
        padded += len(group) * max(rows[i][0] for i in group)
    tokens = padded / len(rows) * lengths.n
    length = padded / len(rows)
    spoken, answers = (lengths.n * fmean(row[k] for row in rows) for k in (1, 2))
    flops = step_flops(setup, tokens, length, spoken, answers) + recomputed_flops(setup, tokens, length)
    return tokens, flops


def _steps(config: StudyConfig, n: int, tokens: float) -> int:
    training = config.training
    budget: int | None = training.max_tokens
    batches = math.ceil(n / training.batch_size)
    if budget is not None:
        batches = max(batches, math.ceil(tokens / budget))
    return max(1, math.ceil(math.ceil(batches / training.accumulation) * training.epochs))


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def read_lengths(config: StudyConfig, options: Options) -> Lengths:
    """Lengths of the training examples: read where the data lies on this machine, else assumed from `options`."""
    from palimpsest.data.examples import Example
    from palimpsest.data.sources import JOIN, load_examples

    train = config.data.train
    parts = train.source.split(JOIN)
    if any(is_hub_name(part) for part in parts):
        rows_of = [PUBLISHED_ROWS.get(part.partition("@")[0]) for part in parts]
        published = None if None in rows_of else sum(n for n in rows_of if n is not None)
        n = options.examples or train.limit or published
        if n is None:
            raise UserError(f"{train.source} is not on this machine; give --examples, how many it will train on.")
        source = "asked for" if options.examples else "data.train.limit" if train.limit else "rows published"
        row = (PROMPT_TOKENS, round(options.question_seconds / SECONDS_PER_CHARACTER / CHARACTERS_PER_TOKEN),
               options.question_seconds, options.answer_tokens)  # fmt: skip
        longest = (PROMPT_TOKENS, row[1] * 3, min(30.0, 3 * options.question_seconds), options.longest_answer)
        origin = (
            f"{n:,} examples ({source}); lengths assumed: questions of {options.question_seconds:g} s, answers of "
            f"{options.answer_tokens} tokens, the longest of {options.longest_answer}"
        )
        # One long example in a hundred.
        return Lengths(n, tuple([row] * 99 + [longest]), origin)

    examples: list[Example] = load_examples(train.source, train.split, train.limit, seed=config.seed)
    sample = random.Random(0).sample(examples, SAMPLE) if len(examples) > SAMPLE else examples
    count, by = _counter(config)
    rows = tuple(count(example) for example in sample)
    of = "" if len(sample) == len(examples) else f" of a random {SAMPLE}"
    spoken = "" if all(example.audio for example in sample) else "; speech yet to be made at 0.07 s a character"
    return Lengths(len(examples), rows, f"{len(examples):,} examples; lengths{of} counted {by}{spoken}")


def is_hub_name(source: str) -> bool:
    """`owner/name` where no such path exists."""
    if ":" in source or source.startswith((".", "/", "~")) or Path(source).exists():
        return False
    return source.count("/") == 1 and not source.endswith(SUFFIXES)


def _counter(config: StudyConfig) -> tuple[Any, str]:
    """A function from an example to its row of `Lengths`, and in words what it counts with."""
    import soundfile

    def seconds(example: Any) -> float:
        if example.audio is not None:
            return float(soundfile.info(str(example.audio)).duration)
        return SECONDS_PER_CHARACTER * len(example.question)

    processor = _processor(config)
    if processor is None:
        per = CHARACTERS_PER_TOKEN
        return lambda e: (
            PROMPT_TOKENS, -(-len(e.question) // per), seconds(e), -(-len(e.answer) // per) + 1
        ), f"as {per} characters a token, for want of the tokenizer"  # fmt: skip
    frame = len(processor.speech_prompt(0))

    def row(example: Any) -> tuple[int, int, float, int]:
        text = len(processor.text_prompt(example.question))
        return frame, text - frame, seconds(example), len(processor.answer(example.answer))

    return row, "with the model's tokenizer"


def _processor(config: StudyConfig) -> Any:
    """The prompts' processor, if the language model's tokenizer is on this machine or can be had."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    from palimpsest.models.loading import text_source
    from palimpsest.models.processor import PromptStyle, SpeechLMProcessor

    where = text_source(config.models.language_model)
    if not Path(where).is_dir():
        return None
    return SpeechLMProcessor(
        AutoTokenizer.from_pretrained(where),
        WhisperFeatureExtractor(),
        stack_factor=config.speech.stack_factor,
        speech_length=config.speech.length,
        style=PromptStyle(config.prompt.system, config.prompt.speech_instruction),
    )
