"""Every record of results.json and compare.json: flat, one row each. Fields are only ever added.

The types here are what pydantic checks the files against (report/inputs.py), and need no pydantic themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, get_args

from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

SCHEMA = 1
MOST_CUT = 0.05  # with a larger share of answers cut at max_new_tokens an accuracy is shown with a warning


@dataclass(frozen=True)
class NullWhereNotFinite:
    """The mark of a float that the file has as null where it was not finite."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema  # only where a file is checked

        return core_schema.nullable_schema(handler(source))


Number = Annotated[float, NullWhereNotFinite()]  # anywhere else a null is a damaged record
Modality = Literal["text", "speech", "cascade", "text_asr"]  # how a question is put: docs/concepts.md
MODALITIES: tuple[Modality, ...] = get_args(Modality)  # the order everywhere
Scope = Literal["global", "per_layer", "per_matrix"]  # within what a share of the weights is counted: docs/concepts.md
SCOPES: tuple[Scope, ...] = get_args(Scope)  # likewise


class DeactivationRecord(TypedDict):
    """Perplexity of `model` after zeroing `n_removed` weights (condition `base`: none removed, ratio 0)."""

    model: str
    modality: str
    condition: str  # base | top | bottom | random
    ratio: float
    scope: str  # global | per_layer | per_matrix
    seed: int | None  # of the random mask
    reduction: str  # of the importance scores that ranked the weights
    n_removed: int
    n_examples: int
    n_tokens: int
    loss: Number  # nats per supervised token
    perplexity: Number


class QARecord(TypedDict):
    method: str
    task: str
    modality: str
    n: int
    correct: int
    accuracy: float  # in [0, 1]
    ci_low: float
    ci_high: float
    metric: str
    metric_version: str
    n_empty: int  # answered, but without a letter or digit
    n_failed: int  # could not be answered; counted as wrong
    n_refusal: NotRequired[int]  # added after the first results were written
    n_loop: NotRequired[int]
    n_cut: NotRequired[int]  # stopped at max_new_tokens, without an end
    source: NotRequired[str]  # measured: by this version, here; published: taken from a paper


class ComparisonRecord(TypedDict):
    """Paired: the same questions answered by a and by b; `difference` = accuracy(b) − accuracy(a)."""

    task: str
    modality: str
    metric: str
    method_a: str
    method_b: str
    n: int
    only_a: int
    only_b: int
    difference: float
    ci_low: float
    ci_high: float
    p_value: float  # McNemar, exact
    p_holm: float  # Holm-corrected over its family
    family: NotRequired[str]  # the tests that `p_holm` is corrected for; absent in records of earlier versions
    n_family: NotRequired[int]  # how many
    left_out: NotRequired[str | None]  # why this row is none of them; its p_holm is then uncorrected, or another row's


class SpeechInputRecord(TypedDict):
    """A method that reads speech tokens beside its like that reads encoder frames (comparison/speech_inputs.py)."""

    method: str
    speech: str  # tokens | centroids
    reference: str  # the method that reads frames
    measure: str  # t2t | s2t | drift | shift
    of: str  # the task, the kind of text, or the distance
    n: int  # questions, texts or batches, the same for both; 0: the reduction does not keep batches
    value_reference: float
    value: float
    difference: float  # value − value_reference
    ci_low: float | None
    ci_high: float | None
    p_value: float | None  # t2t, s2t: as in comparisons; drift, shift: of the bootstrap
    p_holm: float | None  # of the families of comparisons; of all such pairs
    family: NotRequired[str | None]
    n_family: NotRequired[int | None]
    left_out: NotRequired[str | None]
    reduction: NotRequired[str | None]  # shift: of the importance


class LayerRecord(TypedDict):
    model: str
    modality: str
    reduction: str
    layer: int
    kind: str  # q k v o gate up down, or "all"
    total: float  # sum of importance
    mean: float  # per parameter
    share: float  # of the model's total
    n_parameters: int


class ShiftRecord(TypedDict):
    """How far the layer-wise distribution of `model` lies from that of `reference`."""

    model: str
    reference: str
    modality: str
    reduction: str
    measure: str
    value: Number
    ci_low: float | None
    ci_high: float | None
    noise_floor: float | None  # the same measure between the reference and itself scored on other data
    n_batches: NotRequired[int | None]  # that both models were scored on; None: the reduction does not keep them
    n_batches_other: NotRequired[int | None]  # of the other data; None: the floor is of even and odd batches, or none


