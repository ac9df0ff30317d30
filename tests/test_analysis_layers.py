"""Sums of importance per layer and kind, from hand-made scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch

from palimpsest.analysis.layers import ModelLayers, layer_batches, layer_distribution, layer_records
from palimpsest.files import UserError

Q0, DOWN0 = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
Q1, NORM1 = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def scores() -> dict[str, torch.Tensor]:
    return {
        EMBEDDING: torch.full((10, 2), 100.0),
        Q0: torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        DOWN0: torch.tensor([[5.0, 5.0]]),
        Q1: torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        NORM1: torch.tensor([8.0]),
    }


def test_totals_means_and_shares_by_hand() -> None:
    scored = ModelLayers("base", layer_distribution(scores()))
    rows = {(row["layer"], row["kind"]): row for row in layer_records(scored, modality="text", reduction="signed_sum")}
    assert set(rows) == {(0, "all"), (0, "q"), (0, "down"), (1, "all"), (1, "q"), (1, "other")}
    assert rows[0, "all"] == {
        "model": "base",
        "modality": "text",
        "reduction": "signed_sum",
        "layer": 0,
        "kind": "all",
        "total": 20.0,
        "mean": pytest.approx(20 / 6),
        "share": pytest.approx(20 / 30),  # the embedding's 2000 do not count
        "n_parameters": 6,
    }
    assert (rows[1, "q"]["total"], rows[1, "q"]["mean"], rows[1, "q"]["n_parameters"]) == (2.0, 0.5, 4)
    assert sum(rows[layer, "all"]["share"] for layer in (0, 1)) == pytest.approx(1.0)


def test_sums_are_in_float64() -> None:
    """float32 has no number between 1 and 1 + 2^-23."""
    assert layer_distribution({Q0: torch.tensor([[1.0, 2.0**-30]])}).layer_totals[0] == 1 + 2.0**-30


def test_one_tensor_at_a_time() -> None:
    class Counting(Mapping[str, torch.Tensor]):
        loads = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            self.loads += 1
            return scores()[name]

        def __iter__(self) -> Iterator[str]:
            return iter(scores())

        def __len__(self) -> int:
            return len(scores())

    lazy = Counting()
    layer_distribution(lazy)
    assert lazy.loads == 4  # each tensor of the layers once, the embedding never


def test_batches_add_up_to_layers() -> None:
    totals = [[7.0, 1.0, 2.0, 3.0, 4.0], [7.0, 10.0, 20.0, 30.0, 40.0]]
    assert layer_batches(totals, list(scores())).tolist() == [[3.0, 7.0], [30.0, 70.0]]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({Q0: torch.tensor([[-1.0, 2.0]])}, "negative"),
        ({Q0: torch.tensor([[float("nan"), 2.0]])}, "non-finite"),
        ({Q0: torch.zeros(1, 2)}, "zero"),
        ({Q1: torch.ones(1, 2)}, "layers \\[1\\]"),
        ({EMBEDDING: torch.ones(1, 2)}, "layers \\[\\]"),
    ],
)
def test_bad_scores_are_named(bad: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(UserError, match=words):
        layer_distribution(bad)


def test_batch_totals_must_fit_their_names() -> None:
    with pytest.raises(UserError, match="shape"):
        layer_batches(np.ones((3, 2)), [Q0])
