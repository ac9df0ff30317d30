"""What bfloat16 arithmetic gains over float32, and what it changes, measured in one run.

    python benchmarks/compute.py                                     # SmolLM2-135M, facts, 2 threads
    python benchmarks/compute.py --threads 1 --clock cpu             # on a busy machine
    python benchmarks/compute.py --repeats 1 --questions 8           # to see that it works

Speed: a training step (forward, backward, AdamW in float32), importance and greedy answers, each on the same batches in
both arithmetics, one after the other in every repeat and in changing order. A ratio is taken within the repeat, then
the median over repeats is printed with the range.

Agreement: importance of every weight on the same questions in both arithmetics, and on other questions in float32 for
comparison; loss and perplexity of held-out answers, also without the top and the bottom 3 % of the weights; accuracy of
the answers, and how many of them differ.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np
import torch

from palimpsest.data.collate import Batch, Collator, batches
from palimpsest.data.examples import Example
from palimpsest.data.sources import load_examples
from palimpsest.evaluation.answers import text_answerer
from palimpsest.evaluation.perplexity import perplexity
from palimpsest.evaluation.scoring import PRIMARY, score
from palimpsest.importance.deactivate import deactivate
from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.scores import Scores
from palimpsest.importance.select import select
from palimpsest.models.compute import Arithmetic, choose_compute, computing
from palimpsest.models.loading import choose_device, load_text_model
from palimpsest.models.loss import supervised_losses
from palimpsest.rundir import cpu_name
from palimpsest.training.methods import layer_totals

BOTH: tuple[Arithmetic, Arithmetic] = ("float32", "bfloat16")
REDUCTIONS = ("signed_sum", "per_batch_abs")
TOP = 0.03
SAMPLED = 2_000_000  # weights of which ranks are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--questions", type=int, default=64, help="scored; as many others; at most as many asked")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: with --threads 1")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    print(f"{cpu_name()}, {options.threads} threads, {options.clock} time; Python {platform.python_version()}, "
          f"torch {version('torch')}, transformers {version('transformers')}")  # fmt: skip
    print(f"device {device}; auto is {choose_compute('auto', device)}")
    model, processor = load_text_model(options.model, device=device)
    collator, n = Collator(processor, "text"), options.questions
    known = load_examples("facts", "train", 2 * n)
    held_out = load_examples("facts", "heldout", n)

    def batched(examples: Sequence[Example]) -> list[Batch]:
        return list(batches(collator, examples, options.batch_size, device, by_length=False))

    print_speed(model, processor, batched(known[: options.batch_size]), held_out[: options.batch_size], options)
    scores = print_importance(model, batched(known[:n]), batched(known[n:]))
    print_losses(model, batched(held_out), scores)
    print_answers(model, processor, held_out, options)


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------
def print_speed(
    model: torch.nn.Module, processor: object, made: list[Batch], asked: list[Example], options: argparse.Namespace
) -> None:
    trained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-6, fused=True)

    def step(compute: Arithmetic) -> None:
        for batch in made:
            with computing(compute, batch["labels"].device):
                losses, _ = supervised_losses(trained, batch)
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def importance(compute: Arithmetic) -> None:
        estimate_importance(model, made, REDUCTIONS, compute=compute)

    def answers(compute: Arithmetic) -> None:
        answerer(model, processor, options, compute)(asked, "text")

    print(f"\nbfloat16 over float32, {options.batch_size} questions, median of {options.repeats} (range)")
    for name, task in (("training step", step), ("importance", importance), ("answers", answers)):
        seconds = alternate(task, options)
        ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
        medians = " ".join(f"{compute} {statistics.median(times):.3f} s" for compute, times in seconds.items())
        print(
            f"{name:<14} {statistics.median(ratios):5.2f} × ({ratios[0]:.2f} to {ratios[-1]:.2f})   {medians}",
            flush=True,
        )


def alternate(task: Callable[[Arithmetic], None], options: argparse.Namespace) -> dict[Arithmetic, list[float]]:
    """Seconds of each repeat, the arithmetics taking turns in being first; both are warmed up before."""
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    seconds: dict[Arithmetic, list[float]] = {compute: [] for compute in BOTH}
    for repeat in range(-1, options.repeats):
        for compute in BOTH if repeat % 2 else BOTH[::-1]:
            begin = clock()
            task(compute)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= 0:
                seconds[compute].append(clock() - begin)
    return seconds


def answerer(model: object, processor: object, options: argparse.Namespace, compute: Arithmetic):  # type: ignore[no-untyped-def]
    return text_answerer(
        model, processor.tokenizer, options.max_new_tokens, processor.style, compute=compute
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Agreement
# ---------------------------------------------------------------------------------------------------------------------
def print_importance(model: torch.nn.Module, same: list[Batch], other: list[Batch]) -> Scores:
    exact, rounded = (estimate_importance(model, same, REDUCTIONS, compute=compute) for compute in BOTH)
    elsewhere = estimate_importance(model, other, REDUCTIONS)
    print(f"\nimportance against float32 on the same questions, {exact.metadata['n_sequences']} of them")
    print(f"{'':<32} Spearman   Jaccard of the top {TOP:.0%}   largest change of a layer's sum")
    for reduction in REDUCTIONS:
        for name, found in (("bfloat16", rounded), ("other questions", elsewhere)):
            a, b = flat(exact, reduction), flat(found, reduction)
            layers, others = layer_totals(exact, reduction), layer_totals(found, reduction)
            change = max(abs(others[layer] / total - 1) for layer, total in layers.items())
            print(
                f"{reduction:<14} {name:<17} {spearman(a, b):8.4f}   {jaccard(a, b):21.3f}   {change:31.2%}", flush=True
            )
    return exact


def flat(scores: Scores, reduction: str) -> np.ndarray:
    tensors = scores.tensors(reduction)
    return np.concatenate([tensors[name].numpy().ravel() for name in scores.names])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    rows = np.random.default_rng(0).permutation(len(a))[:SAMPLED]
    ranks = [np.argsort(np.argsort(values[rows], kind="stable"), kind="stable") for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    k = int(TOP * len(a))
    first, second = (np.zeros(len(a), dtype=bool) for _ in range(2))
    for top, values in ((first, a), (second, b)):
        top[np.argpartition(values, -k)[-k:]] = True
    return float((first & second).sum() / (first | second).sum())


def print_losses(model: torch.nn.Module, made: list[Batch], scores: Scores) -> None:
    print("\nloss of held-out answers, nats per token (perplexity)")
    tensors = scores.tensors("signed_sum")
    for label, which in (("unchanged", None), ("without the bottom 3 %", "bottom"), ("without the top 3 %", "top")):
        mask = None if which is None else select(tensors, TOP, which)  # type: ignore[arg-type]
        found = {}
        for compute in BOTH:
            if mask is None:
                found[compute] = perplexity(model, made, compute=compute)
            else:
                with deactivate(model, mask):
                    found[compute] = perplexity(model, made, compute=compute)
        cells = "   ".join(f"{compute} {of.loss:.4f} ({of.perplexity:.4g})" for compute, of in found.items())
        print(f"{label:<24} {cells}")


def print_answers(model: object, processor: object, asked: list[Example], options: argparse.Namespace) -> None:
    given = {}
    for compute in BOTH:
        answer = answerer(model, processor, options, compute)
        groups = [asked[i : i + options.batch_size] for i in range(0, len(asked), options.batch_size)]
        given[compute] = [one.response for group in groups for one in answer(group, "text")]
    right = {
        compute: sum(score(r, e.answers, e.question)[PRIMARY] for r, e in zip(responses, asked, strict=True))
        for compute, responses in given.items()
    }
    differing = sum(a != b for a, b in zip(*given.values(), strict=True))
    cells = "   ".join(f"{compute} {n}/{len(asked)} right" for compute, n in right.items())
    print(f"\nanswers to held-out facts    {cells}   {differing} differ in their words")


if __name__ == "__main__":
    main()
