"""How well do the importance scores of a model rank its weights? Exact ablation of a sample, on text questions.

The scores come from one split; the ablations are measured on the same questions ("same data") and, as the use the
scores are put to asks for, on those of other splits. Everything is kept in a folder and continued there:

    sample.json           settings, the drawn weights, their strata, sampling weights, scores and first-order changes
    changes-SPLIT.jsonl   signed exact changes, {"row", "change"}, appended as they are measured
    records.json          the agreement table          validation.json   settings, noise floor, times, versions
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from palimpsest.ablation.agreement import (
    Design,
    Estimate,
    Sample,
    advantage,
    agreement,
    sample_weights,
    scores_at,
    sign_agreement,
)
from palimpsest.ablation.exact import exact_changes, signed_products
from palimpsest.data.collate import Batch, Collator, batches
from palimpsest.data.examples import Example
from palimpsest.data.sources import load_examples
from palimpsest.files import UserError, append_jsonl, drop_cut_line, hash_value, read_json, read_lines, write_json
from palimpsest.importance.estimate import estimate_importance
from palimpsest.models.anatomy import named_parameters
from palimpsest.models.compute import Arithmetic, Compute, choose_compute
from palimpsest.models.loading import choose_device, fingerprint, load_text_model
from palimpsest.models.loss import IGNORED, supervised_losses
from palimpsest.models.packing import SharedPrefix, pack, takes_places
from palimpsest.progress import Advance, Reporter
from palimpsest.rundir import provenance

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import nn

    Values = Float64[np.ndarray, " positions"]

ROWS_AT_ONCE = 100  # weights between two writes of changes-SPLIT.jsonl
N_CHECKED = 32  # weights measured in float64 too, for the noise floor
PACKED_TOLERANCE = 1e-3  # nats per token between packed and plain rows; beyond it the model cannot be packed


def validate_importance(
    model: str,
    source: str,
    out: Path,
    *,
    splits: Sequence[str] = ("train", "heldout"),
    limit: int | None = None,
    score_limit: int | None = None,
    n_weights: int = 2000,
    reductions: Sequence[str] = ("signed_sum", "per_batch_abs", "per_sequence_abs", "fisher"),
    batch_size: int = 4,
    dtype: str = "float32",
    seed: int = 0,
    device: str = "auto",
    compute: Compute = "float32",
    resamples: int = 500,
) -> list[dict[str, Any]]:
    """Score on splits[0], ablate a stratified sample of weights on every split, and compare; returns the records.

    limit: questions per split to ablate on, which is what costs time; the scores are taken on the same questions of
        splits[0] and, with score_limit, on that many of them too, as scores are in use.
    batch_size: of the scores, which matters to per_batch_abs.
    dtype: of the ablations; float64 takes three to four times as long and leaves no rounding noise.
    compute: the arithmetic of the scores, whose sums are float32; bfloat16 shows what it costs against exact ablation.

    Records have model, scored_on, n_scored (questions), measured_on, kind ("all" or a module kind), reduction, n, and
    for spearman, kendall, top_precision, sign_agreement and top_sign_agreement (only for signed_sum, else null) the
    value and NAME_low, NAME_high, a 95 % bootstrap interval; spearman_gain and top_precision_gain over the first
    reduction, paired; and the share of the weights below the noise floor.
    Raises UserError for bad input and for an `out` that holds another validation.
    """
    examples = {split: load_examples(source, split, limit) for split in splits}
    scored = {len(examples[splits[0]]): examples[splits[0]]}
    if score_limit is not None:
        items = load_examples(source, splits[0], score_limit)
        scored[len(items)] = items
    settings = {
        "model": model,
        "weights": fingerprint(model),
        "source": source,
        "splits": {split: [example.id for example in items] for split, items in examples.items()},
        "scored": {str(n): [example.id for example in items] for n, items in scored.items()},
        "n_weights": n_weights,
        "reductions": list(reductions),
        "batch_size": batch_size,
        "dtype": dtype,
        "seed": seed,
    }
    place = choose_device(device)
    chosen = choose_compute(compute, place, exact=True)
    if chosen.dtype != "float32":  # a validation begun before there was the choice can be continued
        settings["compute"] = chosen.dtype
    if (out / "sample.json").exists() and read_json(out / "sample.json")["settings"] != hash_value(settings):
        raise UserError(f"{out} holds a validation with other settings; choose another --out or delete it.")

    started = time.monotonic()
    language_model, processor = load_text_model(model, device=place)
    collator = Collator(processor, "text")

    def batched(items: Sequence[Example]) -> list[Batch]:
        return list(batches(collator, items, batch_size, place, by_length=False))

    data = {split: batched(items) for split, items in examples.items()}
    reporter = Reporter(3)
    if not (out / "sample.json").exists():
        to_score = {str(n): batched(items) for n, items in scored.items()}
        with reporter.step(f"scores of {model}") as advance:
            _write_sample(out, language_model, to_score, settings, chosen.dtype, advance)
    else:
        reporter.skipped(f"scores of {model}")
    sample, values, predicted = _read_sample(out)

    if dtype == "float64":
        language_model = language_model.double()
    measured = {split: _data(language_model, data[split]) for split in splits}
    with reporter.step("ablations") as advance:
        changes = _measure(out, measured, sample, advance)
    with reporter.step("noise floor") as advance:
        floor = _noise_floor(language_model, dtype, data[splits[0]], sample, changes[splits[0]], advance)

    records = [
        record
        for split in splits
        for n in values
        for record in _records(
            {"model": model, "scored_on": splits[0], "n_scored": int(n), "measured_on": split},
            sample, values[n], predicted[n], changes[split], floor, seed, resamples,
        )
    ]  # fmt: skip
    write_json(out / "records.json", records)
    write_json(
        out / "validation.json",
        {
            "schema": 1,
            "settings": settings,
            "compute": asdict(chosen),
            "noise_floor": floor,  # nats per supervised token
            "data": {
                split: {"n_tokens": item.n_tokens, "loss": item.loss, "packed": item.packed}
                for split, item in measured.items()
            },
            "seconds": time.monotonic() - started,  # of this call; a continued one is shorter
            "provenance": provenance(),
        },
    )
    return records


def table(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The records for all kinds together, as lines."""
    for record in records:
        if record["kind"] != "all":
            continue
        cells = [
            f"{name} {record[name]:.3f} [{record[f'{name}_low']:.3f}, {record[f'{name}_high']:.3f}]"
            for name in ("spearman", "kendall", "top_precision", "sign_agreement")
            if record[name] is not None
        ]
        yield f"{record['reduction']:<17} of {record['n_scored']:<4} on {record['measured_on']:<8} {'   '.join(cells)}"


