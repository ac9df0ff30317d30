"""Does the retention probe see damage? python benchmarks/probe_damage.py [DAMAGE …] (minutes each on one core)

SmolLM2-135M-Instruct against itself with noise on the weights of its layers (`noise 0.1`: a tenth of each matrix's
standard deviation), with a share of them set to zero at random (`zeroed 0.02`), or narrowly trained on the written
questions of `facts` (`tuned 0.0005`: the learning rate; 60 steps of 8). For each: perplexity of general text (this
project's pages) over the undamaged model's, and by group of kinds the pairs that are right, paired by pair.
docs/evaluation.md has the results.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palimpsest.data.collate import Collator, batches
from palimpsest.data.sources import load_examples
from palimpsest.evaluation.probe import PairLoss, load_pairs, pair_losses
from palimpsest.intervals import clustered_difference, compare_accuracies
from palimpsest.models.loading import load_text_model
from palimpsest.models.loss import supervised_losses

ROOT = Path(__file__).parent.parent
PAGES = ("docs/concepts.md", "docs/importance.md", "README.md")
TOKENS, WINDOW = 2048, 256
HARD = ("far_agreement", "close_facts")
DAMAGES = ("noise 0.05", "noise 0.1", "noise 0.15", "zeroed 0.02", "tuned 0.0002", "tuned 0.0005")
STEPS, BATCH = 60, 8  # of "tuned"


def main() -> None:
    torch.set_num_threads(1)
    model, processor = load_text_model("embedded:smollm2-135m-instruct")
    tokenizer = processor.tokenizer
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokenizer(general_text())["input_ids"][:TOKENS]
    before, loss = pair_losses(model, tokenizer, load_pairs()), general_loss(model, ids)
    for what in sys.argv[1:] or DAMAGES:
        model.load_state_dict(whole)
        kind, size = what.split()
        if kind == "tuned":
            tune(model, processor, float(size))
        else:
            damage(model, kind, float(size))
        print(f"{what}: perplexity of general text × {math.exp(general_loss(model, ids) - loss):.2f}")
        show(before, pair_losses(model, tokenizer, load_pairs()))


def general_text() -> str:
    """Prose of the pages: no tables, code or lists."""
    lines = [line for page in PAGES for line in (ROOT / page).read_text(encoding="utf-8").splitlines()]
    return "\n".join(line for line in lines if not line.startswith(("|", "```", " ")))


def general_loss(model: Any, ids: list[int]) -> float:
    total = tokens = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids), WINDOW):
            window = torch.tensor([ids[start : start + WINDOW]])
            count = window.shape[1] - 1
            total, tokens = total + count * float(model(input_ids=window, labels=window).loss), tokens + count
    return total / tokens


def damage(model: Any, kind: str, size: float) -> None:
    """On every matrix of the layers, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.ndim == 2:
                if kind == "noise":
                    weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * size)
                else:
                    weight.mul_(torch.rand(weight.shape, generator=generator) >= size)


def tune(model: Any, processor: Any, learning_rate: float) -> None:
    """Adam on the answers of `facts`, without its held-out questions."""
    collator, examples = Collator(processor, "text"), load_examples("facts", "train", STEPS * BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for batch in batches(collator, random.Random(0).sample(examples, len(examples)), BATCH, by_length=False):
        losses, _ = supervised_losses(model, batch)
        (losses.sum() / len(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()


def show(before: list[PairLoss], after: list[PairLoss]) -> None:
    kinds = list(dict.fromkeys(loss.kind for loss in before))
    easy = tuple(kind for kind in kinds if kind not in HARD)
    for name, group in {"easy kinds": easy, "hard kinds": HARD, **{kind: (kind,) for kind in kinds}}.items():
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.kind in group]
        right = np.array([[one.correct for one in pair] for pair in pairs], dtype=float).T
        margin = np.array([[one.wrong - one.right for one in pair] for pair in pairs]).T
        found, moved = compare_accuracies(right[0], right[1], 0), clustered_difference(margin[0], margin[1])
        print(
            f"  {name:14}{found.n:5} {right[0].mean():7.1%} → {right[1].mean():6.1%}  "
            f"{100 * found.difference:+5.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]  p {found.p_value:.1g}  "
            f"margin {moved.value:+.2f} [{moved.low:+.2f}, {moved.high:+.2f}]"
        )


if __name__ == "__main__":
    main()
