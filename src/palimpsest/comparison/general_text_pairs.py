"""Loss on general text of tuned models against their base's: paired by document, corrected over the tuned models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from palimpsest.comparison.families import ALIKE, corrected, of_points
from palimpsest.evaluation.general_text import TextLoss, by_document
from palimpsest.files import UserError
from palimpsest.intervals import loss_difference
from palimpsest.records import GeneralTextComparisonRecord


def general_text_comparisons(
    base: tuple[str, Sequence[TextLoss]],
    tuned: Mapping[str, Sequence[TextLoss]],
    text: str,
    same: Mapping[str, str] | None = None,
    points: Collection[str] = (),
) -> list[GeneralTextComparisonRecord]:
    """A row for each tuned model, all one family of tests. base: its name and losses; text: what the texts are called.

    same: as `corrected` takes it. points: of curves, a family of their own.

    The difference is in nats per byte, a ratio of sums over documents, with the standard error of `loss_difference`;
    per token too where the tokens are the same number in every document.

    Raises UserError for losses of other texts.
    """
    label, first = base
    sums_base, tokens_base, n_bytes = by_document(first)
    rows: list[GeneralTextComparisonRecord] = []
    for name, losses in tuned.items():
        sums, tokens, others = by_document(losses)
        if [(loss.id, loss.n_bytes) for loss in losses] != [(loss.id, loss.n_bytes) for loss in first]:
            raise UserError(f"{name} and {label} were measured on other texts; measure both on the same.")
        effect = loss_difference(sums_base, sums, n_bytes)
        as_many = bool(np.array_equal(tokens_base, tokens))
        per_token = loss_difference(sums_base, sums, tokens) if as_many else None
        rows.append(
            {
                "method": name,
                "base": label,
                "text": text,
                "n": len(n_bytes),
                "per_byte_base": float(sums_base.sum() / n_bytes.sum()),
                "per_byte": float(sums.sum() / others.sum()),
                "difference": effect.value,
                "ci_low": effect.low,
                "ci_high": effect.high,
                "per_token_difference": per_token.value if per_token else None,
                "per_token_ci_low": per_token.low if per_token else None,
                "per_token_ci_high": per_token.high if per_token else None,
                "p_value": effect.p_value,
                "p_holm": effect.p_value,
                "detectable": effect.detectable,
                "verdict": ALIKE,
                "family": of_points(f"general text ({text}), against the base", name in points),
                "n_family": 1,
                "left_out": None,
            }
        )
    return corrected(rows, same, better=-1)
