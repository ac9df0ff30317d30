"""What the steps of a study need besides training: memory of each on one device, and disk in the order they write.

Letters as in memory.py. Every process holds the whole model in these steps, however training divides it: the language
model, and of a trained one the encoder and the adaptor too. Importance is a forward and a backward without optimizer,
as training in full takes it (which is a little more than it needs: norms and head have no gradient there), and one
float32 number per scored weight and reduction. The others run forward only: one layer's activations at a time, and the
logits of every column in which some row is supervised, or keys and values of all tokens of the answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from palimpsest.config import STUDY_REDUCTIONS, StudyConfig
from palimpsest.planning.memory import (
    ACCUMULATED,
    ADAM_STATES,
    RUNTIME_BYTES,
    Batch,
    Decoder,
    Encoder,
    Setup,
    importance_parts,
    layer_bytes_per_token,
)
from palimpsest.records import BASE
from palimpsest.rundir import folder_of
from palimpsest.training.remedies import Replay


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step on one device, by part, and in host memory for each process; `remedy`: keys that make room."""

    name: str
    parts: dict[str, int]
    host: int = 0
    remedy: str | None = None

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------
def accumulated(config: StudyConfig) -> int:
    """Reductions with a number for every weight while importance is estimated."""
    return len(config.importance.keep if config.importance.accumulate == "kept" else STUDY_REDUCTIONS)


def importance_memory(config: StudyConfig, setup: Setup, batch: Batch, *, tuned: bool, rows: int = 0) -> StepMemory:
    """setup: of the language model, in the arithmetic of importance; batch: the longest questions as text.

    rows: of the embedding and of speech tokens, where they are scored too, by one reduction; `batch` is then spoken.
    """
    options, decoder = config.importance, setup.decoder
    setup = replace(setup, method="full", modality="text", checkpointing=options.gradient_checkpointing, n_gpus=1)
    batch = replace(batch, rows=options.batch_size)
    sums = ACCUMULATED * decoder.matrices * accumulated(config)
    if rows:
        sums = ACCUMULATED * (decoder.matrices + rows * decoder.hidden)
    parts = importance_parts(setup, batch, sums if options.offload == "none" else 0)
    parts["weights"] = _weights(setup, tuned)
    name = f"{'methods/NAME' if tuned else BASE}/importance{'_parts' if rows else ''}"
    return StepMemory(name, parts, host=sums if options.offload == "cpu" else 0)


def importance_that_fits(
    config: StudyConfig, setup: Setup, batch: Batch, capacity: int, *, tuned: bool, rows: int = 0
) -> str | None:
    """The keys of importance that make it fit, those that cost least first; None if none of them do."""
    options = config.importance
    choices: dict[str, list[Any]] = {
        "offload": [options.offload, "cpu"],
        "accumulate": [options.accumulate, "kept"] if "signed_sum" in options.keep else [options.accumulate],
        "gradient_checkpointing": [options.gradient_checkpointing, True],
    }
    for size in (options.batch_size, 1):
        for values in product(*choices.values()):
            wanted = {**dict(zip(choices, values, strict=True)), "batch_size": size}
            if wanted["accumulate"] == "kept" and len(options.keep) > 1:
                wanted["keep"] = (options.reduction,) if options.reduction == "signed_sum" else options.keep
            other = config.model_copy(update={"importance": replace(options, **wanted)})
            if importance_memory(other, setup, batch, tuned=tuned, rows=rows).peak <= capacity:
                changed = {key: value for key, value in wanted.items() if getattr(options, key) != value}
                return ", ".join(f"importance.{key}: {_yaml(value)}" for key, value in changed.items())
    return None


def forward_memory(
    name: str, setup: Setup, *, rows: int, length: int, columns: int, cached: int, beside: int = 0, tuned: bool = True
) -> StepMemory:
    """A step that only runs models forward; cached: tokens of a row whose keys and values are kept.

    beside: bytes of another model in memory, such as the recogniser of the cascade.
    """
    decoder, c = setup.decoder, setup.compute_bytes
    setup = replace(setup, method="full", modality="text", checkpointing=False, n_gpus=1)
    one_layer = rows * length * (sum(layer_bytes_per_token(setup).values()) + c * length)
    values = 2 * decoder.layers * decoder.heads * decoder.head_dim * c  # of a token; fewer with shared heads
    copies = 2 * decoder.parameters if setup.casts else 0  # autocast keeps what it has rounded until the forward ends
    parts = {
        "weights": _weights(setup, tuned) + beside,
        "accumulators": 0,
        "activations": one_layer + copies + rows * cached * values,
        "loss or gradient": (c + 4) * rows * columns * decoder.vocabulary,
        "runtime": RUNTIME_BYTES[setup.device],
    }
    return StepMemory(name, parts)


