"""A tuned model to diagnose where there is none yet: a chat model taught to answer in a phrase, by a plain loop.

    python examples/small_pair.py runs/tuned

About two minutes on two cores; 540 MB of disk. The rate is high on purpose: something is to be lost.
"""

from __future__ import annotations

import sys

import torch

from palimpsest import load_language_model
from palimpsest.data.sources import load_examples

BASE = "embedded:smollm2-135m-instruct"


def tune(name: str, out: str, steps: int = 30, learning_rate: float = 5e-4, batch_size: int = 8) -> list[float]:
    """Trains on question and answer alike, saves a folder of transformers', returns the losses."""
    torch.manual_seed(0)
    model, tokenizer = load_language_model(name)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    examples = load_examples("facts", "train", limit=steps * batch_size)
    losses = []
    for step in range(steps):
        chosen = examples[step * batch_size : (step + 1) * batch_size]
        texts = [f"{example.question} {example.answer}{tokenizer.eos_token}" for example in chosen]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return losses


if __name__ == "__main__":
    losses = tune(BASE, sys.argv[1])
    print(f"loss {losses[0]:.2f} in the first step, {losses[-1]:.2f} in the last; saved in {sys.argv[1]}")
