"""transformers' Trainer with our batches, loss, parameter groups and evaluation; one per phase of training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from palimpsest.data.collate import to_device
from palimpsest.data.in_loop import encode_batch
from palimpsest.files import UserError
from palimpsest.models.compute import Arithmetic, attention_with_gradients
from palimpsest.models.fused_loss import Kernel, fused_loss, require_same_loss
from palimpsest.models.loss import describe_ids, supervised_losses
from palimpsest.parallel import is_main, whole, world_size
from palimpsest.records import TrainingRecord
from palimpsest.training import distributed
from palimpsest.training.callbacks import EpochReachesBatches, LastStepAndCheckpoints, ReportProgress
from palimpsest.training.held_out import HeldOut, OwnText, measure, measure_drift_estimate, modalities_of
from palimpsest.training.keep import Held, WithText, attach, distilled_loss
from palimpsest.training.phases import Phase
from palimpsest.training.remedies import REPLAYED
from palimpsest.training.resume import last_complete_checkpoint
from palimpsest.training.rules import parameter_groups
from palimpsest.training.settings import Settings

if TYPE_CHECKING:
    from palimpsest.models.speech_lm import SpeechLM

STEP_FIELDS = ("loss", "learning_rate", "grad_norm")
EVAL_FIELDS = ("loss", "perplexity", "n_tokens")
MOST_WORKERS, EXAMPLES_PER_WORKER = 8, 256  # processes that read recordings; a small set is read before they have begun


def run_phase(
    model: SpeechLM,
    phase: Phase,
    settings: Settings,
    folder: Path,
    *,
    name: str,
    kernel: Kernel | None = None,
    held_out: HeldOut | None = None,
    own_text: OwnText | None = None,
    held: Held | None = None,
    sharded: bool = False,
    advance: Callable[[int], None] | None = None,
) -> list[TrainingRecord]:
    """Train `model` in place, from the last complete checkpoint in `folder` if there is one; returns the records.

    `advance` gets the number of the phase's steps that are done, after each. `sharded`: see training/distributed.py.
    """
    if settings.gradient_checkpointing:
        model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if kernel is not None:
        first = to_device(phase.collator(phase.examples[:2]), model.device)
        encoded = encode_batch(first, model.encoder, model.config.speech_length, settings.compute)
        require_same_loss(model, encoded, kernel)
    trained = distributed.twin_of(model) if sharded else model
    trainer = SpeechTrainer(
        trained,
        phase,
        arguments(folder, phase, settings, name, model.device),
        kernel=kernel,
        held_out=held_out or {},
        own_text=own_text,
        held=held,
        max_tokens=settings.max_tokens,
        compute=settings.compute,
        checkpointed=settings.gradient_checkpointing,
        sharded=sharded,
    )
    if advance is not None:
        trainer.add_callback(ReportProgress(advance))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    if sharded:
        distributed.gather(trained, model)
    restore(model, trainer, settings)
    return records(trainer.state.log_history, name, phase)


def arguments(folder: Path, phase: Phase, settings: Settings, name: str, device: torch.device) -> TrainingArguments:
    return one_gpu(
        TrainingArguments(
            output_dir=str(folder),
            use_cpu=device.type == "cpu",  # also where there is a GPU: the study's models.device rules
            run_name=name if phase.name == "method" else f"{name}-{phase.name}",
            max_steps=phase.steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=phase.learning_rate,
            weight_decay=settings.weight_decay,
            lr_scheduler_type="cosine",
            # It begins at rate 0, so the only step of a phase is no warm-up.
            warmup_steps=min(math.ceil(settings.warmup_ratio * phase.steps), phase.steps - 1),
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.compute == "bfloat16",
            torch_compile=settings.compile,
            seed=settings.seed,
            data_seed=settings.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="no" if settings.eval_every is None else "steps",
            eval_steps=settings.eval_every,
            save_strategy="steps" if settings.checkpoint_every < phase.steps else "no",
            save_steps=settings.checkpoint_every,
            save_total_limit=2,  # the one before stays until the new one is marked complete
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            report_to=list(settings.report_to),
            # The adaptor, where a batch has no speech; looking for it costs time.
            ddp_find_unused_parameters=phase.collator.modality == "text" or bool(phase.text),
        )
    )


def one_gpu(arguments: TrainingArguments) -> TrainingArguments:
    """One process, one GPU: where a single process sees several, the Trainer would wrap the model in nn.DataParallel.

    That scatters batches and gathers the logits of all positions, and its loss is another. torchrun starts a process a
    GPU instead.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def n_workers(phase: Phase, device: torch.device) -> int:
    """Processes that make the log-mel features of the next batches while a GPU is at this one.

    None for cached frames, which are only copied, and none on a CPU, where they would take the model's own cores. What
    a worker makes depends on its batch alone, so their number changes nothing.
    """
    if not phase.collator.in_loop or device.type == "cpu":
        return 0
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(MOST_WORKERS, cores - 1, len(phase.examples) // EXAMPLES_PER_WORKER))


class SpeechTrainer(Trainer):  # type: ignore[misc]
    """Overrides: the batches, the loss, the optimizer's parameter groups, the evaluation; gradients must be finite.

    With the model in parts (`sharded`), also what is written into a checkpoint and read from it.
    """

    control: TrainerControl

    def __init__(
        self,
        model: SpeechLM,
        phase: Phase,
        args: TrainingArguments,
        *,
        kernel: Kernel | None,
        held_out: HeldOut,
        max_tokens: int | None,
        own_text: OwnText | None = None,
        held: Held | None = None,
        compute: Arithmetic = "float32",
        checkpointed: bool = False,
        sharded: bool = False,
    ) -> None:
        self.sharded, self.compute, self.checkpointed = sharded, compute, checkpointed
        self.phase, self.kernel, self.held_out, self.max_tokens = phase, kernel, held_out, max_tokens
        self.own_text, self.held = own_text, held
        self.step_ids: list[str] = []  # of the examples since the last optimizer step
        self.text_share = 0.0  # of replayed text among the supervised tokens of the step
        self.text_loss = torch.zeros((), device=args.device)  # its part of the step's loss on this rank
        super().__init__(
            model=model,
            args=args,
            train_dataset=phase.rows,
            eval_dataset=[] if args.eval_strategy != "no" else None,  # asked for; what is measured is `held_out`
            data_collator=WithText(phase.collate, held.text) if held and held.reads_text else phase.collate,
            callbacks=[LastStepAndCheckpoints(), EpochReachesBatches(phase.batches.set_epoch)],
        )
        self.remove_callback(PrinterCallback)
        # Makes Trainer count the supervised tokens of all accumulated batches: `num_items_in_batch` below.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        workers = n_workers(self.phase, self.args.device)
        if world_size() > 1:  # not prepared by accelerate, which would divide the batches once more
            return distributed.share_loader(
                self.phase.rows, self.phase.batches, self.data_collator, self.args.dataloader_pin_memory, workers
            )
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=self.phase.batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # its own, so that dropout alone draws from the global one
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except UserError as error:  # a worker process puts its whole traceback in front of the sentence
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
        n_tokens = distributed.tokens_of_step(batches, device)
        if self.phase.text:
            of_text = distributed.tokens_of_step([batch for batch in batches if REPLAYED in batch], device)
            self.text_share = float(of_text) / float(n_tokens)
            self.text_loss.zero_()
        return batches, n_tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self.step_ids += inputs.get("ids", [])
        inputs = encode_batch(inputs, self.model.encoder, self.model.config.speech_length, self.compute)
        if self.kernel is None:
            with nullcontext() if self.checkpointed else attention_with_gradients(self.args.device):
                if self.held is not None and self.held.distill is not None:
                    total, n_tokens = distilled_loss(self.held, self.model, model, inputs, self.compute)
                else:
                    losses, _ = supervised_losses(model, inputs)
                    total, n_tokens = losses.sum(), len(losses)
        else:
            with self.accelerator.autocast():
                total, n_tokens = fused_loss(model, inputs, self.kernel)
        if not bool(torch.isfinite(total)):
            raise self._not_finite("loss", float(total.detach()), inputs)
        loss = distributed.loss_of_rank(total, n_tokens if num_items_in_batch is None else num_items_in_batch, inputs)
        if REPLAYED in inputs:
            self.text_loss += loss.detach()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.phase.text:
            logs["replayed"] = self.text_share
            if self.text_share:
                logs["loss_replayed"] = float(distributed.mean_over_ranks(self.text_loss)) / self.text_share
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        norm: torch.Tensor = whole(super()._clip_grad_norm(model))
        if not math.isfinite(float(norm)):
            raise self._not_finite("gradient norm", float(norm), {"ids": self.step_ids})
        self.step_ids = []
        return norm

    def _not_finite(self, what: str, value: float, inputs: Mapping[str, Any]) -> UserError:
        where = f"step {self.state.global_step + 1}{describe_ids(inputs)}"
        return UserError(
            f"The training {what} is {value} at {where}; "
            "lower the learning rate or look at these examples. Nothing was saved as if it were good."
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer | None:
        if self.optimizer is None:
            if self.sharded:  # only now, when the weights of a checkpoint have been read
                distributed.shard(self.model, bf16=self.args.bf16, whole_encoder=self.phase.collator.in_loop)
                self.model._is_accelerate_prepared = True  # nothing more to wrap it with
            if not self.phase.keeps_frozen:
                self.model.requires_grad_(True)  # a phase's rules decide alone: the one before may have frozen more
            groups = parameter_groups(self.model, self.phase.rules, self.args.learning_rate, self.args.weight_decay)
            self.optimizer: torch.optim.Optimizer | None = torch.optim.AdamW(groups, fused=True)
            if self.held is not None:
                attach(self.held, self.optimizer, self.model)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        distributed.save_weights(self.model, Path(output_dir or self.args.output_dir) / SAFE_WEIGHTS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = distributed.whole_optimizer_state(self.optimizer)
        if is_main():
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
            distributed.load_optimizer_state(self.optimizer, state)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        batch_size = self.args.per_device_train_batch_size
        found = measure(self.model, self.held_out, batch_size, self.max_tokens, self.args.device)
        if self.own_text is not None:
            found |= measure_drift_estimate(self.model, self.own_text, self.args.device)
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


def restore(model: SpeechLM, trainer: SpeechTrainer, settings: Settings) -> None:
    """Take off what training put on: accelerate's autocast around forward, checkpointing, the compiler's switch.

    Without this, a model measured right after training in bf16 and one read back from disk would differ.
    """
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if settings.gradient_checkpointing:
        model.language_model.gradient_checkpointing_disable()
    if settings.compile:
        for variable in [v for v in os.environ if v.startswith("ACCELERATE_DYNAMO_")]:
            del os.environ[variable]


def records(history: Sequence[Mapping[str, Any]], name: str, phase: Phase) -> list[TrainingRecord]:
    """The Trainer's log as records: one per step, one per evaluation and modality, one per estimate of the drift."""
    found: list[Any] = []
    for entry in history:
        common = {"method": name, "phase": phase.name, "step": phase.before + entry["step"], "epoch": entry["epoch"]}
        if "loss" in entry:
            values = {key: entry[key] for key in STEP_FIELDS}
            values |= {key: entry[key] for key in ("replayed", "loss_replayed") if key in entry}
            found.append({**common, "kind": "train"} | values)
        for modality in modalities_of(entry):
            values = {key: entry[f"eval_{modality}_{key}"] for key in EVAL_FIELDS}
            found.append({**common, "kind": "eval", "modality": modality, "learning_rate": None} | values)
        if "drift_loss" in entry:
            loss, of_base = entry["drift_loss"], entry["drift_loss_base"]
            values = {"loss": loss, "loss_base": of_base, "drift": loss - of_base, "n_tokens": entry["drift_tokens"]}
            found.append({**common, "kind": "drift", "learning_rate": None} | values)
    return found