def _weights(setup: Setup, tuned: bool) -> int:
    more = setup.encoder.parameters + setup.adaptor_parameters if tuned else 0
    return setup.weight_bytes * (setup.decoder.parameters + more)


def recogniser_bytes(encoder: Encoder) -> int:
    """Whisper whole, in float32: a layer of the decoder has cross-attention beside what one of the encoder has (16 d²
    against 12 d²), and there are 51,866 tokens."""
    return 4 * (encoder.parameters + encoder.layers * 16 * encoder.dim**2 + 51_866 * encoder.dim)


def _yaml(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value).lower()


# ---------------------------------------------------------------------------------------------------------------------
# Disk
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StepDisk:
    """Bytes that a step leaves, and those that go away again when it ends."""

    name: str
    kept: int
    passing: int = 0


def disk_of_steps(
    config: StudyConfig, decoder: Decoder, setups: Mapping[str, Setup], steps: Mapping[str, float], n_processes: int = 1
) -> list[StepDisk]:
    """Of the steps that write weights or scores of weights, in a study's order.

    setups: by method. steps: optimizer steps of a method; math.inf where they are not known. n_processes: those that
    estimate importance together, each with accumulators of its own.
    """
    options, scores = config.importance, ACCUMULATED * decoder.matrices
    passing = n_processes * scores * accumulated(config) if options.offload == "disk" else 0
    of_model = scores * len(options.keep)
    of_others = -(-decoder.matrices // 8) if options.keep_other == "masks" else of_model
    found = [
        StepDisk(f"{BASE}/importance", of_model, passing),
        StepDisk(f"{BASE}/importance_other", of_others, passing),
    ]
    if any(method.weighs_by("fisher") for method in config.methods.values()):
        found.append(StepDisk(f"{BASE}/fisher", scores, scores * n_processes if options.offload == "disk" else 0))
    for run, name in zip(config.runs, list(config.methods) * config.seeds, strict=True):
        if setups[name].method not in ("given", "blend"):
            found.append(
                StepDisk(
                    f"{folder_of(run)}/checkpoint",
                    checkpoint_bytes(setups[name], light=config.kept_light(run)),
                    trainer_bytes(setups[name]) if config.training.checkpoint_every < steps[name] else 0,
                )
            )
        if config.measures(run, "importance"):
            found.append(StepDisk(f"{folder_of(run)}/importance", of_model, passing))
        if config.has_parts(run) and options.offload == "disk":
            rows = decoder.vocabulary + setups[name].speech_tokens
            of_parts = n_processes * ACCUMULATED * (decoder.matrices + rows * decoder.hidden)
            found.append(StepDisk(f"{folder_of(run)}/importance_parts", 0, of_parts))
    return found


def checkpoint_bytes(setup: Setup, *, light: bool) -> int:
    """Of one trained model; a light one holds the adaptor and inserted layers, or LoRA's matrices, which peft keeps in
    float32."""
    adaptor = setup.weight_bytes * setup.adaptor_parameters
    lora = 4 * setup.lora_parameters
    if light:
        return adaptor + lora + setup.weight_bytes * setup.new_parameters
    return adaptor + lora + setup.weight_bytes * (setup.decoder.parameters + setup.encoder.parameters)


def trainer_bytes(setup: Setup) -> int:
    """The Trainer's checkpoints while a method trains: two are kept and a third is being written."""
    adam = ADAM_STATES * (setup.weight_bytes * (setup.trainable - setup.lora_parameters) + 4 * setup.lora_parameters)
    return 3 * (checkpoint_bytes(setup, light=False) + adam)


def most_disk(steps: Sequence[StepDisk], before: int = 0) -> int:
    """The most bytes that there are at any time, `before` being there from the start."""
    peak = total = before
    for step in steps:
        peak = max(peak, total + step.kept + step.passing)
        total += step.kept
    return peak


def first_that_fails(steps: Sequence[StepDisk], room: int, before: int = 0) -> tuple[str, int] | None:
    """(name of the first step that `room` bytes are too few for, bytes there would have to be); None: all fit."""
    total = before
    for step in steps:
        if total + step.kept + step.passing > room:
            return step.name, total + step.kept + step.passing
        total += step.kept
    return None


def steps_at_most(config: StudyConfig, n_examples: int | None, replay: Replay | None = None) -> float:
    """Optimizer steps of a training run on `n_examples`, or on as many as the recipe limits it to.

    With a token budget, or examples that nobody has counted, there is no bound.
    """
    n = n_examples if n_examples is not None else config.data.train.limit
    if n is None or config.training.max_tokens is not None:
        return math.inf
    if n_examples is None and config.speech.augmentation is not None:
        n *= 1 + config.speech.augmentation.copies
    batches = math.ceil(n / config.training.batch_size)
    batches += 0 if replay is None else replay.n_batches(batches)
    return math.ceil(math.ceil(batches / config.training.accumulation) * config.training.epochs)
