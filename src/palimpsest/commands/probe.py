"""palimpsest probe: the retention probe of one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.files import require_unwritten, write_json, write_jsonl
from palimpsest.models import MODEL
from palimpsest.models.compute import DeviceOption, DtypeOption
from palimpsest.progress import Reporter

RECORDS = "records.json"


@dataclass(frozen=True)
class Options:
    """Does a model find right continuations more likely than wrong ones? Seconds, no generation; chance is 50 %.

    Example: palimpsest probe --model embedded:smollm2-135m-instruct --out runs/probe
    """

    model: Annotated[str, Doc(MODEL)]
    out: Annotated[Path, Doc("Folder for records.json and pairs.jsonl.")]
    batch_size: Annotated[int, Ge(1)] = 32
    device: DeviceOption = "auto"
    dtype: DtypeOption = None


def run(options: Options) -> Iterator[str]:
    from palimpsest.evaluation.probe import load_pairs, pair_losses, pairs_version, summarise_probe
    from palimpsest.models.loading import choose_device, fingerprint, load_language_model, reading_notes, resolve

    model, out = options.model, options.out
    require_unwritten(out / RECORDS, "a probe")
    resolve(model)
    device = choose_device(options.device)
    with Reporter(1).step("probe") as advance:
        loaded = load_language_model(model, dtype=options.dtype or "float32", device=device)
        losses = pair_losses(*loaded, load_pairs(), options.batch_size, progress=advance)
    records = summarise_probe(losses, model)
    about = {"schema": 1, "pairs": pairs_version(), "model": fingerprint(model)}
    write_jsonl(out / "pairs.jsonl", (loss.to_row() for loss in losses))
    write_json(out / RECORDS, {**about, "probe": records})
    yield from reading_notes(model)
    for record in records:
        yield (
            f"{record['kind']:<14} {record['correct']:>4}/{record['n']:<4} {100 * record['accuracy']:5.1f} %  "
            f"[{100 * record['ci_low']:.1f}, {100 * record['ci_high']:.1f}]  margin {record['margin']:+.2f} nats"
        )
