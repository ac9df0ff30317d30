"""Importance against numbers derived by hand, against a plain autograd loop, and its invariances."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import tiny_llama, tiny_speech_lm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palimpsest.files import UserError
from palimpsest.importance.estimate import estimate_importance
from palimpsest.models.anatomy import find_language_model, scored_parameters
from palimpsest.models.loss import supervised_losses

Batch = dict[str, Any]


def make_batches(n: int = 3, rows: int = 4, length: int = 8) -> list[Batch]:
    """Right-padded rows of different lengths; two tokens of prompt."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(n):
        input_ids = torch.randint(5, 300, (rows, length), generator=generator)
        mask = torch.ones_like(input_ids)
        for i in range(rows):
            mask[i, length - (i + number) % 4 :] = 0
        labels = input_ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        ids = [f"b{number}r{i}" for i in range(rows)]
        batches.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels, "ids": ids})
    return batches


def autograd_products(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """θ · g_b by one torch.autograd.grad per batch, float64: name → (batches, *weight)."""
    weights = scored_parameters(model)
    for weight in weights.values():
        weight.requires_grad_(True)
    products: dict[str, list[Tensor]] = {name: [] for name in weights}
    for batch in batches:
        losses, _ = supervised_losses(model, batch)
        gradients = torch.autograd.grad(losses.sum(), list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            products[name].append(weight.detach().double() * gradient.double())
    return {name: torch.stack(items) for name, items in products.items()}


def n_tokens(batches: list[Batch]) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def assert_same_scores(a: Any, b: Any, **tolerance: float) -> None:
    assert a.reductions == b.reductions
    for reduction in a.reductions:
        for name, tensor in a.tensors(reduction).items():
            torch.testing.assert_close(tensor, b.tensors(reduction)[name], **tolerance)


# ------------------------------------------------------------------------------------------------------------
# Correctness
# ------------------------------------------------------------------------------------------------------------
class LinearLM(nn.Module):
    """logits = column of W that the input token names: a language model one can differentiate by hand."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].up_proj = nn.Linear(2, 2, bias=False)
        self.layers[0].up_proj.weight = nn.Parameter(weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        one_hot = nn.functional.one_hot(input_ids, 2).to(self.layers[0].up_proj.weight.dtype)
        return SimpleNamespace(logits=self.layers[0].up_proj(one_hot))


def test_by_hand() -> None:
    # softmax(column 0) = (3/4, 1/4), softmax(column 1) = (1/4, 3/4); ∂loss/∂column = softmax − one-hot(target).
    weight = torch.tensor([[math.log(6), math.log(3)], [math.log(2), math.log(9)]])
    # Batch 0: token 0 → target 1 gives (3/4, −3/4) in column 0; token 1 → target 0 gives (−3/4, 3/4) in column 1.
    # Batch 1: token 0 → target 0 gives (−1/4, 1/4) in column 0.
    batches = [
        {"input_ids": torch.tensor([[0, 1, 0]]), "labels": torch.tensor([[-100, 1, 0]])},
        {"input_ids": torch.tensor([[0, 0]]), "labels": torch.tensor([[-100, 0]])},
    ]
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    scores = estimate_importance(LinearLM(weight), batches)
    name = "layers.0.up_proj.weight"
    assert scores.names == (name,)
    signed = weight * torch.tensor([[1 / 2, 3 / 4], [1 / 2, 3 / 4]]) / 3  # column 0: 3/4 − 1/4; three tokens
    per_batch = weight * torch.tensor([[1.0, 3 / 4], [1.0, 3 / 4]]) / 3  # column 0: 3/4 + 1/4
    torch.testing.assert_close(scores.tensors("signed_sum")[name], signed)
    torch.testing.assert_close(scores.tensors("per_batch_abs")[name], per_batch)

    column0, column1 = weight.double().sum(dim=0).tolist()
    assert scores.batch_totals.tolist() == [
        [pytest.approx(3 / 4 * (column0 + column1))],
        [pytest.approx(1 / 4 * column0)],
    ]
    assert scores.batch_tokens.tolist() == [2, 1]
    assert scores.metadata["n_tokens"] == 3
    assert scores.metadata["n_sequences"] == 2
    assert scores.metadata["loss"] == pytest.approx((2 * math.log(4) + math.log(4 / 3)) / 3)


@pytest.mark.parametrize("tied", [True, False])
def test_equals_an_autograd_loop(tied: bool) -> None:
    model, batches = tiny_llama(tied=tied), make_batches()
    products = autograd_products(model, batches)
    scores = estimate_importance(model, batches)
    assert scores.names == tuple(products)
    for column, (name, product) in enumerate(products.items()):
        signed = (product.sum(0).abs() / n_tokens(batches)).float()
        per_batch = (product.abs().sum(0) / n_tokens(batches)).float()
        torch.testing.assert_close(scores.tensors("signed_sum")[name], signed, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(scores.tensors("per_batch_abs")[name], per_batch, rtol=1e-5, atol=1e-8)
        expected = product.abs().flatten(1).sum(1)
        torch.testing.assert_close(torch.from_numpy(scores.batch_totals[:, column]), expected, rtol=1e-5, atol=0)


def test_folding_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tiny_llama(), make_batches()
    whole = estimate_importance(model, batches)
    monkeypatch.setattr("palimpsest.importance.reduce.PIECE", {"cpu": 7})
    pieces = estimate_importance(model, batches)
    assert_same_scores(pieces, whole, rtol=0, atol=0)
    assert pieces.batch_totals == pytest.approx(whole.batch_totals, rel=1e-6)


def test_a_tied_parameter_counts_once_with_both_of_its_gradients() -> None:
    model, batches = tiny_llama(tied=True), make_batches(1)
    embedding = model.model.embed_tokens.weight
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": model.lm_head.weight}
    scores = estimate_importance(model, batches, parameters=both)
    assert scores.names == ("model.embed_tokens.weight",)
    assert scores.metadata["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    (gradient,) = torch.autograd.grad(supervised_losses(model, batches[0])[0].sum(), embedding)
    expected = (embedding.detach() * gradient).abs() / n_tokens(batches)
    torch.testing.assert_close(scores.tensors("signed_sum")["model.embed_tokens.weight"], expected)


def test_layers_that_share_a_weight_count_once() -> None:
    model, batches = tiny_llama(), make_batches(2)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    products = autograd_products(model, batches)
    scores = estimate_importance(model, batches)
    assert "model.layers.1.mlp.up_proj.weight" not in scores.names
    name = "model.layers.0.mlp.up_proj.weight"
    expected = (products[name].abs().sum(0) / n_tokens(batches)).float()
    torch.testing.assert_close(scores.tensors("per_batch_abs")[name], expected, rtol=1e-5, atol=1e-8)


def test_the_language_model_inside_a_speech_lm() -> None:
    model, processor = tiny_speech_lm()
    prompt = processor.speech_prompt(3)
    row = torch.tensor([[*prompt, 20, 21]])
    batch = {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "labels": torch.tensor([[-100] * len(prompt) + [20, 21]]),
        "encoder_frames": torch.randn(1, 17, 16, generator=torch.Generator().manual_seed(0)),
        "frame_counts": torch.tensor([17]),
    }
    scores = estimate_importance(model, [batch], ["signed_sum"], metadata={"modality": "speech"})
    assert scores.names == tuple(scored_parameters(find_language_model(model)))
    assert scores.metadata["modality"] == "speech"
    for name, product in autograd_products(model, [batch]).items():
        expected = (product[0].abs() / 2).float()
        torch.testing.assert_close(scores.tensors("signed_sum")[name], expected, rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------
# Invariances
# ------------------------------------------------------------------------------------------------------------
def test_padding_never_counts() -> None:
    # In float64: products of other shapes add up in another order, and where the batches' parts cancel (0.0054, −0.0038
    # and −0.0017 to 0.00004) the rounding of float32 is, on some processors, more than a difference one would miss.
    model, batches = tiny_llama().double(), make_batches()
    wider = [
        {
            "input_ids": nn.functional.pad(batch["input_ids"], (0, 6), value=9),
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 6)),
            "labels": nn.functional.pad(batch["labels"], (0, 6), value=-100),
            "ids": batch["ids"],
        }
        for batch in batches
    ]
    narrow, wide = estimate_importance(model, batches), estimate_importance(model, wider)
    assert_same_scores(wide, narrow, rtol=1e-6, atol=1e-9)
    assert wide.metadata["n_tokens"] == narrow.metadata["n_tokens"]
    assert wide.metadata["data"] == narrow.metadata["data"]


def test_the_order_of_batches_does_not_matter() -> None:
    model, batches = tiny_llama(), make_batches()
    forward, backward = estimate_importance(model, batches), estimate_importance(model, batches[::-1])
    assert_same_scores(backward, forward, rtol=1e-4, atol=1e-8)
    assert forward.metadata["data"] != backward.metadata["data"]  # the batch totals are in the batches' order


def test_signed_sum_does_not_depend_on_how_the_data_are_batched() -> None:
    model, batches = tiny_llama(), make_batches()
    rows = [
        {key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(len(batch["ids"]))
    ]
    together, apart = estimate_importance(model, batches), estimate_importance(model, rows)
    for name, tensor in together.tensors("signed_sum").items():
        torch.testing.assert_close(apart.tensors("signed_sum")[name], tensor, rtol=1e-4, atol=1e-8)
        assert (apart.tensors("per_batch_abs")[name] >= together.tensors("per_batch_abs")[name] - 1e-7).all()


def test_dropout_is_off() -> None:
    batches = make_batches(1)
    training = tiny_llama(attention_dropout=0.5).train()
    assert_same_scores(estimate_importance(training, batches), estimate_importance(tiny_llama(), batches))


def test_bfloat16_weights() -> None:
    batches = make_batches()
    model = tiny_llama().bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scores = estimate_importance(model, batches)
    precise = estimate_importance(model.float(), batches)
    for name in scores.names:
        tensor, exact = scores.tensors("per_batch_abs")[name], precise.tensors("per_batch_abs")[name]
        assert tensor.dtype == torch.float32
        assert torch.corrcoef(torch.stack([tensor.flatten(), exact.flatten()]))[0, 1] > 0.99
    assert all(torch.equal(p.bfloat16(), before[name]) for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------
def test_no_two_gradients_are_held_at_once() -> None:
    model = tiny_llama()
    held: list[int] = []

    def count(_: Tensor) -> None:
        held.append(sum(p.grad is not None for p in model.parameters()))

    for weight in scored_parameters(model).values():
        weight.register_post_accumulate_grad_hook(count)  # called before the estimation's own hook
    estimate_importance(model, make_batches(1))
    assert len(held) == 14
    assert set(held) == {1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_layers_and_changes_nothing(reentrant: bool) -> None:
    model, batches = tiny_llama(), make_batches(2)
    plain = estimate_importance(model, batches)
    calls: list[bool] = []
    # Before the forward: recomputation stops as soon as it has what the backward needs.
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, _: calls.append(module.training))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_scores(estimate_importance(model, batches), plain, rtol=0, atol=0)
    assert calls == [False] * 4  # forward and recomputation, twice, in eval mode
    assert "forward" not in model.model.layers[0].__dict__


class SharedTwice(LinearLM):
    """The same weight in two checkpointed segments."""

    reentrant = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = nn.functional.one_hot(input_ids, 2).float().requires_grad_(True)
        for _ in range(2):
            hidden = checkpoint(self.layers[0].up_proj, hidden, use_reentrant=self.reentrant)
        return SimpleNamespace(logits=hidden)


def test_a_gradient_that_comes_in_parts_is_refused() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 1, 0]]),
        "attention_mask": torch.ones(1, 3),
        "labels": torch.tensor([[-100, 1, 0]]),
    }
    model = SharedTwice(torch.tensor([[0.3, -0.2], [0.5, 0.7]]))
    with pytest.raises(UserError, match=r"came in 2 parts.*use_reentrant=False"):
        estimate_importance(model, [batch])
    model.reentrant = False
    estimate_importance(model, [batch])


# ------------------------------------------------------------------------------------------------------------
# The model afterwards, and bad input
# ------------------------------------------------------------------------------------------------------------
def state_of(model: nn.Module) -> Any:
    return (
        {name: p.detach().clone() for name, p in model.named_parameters()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: p.grad for name, p in model.named_parameters()},
        {name: dict(p._post_accumulate_grad_hooks or {}) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails: bool) -> None:
    model = tiny_llama().train()
    model.model.layers[0].mlp.eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    model.model.layers[1].mlp.up_proj.weight.grad = torch.ones_like(model.model.layers[1].mlp.up_proj.weight)
    before = state_of(model)

    def data() -> Iterator[Batch]:
        yield make_batches()[0]
        if fails:
            raise RuntimeError("the disk is gone")

    if fails:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            estimate_importance(model, data())
    else:
        estimate_importance(model, data())
    weights, *rest = state_of(model)
    assert all(torch.equal(weights[name], value) for name, value in before[0].items())
    assert rest[1].keys() == before[2].keys()
    assert all(rest[1][name] is gradient for name, gradient in before[2].items())
    assert (rest[0], rest[2], rest[3]) == (before[1], before[3], before[4])


def test_a_loss_that_is_not_finite_names_batch_and_examples() -> None:
    model, batches = tiny_llama(tied=False), make_batches()
    batches[1]["input_ids"][0, 0] = 4  # nowhere else
    with torch.no_grad():
        model.model.embed_tokens.weight[4] = math.nan
    with pytest.raises(UserError, match=r"The loss of batch 1 \(b1r0, .* is nan"):
        estimate_importance(model, batches)


class RootOfZero(LinearLM):
    """Finite loss, gradient not finite."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(
            logits=super().forward(input_ids, attention_mask).logits + (0 * self.layers[0].up_proj.weight.sum()).sqrt()
        )


def test_a_gradient_that_is_not_finite_names_batch_and_parameter() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 1]]),
        "attention_mask": torch.ones(1, 2),
        "labels": torch.tensor([[-100, 1]]),
        "ids": ["q7"],
    }
    with pytest.raises(UserError, match=r"gradient of layers.0.up_proj.weight is not finite in batch 0 \(q7\)"):
        estimate_importance(RootOfZero(torch.ones(2, 2)), [batch])