class ClusteringRecord(TypedDict):
    """Concentration of one matrix on rows or columns, beside what the same entries give when shuffled."""

    model: str
    of: str  # importance | mask (its top ratio) | delta | delta_rank<r> (best approximation of rank r)
    name: str
    layer: int
    kind: str
    measure: str
    value: Number
    null_mean: Number  # entries shuffled; of delta_rank<r>: random singular vectors
    null_std: Number
    z: Number
    within_rows_mean: NotRequired[float | None]  # entries shuffled within their rows; None where that changes nothing
    within_rows_std: NotRequired[float | None]
    within_rows_z: NotRequired[float | None]
    within_columns_mean: NotRequired[float | None]
    within_columns_std: NotRequired[float | None]
    within_columns_z: NotRequired[float | None]


class DeltaRecord(TypedDict):
    method: str
    name: str
    layer: int
    kind: str
    relative_norm: Number  # ‖W_tuned − W_base‖ / ‖W_base‖, Frobenius
    overlap_with_importance: Number  # share of the largest changes that hit the base model's most important weights
    overlap_by_chance: Number
    effective_rank: NotRequired[Number]  # of the change, see ClusteringRecord's measure of that name
    energy_top1: NotRequired[Number]  # share of ‖ΔW‖² in its largest singular direction
    energy_top8: NotRequired[Number]
    energy_top24: NotRequired[Number]


class EmbeddingRecord(TypedDict):
    """The embedding or the head of a given model against the base's, in the rows that both have: the first of each."""

    method: str
    name: str
    part: str  # embedding | head
    rows_base: int
    rows_tuned: int
    rows: int  # in both
    rows_changed: int  # of these
    relative_norm: Number  # of the change of these rows, Frobenius


class PartRecord(TypedDict):
    """Importance on spoken questions of one part of a model that takes speech (analysis/parts.py)."""

    model: str
    modality: str  # speech
    reduction: str
    part: str  # layers | old_rows (of the embedding) | new_rows (of speech tokens) | adaptor (of encoder frames)
    total: float  # sum of importance
    mean: float  # per parameter
    share: float  # of all three
    ci_low: float | None  # of the share
    ci_high: float | None
    n_parameters: int
    n_rows: int | None  # of a table of rows
    n_reached: int | None  # rows with a score above 0
    n_batches: int


class ClaimRecord(TypedDict):
    claim: int
    statement: str
    measure: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    verdict: str  # holds | fails | undecided
    note: NotRequired[str]


class TimingRecord(TypedDict):
    step: str
    seconds: float
    peak_rss_bytes: int


BASE = "base"  # what records call the model that was not trained


def run_name(method: str, number: int) -> str:
    """The folder of a method's training run: the method's own name for the first, else `full-seed1`, `full-seed2` …"""
    return method if number == 0 else f"{method}-seed{number}"


def method_of(run: str) -> tuple[str, int]:
    """The inverse of `run_name`: (method, number of the run)."""
    found = re.fullmatch(r"(.+)-seed([1-9]\d*)", run)
    return (found[1], int(found[2])) if found else (run, 0)


class ClusteringSummaryRecord(TypedDict):
    """Over the matrices of a model, or of one module kind in it: the typical ratio of a measure to its null."""

    model: str
    of: str
    kind: str  # "all" or a module kind
    measure: str
    n_matrices: int
    n_undefined: int  # left out: all-zero matrices
    ratio: Number  # geometric mean of value / null_mean; 1 is no clustering
    ci_low: Number
    ci_high: Number


class MaskOverlapRecord(TypedDict):
    """Do the same weights stay the most important ones? Per matrix, and over all matrices (name and kind "all")."""

    model: str
    reference: str
    name: str
    layer: int | None
    kind: str
    ratio: float  # of the weights of each matrix that count as its most important
    overlap: Number  # share of the model's most important weights that are the reference's too
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


class ProbeRecord(TypedDict):
    """Right against wrong continuations, without generation; see evaluation/probe.py."""

    model: str
    kind: str  # of pairs, or "all"
    n: int
    correct: int  # pairs whose right continuation has the lower mean loss
    accuracy: float  # chance: one half
    ci_low: float
    ci_high: float
    margin: float  # mean of the wrong continuation's loss minus the right one's, nats per token
    loss_right: float
    loss_wrong: float


