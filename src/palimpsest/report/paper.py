"""The published numbers, as typed constants, shown beside a study's own numbers and never in their place.

Source: Wang et al., "Understanding Textual Capability Degradation in Speech LLMs via Parameter Importance
Analysis", arXiv 2509.23755 (ICASSP 2026). Every number carries how sure we are of it: `"paper"` was read from
the paper, `"digest"` comes from one secondary digest of the published PDF and may be misread there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CITATION = "Wang et al., arXiv 2509.23755 (ICASSP 2026)"
SOURCE_LABEL = "published (Wang et al.)"  # stands in every row of a table that shows one of these numbers

Certainty = Literal["paper", "digest"]
Task = Literal["llama_questions", "web_questions"]


@dataclass(frozen=True)
class Value:
    """One published number and how sure we are of it."""

    value: float
    certainty: Certainty = "paper"


@dataclass(frozen=True)
class PerplexityRow:
    """A row of Table 1: perplexity with 3 % of the parameters set to zero."""

    model: str
    modality: Literal["text", "speech"]
    base: Value
    top: Value
    bottom: Value
    random: Value


@dataclass(frozen=True)
class AccuracyRow:
    """A row of Table 2 (or 3, where `rank` is set) for one task: accuracy in %, None where there is none."""

    system: str
    size: str
    method: str | None  # base | full | layer_lr | lora; None: not stated for that system
    task: Task
    t2t: Value | None
    s2t: Value | None
    rank: int | None = None  # of LoRA, in Table 3


@dataclass(frozen=True)
class ClaimReference:
    """Where the paper supports a claim, and with what, in our words."""

    claim: int
    where: str
    published: str


TABLE_1: tuple[PerplexityRow, ...] = (
    PerplexityRow("1B", "speech", Value(2.08), Value(1.14e5, "digest"), Value(2.18), Value(3.85)),
    PerplexityRow("1B", "text", Value(3.65), Value(2.68e5, "digest"), Value(3.81), Value(6.39)),
    PerplexityRow("8B", "speech", Value(1.75), Value(2.72e5, "digest"), Value(1.76), Value(3.54)),
    PerplexityRow("8B", "text", Value(3.12), Value(2.60e5, "digest"), Value(3.19), Value(5.47)),
)
TABLE_1_RATIO = 0.03  # whether it was taken over the whole model or per matrix is not stated


def _accuracy(
    system: str, size: str, method: str | None, numbers: tuple[float | None, ...], rank: int | None = None
) -> tuple[AccuracyRow, AccuracyRow]:
    """The two rows of one published line: (Llama Questions T2T, S2T, Web Questions T2T, S2T)."""
    llama_t2t, llama_s2t, web_t2t, web_s2t = (None if number is None else Value(number) for number in numbers)
    return (
        AccuracyRow(system, size, method, "llama_questions", llama_t2t, llama_s2t, rank),
        AccuracyRow(system, size, method, "web_questions", web_t2t, web_s2t, rank),
    )


TABLE_2: tuple[AccuracyRow, ...] = (
    *_accuracy("Moshi", "7B", "full", (None, 62.3, None, 26.6)),
    *_accuracy("GLM-4-Voice", "9B", None, (None, 64.7, None, 32.2)),
    *_accuracy("LLaMA-Omni (its authors)", "8B", None, (None, 67.7, None, 33.4)),
    *_accuracy("LLaMA-Omni", "1B", "base", (74.0, None, 44.5, None)),
    *_accuracy("LLaMA-Omni", "1B", "full", (73.3, 66.7, 42.1, 29.1)),
    *_accuracy("LLaMA-Omni", "1B", "layer_lr", (73.7, 68.3, 43.8, 30.2)),
    *_accuracy("LLaMA-Omni", "1B", "lora", (73.7, 70.3, 42.9, 33.5)),
    *_accuracy("LLaMA-Omni", "8B", "base", (84.7, None, 58.7, None)),
    *_accuracy("LLaMA-Omni", "8B", "full", (80.0, 72.0, 55.7, 38.7)),
    *_accuracy("LLaMA-Omni", "8B", "layer_lr", (81.3, 73.3, 57.6, 39.6)),
    *_accuracy("LLaMA-Omni", "8B", "lora", (81.0, 75.0, 56.7, 42.9)),
)

TABLE_3: tuple[AccuracyRow, ...] = (
    *_accuracy("LLaMA-Omni", "8B", "lora", (81.3, 74.7, 56.3, 41.7), rank=8),
    *_accuracy("LLaMA-Omni", "8B", "lora", (81.0, 75.0, 56.7, 42.9), rank=16),
    *_accuracy("LLaMA-Omni", "8B", "lora", (79.3, 75.3, 54.7, 40.1), rank=24),
)

LAYER_LR_LAMBDA = Value(0.4, "digest")  # λ of Eq. 3: scale_l = 1 − λ · (I_l − min I) / (max I − min I)
LORA_RANKS = {"1B": Value(8, "digest"), "8B": Value(16)}

CLAIMS: tuple[ClaimReference, ...] = (
    ClaimReference(
        1,
        "Table 1",
        "1B, text: perplexity 3.65 whole, 2.68e5 without the top 3 % (from a digest), "
        "3.81 without the bottom 3 %, 6.39 without a random 3 %",
    ),
    ClaimReference(2, "Figure 1", "shown as heat maps; no number and no null is given"),
    ClaimReference(
        3, "Figure 2", "shown as curves; 1B: the peak moves to much earlier layers; 8B: the shape stays, lower"
    ),
    ClaimReference(4, "Figure 3", "shown as curves; both lie close to the base"),
    ClaimReference(
        5,
        "Table 2",
        "8B, Llama Questions T2T: 84.7 % before; 80.0 % Full-FT, 81.3 % Layer-LR, 81.0 % LoRA; no interval is given",
    ),
    ClaimReference(
        6,
        "Table 2",
        "8B, Llama Questions S2T: LoRA 75.0 %, Layer-LR 73.3 %, Full-FT 72.0 %; T2T: Layer-LR 81.3 %, LoRA 81.0 %",
    ),
    ClaimReference(7, "Figure 4", "shown as maps of the parameter change; no number is given"),
    ClaimReference(8, "Table 3", "8B, Web Questions T2T: 56.3 % at rank 8, 56.7 % at rank 16, 54.7 % at rank 24"),
)