def test_bad_input() -> None:
    model, batches = tiny_llama(), make_batches(1)
    with pytest.raises(UserError, match="no batches"):
        estimate_importance(model, [])
    with pytest.raises(UserError, match="'fischer' is not a reduction"):
        estimate_importance(model, batches, ["fischer"])
    with pytest.raises(UserError, match="nothing to score"):
        estimate_importance(model, batches, parameters={})
    with pytest.raises(UserError, match="itself records 'n_tokens'"):
        estimate_importance(model, batches, metadata={"n_tokens": 3})
    with pytest.raises(UserError, match="depends on no scored parameter"):
        estimate_importance(model, batches, parameters={"layers.0.x.weight": nn.Parameter(torch.ones(2, 2))})
    quantised = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="without quantisation"):
        estimate_importance(model, batches, parameters={"layers.0.x.weight": quantised})


def test_lora_counts_as_part_of_the_weights() -> None:
    from peft import LoraConfig, get_peft_model

    batches = make_batches(1)
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    reductions = ["signed_sum", "per_batch_abs", "per_sequence_abs", "fisher"]
    scores = estimate_importance(adapted, batches, reductions)
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters())
    assert_same_scores(scores, estimate_importance(adapted.merge_and_unload(), batches, reductions))


def test_progress_is_told_batches_and_tokens() -> None:
    batches, seen = make_batches(), []
    estimate_importance(tiny_llama(), iter(batches), progress=lambda done, tokens: seen.append((done, tokens)))
    assert [done for done, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == n_tokens(batches)