class ProbeComparisonRecord(TypedDict):
    """The probe of a method against the base's, on the same pairs; differences are the method's minus the base's."""

    method: str
    kind: str  # of pairs, or "all"
    n: int
    n_seeds: int
    accuracy_base: float
    accuracy: float
    only_base: int | None  # pairs only the base has right; None where there are several runs
    only_method: int | None
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    p_holm: float  # Holm-corrected over its family
    margin_difference: float  # nats per token
    margin_ci_low: float
    margin_ci_high: float
    loss_right_difference: float  # of the right continuations, nats per token; above 0: less likely than before
    loss_right_ci_low: float
    loss_right_ci_high: float
    family: NotRequired[str]  # the tests that `p_holm` is corrected for; absent in records of earlier versions
    n_family: NotRequired[int]  # how many
    left_out: NotRequired[str | None]  # why this row is none of them; its p_holm is then uncorrected, or another row's


class FloorRecord(TypedDict):
    """How often a metric calls something right that cannot be; see evaluation/floors.py."""

    method: str
    task: str
    modality: str
    metric: str
    metric_version: str
    floor: str  # unrelated | echo | echo_in_sentence
    n: int
    draws: int  # of the unrelated floor; else 1
    value: float  # in [0, 1]
    ci_low: float
    ci_high: float


class SpeechTestRecord(TypedDict):
    """S2T against a reference on the same questions, paired; `difference` = accuracy − reference_accuracy."""

    method: str
    task: str
    metric: str
    metric_version: str
    reference: str  # unrelated (the answers, for other questions) | text (the same model) | cascade (the base)
    n: int  # questions
    n_seeds: int
    accuracy: float  # from speech
    reference_accuracy: float
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    p_holm: float  # Holm-corrected over its family: the rows of a reference
    family: NotRequired[str]  # the tests that `p_holm` is corrected for; absent in records of earlier versions
    n_family: NotRequired[int]  # how many
    left_out: NotRequired[str | None]  # why this row is none of them; its p_holm is then uncorrected, or another row's


class VoiceRecord(TypedDict):
    """Accuracy by the voice of the question, of tasks spoken in several; mean over the training runs of a method."""

    method: str
    task: str
    modality: str  # speech | cascade
    voice: str  # "recording": came with its audio and no name of a voice
    trained_on: bool  # is it a voice of the study's training questions?
    n: int  # questions
    n_seeds: int
    metric: str
    accuracy: float
    ci_low: float  # 95 %
    ci_high: float
    accuracy_text: float  # of the same questions as text


class PerplexityRecord(TypedDict):
    """On target answers; the per-example losses behind it are in a file losses-MODALITY.jsonl."""

    method: str
    task: str  # "heldout" in a study
    modality: str
    n_examples: int
    n_tokens: int
    loss: Number  # nats per supervised token
    perplexity: Number


class DriftRecord(TypedDict):
    """How far a model's next-token distributions are from the base's, on text of the base's; see evaluation/drift.py.

    Means over tokens, as ratios of totals; 95 % intervals over texts.
    """

    model: str
    base: str
    text: str  # plain | chat
    tokens: str  # all, or a class of tokens
    n_texts: int  # that have such tokens
    n_tokens: int
    kl: float  # KL(base ‖ model), nats per token
    kl_ci_low: float
    kl_ci_high: float
    reverse_kl: float  # KL(model ‖ base)
    reverse_kl_ci_low: float
    reverse_kl_ci_high: float
    agreement: float  # share of positions at which both have the same most likely token
    agreement_ci_low: float
    agreement_ci_high: float
    loss_base: float  # nats per token; the text is the base's own, so this is about its entropy
    loss: float  # of the model; minus the base's it is an estimate of `kl` from the text alone
    loss_difference: float
    loss_difference_ci_low: float
    loss_difference_ci_high: float
    new_tokens_share: float  # of the model's probability, on tokens that the base does not have; not in the rest


class GeneralTextRecord(TypedDict):
    """Loss on text that somebody gave (evaluation/general_text.py); 95 % intervals over documents."""

    model: str
    text: str  # its name
    n_texts: int
    n_documents: int
    n_windows: int
    n_long: int  # texts longer than a window, cut into several of which none is left out
    n_tokens: int
    n_bytes: int  # of UTF-8
    loss: Number  # nats per token
    loss_ci_low: Number
    loss_ci_high: Number
    per_byte: Number  # nats per byte, comparable over tokenizers
    per_byte_ci_low: Number
    per_byte_ci_high: Number
    perplexity: Number  # per token