# ---------------------------------------------------------------------------------------------------------------------
# Scores and sample
# ---------------------------------------------------------------------------------------------------------------------
def _write_sample(
    out: Path,
    language_model: nn.Module,
    to_score: Mapping[str, Sequence[Batch]],
    settings: Mapping[str, Any],
    compute: Arithmetic,
    advance: Advance,
) -> None:
    """The drawn weights, with their scores and first-order changes on each of the sets `to_score`.

    The strata are those of the scores of the largest set: what is drawn should be spread over importance in general.
    """
    done, total = 0, sum(map(len, to_score.values()))
    sample, values, predicted = None, {}, {}
    weights = named_parameters(language_model)
    for label, items in sorted(to_score.items(), key=lambda item: -len(item[1])):
        scores = estimate_importance(language_model, items, settings["reductions"], compute=compute)
        done += len(items)
        advance(done, total)
        if sample is None:
            sample = sample_weights(scores, settings["n_weights"], settings["seed"])
        values[label] = {r: scores_at(scores, r, sample.positions).tolist() for r in scores.reductions}
        del scores  # one set of accumulators at a time
        if "fisher" in values[label]:  # Fisher information is curvature; times θ²/2 it is a change of the loss
            theta = [float(weights[name].detach().view(-1)[index]) for name, index in sample.positions]
            values[label]["theta2_fisher"] = [t * t * f for t, f in zip(theta, values[label]["fisher"], strict=True)]
        n_tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in items)
        predicted[label] = (-signed_products(language_model, items, sample.positions).sum(axis=0) / n_tokens).tolist()
    assert sample is not None
    write_json(
        out / "sample.json",
        {
            "settings": hash_value(settings),
            "positions": sample.positions,
            "kinds": sample.kinds,
            "strata": sample.strata.tolist(),
            "weights": sample.weights.tolist(),
            "scores": values,
            "predicted": predicted,
        },
    )


def _read_sample(out: Path) -> tuple[Sample, dict[str, dict[str, Values]], dict[str, Values]]:
    """(sample, {set: {reduction: scores}}, {set: predicted signed changes})."""
    stored = read_json(out / "sample.json")
    positions = [(str(name), int(index)) for name, index in stored["positions"]]
    sample = Sample(positions, stored["kinds"], np.array(stored["strata"]), np.array(stored["weights"]))
    values = {label: {r: np.array(v) for r, v in items.items()} for label, items in stored["scores"].items()}
    return sample, values, {label: np.array(items) for label, items in stored["predicted"].items()}


