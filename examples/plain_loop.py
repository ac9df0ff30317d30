"""A method of a finished study trained again, in a plain PyTorch loop, and compared with the study's own checkpoint.

    python examples/plain_loop.py runs/demo lora

Uses from palimpsest: the models and batches of the run, the learning-rate rules, the loss. The loop is yours to change;
accumulation, token budget, replay and the adaptor's own phase, where a recipe asks for them, are not in it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from transformers import get_cosine_schedule_with_warmup

from palimpsest.data.collate import to_device
from palimpsest.data.in_loop import encode_batch
from palimpsest.models.compute import computing
from palimpsest.models.loss import supervised_losses
from palimpsest.training.batching import epoch_batches
from palimpsest.training.methods import add_lora, merge_lora, rules_for
from palimpsest.training.rules import parameter_groups


def train(model, examples, collator, method, settings, scales=None):
    """Train `model` in place; `scales` (layer → learning-rate scale, Eq. 3) for layer_lr."""
    torch.manual_seed(settings.seed)  # LoRA's first matrices
    if method.kind == "lora":
        add_lora(model, method)
    groups = parameter_groups(model, rules_for(method, scales), method.learning_rate, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    steps_per_epoch = math.ceil(len(examples) / settings.batch_size)
    n_steps = math.ceil(steps_per_epoch * settings.epochs)
    n_warmup = min(math.ceil(settings.warmup_ratio * n_steps), n_steps - 1)  # it begins at rate 0
    schedule = get_cosine_schedule_with_warmup(optimizer, n_warmup, n_steps)

    torch.manual_seed(settings.seed)  # dropout
    model.train()
    for step in range(n_steps):
        epoch, within = divmod(step, steps_per_epoch)
        rows = epoch_batches(len(examples), settings.batch_size, seed=settings.seed, epoch=epoch)[within]
        batch = to_device(collator([examples[i] for i in rows]), model.device)
        # Where the study encodes in its loop; cached frames stay as they are.
        batch = encode_batch(batch, model.encoder, model.config.speech_length, settings.compute)
        with computing(settings.compute, model.device):
            losses, _ = supervised_losses(model, batch)
        (losses.sum() / len(losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    if method.kind == "lora":
        merge_lora(model)
    model.eval()


def main(run: Path, name: str) -> None:
    from palimpsest.config import load_config
    from palimpsest.models.loading import load_speech_lm
    from palimpsest.progress import Reporter
    from palimpsest.study.workspace import Workspace
    from palimpsest.training.methods import layer_scales

    config = load_config(run / "study.yaml")
    study = Workspace(config, run, Reporter(1))
    method = config.methods[name]
    scales = None
    if method.kind == "layer_lr":
        scales = layer_scales(study.scores("base"), method.lambda_, config.importance.reduction)
    model = study.new_speech_lm()
    train(model, study.training_examples(name), study.collator("speech", "train"), method, study.settings, scales)
    stored = load_speech_lm(run / "methods" / name / "checkpoint")[0].state_dict()
    largest = max(float((value - stored[key]).abs().max()) for key, value in model.state_dict().items())
    print(f"{name}: largest difference of a weight from the study's checkpoint: {largest:.3g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
