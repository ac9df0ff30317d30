"""The settings of a training run, all methods alike; docs/training.md explains each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from palimpsest.models.compute import Arithmetic


@dataclass(frozen=True)
class AdaptorFirst:
    """The first phase. `instruction` stands beside the speech when the target is `repeat`."""

    epochs: Annotated[float, Gt(0)]
    learning_rate: Annotated[float, Gt(0)]
    target: Literal["answer", "repeat"] = "answer"  # repeat: the model writes down the question that is spoken
    instruction: str = "Repeat what is said in the speech."


@dataclass(frozen=True)
class Align:
    """Before the first phase: the adaptor's outputs aligned with the embeddings of the words spoken (align.py)."""

    epochs: Annotated[int, Ge(1)] = 4
    learning_rate: Annotated[float, Gt(0)] = 1e-3  # linear warm-up, then a cosine to zero
    warmup_steps: Annotated[int, Ge(1)] = 100
    batch_size: Annotated[int, Ge(1)] = 32
    weight_decay: Annotated[float, Ge(0)] = 0.01
    max_grad_norm: Annotated[float, Gt(0)] = 5.0
    sharpness: Annotated[float, Gt(0)] = 20.0  # at the start; logit between a token's embedding and the origin, learned


@dataclass(frozen=True)
class Settings:
    """Defaults are the paper's (LLaMA-Omni stage 1) where it states them."""

    epochs: Annotated[float, Gt(0)] = 3.0
    batch_size: Annotated[int, Ge(1)] = 32
    accumulation: Annotated[int, Ge(1)] = 1
    warmup_ratio: Annotated[float, Ge(0), Lt(1)] = 0.03
    weight_decay: Annotated[float, Ge(0)] = 0.0
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    checkpoint_every: Annotated[int, Ge(1)] = 500  # optimizer steps
    gradient_checkpointing: bool = False
    seed: int = 0  # in a study: derived from the study's, so no key of a recipe
    compute: Arithmetic = "float32"  # of forward and backward; in a study models.compute decides, so no key of a recipe
    max_tokens: Annotated[int, Ge(1)] | None = None  # of a batch, padding counted; batch_size then limits its rows
    compile: bool = False  # torch.compile
    liger: bool | Literal["auto"] = "auto"  # head and loss in one kernel; auto: where it is installed, on CUDA
    eval_every: Annotated[int, Ge(1)] | None = None  # optimizer steps between perplexities of the held-out data
    report_to: tuple[str, ...] = ()  # loggers of transformers, such as tensorboard and wandb
    align: Align | None = None  # the adaptor's outputs with the embeddings of the words, before all else
    adaptor_first: AdaptorFirst | None = None  # a phase of its own for the adaptor, before the method


def n_steps(n_examples: int, settings: Settings, *, n_batches: int | None = None, epochs: float | None = None) -> int:
    """Optimizer steps of a run, or of a phase of other `epochs`; the last, smaller step of an epoch counts.

    `n_batches` of an epoch is known only from the lengths where there is a token budget; without one it is
    n_examples / batch_size.
    """
    if n_batches is None:
        n_batches = math.ceil(n_examples / settings.batch_size)
    per_epoch = math.ceil(n_batches / settings.accumulation)
    return max(1, math.ceil(per_epoch * (settings.epochs if epochs is None else epochs)))