class GeneralTextComparisonRecord(TypedDict):
    """Loss of a model minus that of the base on the same texts, paired by document."""

    method: str
    base: str
    text: str
    n: int  # documents
    per_byte_base: float  # nats per byte
    per_byte: float
    difference: float  # nats per byte; above 0: the text is less likely than before
    ci_low: float
    ci_high: float
    per_token_difference: float | None  # nats per token; None: other tokenizers
    per_token_ci_low: float | None
    per_token_ci_high: float | None
    p_value: float
    p_holm: float
    detectable: float | None  # nats per byte
    verdict: str  # better | worse | no difference shown, of the model
    family: NotRequired[str]
    n_family: NotRequired[int]
    left_out: NotRequired[str | None]


class FrontierRecord(TypedDict):
    """One method in the plane of one text measure and one hearing measure; of several training runs their means.

    Values are as measured; `text_better` and `hearing_better` say whether higher or lower ones are.
    """

    model: str  # the base or a method
    curve: str  # a method that is no point of a curve is a curve of its own
    varied: str | None  # the key that differs between the points of the curve, such as learning_rate
    point: float | str | None  # its value here
    text_measure: str  # drift | general_text | t2t
    text_task: str | None  # of t2t
    text_better: str  # higher | lower
    text: float  # drift: KL to the base, nats per token; the others minus the base's: nats per token, accuracy
    text_ci_low: float  # 95 %
    text_ci_high: float
    n_text: int  # texts, documents, questions
    hearing_measure: str  # speech_loss | s2t
    hearing_task: str | None  # of s2t
    hearing_better: str
    hearing: float | None  # speech_loss: nats per token of held-out answers; s2t: accuracy; None: not asked in speech
    hearing_ci_low: float | None
    hearing_ci_high: float | None
    n_hearing: int  # answers, questions
    n_seeds: int  # training runs that have both
    pareto: bool | None  # no method is at least as good in both and better in one; None: not asked in speech


class EqualHearingRecord(TypedDict):
    """Text kept by two curves at the same hearing; `difference` = text_b − text_a. comparison/frontier.py says how."""

    text_measure: str
    text_task: str | None
    text_better: str
    hearing_measure: str
    hearing_task: str | None
    hearing_better: str
    position: str  # best: the best hearing that both reach; middle: of the hearing that both reach
    method_a: str  # curves
    method_b: str
    points_a: int
    points_b: int
    seeds_a: int  # training runs of each side
    seeds_b: int
    hearing: float | None  # the level; None here and below: no hearing in common
    text_a: float | None
    text_b: float | None
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    overlap: float  # share of the bootstrap's draws in which the two have a hearing in common
    test: str  # bootstrap_sign | jackknife_t
    p_value: float | None
    p_holm: float | None  # Holm-corrected over its family
    verdict: str  # better | worse | no difference shown, of b; not comparable
    family: str
    n_family: int
    left_out: str | None  # why this row is none of its family's tests


class PredictorRecord(TypedDict):
    """Over tuned models: does a measure say how much text was lost, at equal hearing? comparison/predictors.py."""

    text_measure: str  # drift | general_text | t2t: what was lost of it
    text_task: str | None  # of t2t
    predictor: str  # jensen_shannon | wasserstein_1 (shift of importance) | relative_change (of weights) | drift
    reduction: str | None  # of the scores that a shift is taken of
    at_equal: str  # speech_loss
    n_models: int
    models: list[str]
    spearman: float | None  # whatever the hearing
    partial: float | None  # at equal hearing, both by ranks; None: see note
    ci_low: float | None  # 95 %, bootstrap over models; None of fewer than 12
    ci_high: float | None
    p_value: float | None  # two-sided, by permutation
    p_holm: float | None  # over the predictors of one kind of text
    n_family: int
    beyond_change: float | None  # |partial| − that of relative_change
    beyond_change_ci_low: float | None
    beyond_change_ci_high: float | None
    note: str


