"""Methods of speech tokens and their likes: who is whose, and on which side a difference stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palimpsest.comparison.speech_inputs import likes, speech_input_records
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
    }  # fmt: skip
    options: dict[str, Any] = {"drifted": [], "scored": [], "reduction": "signed_sum", "seed": 0}
    (found,) = speech_input_records(Path(), methods, qa=qa, comparisons=[row], **options)
    assert (found["measure"], found["of"], found["value_reference"], found["value"]) == ("s2t", "facts", 0.5, 0.2)
    assert (found["difference"], found["ci_low"], found["ci_high"]) == pytest.approx((-0.3, -0.6, -0.1))
    row |= {"method_a": "frames", "method_b": "tokens", "difference": -0.3, "ci_low": -0.6, "ci_high": -0.1}
    assert speech_input_records(Path(), methods, qa=qa, comparisons=[row], **options) == [found]
