"""What holds a method's weights back while they train: distillation from the base, a pull to it, slowed weights.

All three are about the *base*, so what they need of it is taken from the model before a checkpoint is read into it
(`hold`): after an interruption the model holds trained weights.

**Distillation** (Hinton et al. 2015; Li & Hoiem 2016). Per supervised token labels · CE + weight · T² ·
KL(base ‖ model), both distributions at the temperature T; summed and divided as the cross-entropy is. Where the model
is asked in speech the base reads the same question as text, and the same answer: its tokens stand in other places, in
the same order. The base is the model itself with its adapter off (peft); without inserted layers, whose neighbours it
shares; or a frozen copy of the language model.

**Pull and slowed weights** work in the optimizer's step, on values: a gradient that is zeroed or added to would pass
through AdamW's moments, which move a weight without a gradient too and divide every pull by the gradients' size.

Shapes: token = supervised tokens of a batch, weight = of one parameter, flattened.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from palimpsest.data.collate import to_device
from palimpsest.files import UserError, hash_value
from palimpsest.importance.select import Mask, select
from palimpsest.models.anatomy import find_language_model, named_parameters
from palimpsest.models.compute import Arithmetic, computing
from palimpsest.models.loss import IGNORED, describe_ids, supervised_logits, supervised_losses
from palimpsest.parallel import is_sharded, local, reshard
from palimpsest.training import distributed
from palimpsest.training.remedies import AT_ONCE, REPLAYED, Distill, Pull, Slow

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

    from palimpsest.data.collate import Collator
    from palimpsest.data.examples import Example
    from palimpsest.models.speech_lm import SpeechLM
    from palimpsest.training.methods import Method

M = TypeVar("M", bound=nn.Module)
AS_TEXT = "as_text"  # key of a spoken batch: the same examples with the question as text, a batch of its own


@dataclass(frozen=True)
class Keep:
    """Scores of the base by canonical name of the parameter, float32: what `pull.by` and `slow` ask for."""

    importance: Mapping[str, Tensor] | None = None
    fisher: Mapping[str, Tensor] | None = None

    def described(self) -> dict[str, Any]:
        """As JSON, for an interrupted training to be continued with the same."""
        return {
            kind: hash_value([[name, float(scores[name].double().sum())] for name in scores])[:16]
            for kind, scores in (("importance", self.importance), ("fisher", self.fisher))
            if scores is not None
        }


@dataclass(frozen=True)
class Held:
    """Of one training: the options, and what they need of the base. Made by `hold`.

    teacher: the base, on the model's device (in parts, if the model is); None: the model, its adapter off.
    base: pull: the language model's weights by canonical name.
    mask, slowed: slow: which weights, and the base's values of these (marked,), by canonical name.
    Both are whole, and emptied by `attach`, which keeps what this rank needs.
    """

    distill: Distill | None
    pull: Pull | None
    slow: Slow | None
    scores: Keep
    text: Collator
    teacher: nn.Module | None
    base: dict[str, Tensor]
    mask: Mask | None
    slowed: dict[str, Tensor]
    sharded: bool

    @property
    def reads_text(self) -> bool:
        """Whether spoken batches need their questions as text beside them."""
        return self.distill is not None and self.distill.speech > 0


def hold(
    model: SpeechLM, method: Method, keep: Keep | None, text: Collator, *, compute: Arithmetic, sharded: bool
) -> Held | None:
    """What the method's remedies need of `model`, which is the base still; None without a remedy.

    text: the collator that puts questions as text.

    Raises UserError for scores of another model.
    """
    if method.distill is None and method.pull is None and method.slow is None:
        return None
    scores = keep or Keep()
    language_model: Any = model.language_model
    teacher, mask = None, None
    base: dict[str, Tensor] = {}
    slowed: dict[str, Tensor] = {}
    if method.distill is not None and method.kind not in ("lora", "peft"):
        if sharded:  # copied to host memory: a device that holds the model has no room for another whole one
            teacher = copied(language_model, "cpu").requires_grad_(False).eval()
            distributed.shard(teacher, bf16=compute == "bfloat16", device=model.device.type)
        elif method.kind == "inserted":  # whose frozen weights are the base's
            teacher = distributed.twin_of(language_model).requires_grad_(False).eval()
        else:
            teacher = copy.deepcopy(language_model).requires_grad_(False).eval()
    weights = named_parameters(find_language_model(model))
    if method.slow is not None:
        assert scores.importance is not None
        mask = select(scores.importance, method.slow.top, "top", method.slow.scope)
        mask.check_shapes({name: tuple(weight.shape) for name, weight in weights.items()}, "the language model")
    # In parts a device has no room for a second whole model, so it waits in host memory until it is divided.
    place = "cpu" if sharded else None
    if method.pull is not None:
        base = {name: weight.detach().to(place or weight.device, copy=True) for name, weight in weights.items()}
    if mask is not None:
        marked = {name: weights[name].detach()[mask.tensor(name).to(weights[name].device)] for name in mask.names}
        slowed = {name: values.to(place or values.device) for name, values in marked.items()}
    return Held(method.distill, method.pull, method.slow, scores, text, teacher, base, mask, slowed, sharded)


def copied(model: M, device: str) -> M:
    """A copy of a module on a device, of whose weights none stands a second time on the model's own."""
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().to(device, copy=True)) if isinstance(tensor, nn.Parameter)
        else tensor.to(device, copy=True)
        for tensor in [*model.parameters(), *model.buffers()]
    }  # fmt: skip
    return copy.deepcopy(model, memo)


