"""The settings of a training run, all methods alike; docs/training.md explains each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class AdaptorFirst:
    """The first phase. `instruction` stands beside the speech when the target is `repeat`."""

    epochs: float
    learning_rate: float
    target: Literal["answer", "repeat"] = "answer"
    instruction: str = "Repeat what is said in the speech."


@dataclass(frozen=True)
class Align:
    """Before the first phase: the adaptor's outputs aligned with the embeddings of the words spoken (align.py)."""

    epochs: int = 4
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Settings:
    """Defaults are the paper's (LLaMA-Omni stage 1) where it states them."""

    epochs: float = 3.0
    batch_size: int = 32
    accumulation: int = 1
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpoint_every: int = 500  # optimizer steps
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    max_tokens: int | None = None  # of a batch, padding counted; batch_size then limits its rows
    compile: bool = False
    liger: bool | Literal["auto"] = "auto"
    eval_every: int | None = None  # optimizer steps
    report_to: tuple[str, ...] = ()
    align: Align | None = None
    adaptor_first: AdaptorFirst | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], seed: int) -> Settings:
        """From the `training` section of a study's configuration."""
        parts: dict[str, type[Align] | type[AdaptorFirst]] = {"align": Align, "adaptor_first": AdaptorFirst}
        made = {key: None if options[key] is None else kind(**options[key]) for key, kind in parts.items()}
        return cls(**{**options, "seed": seed, **made})


def n_steps(n_examples: int, settings: Settings, *, n_batches: int | None = None, epochs: float | None = None) -> int:
    """Optimizer steps of a run, or of a phase of other `epochs`; the last, smaller step of an epoch counts.

    `n_batches` of an epoch is known only from the lengths where there is a token budget; without one it is
    n_examples / batch_size.
    """
    if n_batches is None:
        n_batches = math.ceil(n_examples / settings.batch_size)
    per_epoch = math.ceil(n_batches / settings.accumulation)
    return max(1, math.ceil(per_epoch * (settings.epochs if epochs is None else epochs)))
