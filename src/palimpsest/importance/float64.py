"""Float64 all the way: without this, a float64 model of transformers still computes its norms in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Float64Throughout(TorchFunctionMode):
    """Within the context, casts of a float64 tensor to float32 leave it as it is.

    RMSNorm and softmax "upcast" to float32, which is a downcast for a float64 model and costs the ablation of a
    small weight all its digits. Float32 and bfloat16 models compute as always.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if double and func is torch.Tensor.float:
            return args[0]
        if double and torch.float32 in (*args[1:], kwargs.get("dtype")):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)