def require_scores(method: Method, keep: Keep | None) -> None:
    """Raise UserError where a remedy weighs by scores of the base that are not there."""
    kinds: tuple[Literal["importance", "fisher"], ...] = ("importance", "fisher")
    for kind in kinds:
        if method.weighs_by(kind) and getattr(keep, kind, None) is None:
            raise UserError(f"The method needs the {kind} of the base's weights; estimate it and give Keep({kind}=…).")


# ---------------------------------------------------------------------------------------------------------------------
# In the optimizer's step
# ---------------------------------------------------------------------------------------------------------------------
def attach(held: Held, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Have `optimizer` pull and slow the language model's weights of `model` in each of its steps.

    Raises UserError for scores that are not those of this model.
    """
    weights = named_parameters(find_language_model(model))
    # A slowed weight moves less in the whole step, the pull included; so it is looked at before the pull.
    if held.slow is not None and held.mask is not None:
        _attach_slow(held.slow, held.mask, held.slowed, optimizer, weights)
    if held.pull is not None:
        _attach_pull(held.pull, held.scores, held.base, optimizer, weights)
    held.base.clear()
    held.slowed.clear()


def _attach_pull(
    pull: Pull,
    scores: Keep,
    base: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, nn.Parameter],
) -> None:
    """θ ← θ − min(1, rate · strength · c) · (θ − base) before each step, rate being that of the parameter's group."""
    by: Mapping[str, Tensor] = {} if pull.by == "plain" else getattr(scores, pull.by)
    mean = mean_score(by, weights, pull.by) if by else 1.0
    # Embeddings, head and norms have no score. Their c is 1, the mean of those that have: nothing says that they
    # matter less, and a tied embedding left free could undo what the matrices keep.
    pulled = {
        weights[name]: (
            part_of(value, weights[name]),
            part_of(by[name], weights[name]) / mean if name in by else None,
        )
        for name, value in base.items()
        if weights[name].requires_grad
    }

    @torch.no_grad()
    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            rate = float(group["lr"]) * pull.strength
            for parameter in group["params"]:
                if parameter not in pulled:
                    continue
                target, share = pulled[parameter]
                value = local(parameter)
                if share is None:
                    value.lerp_(target, min(1.0, rate))
                else:
                    value.lerp_(target, (share * rate).clamp_(max=1.0).to(value.dtype))

    optimizer.register_step_pre_hook(hook)


def mean_score(scores: Mapping[str, Tensor], weights: Mapping[str, Tensor], kind: str) -> float:
    """The mean over all scored weights, in float64.

    Raises UserError for scores that are not of these weights, or all zero.
    """
    total, n = 0.0, 0
    for name, score in scores.items():
        if name not in weights or tuple(weights[name].shape) != tuple(score.shape):
            raise UserError(
                f"The {kind} has scores of {name} {tuple(score.shape)}, which the language model does not have; "
                "estimate it on the base of this training."
            )
        total, n = total + float(score.double().sum()), n + score.numel()
    if not total > 0:
        raise UserError(
            f"The {kind} of the base is 0 for every weight, so nothing can be pulled by it; use other questions."
        )
    return total / n


def _attach_slow(
    slow: Slow,
    mask: Mask,
    slowed: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, nn.Parameter],
) -> None:
    """The marked weights move `scale` times as far in each step as they would; with 0 they are the base's to the bit.

    Kept are the marked values alone, and where they stand.
    """
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    places: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, positions (marked,), their values (marked,)
    for name in mask.names:
        parameter = weights[name]
        if parameter in trained:
            marked = mask.tensor(name)
            positions = part_of(marked, parameter).flatten().nonzero().squeeze(1)
            values = slowed[name]
            if is_sharded(parameter):
                whole = torch.zeros(marked.shape, dtype=values.dtype)
                whole[marked] = values
                values = part_of(whole, parameter).flatten()[positions]
            places.append((parameter, positions, values))

    @torch.no_grad()
    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, positions, values in places:
            torch.index_select(local(parameter).view(-1), 0, positions, out=values)

    @torch.no_grad()
    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, positions, values in places:
            flat = local(parameter).view(-1)
            if slow.scale:
                moved = torch.lerp(values, flat[positions], slow.scale)
                flat.index_copy_(0, positions, moved)
            else:
                flat.index_copy_(0, positions, values)

    if slow.scale:
        optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def part_of(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor like `parameter`, on its device; of a sharded parameter this rank's part."""
    if not is_sharded(parameter):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    # Every rank has the whole tensor, so nothing is sent.
    return local(
        distribute_tensor(value.to(parameter.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
    ).clone()


# ---------------------------------------------------------------------------------------------------------------------
# Distillation
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WithText:
    """A collator whose spoken batches have the same examples as text beside them, under AS_TEXT; others as they are.

    No inner function: a worker process that is not forked gets it pickled.
    """

    collator: Any
    text: Collator

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(examples)
        if REPLAYED in batch:
            return batch
        as_text = self.text(examples)
        require_same_answers(batch, as_text)
        return {**batch, AS_TEXT: {key: as_text[key] for key in ("input_ids", "attention_mask", "labels")}}


def require_same_answers(batch: Mapping[str, Any], as_text: Mapping[str, Any]) -> None:
    """Raise UserError unless every row has the same supervised tokens in both, in order."""
    for row, (spoken, written) in enumerate(zip(batch["labels"], as_text["labels"], strict=True)):
        if not torch.equal(spoken[spoken != IGNORED], written[written != IGNORED]):
            raise UserError(
                f"The answer of {batch['ids'][row]!r} has other tokens after its question as text than after its "
                "speech, so the base's distributions cannot be laid beside the model's; leave it out of the data, or "
                "train without distill.speech."
            )


def distilled_loss(
    held: Held, inner: SpeechLM, model: nn.Module, batch: Mapping[str, Any], compute: Arithmetic
) -> tuple[Float[Tensor, ""], int]:
    """(loss of a batch, summed over its supervised tokens, in nats; how many these are).

    inner: the SpeechLM that `model` may wrap for several processes, or compiled; the base answers through it.
    """
    distill = held.distill
    assert distill is not None
    asked = batch if REPLAYED in batch else batch.get(AS_TEXT)
    weight = distill.text if REPLAYED in batch else distill.speech
    if asked is None or not weight:
        losses, _ = supervised_losses(model, batch)
        return distill.labels * losses.sum(), len(losses)
    base = base_logits(held.teacher, inner, asked, compute)
    logits, targets, _ = supervised_logits(model, batch)
    if logits.shape != base.shape:
        raise UserError(
            f"The base has {len(base)} distributions of the answers{describe_ids(batch)} and the model {len(logits)}; "
            "its answers must be the same tokens as text and as speech."
        )
    loss = distillation_loss(
        logits, base, targets, labels=distill.labels, weight=weight, temperature=distill.temperature
    )
    return loss, len(targets)


@torch.no_grad()
def base_logits(
    teacher: nn.Module | None, inner: SpeechLM, batch: Mapping[str, Any], compute: Arithmetic
) -> Float[Tensor, "token vocabulary"]:
    """What the base says where `batch`, of text, has labels: a frozen copy, or `inner` with its adapter off."""
    with computing(compute, batch["labels"].device):
        if teacher is not None:
            logits = supervised_logits(teacher, batch)[0]
            reshard(teacher)  # what FSDP gathered; no backward will do it
            return logits
        with adapter_off(inner):
            return supervised_logits(inner, batch)[0]


@contextmanager
def adapter_off(model: SpeechLM) -> Iterator[None]:
    """Within the block the language model is the base under its adapter, in eval mode."""
    language_model: Any = model.language_model
    # peft freezes what it switches off. FSDP reads the flag of a weight when it gathers it, and outside the layers that
    # is not before the next backward; so the flags stay as they are.
    flags = [(parameter, parameter.requires_grad) for parameter in language_model.parameters()]
    training = model.training

    def restore() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    try:
        model.eval()
        with language_model.disable_adapter():
            restore()
            yield
    finally:
        restore()
        model.train(training)


@contextmanager
def base_stays(
    model: SpeechLM, method: Method, text: Collator, examples: Sequence[Example], compute: Arithmetic
) -> Iterator[None]:
    """Around what adds to `model`: raises UserError where it is then another model than the base.

    Of peft's tuners some train biases of the base itself, and some ways to begin take a part out of the base's weights:
    then there is none to distil from. Inserted layers must say what the base says to the bit.

    examples: a few, which `text` puts as text.
    """
    if method.distill is None and method.kind != "inserted":
        yield
        return
    batch = to_device(text(examples), model.device)
    with torch.no_grad(), computing(compute, model.device):
        expected = supervised_logits(model.eval(), batch)[0]
    yield
    language_model: Any = model.language_model
    if method.kind == "inserted":
        with torch.no_grad(), computing(compute, model.device):
            if not torch.equal(supervised_logits(model, batch)[0], expected):
                raise UserError(
                    f"Layers inserted into {type(language_model).__name__} change what it says before they have "
                    "learned anything; use another kind of method with this model."
                )
    if not hasattr(language_model, "peft_config"):
        return
    config = next(iter(language_model.peft_config.values()))
    found = base_logits(None, model, batch, compute)
    if getattr(config, "bias", "none") != "none" or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"The adapter ({config.peft_type.value}) changes weights of the base itself, so the base is not there to "
            "distil from; let it begin from an update of zero, without biases, or remove distill."
        )


def distillation_loss(
    logits: Float[Tensor, "token vocabulary"],
    base: Float[Tensor, "token vocabulary"],
    targets: Int64[Tensor, " token"],
    *,
    labels: float,
    weight: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """Σ over tokens of labels · CE + weight · T² · KL(softmax(base / T) ‖ softmax(logits / T)), nats, float32 or wider.

    Its gradient of the logits is labels · (q − target) + weight · T · (q_T − p_T). It is made along with the loss, some
    tokens at a time, and written over `base`, which is not needed any more: beside the two models' logits no tensor
    over tokens and vocabulary stays.
    """
    apply: Any = _Distillation.apply
    loss: Tensor = apply(logits, base, targets, labels, weight, temperature)
    return loss


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, base: Tensor, targets: Tensor, labels: float, weight: float, temperature: float
    ) -> Tensor:
        precision = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=precision, device=logits.device)
        gradient = base if base.dtype == logits.dtype else torch.empty_like(logits)
        step = max(1, AT_ONCE // logits.shape[1])
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            z = logits[part].to(precision)
            log_p = (base[part].to(precision) / temperature).log_softmax(-1)
            log_q_t = (z / temperature).log_softmax(-1)
            p = log_p.exp()
            total += weight * temperature**2 * (p * (log_p - log_q_t)).sum()
            slope = (log_q_t.exp() - p) * (weight * temperature)
            if labels:
                log_q = log_q_t if temperature == 1 else z.log_softmax(-1)
                at = targets[part, None]
                total -= labels * log_q.gather(1, at).sum()
                slope += labels * log_q.exp()
                slope.scatter_add_(1, at, slope.new_full(at.shape, -labels))
            gradient[part] = slope
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        # In place: a loss is gone back through once.
        return ctx.gradient.mul_(outer[0]), None, None, None, None, None
