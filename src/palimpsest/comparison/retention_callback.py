"""RetentionCallback: probe, drift and layer shift every N steps of a training that is not palimpsest's.

    trainer = Trainer(model, arguments, train_dataset=..., processing_class=tokenizer)
    trainer.add_callback(RetentionCallback(trainer, every=100))

The model that training starts from is the base. What is measured goes through `trainer.log`, so to whatever the Trainer
reports to; `history` has the whole records. No data is needed: drift, and the importance behind the shift, are
measured on text that the base writes before the first step.

What it costs. Memory: a frozen copy of the base, unless the model is peft's, whose adapter is switched off instead, or
`base` is given; for the shift a float32 number per scored weight. Time: `retention_seconds` of every entry.

The training is the same to the bit with and without it: measured is in eval mode, in the weights' own precision, with
no random number of torch's; modes, gradient flags and gradients are put back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from palimpsest.analysis.analyse import model_layers
from palimpsest.analysis.layers import ModelLayers
from palimpsest.analysis.shift import shift_records
from palimpsest.evaluation.drift import ALL, BasePasses, batch_of, measure_drift, summarise_drift, token_classes
from palimpsest.evaluation.drift_settings import Sampling
from palimpsest.evaluation.own_text import OwnText, sample_own_text
from palimpsest.evaluation.probe import probe
from palimpsest.files import UserError
from palimpsest.importance.estimate import estimate_importance
from palimpsest.records import BASE, DriftRecord, ProbeRecord, ShiftRecord

REDUCTION = "per_batch_abs"  # of the importance that the shift is of; adds up over batches, so it has an interval
LOGGED_SHIFTS = ("jensen_shannon", "centre_shift")


@dataclass(frozen=True)
class Retention:
    """What was measured after a step; 0 is before the first."""

    step: int
    probe: list[ProbeRecord] = field(default_factory=list)
    drift: list[DriftRecord] = field(default_factory=list)
    shift: list[ShiftRecord] = field(default_factory=list)
    seconds: float = 0.0

    def logged(self) -> dict[str, float]:
        """The few numbers that a curve is drawn of."""
        found: dict[str, float] = {}
        for pairs in self.probe:
            if pairs["kind"] == ALL:
                found |= {"retention_probe_accuracy": pairs["accuracy"], "retention_probe_margin": pairs["margin"]}
        for tokens in self.drift:
            if tokens["tokens"] == ALL:
                found[f"retention_kl_{tokens['text']}"] = tokens["kl"]
                found[f"retention_agreement_{tokens['text']}"] = tokens["agreement"]
        found |= {f"retention_{it['measure']}": it["value"] for it in self.shift if it["measure"] in LOGGED_SHIFTS}
        return {**found, "retention_seconds": self.seconds}


class RetentionCallback(TrainerCallback):  # type: ignore[misc]
    """Measures before the first step, every `every` steps and after the last.

    Args:
        trainer: whose `log` is called; its processing_class is the tokenizer unless one is given.
        sampling: of the base's own text. batch_size: of everything that is measured.
        probe, drift, shift: what is measured.
        base: what the model is compared with, on the same device, in eval mode; None: the model as training starts.
        batches: with labels, that importance is estimated on; None: the base's own text.
        seed: of the text and of the intervals.

    Raises UserError when training begins with several processes, which it cannot measure in, or is continued from a
    checkpoint without `base`.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        every: int = 100,
        sampling: Sampling | None = None,
        probe: bool = True,
        drift: bool = True,
        shift: bool = True,
        base: Any = None,
        tokenizer: Any = None,
        batches: Sequence[Mapping[str, Any]] | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        if every < 1 or batch_size < 1:
            raise UserError("RetentionCallback needs every and batch_size of 1 or more.")
        self.trainer, self.every, self.sampling = trainer, every, sampling or Sampling(16, 64)
        self.measured = {"probe": probe, "drift": drift, "shift": shift}
        self.base, self.batches, self.batch_size, self.seed = base, batches, batch_size, seed
        self.tokenizer = tokenizer if tokenizer is not None else getattr(trainer, "processing_class", None)
        self.history: list[Retention] = []
        self._texts: list[OwnText] = []
        self._passes = BasePasses()
        self._reference: ModelLayers | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.world_size > 1:
            raise UserError(
                f"RetentionCallback measures in one process and this training has {args.world_size}; leave it out, and "
                "give the checkpoints to `palimpsest drift` instead."
            )
        if self.tokenizer is None:
            raise UserError("RetentionCallback needs the model's tokenizer; give tokenizer=, or the Trainer's own.")
        is_peft = hasattr(model, "disable_adapter")
        if self.base is None and state.global_step > 0 and not is_peft:
            raise UserError(
                f"The training continues at step {state.global_step}, so its model is not the base any more; give "
                "base= to RetentionCallback."
            )
        with _as_it_is(model):
            self._prepare(model, is_peft)
        self._measure(model, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._measure(model, state, control)

    def _prepare(self, model: Any, is_peft: bool) -> None:
        """The base, its text and its importance, once."""
        given = self.base is not None
        without_adapter = nullcontext() if given or not is_peft else model.disable_adapter()
        needed = self.measured["drift"] or (self.measured["shift"] and self.batches is None)
        with without_adapter:
            origin = self.base if given else model
            if needed and not self._texts:
                self._texts = sample_own_text(origin, self.tokenizer, self.sampling, seed=self.seed)
            if self.measured["shift"] and self._reference is None:
                self._reference = self._layers(BASE, origin)
        if self.measured["drift"] and not given:
            self.base = _WithoutAdapter(model) if is_peft else deepcopy(model).requires_grad_(False).eval()

    def _measure(self, model: Any, state: Any, control: Any) -> None:
        started = time.perf_counter()
        with _as_it_is(model):
            found = Retention(
                state.global_step,
                probe(model, self.tokenizer, batch_size=4 * self.batch_size) if self.measured["probe"] else [],
                self._drift(model) if self.measured["drift"] else [],
                self._shift(model) if self.measured["shift"] else [],
                time.perf_counter() - started,
            )
        self.history.append(found)
        due = control.should_log  # of the Trainer's own loss; logging in between would take it for done
        self.trainer.log(found.logged())
        control.should_log = due

    def _drift(self, model: Any) -> list[DriftRecord]:
        drifts = measure_drift(self.base, model, self._texts, batch_size=self.batch_size, passes=self._passes)
        classes = [token_classes(self.tokenizer, text) for text in self._texts]
        return summarise_drift(drifts, self._texts, classes, model="model", base=BASE, seed=self.seed)

    def _shift(self, model: Any) -> list[ShiftRecord]:
        assert self._reference is not None
        options: dict[str, Any] = {"modality": "text", "reduction": REDUCTION, "seed": self.seed}
        return shift_records(self._reference, self._layers("model", model), **options)

    def _layers(self, name: str, model: Any) -> ModelLayers:
        size, device = self.batch_size, next(model.parameters()).device
        starts = range(0, len(self._texts), size)
        batches = self.batches or [batch_of(self._texts[start : start + size], device) for start in starts]
        with torch.enable_grad():
            scores = estimate_importance(model, batches, (REDUCTION,)).keeping(())  # sums, off the model's device
        return model_layers(name, scores, REDUCTION)


class _WithoutAdapter(nn.Module):
    """peft's model with its adapter off; the attribute has torch.compile's name, so that `unwrap` looks inside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, **inputs: Any) -> Any:
        with self._orig_mod.disable_adapter():
            return self._orig_mod(**inputs)


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """In eval mode and without the autocast that accelerate puts around `forward`; afterwards as before."""
    training = {module: module.training for module in model.modules()}
    wrapped = model.__dict__.pop("forward", None)
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        if wrapped is not None:
            model.__dict__["forward"] = wrapped
