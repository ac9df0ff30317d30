"""Speed of training a speech LLM, as ratios measured in one run.

    python benchmarks/training.py                      # SmolLM2-135M behind Whisper tiny.en, batches of 8, 2 threads
    python benchmarks/training.py --repeats 1 --steps 3
    python benchmarks/training.py --skip-layouts --skip-trainer    # what holds weights back, against Full-FT

Layouts: one optimizer step (data, forward, backward, AdamW; everything but the encoder trained) on the same questions
in the eight layouts that three choices make:

    trim    speech at its real length, or padded to 30 s (1500 encoder frames, 300 positions a question)
    cache   encoder frames read from a file, or recording, log-mel and encoder in every step
    head    logits at supervised positions, or at all (transformers' own loss from `labels`)

All three off is LLaMA-Omni's layout; all three on is what `palimpsest study` does. Every repeat runs all layouts one
after the other on one batch of its own; a layout's ratio is taken within the repeat, then the median over repeats. The
losses of the layouts with the same speech length are checked to agree. What the cache costs once is printed beside it.

Trainer: `train` of training/train.py against a hand-written loop on the same batches in the same order: collate, the
same loss, backward, clip, fused AdamW, cosine schedule. Seconds from the end of one step to the end of the next; ratio
step by step (same batch), median over all.

Remedies: `train` with each of what holds weights back (docs/remedies.md), on the same batches in the same order as
plain full fine-tuning, from the same weights: seconds of a step over those of Full-FT, step by step within a repeat,
and peak resident memory above what the model took before (Linux).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.data.features import Features, compute_features
from palimpsest.data.sources import load_examples
from palimpsest.data.speech import read_audio, speak
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.loading import load_encoder, load_language_model
from palimpsest.models.loss import supervised_losses
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import SpeechLength, SpeechLM
from palimpsest.rundir import cpu_name
from palimpsest.study.workspace import give_back_memory
from palimpsest.training.keep import Keep
from palimpsest.training.methods import Method
from palimpsest.training.remedies import Distill, Pull, Slow
from palimpsest.training.train import Settings, train

Clock = Callable[[], float]
LENGTHS: tuple[SpeechLength, SpeechLength] = ("pad_to_30s", "trim")
LEARNING_RATE = 2e-5
REMEDIES = {
    "full": Method("full", LEARNING_RATE),
    "full, pull": Method("full", LEARNING_RATE, pull=Pull(100.0)),
    "full, slow": Method("full", LEARNING_RATE, slow=Slow(0.03)),
    "full, distill from speech": Method("full", LEARNING_RATE, distill=Distill()),
    "lora": Method("lora", LEARNING_RATE),
    "lora, distill from speech": Method("lora", LEARNING_RATE, distill=Distill()),
    "lora, gate": Method("lora", LEARNING_RATE, gate="speech"),
    "inserted, 4 layers": Method("inserted", LEARNING_RATE, new_layers=4),
    "inserted, 4, distill": Method("inserted", LEARNING_RATE, new_layers=4, distill=Distill()),
}
GOALS = {"full, pull": 1.05, "full, distill from speech": 1.5}


@dataclass(frozen=True)
class Layout:
    """Which of the three choices are on."""

    trim: bool
    cache: bool
    head: bool

    @property
    def length(self) -> SpeechLength:
        return LENGTHS[self.trim]


NAIVE, OURS = Layout(False, False, False), Layout(True, True, True)
LAYOUTS = [Layout(*choices) for choices in itertools.product((False, True), repeat=3)]


@dataclass
class Bench:
    """What all measurements share: the model, and per speech length a processor and a collator with cached frames."""

    model: SpeechLM
    processors: dict[SpeechLength, SpeechLMProcessor]
    collators: dict[SpeechLength, Collator]
    cache_seconds: dict[SpeechLength, float]  # to compute the frames, per example
    examples: list[Example]
    clock: Clock = field(default=time.perf_counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--encoder", default="embedded:whisper-tiny.en")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="of every layout, and of Trainer and loop")
    parser.add_argument("--steps", type=int, default=4, help="of Trainer and loop, per repeat")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: with --threads 1, on a busy machine"
    )
    parser.add_argument("--skip-layouts", action="store_true")
    parser.add_argument("--skip-trainer", action="store_true")
    parser.add_argument("--skip-remedies", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    print(f"{cpu_name()}, {options.threads} threads, {platform.system()}; Python {platform.python_version()}, "
          f"torch {version('torch')}, transformers {version('transformers')}")  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="palimpsest-benchmark-"))
    try:
        bench = prepare(options, folder)
        if not options.skip_layouts:
            print_layouts(bench, options)
        if not options.skip_trainer:
            print_trainer(bench, options, folder)
        if not options.skip_remedies:
            print_remedies(bench, options, folder)
    finally:
        shutil.rmtree(folder)


def prepare(options: argparse.Namespace, folder: Path) -> Bench:
    """Questions of the built-in set spoken by hibari, models, and the encoder frames at both lengths."""
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    n_layouts = 0 if options.skip_layouts else options.repeats
    n_trainer = 0 if options.skip_trainer and options.skip_remedies else options.steps
    n_examples = max(n_layouts, n_trainer, 1) * options.batch_size
    examples = speak(load_examples("facts", "train", n_examples, seed=0), folder / "audio", "hibari")
    language_model, tokenizer = load_language_model(options.model)
    encoder, feature_extractor = load_encoder(options.encoder)
    model = SpeechLM.from_parts(encoder, language_model)
    processors = {length: SpeechLMProcessor(tokenizer, feature_extractor, speech_length=length) for length in LENGTHS}
    seconds = {}
    for length in LENGTHS:
        start = clock()
        compute_features(encoder, processors[length], examples, folder / length)
        seconds[length] = (clock() - start) / len(examples)
    collators = {length: Collator(processors[length], "speech", Features(folder / length)) for length in LENGTHS}
    return Bench(model, processors, collators, seconds, examples, clock)


# ------------------------------------------------------------------------------------------------------------
# Layouts
# ------------------------------------------------------------------------------------------------------------
def print_layouts(bench: Bench, options: argparse.Namespace) -> None:
    optimizer = new_optimizer(bench.model)
    groups = batches_of(bench.examples, options.batch_size)[: options.repeats]
    one_step(bench, optimizer, groups[0], OURS)  # warm up
    seconds: dict[Layout, list[float]] = {layout: [] for layout in LAYOUTS}
    tokens: dict[Layout, list[int]] = {layout: [] for layout in LAYOUTS}
    check_losses(bench, groups[0])
    for group in groups:
        for layout in LAYOUTS:
            start = bench.clock()
            n_tokens = one_step(bench, optimizer, group, layout)
            seconds[layout].append(bench.clock() - start)
            tokens[layout].append(n_tokens)
    speech = statistics.mean(len(read_audio(audio_of(example))) / 16_000 for group in groups for example in group)
    print(f"\nOne step of {options.batch_size} questions ({speech:.1f} s of speech each), "
          f"medians of {len(groups)} batches, {options.clock} time")  # fmt: skip
    print(f"{'trim':>5} {'cache':>5} {'head':>5} {'tokens':>7} {'s per step':>11} {'examples/s':>11} "
          f"{'over LLaMA-Omni':>16}  {'least to most'}")  # fmt: skip
    for layout in LAYOUTS:
        times = seconds[layout]
        ratios = sorted(base / own for base, own in zip(seconds[NAIVE], times, strict=True))
        marks = " ".join(f"{'on' if choice else '–':>5}" for choice in (layout.trim, layout.cache, layout.head))
        note = {NAIVE: "   LLaMA-Omni's layout", OURS: "   palimpsest"}.get(layout, "")
        print(f"{marks} {statistics.median(tokens[layout]):7.0f} {statistics.median(times):11.2f} "
              f"{options.batch_size / statistics.median(times):11.2f} {statistics.median(ratios):15.2f}×  "
              f"{ratios[0]:.2f} to {ratios[-1]:.2f}{note}")  # fmt: skip
    print("\nEach choice by itself, median ratio of examples per second:")
    for choice in ("trim", "cache", "head"):
        on = Layout(**{name: name == choice for name in ("trim", "cache", "head")})
        off = Layout(**{name: name != choice for name in ("trim", "cache", "head")})
        alone = statistics.median(a / b for a, b in zip(seconds[NAIVE], seconds[on], strict=True))
        last = statistics.median(a / b for a, b in zip(seconds[off], seconds[OURS], strict=True))
        print(f"{choice:>5}: {alone:5.2f}× switched on alone, {last:5.2f}× switched on last")
    once = bench.cache_seconds["trim"]
    saved = statistics.median(a - b for a, b in zip(seconds[Layout(True, False, True)], seconds[OURS], strict=True))
    print(f"The cache costs {once:.3f} s per question once (trimmed) and saves {saved / options.batch_size:.3f} s "
          "in every epoch of every method.")  # fmt: skip


def one_step(bench: Bench, optimizer: torch.optim.Optimizer, group: Sequence[Example], layout: Layout) -> int:
    """Data, forward, backward and optimizer; returns the tokens of the batch, speech positions and padding included."""
    bench.model.train()
    batch = make_batch(bench, group, layout)
    torch.autograd.backward(loss_of(bench, batch, layout))
    optimizer.step()
    optimizer.zero_grad()
    return int(batch["input_ids"].numel())


def make_batch(bench: Bench, group: Sequence[Example], layout: Layout) -> dict[str, Any]:
    batch = bench.collators[layout.length](group)
    if not layout.cache:
        mels, counts = bench.processors[layout.length].features([read_audio(audio_of(example)) for example in group])
        del batch["encoder_frames"]
        batch |= {"input_features": mels, "frame_counts": counts}
    return batch


def loss_of(bench: Bench, batch: dict[str, Any], layout: Layout) -> torch.Tensor:
    """Mean loss over the supervised tokens."""
    bench.model.config.speech_length = layout.length
    if layout.head:
        return supervised_losses(bench.model, batch)[0].mean()
    inputs = {name: value for name, value in batch.items() if name != "ids"}
    loss: torch.Tensor = bench.model(**inputs, use_cache=False).loss
    return loss


@torch.no_grad()
def check_losses(bench: Bench, group: Sequence[Example]) -> None:
    """The layouts differ in cost alone: equal losses for equal speech lengths, but for the cache's 16 bits."""
    bench.model.eval()
    few = group[:2]
    for trim in (False, True):
        losses = {
            (cache, head): float(loss_of(bench, make_batch(bench, few, layout), layout))
            for cache, head in itertools.product((False, True), repeat=2)
            for layout in [Layout(trim, cache, head)]
        }
        spread = max(losses.values()) - min(losses.values())
        if not spread < 1e-2:
            raise SystemExit(f"The losses of the layouts with trim={trim} differ by {spread:g}: {losses}")


