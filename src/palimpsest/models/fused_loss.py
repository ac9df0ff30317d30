"""The loss without logits: head and cross-entropy in one kernel (Liger), at supervised positions only.

The logits of a large vocabulary are the largest tensor of a training step; a fused kernel computes them in pieces and
keeps only the gradient of the hidden states. The result is the sum that `models.loss.supervised_losses` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from palimpsest.files import UserError
from palimpsest.models.anatomy import unwrap
from palimpsest.models.loss import forward_inputs, right_padded, supervised_losses, supervised_positions

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# (hidden (n, d), head weight (vocabulary, d), targets (n,), head bias or None, soft cap or None) → summed loss, nats
Kernel = Callable[["Tensor", "Tensor", "Tensor", "Tensor | None", "float | None"], "Tensor"]
TOLERANCE = 0.02  # of the fused loss against the plain one, relative: a 16-bit head rounds at 2⁻⁸


def choose_kernel(setting: bool | Literal["auto"], device: str | torch.device) -> Kernel | None:
    """Liger's kernel, or None for the plain loss.

    True: Raises UserError where liger-kernel is not installed or the device is no CUDA device. "auto": None there.
    """
    if setting is False:
        return None
    installed, on_cuda = find_spec("liger_kernel") is not None, torch.device(device).type == "cuda"
    if installed and on_cuda:
        return liger_kernel
    if setting == "auto":
        return None
    missing = "it is not installed" if not installed else f"it runs on CUDA and the device is {device}"
    remedy = "install palimpsest-llm[liger]" if not installed else "train on a GPU"
    raise UserError(f'training.liger is true, but {missing}; {remedy}, or set it to "auto" or false.')


def liger_kernel(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Liger's fused linear cross-entropy, summed, the head's gradient accumulated in float32."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden, weight, targets, bias=bias, reduction="sum", softcap=softcap, accum_dtype=torch.float32
    )
    return loss


def fused_loss(model: nn.Module, batch: Mapping[str, Any], kernel: Kernel) -> tuple[Float[Tensor, ""], int]:
    """Summed cross-entropy, in nats, and the number of supervised tokens of a batch.

    `model` and `batch` as for `supervised_losses`. forward runs as a whole, so that wrappers (autocast, compilation) do
    their work, but with no position left for its head; the hidden states are taken where the decoder gives them.

    Raises UserError for a model whose head is not one linear map of the decoder's output.
    """
    batch = right_padded(batch)
    decoder, head, softcap = _decoder_and_head(model)
    supervised = supervised_positions(batch)
    labels: Tensor = batch["labels"]
    inputs, accepted = forward_inputs(model, batch)
    if "logits_to_keep" not in accepted:
        raise UserError(f"{type(model).__name__} has no logits_to_keep; set training.liger to false for it.")
    inputs["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=labels.device)
    outputs: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        model(**inputs)
    finally:
        hook.remove()
    (hidden,) = outputs  # (batch, seq, d)
    kept = hidden[:, :-1].flatten(0, 1).index_select(0, supervised.flatten().nonzero().squeeze(1))
    targets = labels[:, 1:][supervised]
    return kernel(kept, head.weight, targets, head.bias, softcap), len(targets)


@torch.no_grad()
def require_same_loss(model: nn.Module, batch: Mapping[str, Any], kernel: Kernel) -> None:
    """Raise UserError if the fused loss of a batch is not the plain one: a head this module does not know."""
    training = model.training
    model.eval()
    fused, n_tokens = fused_loss(model, batch, kernel)
    plain = supervised_losses(model, batch)[0].sum()
    model.train(training)
    if abs(float(fused - plain)) > TOLERANCE * abs(float(plain)):
        raise UserError(
            f"The fused loss of the first {n_tokens} tokens is {float(fused):.4g} nats, the plain one "
            f"{float(plain):.4g}; set training.liger to false for this model."
        )


def _decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear, float | None]:
    inner: Any = unwrap(model)  # the head may stand above the language model: take the causal LM, not its decoder
    language_model: Any = unwrap(inner.language_model) if type(inner).__name__ == "SpeechLM" else inner
    decoder, head = language_model.base_model, language_model.get_output_embeddings()
    if decoder is language_model or type(head) is not nn.Linear:
        raise UserError(
            f"The head of {type(language_model).__name__} is not one plain linear layer; set training.liger to false."
        )
    return decoder, head, getattr(language_model.config.get_text_config(), "final_logit_softcapping", None)
