"""NaN and infinity stop an evaluation: among NaN some logit is the largest too, and gives an answer like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor, nn


class NotFiniteError(UserError):
    """A model gave a number that is none; unlike other errors it is no fault of a single question."""


def not_finite(model: nn.Module, where: str) -> NotFiniteError:
    """The error for a NaN or infinity met at `where`, which names the first tensor of the model that holds one."""
    for kind, tensors in (("weight", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            # Buffers may hold infinities on purpose (masks), never a NaN.
            bad = tensor.isnan() if kind == "buffer" or not tensor.is_floating_point() else ~tensor.isfinite()
            if n := int(bad.sum()):
                return NotFiniteError(
                    f"The {kind} {name} of the model has {n} of {tensor.numel()} values that are NaN or infinite (met "
                    f"at {where}); use another checkpoint: this one is damaged, or its training diverged."
                )
    return NotFiniteError(
        f"The model gives NaN or infinite numbers at {where} though its weights are finite: its precision is too "
        "small or the input is damaged; use bfloat16 or float32, and check that input."
    )


def finite_logits(model: nn.Module, names: Sequence[str]) -> Any:
    """What `generate` takes as `logits_processor` to raise `not_finite` for the first row of the batch without logits.

    names: what an error calls each row. Logits of −infinity exclude a token and are fine, unless all are.
    """
    from transformers import LogitsProcessor, LogitsProcessorList

    class Finite(LogitsProcessor):  # type: ignore[misc]
        def __call__(
            self, input_ids: Int64[Tensor, "batch seq"], scores: Float[Tensor, "batch vocabulary"]
        ) -> Float[Tensor, "batch vocabulary"]:
            # The largest of a row is NaN if any is; it is finite in every other case that is right.
            rows = (~scores.amax(-1).isfinite()).nonzero().flatten().tolist()
            if rows:
                raise not_finite(model, names[rows[0]] if rows[0] < len(names) else "an input")
            return scores

    return LogitsProcessorList([Finite()])
