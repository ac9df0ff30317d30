"""First-order importance of every weight (Eq. 2), streamed: gradients are folded as they appear.

For each batch, one backward of the SUM of its token losses. Whenever autograd has finished the gradient of a
weight, a hook folds it into the accumulators and frees it, so the gradients of all weights are never held at
once. For reductions over sequences, linear layers fold the gradient of each sequence in that same backward
(per_sequence.py). The sums are divided once, at the end, by the number of supervised tokens.

Memory above weights and activations: a float32 accumulator per reduction, and the largest single gradient.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from palimpsest.files import UserError, hash_value
from palimpsest.importance import layouts
from palimpsest.importance.lora import merged_adapters
from palimpsest.importance.per_sequence import SequenceGradients, require_whole
from palimpsest.importance.reduce import Accumulators, Offload, chosen_reductions
from palimpsest.importance.scores import Scores
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.compute import Arithmetic, computing
from palimpsest.models.loss import describe_ids, each_batch, supervised_losses
from palimpsest.models.packing import Losses
from palimpsest.parallel import local, reshard

if TYPE_CHECKING:
    from torch import Tensor, nn

# What the estimation writes into the metadata of its scores.
RECORDED = {
    *("reductions", "normalisation", "n_tokens", "n_sequences", "n_batches", "loss"),
    *("model", "data", "versions", "tied", "without_gradient", "one_by_one", "parameters", "compute", "packed"),
}


def estimate_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    reductions: Iterable[str] = ("signed_sum", "per_batch_abs"),
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    offload: Offload = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    distributed: bool = False,
    compute: Arithmetic = "float32",
) -> Scores:
    """Importance of the weights of `model`, or of the language model in it, on `batches`.

    batches: dictionaries as `supervised_losses` takes them, on the model's device already; read once. Padding may stand
        on either side; the scores are those of the rows padded on the right.
    reductions: names in `reduce.REDUCTIONS`; all of them come from the same pass.
    parameters: what to score; default `scored_parameters(model)`. A parameter that stands there under
        several names is scored once, under the first.
    offload: where the accumulators live: None, on the devices of the weights; "cpu", in host memory; a folder
        (Path), in memory-mapped files there, which vanish with the scores that are not saved.
    metadata: JSON values to keep with the scores, such as the modality.
    progress: called after every batch with (batches done, supervised tokens so far), of this process.
    distributed: the ranks of the initialised process group estimate together, each on its own batches, with
        replicas of the model or with a model sharded by fully_shard; see `importance.layouts`.
    compute: the arithmetic of forward and backward (models.compute); gradients and accumulators of float32 weights are
        float32 either way. What bfloat16 changes is in docs/importance.md.

    The scores are in nats per supervised token (`fisher`: see reduce.py). Reductions over sequences fall back to
    one backward per sequence for parameters that are not used by exactly one linear layer, once; a warning and
    the metadata's "one_by_one" say which and why. Active LoRA adapters count as part of the weights.

    Meanwhile the model is in eval mode; afterwards, also after an error, it is as before: weights to the bit,
    modes, gradient flags, gradients, hooks. Gradient checkpointing, where the model has it switched on, is used
    (non-re-entrant).

    Raises UserError: nothing to score, no batches, one batch in the place of a list, a batch without labels or without
    supervised tokens, a loss or gradient that
    is not finite (naming batch and examples), quantised weights, re-entrant checkpointing.
    """
    reshard(model)
    weights, tied = _once_each(scored_parameters(model) if parameters is None else parameters)
    _require_plain_weights(weights)
    metadata = dict(metadata or {})
    for key in RECORDED & metadata.keys():
        raise UserError(f"The estimation itself records {key!r} in the metadata; use another key.")
    chosen = chosen_reductions(reductions)
    layout = layouts.layout_of(model, weights, chosen, distributed)
    with merged_adapters(model):
        accumulators = Accumulators({name: local(weight) for name, weight in weights.items()}, chosen, offload)
        return _scores(model, batches, weights, tied, accumulators, layout, metadata, progress, compute)


def _scores(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    weights: Mapping[str, nn.Parameter],
    tied: Mapping[str, str],
    accumulators: Accumulators,
    layout: layouts.Layout,
    metadata: Mapping[str, Any],
    progress: Callable[[int, int], None] | None,
    compute: Arithmetic,
) -> Scores:
    """The pass over the data, once everything that can be checked before it has been."""
    device = next(iter(weights.values())).device
    described = layouts.describe_weights(weights, layout)
    sequences = SequenceGradients(model, weights, accumulators, compute) if accumulators.by_sequence else None

    # Gradients of single sequences need rows of their own, and ranks with parts of a model the same forwards.
    alike = sequences is not None or layout == "sharded"
    losses_of = partial(supervised_losses, model) if alike else Losses(model)

    mine: list[layouts.BatchRecord] = []
    installed = sequences.installed() if sequences else nullcontext()
    with evaluating(model, weights), _checkpointing_in_eval_mode(model), _hooks(weights, accumulators.fold), installed:
        for number, batch in enumerate(layouts.in_step(each_batch(batches), layout, device)):
            where = f"batch {number}{describe_ids(batch)}"
            if sequences:
                sequences.expect(batch)
            with computing(compute, device):
                losses, _ = losses_of(batch)
            if not losses.requires_grad:
                raise UserError(f"The loss of {where} depends on no scored parameter; check `parameters`.")
            if sequences:
                sequences.settle(losses)
            torch.autograd.backward(losses.sum() * layouts.loss_factor(layout))

            batch_totals, firings = accumulators.take_batch()
            loss = losses.detach().double().sum().item()
            _require_sound(where, loss, dict(zip(weights, batch_totals.tolist(), strict=True)), firings)
            if sequences:
                sequences.complete(model, batch, firings)
            digest = hashlib.sha256(_batch_bytes(batch)).hexdigest()
            mine.append(
                layouts.BatchRecord(batch_totals, len(losses), len(batch["labels"]), loss, digest, set(firings))
            )
            if progress is not None:
                progress(len(mine), sum(record.n_tokens for record in mine))
    done = layouts.all_batches(mine, layout)
    if not done:
        raise UserError("There are no batches to estimate importance on; check the data and its filters.")
    if layout == "replicas":
        layouts.sum_over_replicas((total for sums in accumulators.sums.values() for total in sums.values()), device)

    one_by_one = sequences.one_by_one if sequences else {}
    _warn_of(one_by_one)

    n_tokens = sum(batch.n_tokens for batch in done)
    with_gradient = set().union(*(batch.with_gradient for batch in done))
    record = {
        "reductions": {key: reduction.formula for key, reduction in accumulators.reductions.items()},
        "normalisation": "gradients of summed token losses, divided once by n_tokens",
        "n_tokens": n_tokens,
        "n_sequences": sum(batch.n_sequences for batch in done),
        "n_batches": len(done),
        "loss": math.fsum(batch.loss for batch in done) / n_tokens,  # nats per supervised token
        "model": hash_value(described),
        "data": hash_value([batch.digest for batch in done]),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "tied": tied,  # name left out → name it was scored under
        "without_gradient": [name for name in weights if name not in with_gradient],  # scored 0
        "compute": compute,
        "packed": isinstance(losses_of, Losses) and losses_of.n_packed > 0,  # rows shared their beginning
        "one_by_one": one_by_one,  # name → why its sequences went through the model one by one
        "parameters": described,
    }
    assert record.keys() == RECORDED
    tensors: dict[str, Mapping[str, Tensor]] = dict(accumulators.finish(n_tokens))
    if layout == "sharded":
        tensors = {key: layouts.GatheredTensors(parts, weights) for key, parts in tensors.items()}
    return Scores(
        {**metadata, **record},
        tensors,
        torch.stack([batch.totals for batch in done]).numpy(),
        np.array([batch.n_tokens for batch in done], dtype=np.int64),
    )


# ------------------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------------------
def _once_each(parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """The parameters, each under its first name only, and {other name: first name}."""
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        first.setdefault(id(parameter), name)
    weights = {name: parameters[name] for name in first.values()}
    return weights, {name: first[id(p)] for name, p in parameters.items() if name not in weights}


def _require_plain_weights(weights: Mapping[str, nn.Parameter]) -> None:
    """Scores are of the numbers the model computes with: not of quantised ones."""
    if not weights:
        raise UserError("There is nothing to score, `parameters` is empty; leave it out for the default.")
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise UserError(f"{name} is stored as {weight.dtype}; load the model without quantisation.")


def _require_sound(where: str, loss: float, totals: Mapping[str, float], firings: Counter[str]) -> None:
    if not math.isfinite(loss):
        raise UserError(f"The loss of {where} is {loss}; check these examples or load the model in float32.")
    require_whole(firings)
    for name, total in totals.items():
        if not math.isfinite(total):
            raise UserError(
                f"The gradient of {name} is not finite in {where}; check these examples, or load the model in float32."
            )


def _warn_of(one_by_one: Mapping[str, str]) -> None:
    """One line about the slow path, if it was taken."""
    if one_by_one:
        reasons = Counter(one_by_one.values())
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        warnings.warn(
            f"The gradients per sequence of {len(one_by_one)} parameters, {next(iter(one_by_one))} among them, took "
            f"one more backward for every sequence ({why}).",
            stacklevel=4,
        )


def _batch_bytes(batch: Mapping[str, Any]) -> bytes:
    """Ids, tokens and labels of the rows without their padding: what the data hash covers."""
    input_ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch.get("attention_mask")
    seen = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.cpu() != 0
    rows = [[input_ids[i][seen[i]].tolist(), labels[i][seen[i]].tolist()] for i in range(len(labels))]
    return json.dumps([[str(name) for name in batch.get("ids", ())], rows]).encode()


# ------------------------------------------------------------------------------------------------------------
# The model during the estimation
# ------------------------------------------------------------------------------------------------------------
@contextmanager
def evaluating(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode and gradients for `weights` only; afterwards modes, flags and gradients are as before."""
    parameters = list({id(p): p for p in [*model.parameters(), *weights.values()]}.values())
    flags = [(p, p.requires_grad, p.grad) for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    scored = {id(p) for p in weights.values()}
    try:
        model.eval()
        for p in parameters:
            p.grad = None
            p.requires_grad_(id(p) in scored)
        with torch.enable_grad():
            yield
    finally:
        for p, requires_grad, gradient in flags:
            p.requires_grad_(requires_grad)
            p.grad = gradient
        for module, training in modes:
            module.training = training


@contextmanager
def _checkpointing_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """transformers checkpoints in training mode only; here dropout must be off and memory still matters."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    own = [(layer, layer.__dict__.get("forward")) for layer in layers]  # accelerate may have set one
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in own:
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


@contextmanager
def _hooks(weights: Mapping[str, nn.Parameter], fold: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = []
    try:
        for name, weight in weights.items():
            register: Callable[..., Any] = weight.register_post_accumulate_grad_hook
            handles.append(register(partial(fold, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
