"""Reductions over sequences against one autograd pass per sequence, and what they must not depend on."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_importance_estimate import Batch, LinearLM, assert_same_scores, make_batches, n_tokens, state_of
from tests.tiny import VOCAB, tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from palimpsest.files import UserError
from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.per_sequence import NOT_BY_ROW, NOT_LINEAR
from palimpsest.importance.reduce import REDUCTIONS, Accumulators
from palimpsest.models.anatomy import named_parameters, scored_parameters
from palimpsest.models.loss import supervised_losses

BY_SEQUENCE = ("per_sequence_abs", "fisher")


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # 0 at first, and then so is its importance
    return model


def rows_of(batches: list[Batch]) -> list[Batch]:
    return [
        {key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(len(batch["ids"]))
    ]


def loop(model: nn.Module, weights: dict[str, nn.Parameter], batches: list[Batch]) -> dict[str, dict[str, Tensor]]:
    """Both reductions, before the division by tokens, by one torch.autograd.grad per sequence, in float64."""
    for weight in weights.values():
        weight.requires_grad_(True)
    sums = {
        key: {name: torch.zeros(w.shape, dtype=torch.float64) for name, w in weights.items()} for key in BY_SEQUENCE
    }
    for row in rows_of(batches):
        gradients = torch.autograd.grad(supervised_losses(model, row)[0].sum(), list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            sums["per_sequence_abs"][name] += (weight.detach().double() * gradient.double()).abs()
            sums["fisher"][name] += gradient.double() ** 2
    return sums


def assert_equals_loop(scores: Any, model: nn.Module, weights: dict[str, nn.Parameter], batches: list[Batch]) -> None:
    for key, tensors in loop(model, weights, batches).items():
        for name, expected in tensors.items():
            expected = expected / n_tokens(batches)
            error = (scores.tensors(key)[name].double() - expected).abs()
            # Relative to the matrix: entries that cancel to almost 0 have no exact digits in float32.
            assert (error <= 1e-5 * expected + 1e-6 * expected.max()).all(), (key, name, error.max(), expected.max())


# ------------------------------------------------------------------------------------------------------------
# Correctness
# ------------------------------------------------------------------------------------------------------------
def test_by_hand() -> None:
    # As in test_importance_estimate: softmax of the columns is (3/4, 1/4) and (1/4, 3/4).
    weight = torch.tensor([[math.log(6), math.log(3)], [math.log(2), math.log(9)]])
    # Sequence 0: token 0 → target 1, then token 1 → target 0: gradient (3/4, −3/4) and (−3/4, 3/4) by columns.
    # Sequence 1: token 0 → target 0: (−1/4, 1/4) in column 0; its last token is padding.
    batch = {
        "input_ids": torch.tensor([[0, 1, 0], [0, 0, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[-100, 1, 0], [-100, 0, -100]]),
    }
    scores = estimate_importance(LinearLM(weight), [batch], list(REDUCTIONS))
    name = "layers.0.up_proj.weight"
    expected = {
        "signed_sum": weight * torch.tensor([1 / 2, 3 / 4]) / 3,
        "per_batch_abs": weight * torch.tensor([1 / 2, 3 / 4]) / 3,
        "per_sequence_abs": weight * torch.tensor([1.0, 3 / 4]) / 3,
        "fisher": torch.tensor([10 / 16, 9 / 16]).expand(2, 2) / 3,
    }
    for reduction, tensor in expected.items():
        torch.testing.assert_close(scores.tensors(reduction)[name], tensor)
    assert scores.metadata["one_by_one"] == {}


@pytest.mark.parametrize(
    "model",
    [
        tiny_llama(tied=True),
        tiny_llama(tied=False, attention_bias=True, mlp_bias=True),
        tiny_gpt2(),
    ],
    ids=["grouped-query", "biases", "Conv1D"],
)
@pytest.mark.parametrize("every_parameter", [False, True])
def test_equals_the_loop_over_sequences(model: nn.Module, every_parameter: bool) -> None:
    batches = make_batches()
    weights = named_parameters(model) if every_parameter else scored_parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if every_parameter else "error")
        scores = estimate_importance(model, batches, list(REDUCTIONS), parameters=weights)
    assert_equals_loop(scores, model, weights, batches)
    # The reductions over batches come from the sums of the sequences: the same as without any sequences.
    plain = estimate_importance(model, batches, parameters=weights)
    for key in plain.reductions:
        for name, tensor in plain.tensors(key).items():
            torch.testing.assert_close(scores.tensors(key)[name], tensor, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scores.batch_totals, plain.batch_totals, rtol=1e-5, atol=0)
    if not every_parameter:
        assert scores.metadata["one_by_one"] == {}


@pytest.mark.parametrize("model", [tiny_llama(attention_bias=True), tiny_gpt2()], ids=["Llama", "GPT-2"])
def test_float64_to_ten_digits(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model.double(), make_batches()
    weights = named_parameters(model)
    sums: dict[str, dict[str, Tensor]] = {}
    finish = Accumulators.finish

    def spy(self: Accumulators, n: int) -> Any:
        sums.update({key: {name: t.clone() for name, t in tensors.items()} for key, tensors in self.sums.items()})
        return finish(self, n)

    monkeypatch.setattr(Accumulators, "finish", spy)
    with pytest.warns(UserWarning, match="for every sequence"):
        scores = estimate_importance(model, batches, BY_SEQUENCE, parameters=weights)
    for key, tensors in loop(model, weights, batches).items():
        for name, expected in tensors.items():
            got = sums[key][name] * (weights[name].detach().abs() if key == "per_sequence_abs" else 1)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
            assert scores.tensors(key)[name].dtype == torch.float32


def test_folding_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tiny_llama(mlp_bias=True), make_batches()
    whole = estimate_importance(model, batches, list(REDUCTIONS))
    monkeypatch.setattr("palimpsest.importance.reduce.PIECE", {"cpu": 100})
    assert_same_scores(estimate_importance(model, batches, list(REDUCTIONS)), whole, rtol=1e-5, atol=1e-8)


def test_bfloat16_weights() -> None:
    model, batches = tiny_llama().bfloat16(), make_batches()
    scores = estimate_importance(model, batches, BY_SEQUENCE)
    for key, tensors in loop(model, scored_parameters(model), batches).items():
        for name, expected in tensors.items():
            tensor = scores.tensors(key)[name]
            assert tensor.dtype == torch.float32
            assert torch.corrcoef(torch.stack([tensor.flatten().double(), expected.flatten()]))[0, 1] > 0.99


# ------------------------------------------------------------------------------------------------------------
# Invariances
# ------------------------------------------------------------------------------------------------------------
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_how_the_sequences_are_batched_does_not_matter(sizes: list[int]) -> None:
    model, (batch,) = tiny_llama(), make_batches(1, rows=12)
    edges = [0, *(e for e in torch.tensor(sizes).cumsum(0).tolist() if e < 12), 12]
    parts = [{key: value[a:b] for key, value in batch.items()} for a, b in itertools.pairwise(edges)]
    together = estimate_importance(model, [batch], BY_SEQUENCE)
    assert_same_scores(estimate_importance(model, parts, BY_SEQUENCE), together, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("left", [False, True])
def test_padding_never_counts(left: bool) -> None:
    model, batches = tiny_llama(), make_batches()
    pad = (6, 0) if left else (0, 6)
    wide = [
        {
            "input_ids": nn.functional.pad(batch["input_ids"], pad, value=9),
            "attention_mask": nn.functional.pad(batch["attention_mask"], pad),
            "labels": nn.functional.pad(batch["labels"], pad, value=-100),
            "ids": batch["ids"],
        }
        for batch in batches
    ]
    narrow = estimate_importance(model, batches, BY_SEQUENCE)
    assert_same_scores(estimate_importance(model, wide, BY_SEQUENCE), narrow, rtol=1e-3, atol=1e-7)


def test_a_sequence_given_twice_counts_twice() -> None:
    model, (batch,) = tiny_llama().double(), make_batches(1)  # float64 for the reason of test_padding_never_counts
    first = {key: value[:1] for key, value in batch.items()}
    twice = {key: value * 2 if key == "ids" else value.repeat(2, 1) for key, value in first.items()}
    once = estimate_importance(model, [first], BY_SEQUENCE)
    assert_same_scores(estimate_importance(model, [twice], BY_SEQUENCE), once, rtol=1e-6, atol=1e-9)  # per token
    assert once.metadata["n_tokens"] * 2 == n_tokens([twice])


def test_gradient_checkpointing_counts_nothing_twice() -> None:
    model, batches = tiny_llama(), make_batches(2)
    plain = estimate_importance(model, batches, list(REDUCTIONS))
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, _: calls.append(1))
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same_scores(estimate_importance(model, batches, list(REDUCTIONS)), plain, rtol=1e-3, atol=1e-7)
    assert len(calls) == 4  # two batches, forward and recomputation: nothing went one by one


def test_one_forward_per_batch_and_no_gradient_of_a_whole_batch() -> None:
    model, batches = tiny_llama(), make_batches()
    forwards: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    whole: list[bool] = []
    for weight in scored_parameters(model).values():
        weight.register_post_accumulate_grad_hook(lambda weight: whole.append(weight.grad is not None))
    estimate_importance(model, batches, BY_SEQUENCE)
    assert len(forwards) == 3
    assert not any(whole)


# ------------------------------------------------------------------------------------------------------------
# What goes one by one
# ------------------------------------------------------------------------------------------------------------
def test_embeddings_norms_and_tied_weights_say_why() -> None:
    model, batches = tiny_llama(tied=True), make_batches()
    weights = named_parameters(model)
    with pytest.warns(UserWarning, match=r"of 6 parameters, .* one more backward for every sequence"):
        scores = estimate_importance(model, batches, BY_SEQUENCE, parameters=weights)
    reasons = scores.metadata["one_by_one"]
    assert reasons.pop("model.embed_tokens.weight") == "used 2 times in one forward"  # as the head too
    assert set(reasons) == {name for name in weights if "norm" in name}
    assert set(reasons.values()) == {NOT_LINEAR}


def test_a_weight_shared_by_two_layers() -> None:
    model, batches = tiny_llama(), make_batches()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    weights = scored_parameters(model)
    with pytest.warns(UserWarning, match="used 2 times"):
        scores = estimate_importance(model, batches, BY_SEQUENCE)
    assert list(scores.metadata["one_by_one"]) == ["model.layers.0.mlp.up_proj.weight"]
    assert_equals_loop(scores, model, weights, batches)


class Odd(LinearLM):
    """The linear layer called twice, or on all tokens in one row, or its weight used outside of it."""

    way = "twice"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        layer: Any = self.layers[0].up_proj
        x = nn.functional.one_hot(input_ids, 2).to(layer.weight.dtype)
        if self.way == "twice":
            return SimpleNamespace(logits=layer(layer(x)))
        if self.way == "flat":
            return SimpleNamespace(logits=layer(x.flatten(0, 1)).unflatten(0, input_ids.shape))
        return SimpleNamespace(logits=layer(x) + nn.functional.linear(x, layer.weight))


@pytest.mark.parametrize(
    ("way", "reason"),
    [("twice", "used 2 times in one forward"), ("flat", NOT_BY_ROW), ("outside", "used 2 times in one forward")],
)
def test_odd_uses_of_a_linear_layer(way: str, reason: str) -> None:
    model = Odd(torch.tensor([[0.3, -0.2], [0.5, 0.7]]))
    model.way = way
    batch = {
        "input_ids": torch.tensor([[0, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0]]),
        "attention_mask": torch.ones(3, 4),
        "labels": torch.tensor([[-100, 1, 0, 1], [-100, -100, -100, 0], [-100, -100, -100, -100]]),
        "ids": ["a", "b", "c"],
    }
    with pytest.warns(UserWarning, match=reason.replace("(", r"\(").replace(")", r"\)")):
        scores = estimate_importance(model, [batch], list(REDUCTIONS))
    assert scores.metadata["one_by_one"] == {"layers.0.up_proj.weight": reason}
    rows = [{**batch, **{k: batch[k][i : i + 1] for k in batch}} for i in (0, 1)]
    one_by_one = estimate_importance(model, rows, BY_SEQUENCE)
    for key in BY_SEQUENCE:
        name = "layers.0.up_proj.weight"
        torch.testing.assert_close(scores.tensors(key)[name], one_by_one.tensors(key)[name])


class TakesMore(Odd):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, clips: Tensor) -> SimpleNamespace:  # type: ignore[override]
        return super().forward(input_ids, attention_mask)


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    row = torch.tensor([[0, 1, 0], [1, 0, 1]])
    batch = {
        "input_ids": row,
        "attention_mask": torch.ones(2, 3),
        "labels": row,
        "clips": torch.ones(3),
        "ids": ["q1", "q2"],
    }
    with pytest.raises(UserError, match=r"'clips' of the batch \(q1, q2\) has 3 rows for 2 sequences"):
        estimate_importance(TakesMore(torch.ones(2, 2)), [batch], BY_SEQUENCE)


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    """As accelerate's hooks give it one: what that forward does must stay part of the model."""
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    plain = layer.forward
    own = layer.forward = lambda input: 2 * plain(input)
    batches = make_batches()
    weights = scored_parameters(model)
    with pytest.warns(UserWarning, match="1 parameters"):
        scores = estimate_importance(model, batches, BY_SEQUENCE)
    assert layer.__dict__["forward"] is own
    assert scores.metadata["one_by_one"] == {"model.layers.0.mlp.up_proj.weight": NOT_LINEAR}
    assert_equals_loop(scores, model, weights, batches)


def test_the_model_comes_back_as_it_was() -> None:
    model = tiny_llama().train()
    before = state_of(model)
    with pytest.warns(UserWarning, match="for every sequence"):
        estimate_importance(model, make_batches(1), BY_SEQUENCE, parameters=named_parameters(model))
    after = state_of(model)
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert after[1:] == before[1:]
    assert not any("forward" in module.__dict__ for module in model.modules())


# ------------------------------------------------------------------------------------------------------------
# Where the accumulators live
# ------------------------------------------------------------------------------------------------------------
def test_offload_changes_nothing_and_leaves_no_file(tmp_path: Path) -> None:
    model, batches = tiny_llama(), make_batches()
    here = estimate_importance(model, batches, list(REDUCTIONS))
    assert_same_scores(estimate_importance(model, batches, list(REDUCTIONS), offload="cpu"), here, rtol=0, atol=0)
    mapped = estimate_importance(model, batches, list(REDUCTIONS), offload=tmp_path / "new")
    assert_same_scores(mapped, here, rtol=0, atol=0)
    assert not list((tmp_path / "new").iterdir())
    mapped.save(tmp_path / "scores")