# ------------------------------------------------------------------------------------------------------------
# Trainer
# ------------------------------------------------------------------------------------------------------------
def print_trainer(bench: Bench, options: argparse.Namespace, folder: Path) -> None:
    bench.model.config.speech_length = "trim"
    examples = bench.examples[: options.steps * options.batch_size]
    seen: list[list[Example]] = []
    collator = Recording(bench.collators["trim"], seen)
    seconds: dict[str, list[list[float]]] = {"Trainer": [], "hand-written loop": []}
    for repeat in range(options.repeats):

        def trainer(repeat: int = repeat) -> list[float]:
            seen.clear()
            return with_trainer(bench, examples, collator, options, folder / f"trainer-{repeat}")

        runs = {"Trainer": trainer, "hand-written loop": lambda: by_hand(bench, seen, options)}
        # The loop needs the Trainer's batches, the same in every repeat; from the second one on it goes first in turns.
        for name in list(runs) if repeat % 2 == 0 else reversed(runs):
            seconds[name].append(runs[name]())
    tokens = [int(bench.collators["trim"](group)["input_ids"].numel()) for group in seen[1:]]
    print(f"\nFull fine-tuning, {len(tokens)} steps of {options.batch_size} questions after a first one, "
          f"{options.repeats} times; {options.clock} time")  # fmt: skip
    for name, repeats in seconds.items():
        speeds = [n / t for times in repeats for n, t in zip(tokens, times, strict=True)]
        print(f"{name:18} {statistics.median(speeds):8.1f} tokens/s (median of steps)")
    pairs = zip(*(itertools.chain(*seconds[name]) for name in ("Trainer", "hand-written loop")), strict=True)
    ratios = sorted(ours / by_hand for ours, by_hand in pairs)
    print(
        f"Trainer over loop, seconds per token: {statistics.median(ratios):.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


class Recording:
    """A collator that notes which examples it was given; all else is the collator's."""

    def __init__(self, collator: Collator, seen: list[list[Example]]) -> None:
        self.collator, self.seen = collator, seen

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        self.seen.append(list(examples))
        return self.collator(examples)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)


