"""Encoder frames made in the training loop against frames read from the cache, as a ratio measured in one run.

    python benchmarks/encode.py                                    # SmolLM2-135M behind Whisper tiny.en, batches of 8
    python benchmarks/encode.py --length pad_to_30s --device cuda  # the paper's layout
    python benchmarks/encode.py --batch-size 2 --steps 2 --repeats 1

Both are `train` of training/train.py, on the same spoken questions in the same batches, one after the other in every
repeat: everything but the encoder is trained. Seconds from the end of one optimizer step to the end of the next; the
first step of a run, in which worker processes start, is left out. The ratio is taken step by step (same batch), then
the median over all. What the cache costs once is printed beside it, and after how many readings it has paid for itself.
The losses of both are checked to agree.
"""

from __future__ import annotations

import argparse
import math
import platform
import shutil
import statistics
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch

from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.data.features import Features, compute_features
from palimpsest.data.in_loop import Recordings
from palimpsest.data.sources import load_examples
from palimpsest.data.speech import speak
from palimpsest.models.compute import Arithmetic, choose_compute
from palimpsest.models.loading import load_encoder, load_language_model
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.rundir import cpu_name
from palimpsest.training.batching import epoch_batches
from palimpsest.training.methods import Method
from palimpsest.training.train import Settings, train

PATHS = ("cache", "loop")
TOLERANCE = 0.02  # between the losses of a step, relative: frames of other batches differ in their last bit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--encoder", default="embedded:whisper-tiny.en")
    parser.add_argument("--length", choices=("trim", "pad_to_30s"), default="trim")
    parser.add_argument("--compute", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="of a run, besides the first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.steps < 1 or options.repeats < 1:
        parser.error("--steps and --repeats are at least 1")

    torch.set_num_threads(options.threads)
    compute = choose_compute(options.compute, options.device)
    where = cpu_name() if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    print(f"{where}, {options.threads} threads, {platform.system()}; Python {platform.python_version()}, "
          f"torch {version('torch')}, transformers {version('transformers')}; {compute}")  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="palimpsest-benchmark-"))
    try:
        measure(options, compute.dtype, folder)
    finally:
        shutil.rmtree(folder)


def measure(options: argparse.Namespace, compute: Arithmetic, folder: Path) -> None:
    n_examples = (options.steps + 1) * options.batch_size
    examples = speak(load_examples("facts", "train", n_examples, seed=0), folder / "audio", "hibari")
    encoder, feature_extractor = load_encoder(options.encoder, device=options.device)
    _, tokenizer = load_language_model(options.model)
    processor = SpeechLMProcessor(tokenizer, feature_extractor, speech_length=options.length)
    start = time.perf_counter()
    compute_features(encoder, processor, examples, folder / "frames", compute=compute)
    once = (time.perf_counter() - start) / n_examples
    collators = {
        "cache": Collator(processor, "speech", Features(folder / "frames")),
        "loop": Collator(processor, "speech", Recordings(processor, examples)),
    }
    settings = Settings(epochs=1, batch_size=options.batch_size, checkpoint_every=n_examples, compute=compute)
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    for repeat in range(options.repeats):
        losses = {}
        for path in PATHS[:: 1 if repeat % 2 == 0 else -1]:  # neither always goes first
            run = folder / f"{path}-{repeat}"
            times, losses[path] = one_run(options, collators[path], examples, settings, run)
            seconds[path] += times
            shutil.rmtree(run)
        for kept, made in zip(losses["cache"], losses["loop"], strict=True):
            if not math.isclose(kept, made, rel_tol=TOLERANCE):
                raise SystemExit(f"the losses differ: {kept:.5f} with the cache, {made:.5f} in the loop")

    batches = epoch_batches(n_examples, options.batch_size, seed=settings.seed, epoch=0)[1:]
    tokens = statistics.mean(sum(collators["cache"].length(examples[i]) for i in rows) for rows in batches)
    for path in PATHS:
        step = statistics.median(seconds[path])
        print(f"{path:<6} {step:8.3f} s per step {tokens / step:10,.0f} tokens/s")
    ratios = [made / kept for made, kept in zip(seconds["loop"], seconds["cache"], strict=True)]
    print(f"loop / cache, seconds of a step: {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}] "
          f"over {len(ratios)} steps")  # fmt: skip
    size = sum(file.stat().st_size for file in (folder / "frames").rglob("*.safetensors")) / n_examples
    more = (statistics.median(seconds["loop"]) - statistics.median(seconds["cache"])) / options.batch_size
    pays = f"it pays after {once / more:.1f} readings" if more > 0 else "the loop is no slower"
    print(f"the cache: {size / 1e6:.2f} MB and {once:.3f} s an example, once; {pays}")


def one_run(
    options: argparse.Namespace, collator: Collator, examples: list[Example], settings: Settings, folder: Path
) -> tuple[list[float], list[float]]:
    """Seconds of every optimizer step but the first, and the loss of every step."""
    language_model, _ = load_language_model(options.model)
    encoder, _ = load_encoder(options.encoder)
    model = SpeechLM.from_parts(encoder, language_model, speech_length=options.length).to(options.device)
    folder.mkdir()
    ends: list[float] = []

    def stamp(done: int, total: int) -> None:
        if options.device != "cpu":
            torch.cuda.synchronize(options.device)
        ends.append(time.perf_counter())

    method = Method("full", learning_rate=2e-5)
    records = train(model, examples, collator, method, settings, folder, name="full", progress=stamp)
    return [end - start for start, end in pairwise(ends)], [record["loss"] for record in records]


if __name__ == "__main__":
    main()
