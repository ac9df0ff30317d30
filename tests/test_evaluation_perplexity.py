from __future__ import annotations

import math

import pytest
import torch

from palimpsest.evaluation.perplexity import Perplexity, SampleLoss, perplexity
from palimpsest.files import UserError
from tiny import tiny_llama

IGNORED = -100


def make_batches(size: int, n: int = 9) -> list[dict]:
    """`n` right-padded sequences of 4 to 12 tokens, of which the last 1 to 5 are supervised."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for i in range(n):
        ids = torch.randint(3, 300, (4 + i,), generator=generator)
        labels = ids.clone()
        labels[: len(ids) - (1 + i % 5)] = IGNORED
        sequences.append((f"q{i}", ids, labels))
    batches = []
    for start in range(0, n, size):
        names, ids, labels = zip(*sequences[start : start + size], strict=True)
        pad = torch.nn.utils.rnn.pad_sequence
        batches.append(
            {
                "ids": list(names),
                "input_ids": pad(ids, batch_first=True, padding_value=0),
                "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
                "labels": pad(labels, batch_first=True, padding_value=IGNORED),
            }
        )
    return batches


def test_against_the_definition() -> None:
    """Log-probabilities taken from the logits one sequence at a time."""
    model = tiny_llama()
    result = perplexity(model, make_batches(4))
    total, tokens = 0.0, 0
    for batch in make_batches(1):
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0].double().log_softmax(-1)
        loss = [-logits[t - 1, label].item() for t, label in enumerate(batch["labels"][0].tolist()) if label != IGNORED]
        sample = result.samples[batch["ids"][0]]
        assert sample.loss == pytest.approx(sum(loss), rel=1e-5)
        assert sample.n_tokens == len(loss)
        total, tokens = total + sum(loss), tokens + len(loss)
    assert result.n_tokens == tokens == 25  # 1 + 2 + 3 + 4 + 5 + 1 + 2 + 3 + 4
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_independent_of_the_batch_size_and_order() -> None:
    model = tiny_llama()
    reference = perplexity(model, make_batches(1))
    for size in (2, 5, 9):
        result = perplexity(model, make_batches(size))
        assert list(result.samples) == list(reference.samples)
        assert result.perplexity == pytest.approx(reference.perplexity, rel=1e-6)
    backwards = perplexity(model, reversed(make_batches(1)))
    assert backwards.total_loss == reference.total_loss


def test_weighs_tokens_not_samples() -> None:
    result = Perplexity({"short": SampleLoss(4.0, 1), "long": SampleLoss(0.0, 3)})
    assert result.perplexity == pytest.approx(math.e)  # exp(4 / 4); a mean over samples would give exp(2)


def test_the_total_does_not_depend_on_the_order() -> None:
    """A float64 running sum would lose both ones after 1e16."""
    result = Perplexity({"a": SampleLoss(1e16, 1), "b": SampleLoss(1.0, 1), "c": SampleLoss(1.0, 1)})
    assert result.total_loss == 1e16 + 2


def test_a_destroyed_model_has_infinite_perplexity_rather_than_an_error() -> None:
    assert Perplexity({"q": SampleLoss(1e6, 1)}).perplexity == math.inf


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_tensor_or_the_example() -> None:
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.model.norm.weight[5] = float("nan")
    with pytest.raises(UserError, match=r"model\.norm\.weight .* 1 of 32 values .* example 'q0'"):
        perplexity(model, make_batches(4))

    healthy = tiny_llama()

    def overflow(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor([2]), float("inf"))

    healthy.lm_head.register_forward_hook(overflow)
    with pytest.raises(UserError, match="at example 'q2' though its weights are finite"):
        perplexity(healthy, make_batches(3))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    perplexity(model, make_batches(3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_input() -> None:
    model = tiny_llama()
    with pytest.raises(UserError, match="no examples"):
        perplexity(model, [])
    with pytest.raises(UserError, match="'q0' comes twice"):
        perplexity(model, make_batches(3) + make_batches(3))
    without_ids = [{key: value for key, value in batch.items() if key != "ids"} for batch in make_batches(3)]
    with pytest.raises(UserError, match="ids"):
        perplexity(model, without_ids)
    silent = make_batches(3)
    silent[0]["labels"][1] = IGNORED
    with pytest.raises(UserError, match="'q1' has no supervised token"):
        perplexity(model, silent)
    with pytest.raises(UserError, match="training mode"):
        perplexity(tiny_llama().train(), make_batches(3))
