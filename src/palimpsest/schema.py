"""Rows of the tables of results.json that come from the analysis and from training; the others stand in rundir.py."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class ClusteringSummaryRecord(TypedDict):
    """Over the matrices of a model, or of one module kind in it: the typical ratio of a measure to its null."""

    model: str
    of: str
    kind: str  # "all" or a module kind
    measure: str
    n_matrices: int
    n_undefined: int  # left out: all-zero matrices
    ratio: float  # geometric mean of value / null_mean; 1 is no clustering
    ci_low: float
    ci_high: float


class MaskOverlapRecord(TypedDict):
    """Do the same weights stay the most important ones? Per matrix, and over all matrices (name and kind "all")."""

    model: str
    reference: str
    name: str
    layer: int | None
    kind: str
    ratio: float  # of the weights of each matrix that count as its most important
    overlap: float  # share of the model's most important weights that are the reference's too
    overlap_by_chance: float
    ci_low: float | None  # of "all": 95 %, bootstrap over matrices
    ci_high: float | None
    noise_floor: float | None  # the reference against itself scored on other data: an upper bound in practice


class CorrelationRecord(TypedDict):
    """Over tuned models: does a larger shift go with a larger loss of text accuracy?"""

    measure: str
    reduction: str
    metric: str
    n_models: int
    models: list[str]
    kendall_tau: float | None
    p_value: float | None  # exact, two-sided
    note: str


class TrainingRecord(TypedDict):
    """One optimizer step (kind `train`), or a measurement on held-out examples between steps (kind `eval`).

    Records without a kind are `train`. Steps count on from the adaptor's phase to the method's.
    """

    method: str
    step: int
    epoch: float  # of the phase
    loss: float  # nats per supervised token
    learning_rate: float  # base rate at this step; null in eval records
    kind: NotRequired[str]  # train | eval
    phase: NotRequired[str]  # adaptor | method
    grad_norm: NotRequired[float]  # train: before clipping
    modality: NotRequired[str]  # eval: text | speech
    n_tokens: NotRequired[int]  # eval
    perplexity: NotRequired[float]  # eval