class RestorationRecord(TypedDict):
    """Some layers have the base's weights again; `difference` = value_b − value_a. comparison/restoration.py."""

    of: str  # the tuned model
    method_a: str  # the tuned model, or another blend of it with as many layers
    method_b: str
    layers_a: list[int] | None  # that are the base's again; None: of the tuned model none
    layers_b: list[int]
    n_shared: int | None  # layers that are in both
    measure: str  # drift | general_text | t2t | speech_loss | s2t
    task: str | None
    better: str  # higher | lower
    n: int  # texts, documents, questions, answers
    value_a: float  # as in FrontierRecord
    value_b: float
    difference: float
    ci_low: float
    ci_high: float
    returned: float | None  # 1 − value_b / value_a, of drift and general text against the tuned model, if it lost any
    returned_ci_low: float | None
    returned_ci_high: float | None
    p_value: float
    p_holm: float
    verdict: str  # better | worse | no difference shown, of b
    family: str
    n_family: int
    left_out: str | None


class PairRecord(TypedDict):
    """`palimpsest compare`: two systems on the same questions; `difference` = accuracy(b) − accuracy(a)."""

    task: str
    modality: str
    metric: str
    metric_version: str
    method_a: str
    method_b: str
    n: int  # questions
    seeds_a: int  # training runs of each side
    seeds_b: int
    accuracy_a: float
    ci_low_a: float
    ci_high_a: float
    accuracy_b: float
    ci_low_b: float
    ci_high_b: float
    only_a: int | None  # questions only a has right; None where there are several seeds
    only_b: int | None
    difference: float
    ci_low: float
    ci_high: float
    test: str  # mcnemar_exact | clustered_t
    p_value: float
    p_holm: float
    detectable: float | None  # the smallest true difference found with probability 0.8; None: no difference would be
    verdict: str  # better | worse | no difference shown, of b
    family: NotRequired[str]  # the tests that `p_holm` is corrected for; absent in records of earlier versions
    n_family: NotRequired[int]  # how many
    left_out: NotRequired[str | None]  # why this row is none of them; its p_holm is then uncorrected, or another row's


class SeedRecord(TypedDict):
    """A measure over the training runs of a method that differ in their seeds; docs/evaluation.md has the interval."""

    method: str
    reference: str | None  # what a ratio, a shift or a difference is relative to
    measure: str  # accuracy, perplexity, perplexity_ratio, perplexity_ratio_top …, jensen_shannon …
    task: str | None
    modality: str
    basis: str | None  # scoring rule of an accuracy, reduction of the importance behind a shift
    scope: NotRequired[str]  # of the weights set to zero, where the study has them in several scopes
    n_seeds: int
    n: int | None  # questions or answers
    values: list[float | None]  # of each run, in their order
    mean: float | None  # geometric for perplexities and their ratios
    std: float | None  # of the values, n − 1
    ci_low: float | None
    ci_high: float | None
    ci_over: str  # what the 95 % interval is over: "seeds, questions", "seeds, batches", "seeds"


class SeedLossRecord(TypedDict):
    """Two models, of training methods the means over their runs, in a loss on the same units; nats per token."""

    measure: str  # drift | general_text | speech_loss
    method_a: str
    method_b: str
    n: int  # texts, documents or held-out answers
    seeds_a: int
    seeds_b: int
    loss_a: float  # drift: KL to the base; general_text: minus the base's
    loss_b: float
    difference: float  # b − a
    values: list[float]  # of each run, in their order
    ci_low: float  # 95 %, over units and runs
    ci_high: float
    p_value: float
    p_holm: float
    verdict: str  # better | worse | no difference shown, of b
    family: NotRequired[str]
    n_family: NotRequired[int]
    left_out: NotRequired[str | None]


class RetentionRecord(TypedDict):
    """Accuracy of a tuned model relative to its base, on written questions; None: not bounded by the data."""

    task: str
    modality: str
    metric: str
    base: str
    method: str
    n: int
    value: float | None  # None: the base has no right answer
    ci_low: float | None
    ci_high: float | None


class GapRecord(TypedDict):
    """Modality gap: accuracy from text minus accuracy from `modality`, of one system on the same questions."""

    task: str
    modality: str  # speech | cascade
    metric: str
    method: str
    n: int
    value: float
    ci_low: float
    ci_high: float
    p_value: float
    p_holm: float
    family: NotRequired[str]  # the tests that `p_holm` is corrected for; absent in records of earlier versions
    n_family: NotRequired[int]  # how many
    left_out: NotRequired[str | None]  # why this row is none of them; its p_holm is then uncorrected, or another row's


