"""Train a SpeechLM with one method: transformers' Trainer, our loss, our batches, our parameter groups.

The encoder is frozen. Its output is cached, or computed for each batch and never kept; so gradients run through the
adaptor and the language model only. The loss is the summed cross-entropy of the supervised tokens divided by their
number over the whole optimizer step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from palimpsest.data.collate import Collator
from palimpsest.files import UserError
from palimpsest.models.compute import computing
from palimpsest.models.fused_loss import Kernel, choose_kernel
from palimpsest.models.gate import close_gate
from palimpsest.models.loading import require_finite
from palimpsest.parallel import is_main, wait_for_all
from palimpsest.progress import Advance
from palimpsest.records import TrainingRecord
from palimpsest.training import distributed
from palimpsest.training.align import align_phase, align_steps
from palimpsest.training.callbacks import require_loggers
from palimpsest.training.held_out import HeldOut, OwnText, loss_of_batches
from palimpsest.training.keep import Keep, base_stays, hold, require_scores
from palimpsest.training.methods import Method, add_layers, add_lora, merge_lora, require_mergeable
from palimpsest.training.phases import phases_of
from palimpsest.training.replay import TextRow
from palimpsest.training.resume import adaptor_phase, describe_run, keep_logs, require_same_run
from palimpsest.training.settings import AdaptorFirst, Align, Settings, n_steps
from palimpsest.training.trainer import run_phase

if TYPE_CHECKING:
    from palimpsest.data.examples import Example
    from palimpsest.models.speech_lm import SpeechLM

__all__ = ["AdaptorFirst", "Align", "Settings", "n_steps", "require_options", "train"]


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
    held_out: HeldOut | None = None,
    own_text: Sequence[Mapping[str, Any]] = (),
    replay: Sequence[TextRow] = (),
    keep: Keep | None = None,
    sharded: bool = False,
    progress: Advance | None = None,
) -> list[TrainingRecord]:
    """Train `model` in place and return its loss curve; LoRA ends merged, its adapter saved in `folder`/adapter.

    With a gate it ends unmerged, in a model that switches it on where there is speech.

    `held_out` (modality → collator, examples) is measured every `settings.eval_every` steps, and so is the drift
    from the model that training starts from, where there are batches of its `own_text`. `replay`: the rows of text that
    a method with that key trains on between the examples. `keep`: scores of the base that the method's remedies weigh
    by (keep.py). `folder` also holds the Trainer's checkpoints while training runs: called again with the same folder
    after an interruption, training continues from the last one and ends with the same weights.

    In a process group every rank must call, with the same arguments; the batches are those of one process, divided
    among the ranks, and each rank ends with the trained model. `sharded`: weights, gradients and optimizer state in
    parts (FSDP2) instead of replicas. Rank 0 writes.

    Raises UserError before training for bad settings, an example above the token budget, too little text to replay and
    an interrupted training of another recipe; during it when the loss or the gradient stops being finite, naming the
    step and the examples.
    """
    if not examples:
        raise UserError("There are no training examples; check the data section of the study.")
    if settings.eval_every is not None and not (held_out and all(group for _, group in held_out.values())):
        raise UserError("training.eval_every is set, but there are no held-out examples to evaluate on; give some.")
    require_mergeable(method, model)
    kernel = require_options(settings, model.device, sharded=sharded, gated=method.gate != "none")
    require_scores(method, keep)
    if method.distill is not None:
        kernel = None  # it makes no logits, and they are what is compared with the base's
    phases = phases_of(method, settings, examples, collator, scales, replay)
    n_align = align_steps(examples, collator, settings)
    total = n_align + sum(phase.steps for phase in phases)
    state = folder / "trainer"
    described = describe_run(method, settings, scales, examples, collator, replay)
    if keep is not None and (kept := keep.described()):
        described["keep"] = kept
    require_same_run(state, described)

    def advance(before: int) -> Callable[[int], None] | None:
        return None if progress is None else lambda done: progress(before + done, total)

    drifting = None
    if own_text and settings.eval_every is not None:
        with computing(settings.compute, model.device):
            drifting = OwnText(own_text, loss_of_batches(model, own_text, model.device)[0])
    records: list[TrainingRecord] = []
    if n_align:
        align = partial(align_phase, model, examples, collator, settings, advance(0))
        records += adaptor_phase(model, state / "align", align)
    for phase in phases:
        # Everything random from here on (LoRA's initial matrices, dropout) comes from the method's own seed.
        torch.manual_seed(settings.seed)
        run = partial(
            run_phase,
            model,
            phase,
            settings,
            name=name,
            kernel=kernel,
            held_out=held_out,
            own_text=drifting,
            sharded=sharded,
            advance=advance(n_align + phase.before),
        )
        if phase.name == "adaptor":
            records += adaptor_phase(model, state / "adaptor", run)
        else:
            text = Collator(collator.processor, "text")
            held = hold(model, method, keep, text, compute=settings.compute, sharded=sharded)
            with base_stays(model, method, text, examples[:2], settings.compute):
                if method.kind in ("lora", "peft"):
                    add_lora(model, method)
                    model.gated = method.gate == "speech"
                elif method.new_layers is not None:
                    add_layers(model, method.new_layers)
            records += run(state, held=held)
    if method.kind in ("lora", "peft"):
        if is_main():
            model.language_model.save_pretrained(folder / "adapter")
        if model.gated:
            close_gate(model)
        else:
            merge_lora(model)
    model.eval()
    if not sharded:  # the loss of the last step was before its update
        require_finite(model.state_dict().items(), f"{name} after its last training step (lower its learning rate)")
    wait_for_all()  # the Trainer of another process may still list the folder that goes now
    if is_main():
        keep_logs(state, folder / "logs")
        shutil.rmtree(state, ignore_errors=True)
    return records


def require_options(
    settings: Settings, device: str | torch.device, *, sharded: bool = False, gated: bool = False
) -> Kernel | None:
    """The loss kernel of the settings. Raises UserError for a logger or a kernel that is not to be had.

    gated: whether a method has a gate, with which compilation has not been tried.
    """
    if gated and settings.compile:
        raise UserError("training.compile is not supported for a method with gate speech; set it to false.")
    require_loggers(settings.report_to)
    return choose_kernel(distributed.allowed_options(settings).liger if sharded else settings.liger, device)