def with_trainer(
    bench: Bench, examples: list[Example], collator: Recording, options: argparse.Namespace, folder: Path
) -> list[float]:
    """Seconds of every step after the first."""
    marks: list[float] = []
    settings = Settings(epochs=1, batch_size=options.batch_size, checkpoint_every=10**6)
    method = Method("full", LEARNING_RATE)
    collate: Any = collator
    train(bench.model, examples, collate, method, settings, folder, name="full",
          progress=lambda done, total: marks.append(bench.clock()))  # fmt: skip
    return between(marks[-options.steps :])


def by_hand(bench: Bench, groups: list[list[Example]], options: argparse.Namespace) -> list[float]:
    """The same steps in a minimal loop: no Trainer, no logging."""
    optimizer = new_optimizer(bench.model)
    n_steps, n_warmup = len(groups), math.ceil(0.03 * len(groups))
    schedule = get_cosine_schedule_with_warmup(optimizer, n_warmup, n_steps)
    parameters = [parameter for parameter in bench.model.parameters() if parameter.requires_grad]
    marks = []
    bench.model.train()
    for group in groups:
        batch = bench.collators["trim"](group)
        torch.autograd.backward(supervised_losses(bench.model, batch)[0].mean())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        marks.append(bench.clock())
    return between(marks)