class LossPairRecord(TypedDict):
    """Losses of two systems on the same target answers, paired by example; `difference` = loss(b) − loss(a)."""

    task: str
    modality: str
    method_a: str
    method_b: str
    n: int
    n_tokens: int
    loss_a: float  # nats per supervised token
    loss_b: float
    difference: float
    ci_low: float
    ci_high: float
    perplexity_ratio: float  # exp(difference)
    p_value: float
    p_holm: float
    detectable: float | None
    verdict: str
    family: NotRequired[str]  # the tests that `p_holm` is corrected for; absent in records of earlier versions
    n_family: NotRequired[int]  # how many
    left_out: NotRequired[str | None]  # why this row is none of them; its p_holm is then uncorrected, or another row's


class TrainingRecord(TypedDict):
    """One optimizer step (kind `train`), or a measurement between steps: on held-out examples (kind `eval`), of the
    drift from the base, estimated on text of the base's own (kind `drift`).

    Records without a kind are `train`. Steps count on from the adaptor's phase to the method's.
    """

    method: str
    step: int
    epoch: float  # of the phase
    loss: Number  # nats per supervised token
    learning_rate: Number  # base rate at this step; null in eval records
    kind: NotRequired[str]  # train | eval | drift
    phase: NotRequired[str]  # adaptor | method
    grad_norm: NotRequired[Number]  # train: before clipping
    replayed: NotRequired[float]  # train, of a method with replay: share of replayed text among the supervised tokens
    loss_replayed: NotRequired[Number]  # likewise: on that share, where there is any
    modality: NotRequired[str]  # eval: text | speech
    n_tokens: NotRequired[int]  # eval, drift
    perplexity: NotRequired[Number]  # eval
    loss_base: NotRequired[Number]  # drift: of the base on the same tokens
    drift: NotRequired[Number]  # loss − loss_base: an estimate of KL(base ‖ model), nats per token


class Results(TypedDict):
    """The tables of results.json, every one present (empty where the run has none)."""

    deactivation: list[DeactivationRecord]
    qa: list[QARecord]
    qa_floors: list[FloorRecord]
    speech_tests: list[SpeechTestRecord]
    voices: list[VoiceRecord]
    perplexity: list[PerplexityRecord]
    comparisons: list[ComparisonRecord]
    speech_inputs: list[SpeechInputRecord]  # of studies with speech tokens
    probe: list[ProbeRecord]
    probe_comparisons: list[ProbeComparisonRecord]
    drift: list[DriftRecord]
    general_text: list[GeneralTextRecord]
    general_text_comparisons: list[GeneralTextComparisonRecord]
    frontier: list[FrontierRecord]  # of studies with curves or a section `drift`
    equal_hearing: list[EqualHearingRecord]  # of studies with curves
    predictors: list[PredictorRecord]  # of studies with a section `drift` and enough tuned models with scores
    restoration: list[RestorationRecord]  # of studies with blends that put layers back
    layers: list[LayerRecord]
    shift: list[ShiftRecord]
    clustering: list[ClusteringRecord]
    clustering_summary: list[ClusteringSummaryRecord]
    delta: list[DeltaRecord]
    embeddings: list[EmbeddingRecord]  # of given models
    importance_parts: list[PartRecord]  # of methods that read speech tokens
    mask_overlap: list[MaskOverlapRecord]
    correlations: list[CorrelationRecord]
    training: list[TrainingRecord]
    seeds: list[SeedRecord]
    seed_comparisons: list[PairRecord]
    seed_losses: list[SeedLossRecord]
    pooled_comparisons: list[PairRecord]  # over several tasks, whose names stand in `task`, parted by ", "
    claims: list[ClaimRecord]
    timings: list[TimingRecord]


RESULT_TABLES = tuple(Results.__annotations__)


class SystemRecord(TypedDict):
    """One of the systems that `palimpsest compare` compares."""

    label: str
    run: str  # its folder
    method: str | None  # None: an evaluation folder


class Paired(TypedDict):
    """Systems on the same questions and answers, and what could not be paired, a sentence each."""

    metric: str
    accuracy: list[PairRecord]
    perplexity: list[LossPairRecord]
    not_compared: list[str]


class Comparison(Paired):
    """compare.json."""

    schema: int
    seed: int  # of the bootstrap
    systems: list[SystemRecord]
    notes: list[str]  # what a reader of the differences must know, a sentence each
    retention: list[RetentionRecord]
    modality_gap: list[GapRecord]