# ---------------------------------------------------------------------------------------------------------------------
# Ablations
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Data:
    """A split as it is measured. loss: of the unchanged model, nats per supervised token."""

    model: nn.Module
    batches: Sequence[Mapping[str, Any]]
    packed: bool
    n_tokens: int
    loss: float


def _data(language_model: nn.Module, items: Sequence[Batch]) -> _Data:
    """Packed rows where the model gives the same token losses on them, else the plain batches."""
    with torch.no_grad():
        plain = torch.cat([supervised_losses(language_model, batch)[0] for batch in items])
    n_tokens, loss = len(plain), float(plain.double().mean())
    if not takes_places(language_model):
        return _Data(language_model, items, False, n_tokens, loss)
    model, row = SharedPrefix(language_model), pack(items)
    with torch.no_grad():
        packed, _ = supervised_losses(model, row)
    if packed.shape == plain.shape and float((packed - plain).abs().max()) < PACKED_TOLERANCE:
        return _Data(model, [row], True, n_tokens, loss)
    return _Data(language_model, items, False, n_tokens, loss)


def _measure(out: Path, measured: Mapping[str, _Data], sample: Sample, advance: Advance) -> dict[str, Values]:
    """Signed exact changes of all sampled weights on each split; those in the files already are not measured again."""
    n = len(sample.positions)
    changes = {split: np.full(n, np.nan) for split in measured}
    files = {split: out / f"changes-{split}.jsonl" for split in measured}
    for split, file in files.items():
        drop_cut_line(file)  # of a run that was killed inside a write
        for where, line in read_lines(file, "delete the file and run again"):
            try:
                changes[split][line["row"]] = line["change"]
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise UserError(f"{where} is no measured change; delete the file and run again.") from error
    n_done = 0
    for start in range(0, n, ROWS_AT_ONCE):
        for split, data in measured.items():
            rows = start + np.flatnonzero(np.isnan(changes[split][start : start + ROWS_AT_ONCE]))
            changes[split][rows] = exact_changes(data.model, data.batches, [sample.positions[row] for row in rows])
            append_jsonl(files[split], [{"row": int(r), "change": float(changes[split][r])} for r in rows])
            n_done += min(ROWS_AT_ONCE, n - start)
            advance(n_done, n * len(measured))
    return changes


def _noise_floor(
    language_model: nn.Module,
    dtype: str,
    items: Sequence[Batch],
    sample: Sample,
    changes: Values,
    advance: Advance,
) -> float:
    """Rounding noise of a change: the 95th percentile of |measured − float64| over some weights; 0 in float64."""
    if dtype == "float64":
        return 0.0
    rows = list(range(min(N_CHECKED, len(sample.positions))))  # the sample is in random order
    data = _data(language_model.double(), items)
    precise = exact_changes(data.model, data.batches, [sample.positions[row] for row in rows], progress=advance)
    return float(np.quantile(np.abs(changes[rows] - precise), 0.95))


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------
def _records(
    about: Mapping[str, Any],
    sample: Sample,
    values: Mapping[str, Values],
    predicted: Values,
    changes: Values,
    floor: float,
    seed: int,
    resamples: int,
) -> Iterator[dict[str, Any]]:
    for kind in ("all", *dict.fromkeys(sorted(sample.kinds))):
        rows = np.array([kind in ("all", k) for k in sample.kinds])
        design = Design(weights=sample.weights[rows], strata=sample.strata[rows], seed=seed, resamples=resamples)
        below = np.abs(changes[rows]) < floor
        first = next(iter(values.values()))[rows]
        for reduction, scores in values.items():
            result = agreement(np.abs(changes[rows]), scores[rows], **design)
            gains = advantage(np.abs(changes[rows]), scores[rows], first, **design)
            signed = reduction == "signed_sum"  # the only one whose gradients keep a sign
            sign = sign_agreement(changes[rows], predicted[rows], **design) if signed else None
            top = sign_agreement(changes[rows], predicted[rows], share=result.share, **design) if signed else None
            yield {
                **about,
                "kind": kind,
                "reduction": reduction,
                "n": result.n,
                "share": result.share,
                **_cells("spearman", result.spearman),
                **_cells("kendall", result.kendall),
                **_cells("top_precision", result.top_precision),
                **_cells("spearman_gain", gains[0]),
                **_cells("top_precision_gain", gains[1]),
                **_cells("sign_agreement", sign),
                **_cells("top_sign_agreement", top),
                "below_noise_floor": float(below.mean()),  # of the sample
                "below_noise_floor_population": float(np.average(below, weights=sample.weights[rows])),
            }


def _cells(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    value = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))
