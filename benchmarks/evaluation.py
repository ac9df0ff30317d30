"""Questions answered per second, batched over one at a time, and whether the answers are the same.

    python benchmarks/evaluation.py                             # SmolLM2-135M, 100 held-out facts, 2 threads
    python benchmarks/evaluation.py --speech LLAMA_QUESTIONS    # also from recordings, through an untrained adaptor
    python benchmarks/evaluation.py --threads 1 --clock cpu     # on a busy machine

One at a time is how the evaluation scripts of speech LLMs such as LLaMA-Omni's run: the same model, prompts and
settings, a batch of one. The questions are cut into groups of the batch size, longest first as an evaluation does; each
group is answered one by one and batched, one after the other, so that a change of the machine's speed meets both. The
ratio is that of the total times, and its range that of the groups.
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib.metadata import version

import torch

from palimpsest.data.examples import Example
from palimpsest.data.sources import load_examples
from palimpsest.evaluation.answers import Answer, Answerer, text_answerer
from palimpsest.models.loading import load_encoder, load_language_model
from palimpsest.records import Modality
from palimpsest.rundir import cpu_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--encoder", default="embedded:whisper-tiny.en")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 50])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: with --threads 1")
    parser.add_argument("--speech", help="a question set with recordings, such as a folder of Llama Questions")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    print(f"{cpu_name()}, {options.threads} threads, {options.clock} time; Python {platform.python_version()}, "
          f"torch {version('torch')}, transformers {version('transformers')}, float32")  # fmt: skip
    language_model, tokenizer = load_language_model(options.model)
    answer = text_answerer(language_model, tokenizer, options.max_new_tokens)
    compare(answer, load_examples("facts", "heldout", options.questions), "text", options)
    if options.speech:
        from palimpsest.evaluation.spoken import recording_answerer
        from palimpsest.models.processor import SpeechLMProcessor
        from palimpsest.models.speech_lm import SpeechLM

        encoder, extractor = load_encoder(options.encoder)
        model = SpeechLM.from_parts(encoder, language_model).eval()
        answer = recording_answerer(model, SpeechLMProcessor(tokenizer, extractor), options.max_new_tokens)
        compare(answer, load_examples(options.speech, "test", options.questions), "speech", options)


def compare(answer: Answerer, examples: list[Example], modality: Modality, options: argparse.Namespace) -> None:
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    examples = sorted(examples, key=lambda example: (-len(example.question), example.id))
    answer(examples[:2], modality)  # warm up
    print(f"\n{len(examples)} questions as {modality}, up to {options.max_new_tokens} new tokens")
    print(f"{'batch':>5} {'questions/s':>12} {'one by one':>11} {'ratio':>7}  {'groups':15} differing answers")
    for size in options.batch_sizes:
        alone_seconds, together_seconds, differing = [], [], 0
        for start in range(0, len(examples), size):
            group = examples[start : start + size]
            begin = clock()
            alone = [answer([example], modality)[0] for example in group]
            middle = clock()
            together = answer(group, modality)
            alone_seconds.append(middle - begin)
            together_seconds.append(clock() - middle)
            differing += sum(a.response != b.response for a, b in zip(alone, together, strict=True))
            report_differences(group, alone, together)
        ratios = sorted(a / b for a, b in zip(alone_seconds, together_seconds, strict=True))
        one, batched = sum(alone_seconds), sum(together_seconds)
        print(f"{size:5} {len(examples) / batched:12.2f} {len(examples) / one:11.2f} {one / batched:6.2f}×  "
              f"{ratios[0]:.2f} to {ratios[-1]:.2f}    {differing} of {len(examples)}")  # fmt: skip


def report_differences(group: list[Example], alone: list[Answer], together: list[Answer]) -> None:
    for example, a, b in zip(group, alone, together, strict=True):
        if a.response != b.response:
            print(f"  differs: {example.id}: {a.response!r} alone, {b.response!r} in the batch")


if __name__ == "__main__":
    main()
