"""Train a SpeechLM with one method: transformers' Trainer, our loss, our parameter groups.

The encoder is frozen and its output cached, so only the adaptor and the language model run. The loss is the summed
cross-entropy of the supervised tokens divided by their number over the whole optimizer step.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from palimpsest.models.loss import describe_ids, supervised_losses
from palimpsest.rundir import TrainingRecord, UserError
from palimpsest.training.methods import Method, add_lora, merge_lora, rules_for
from palimpsest.training.rules import Rule, parameter_groups

if TYPE_CHECKING:
    from palimpsest.data.collate import Collator
    from palimpsest.data.records import Example
    from palimpsest.models.speech_lm import SpeechLM

Progress = Callable[[int, int], None]
COMPLETE = "complete"  # empty file the Trainer's checkpoint gets when all of it is written


@dataclass(frozen=True)
class Settings:
    """Defaults are the paper's (LLaMA-Omni stage 1) where it states them."""

    epochs: float = 3.0
    batch_size: int = 32
    accumulation: int = 1
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpoint_every: int = 500  # optimizer steps
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0


def train(
    model: SpeechLM,
    examples: Sequence[Example],
    collator: Collator,
    method: Method,
    settings: Settings,
    folder: Path,
    *,
    name: str,
    scales: Mapping[int, float] | None = None,
    progress: Progress | None = None,
) -> list[TrainingRecord]:
    """Train `model` in place and return its loss curve; LoRA ends merged, its adapter saved in `folder`/adapter.

    `folder` also holds the Trainer's checkpoints while training runs: called again with the same folder after an
    interruption, training continues from the last one and ends with the same weights.

    Raises UserError when the loss stops being finite, naming the step and the examples.
    """
    if not examples:
        raise UserError("There are no training examples; check the data section of the study.")
    # Everything random from here on (LoRA's initial matrices, dropout, order) comes from the method's own seed.
    torch.manual_seed(settings.seed)
    if method.kind == "lora":
        add_lora(model, method)
    if settings.gradient_checkpointing:
        model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    state = folder / "trainer"
    trainer = _Trainer(
        model=model,
        args=_arguments(state, method, settings, len(examples)),
        train_dataset=list(examples),
        data_collator=collator,
        callbacks=[_MarkComplete(), *([_ProgressCallback(progress)] if progress is not None else [])],
        rules=rules_for(method, scales),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_complete_checkpoint(state))
    if method.kind == "lora":
        model.language_model.save_pretrained(folder / "adapter")
        merge_lora(model)
    model.eval()
    shutil.rmtree(state, ignore_errors=True)
    return [
        {
            "method": name,
            "step": entry["step"],
            "epoch": entry["epoch"],
            "loss": entry["loss"],
            "learning_rate": entry["learning_rate"],
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def n_steps(n_examples: int, settings: Settings) -> int:
    """Optimizer steps of a run; the last, smaller batch of an epoch counts."""
    per_epoch = math.ceil(math.ceil(n_examples / settings.batch_size) / settings.accumulation)
    return max(1, math.ceil(per_epoch * settings.epochs))


def _arguments(folder: Path, method: Method, settings: Settings, n_examples: int) -> TrainingArguments:
    steps = n_steps(n_examples, settings)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=method.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.checkpoint_every < steps else "no",
        save_steps=settings.checkpoint_every,
        save_total_limit=2,  # the one before stays until the new one is marked complete
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
    )


class _Trainer(Trainer):  # type: ignore[misc]
    """Two overrides: the loss, and the optimizer's parameter groups."""

    def __init__(self, *, rules: Sequence[Rule], **kwargs: Any) -> None:
        self.rules = rules
        super().__init__(**kwargs)
        # Makes Trainer count the supervised tokens of all accumulated batches: `num_items_in_batch` below.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        losses, _ = supervised_losses(model, inputs)
        total = losses.sum()
        if not bool(torch.isfinite(total)):
            where = f"step {self.state.global_step + 1}{describe_ids(inputs)}"
            raise UserError(
                f"The training loss is {float(total.detach())} at {where}; "
                "lower the learning rate or look at these examples. Nothing was saved as if it were good."
            )
        return total / (len(losses) if num_items_in_batch is None else num_items_in_batch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer | None:
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.rules, self.args.learning_rate, self.args.weight_decay)
            self.optimizer: torch.optim.Optimizer | None = torch.optim.AdamW(groups, fused=True)
        return self.optimizer


def _last_complete_checkpoint(folder: Path) -> str | None:
    """Removes what a kill left half written; the Trainer would take it for a checkpoint."""
    complete: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).exists():
            complete[int(checkpoint.name.rpartition("-")[2])] = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return str(complete[max(complete)]) if complete else None


class _MarkComplete(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False  # the finished model is written by the caller

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class _ProgressCallback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)
