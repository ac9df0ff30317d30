"""In which arithmetic a model computes: a choice, made in one place and recorded with its reason.

In bfloat16 the operands of matrix products are rounded to eight bits (torch's autocast). Weights, gradients, what they
are added up in, optimizer and losses are float32 either way.

>>> choice = choose_compute("auto", "cpu")
>>> with computing(choice.dtype, "cpu"):  # doctest: +SKIP
...     logits = model(**batch).logits
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from typing_extensions import Doc

from palimpsest.files import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

Compute = Literal["auto", "float32", "bfloat16"]  # what can be asked for
Arithmetic = Literal["float32", "bfloat16", "float16"]  # what it can come to; float16: of such weights
WeightDtype = Literal["float32", "bfloat16"]

# Options of the commands that run a model.
ComputeOption = Annotated[
    Compute, Doc("Arithmetic: float32, bfloat16, or auto: bfloat16 where the device multiplies it faster.")
]
DeviceOption = Annotated[str, Doc("auto (CUDA if there is one), cpu, cuda, cuda:1 …")]
DtypeOption = Annotated[
    WeightDtype | None, Doc("Of the weights; default float32, for an audio LLM that of its checkpoint.")
]

# What makes a processor's bfloat16 products faster than its float32 ones, by torch's names for it.
INSTRUCTIONS = {"amx_bf16": "AMX", "amx_tile": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "ARM's bf16"}
DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")  # what a device can be called
AMPERE = 8  # the first major compute capability of CUDA with bfloat16 tensor cores


@dataclass(frozen=True)
class Choice:
    """The arithmetic and why it is this one; as JSON (`asdict`) it stands beside the numbers."""

    dtype: Arithmetic
    reason: str

    def __str__(self) -> str:
        return f"{self.dtype} ({self.reason})"


def choose_compute(
    wanted: Compute, device: str | torch.device, *, weights: str = "float32", exact: bool = False
) -> Choice:
    """The arithmetic on `device` ("cpu", "cuda:1", …), found by asking the device what it is, never by a timing.

    weights: the dtype of the model's weights; weights of 16 bits compute as what they are.
    exact: "auto" is float32, for measurements that rounding changes more than it should (importance, deactivation,
        drift).

    Raises UserError for an unknown arithmetic, and for float32 with weights of 16 bits.
    """
    if wanted not in ("auto", "float32", "bfloat16"):
        raise UserError(f"There is no arithmetic {wanted!r}; choose auto, float32 or bfloat16.")
    if weights in ("bfloat16", "float16"):
        if wanted == "float32":
            raise UserError(
                f"Weights in {weights} cannot compute in float32; load them in float32 (dtype), or leave compute at "
                "auto."
            )
        if wanted == "auto":
            return Choice(cast(Arithmetic, weights), f"the weights are {weights}")
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if exact:
        return Choice("float32", "auto keeps importance, deactivation and drift in float32")
    return fastest(device)


def computing(dtype: Arithmetic, device: str | torch.device) -> AbstractContextManager[Any]:
    """Within the block models on `device` form matrix products in `dtype`; float32 changes nothing.

    Enter it around a forward and leave it before backward: autocast keeps the rounded copies of trainable weights until
    the outermost block ends, and would not see that one was changed.
    """
    if dtype != "bfloat16":
        return nullcontext()
    import torch

    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def attention_with_gradients(device: str | torch.device) -> AbstractContextManager[Any]:
    """Within the block attention on a CPU computes in float32, under autocast too, which is exact and faster.

    torch's attention kernel for CPUs takes four times as long for the gradients of short sequences in bfloat16 (2.13).
    Not for layers that are checkpointed: what is computed again for the gradients would miss the block.
    """
    if str(device).partition(":")[0] != "cpu":
        return nullcontext()
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode

    class Float32(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is not scaled_dot_product_attention or not torch.is_autocast_enabled("cpu"):
                return function(*args, **(kwargs or {}))
            query, key, value, *rest = args
            with torch.autocast("cpu", enabled=False):
                return function(query.float(), key.float(), value.float(), *rest, **(kwargs or {}))

    return Float32()


@contextmanager
def many_forwards(model: nn.Module, dtype: Arithmetic) -> Iterator[None]:
    """`computing` for many forwards of `model` without gradients, such as those of `generate`, to the same numbers.

    In inference mode autocast rounds every weight anew in every forward, which takes as long as a token of an answer.
    Here linear layers and convolutions hold rounded weights meanwhile, and get theirs back after, also after an error.
    Of a speech LLM it is the language model that runs often; only its weights are held.
    """
    if dtype != "bfloat16":
        yield
        return
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    often: nn.Module = getattr(model, "language_model", model)
    own: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in often.modules():
            if type(module) in (nn.Linear, nn.Conv1d, Conv1D):
                for name, weight in module.named_parameters(recurse=False):
                    if weight.dtype == torch.float32:
                        own.append((module, name, weight))
                        rounded = weight.detach().to(torch.bfloat16)
                        module._parameters[name] = nn.Parameter(rounded, requires_grad=False)
        with computing(dtype, next(often.parameters()).device):
            yield
    finally:
        for module, name, weight in own:
            module._parameters[name] = weight


# ---------------------------------------------------------------------------------------------------------------------
# What the device is good at
# ---------------------------------------------------------------------------------------------------------------------
def fastest(device: str | torch.device) -> Choice:
    """What auto comes to on a device."""
    import torch

    place = torch.device(device)
    if place.type == "cuda":
        major, minor = torch.cuda.get_device_capability(place)
        name = f"{torch.cuda.get_device_name(place)}, compute capability {major}.{minor}"
        if major >= AMPERE:
            return Choice("bfloat16", f"the GPU multiplies it faster than float32 ({name})")
        return Choice("float32", f"the GPU does not multiply bfloat16 faster ({name})")
    if place.type == "cpu":
        features = processor_features()
        found = next((name for feature, name in INSTRUCTIONS.items() if features.get(feature)), None)
        if found is not None:
            return Choice("bfloat16", f"the processor multiplies it faster than float32 ({found})")
        return Choice("float32", "the processor has no instructions for products in bfloat16")
    return Choice("float32", f"auto knows of no faster arithmetic on {place.type}")


def processor_features() -> Mapping[str, Any]:
    """What the processor can do, by torch's names; older versions tell of x86 alone, and of ARM the system does."""
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        found: Mapping[str, Any] = ask()
        return found
    known = ("amx_tile", "avx512_bf16")
    asked = {name: getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in known}
    return {**asked, "bf16": _system_names("bf16")}


def _system_names(feature: str) -> bool:
    """Whether Linux lists the feature among those of an ARM processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(feature in line.split() for line in lines if line.startswith("Features"))