def between(marks: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(marks)]


# ------------------------------------------------------------------------------------------------------------
# Remedies
# ------------------------------------------------------------------------------------------------------------
def print_remedies(bench: Bench, options: argparse.Namespace, folder: Path) -> None:
    bench.model.config.speech_length = "trim"
    examples = bench.examples[: options.steps * options.batch_size]
    weights = scored_parameters(bench.model)
    # Which weights are the most important makes no difference to the cost.
    keep = Keep(importance={name: torch.rand(weight.shape) for name, weight in weights.items()})
    seconds: dict[str, list[list[float]]] = {name: [] for name in REMEDIES}
    peaks: dict[str, list[float]] = {name: [] for name in REMEDIES}
    for repeat in range(options.repeats):
        for name in list(REMEDIES) if repeat % 2 == 0 else reversed(REMEDIES):
            model = copy.deepcopy(bench.model)  # which some methods make another of
            give_back_memory()
            resident = memory_from_here()
            marks: list[float] = []

            def mark(done: int, total: int, marks: list[float] = marks) -> None:
                marks.append(bench.clock())

            settings = Settings(epochs=1, batch_size=options.batch_size, checkpoint_every=10**6)
            train(model, examples, bench.collators["trim"], REMEDIES[name], settings,
                  folder / f"{name}-{repeat}", name="m", keep=keep, progress=mark)  # fmt: skip
            seconds[name].append(between(marks))
            peaks[name].append((peak_bytes() - resident) / 1e9)
    n = len(seconds["full"][0])
    print(f"\nRemedies: {n} steps of {options.batch_size} questions after a first one, {options.repeats} times; "
          f"{options.clock} time; peak memory above the model's own")  # fmt: skip
    print(f"{'':24} {'s per step':>11} {'over Full-FT':>13}  {'least to most':15} {'peak, GB':>9}")
    for name, repeats in seconds.items():
        pairs = zip(itertools.chain(*repeats), itertools.chain(*seconds["full"]), strict=True)
        ratios = sorted(own / full for own, full in pairs)
        print(f"{name:24} {statistics.median(itertools.chain(*repeats)):11.2f} {statistics.median(ratios):12.3f}×  "
              f"{f'{ratios[0]:.2f} to {ratios[-1]:.2f}':15} {statistics.median(peaks[name]):9.2f}")  # fmt: skip
    for name, goal in GOALS.items():
        print(f"goal of {name}: at most {goal}× the time of a step")


def memory_from_here() -> int:
    """Bytes that are resident now; the peak starts anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_bytes() -> int:
    return status("VmHWM")


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# ------------------------------------------------------------------------------------------------------------
# Common
# ------------------------------------------------------------------------------------------------------------
def new_optimizer(model: SpeechLM) -> torch.optim.Optimizer:
    """As training/train.py makes it for full fine-tuning without weight decay: everything but the encoder."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("encoder."))
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0,
                             fused=True)  # fmt: skip


def batches_of(examples: list[Example], size: int) -> list[list[Example]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def audio_of(example: Example) -> Path:
    assert example.audio is not None
    return example.audio


if __name__ == "__main__":
    main()
