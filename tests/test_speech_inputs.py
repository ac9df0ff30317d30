"""Methods of speech tokens and their likes: who is whose, on which side a difference stands, and what it is worth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.comparison.speech_inputs import likes, speech_input_records
from palimpsest.evaluation.drift import TextDrift, write_drift
from palimpsest.importance.scores import Scores
from palimpsest.report.table import to_plain
from palimpsest.report.tables import speech_inputs
from palimpsest.rundir import folder_of
from palimpsest.training.methods import Method


def test_a_like_differs_in_what_stands_for_speech_and_its_rate_alone() -> None:
    methods = {
        "rows": Method("adaptor", 1e-3, speech="tokens"),  # of kind adaptor the rate is that of what stands for speech
        "adaptor": Method("adaptor", 1e-4),
        "full": Method("full", 5e-5, adaptor_learning_rate=1e-4),
        "full_tokens": Method("full", 5e-5, adaptor_learning_rate=1e-3, speech="tokens"),
        "full_centroids": Method("full", 5e-5, speech="centroids"),
        "full_250": Method("full", 5e-5, adaptor_learning_rate=1e-3, speech="tokens", k=250),
        "faster": Method("full", 1e-4, speech="tokens"),
        "lora": Method("lora", 5e-4, rank=8),
        "lora_tokens": Method("lora", 5e-4, rank=16, speech="tokens"),
        "as_text": Method("full", 5e-5, modality="text"),
    }
    assert likes(methods) == [
        ("rows", "adaptor"),
        ("full_tokens", "full"),
        ("full_centroids", "full"),
        ("full_250", "full"),
    ]


def test_a_comparison_is_turned_to_tokens_minus_frames() -> None:
    methods = {"tokens": Method("adaptor", speech="tokens"), "frames": Method("adaptor")}
    about = {"task": "facts", "modality": "speech", "metric": "m"}
    qa: Any = [{"method": name, "accuracy": share, **about} for name, share in (("tokens", 0.2), ("frames", 0.5))]
    row: Any = {
        **about, "method_a": "tokens", "method_b": "frames", "n": 10, "only_a": 0, "only_b": 3, "difference": 0.3,
        "ci_low": 0.1, "ci_high": 0.6, "p_value": 0.25, "p_holm": 0.5,
        "family": "speech, against each other", "n_family": 2, "left_out": None,
    }  # fmt: skip
    options: dict[str, Any] = {"drifted": [], "scored": [], "reduction": "signed_sum", "seed": 0}
    (found,) = speech_input_records(Path(), methods, qa=qa, comparisons=[row], **options)
    assert (found["measure"], found["of"], found["value_reference"], found["value"]) == ("s2t", "facts", 0.5, 0.2)
    assert (found["p_value"], found["p_holm"]) == (0.25, 0.5)
    assert (found.get("family"), found.get("n_family")) == ("speech, against each other", 2)
    assert (found["difference"], found["ci_low"], found["ci_high"]) == pytest.approx((-0.3, -0.6, -0.1))
    row |= {"method_a": "frames", "method_b": "tokens", "difference": -0.3, "ci_low": -0.6, "ci_high": -0.1}
    assert speech_input_records(Path(), methods, qa=qa, comparisons=[row], **options) == [found]


def drifted(run: Path, name: str, **kl: list[list[float]]) -> None:
    """kind of text → a list of texts, each the KL of its tokens."""
    texts = [
        TextDrift(f"{kind}-{i}", tuple(values), *[(0.0,) * len(values)] * 5)
        for kind, texts in kl.items()
        for i, values in enumerate(texts)
    ]
    (run / folder_of(name) / "drift").mkdir(parents=True)
    write_drift(run / folder_of(name) / "drift/tokens.jsonl", texts)


def scored(run: Path, name: str, batches: list[list[float]], kept: str) -> None:
    """Two layers of one weight each, and their importance in every batch; the scores of weights of `kept` alone."""
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    parameters = [{"name": it, "shape": [1, 1], "dtype": "float32", "sha256": ""} for it in names]
    tensors = {it: torch.ones(1, 1) for it in names}
    totals = np.array(batches)
    metadata = {"parameters": parameters, "reductions": {kept: ""}}
    scores = Scores(metadata, {kept: tensors}, totals, np.ones(len(batches), dtype=np.int64))
    scores.with_batch_sums().save(run / folder_of(name) / "importance")


def test_drift_and_shift_have_a_p_of_their_pairs_and_are_corrected_for_one_another(tmp_path: Path) -> None:
    methods = {
        "full": Method("full", 5e-5),
        "full_tokens": Method("full", 5e-5, speech="tokens"),
        "full_100": Method("full", 5e-5, speech="tokens", k=100),
    }
    # Texts of other lengths, but a token drifts by a quarter of a nat more in each: so in every resample.
    drifted(tmp_path, "full", plain=[[0.25, 0.5], [0.25], [1.0] * 4], chat=[[0.5], [0.5]])
    drifted(tmp_path, "full_tokens", plain=[[0.5, 0.75], [0.5], [1.25] * 4], chat=[[0.5], [0.5]])
    drifted(tmp_path, "full_100", plain=[[0.25, 0.5], [1.25], [1.0] * 4], chat=[[0.0], [1.0]])
    for name, share in (("base", 1.0), ("full", 1.0), ("full_tokens", 3.0), ("full_100", 1.0)):
        scored(tmp_path, name, [[share, 1.0]] * 10, "signed_sum")
    options: dict[str, Any] = {"qa": [], "comparisons": [], "drifted": methods, "scored": methods, "seed": 0}
    rows = speech_input_records(tmp_path, methods, reduction="signed_sum", **options)
    found = {(row["method"], row["of"]): row for row in rows}
    assert len(found) == len(rows) == 8  # two pairs, two kinds of text and two distances

    surest = 2 * 0.5**3  # no draw of 10,000 beyond 0, but three texts say the same in one of four cases
    plain = found["full_tokens", "plain"]
    assert (plain["value_reference"], plain["value"], plain["n"]) == pytest.approx((5 / 7, 6.75 / 7, 3))
    assert (plain["difference"], plain["ci_low"], plain["ci_high"]) == pytest.approx((0.25, 0.25, 0.25))
    assert plain["p_value"] == pytest.approx(surest)
    assert plain["p_holm"] == pytest.approx(3 * surest)  # of this, full_100's plain and full_100's chat
    assert (plain.get("family"), plain.get("n_family")) == ("drift, speech tokens against frames", 3)
    assert found["full_tokens", "chat"].get("left_out") == "nothing separates them"
    # One text of three drifts more, the other two as much: without it, 8 draws of 27, there is no difference.
    assert found["full_100", "plain"]["p_value"] == pytest.approx(2 * 8 / 27, abs=0.03)
    assert found["full_100", "chat"]["p_value"] == 1.0  # one up, one down

    moved = found["full_tokens", "wasserstein_1"]
    assert (moved["value_reference"], moved["value"], moved["n"]) == (0.0, 0.25, 10)  # (1/2, 1/2) to (3/4, 1/4)
    assert (moved["difference"], moved["ci_low"], moved["ci_high"]) == pytest.approx((0.25, 0.25, 0.25))
    assert moved.get("reduction") == "per_batch_abs"  # its sums are there, and it has an interval
    assert moved["p_holm"] == pytest.approx(2 * 2 * 0.5**10)  # of ten batches; no draw of 2000 is beyond 0
    assert (moved.get("family"), moved.get("n_family")) == ("shift, speech tokens against frames", 2)
    entropy = -(0.625 * math.log2(0.625) + 0.375 * math.log2(0.375))
    divergence = entropy - (1 + (0.75 * math.log2(4 / 3) + 0.25 * 2)) / 2
    assert found["full_tokens", "jensen_shannon"]["value"] == pytest.approx(divergence)
    assert found["full_100", "wasserstein_1"].get("left_out") == "nothing separates them"
    said = to_plain(speech_inputs(rows))
    assert "None" not in said

    for name in ("base", "full", "full_tokens", "full_100"):  # too few batches for an interval: no p, and no family
        scored(tmp_path, name, [[1.0, 1.0]] * 9, "signed_sum")
    few = speech_input_records(tmp_path, methods, reduction="signed_sum", **options)
    assert {row["p_value"] for row in few if row["measure"] == "shift"} == {None}
    assert "None" not in to_plain(speech_inputs(few))
