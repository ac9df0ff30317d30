"""What an interrupted training left: complete checkpoints, the adaptor of a finished first phase, and of which recipe.

The state folder lives while training runs:

    run.json                     method, settings, scales and data that the rest belongs to
    checkpoint-N/                the Trainer's checkpoints of the method's phase
    adaptor/checkpoint-N/        those of the adaptor's phase
    adaptor/done.safetensors     the adaptor after its phase, with the phase's records beside it
    align/done.safetensors       the adaptor after its alignment; align/state while that runs
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError, differences, hash_value, in_words, read_json, replacing, write_json
from palimpsest.parallel import is_main, share
from palimpsest.records import TrainingRecord
from palimpsest.training.callbacks import COMPLETE

if TYPE_CHECKING:
    from palimpsest.data.collate import Collator
    from palimpsest.data.examples import Example
    from palimpsest.models.speech_lm import SpeechLM
    from palimpsest.training.replay import TextRow

RUN, DONE, RECORDS = "run.json", "done.safetensors", "done.json"
# Any of these in the state folder is something to resume.
MARKS = (
    f"checkpoint-*/{COMPLETE}",
    f"adaptor/checkpoint-*/{COMPLETE}",
    f"adaptor/{DONE}",
    f"align/{DONE}",
    "align/state",
)


def describe_run(
    method: Any,
    settings: Any,
    scales: Mapping[int, float] | None,
    examples: Sequence[Example],
    collator: Collator,
    replay: Sequence[TextRow] = (),
) -> dict[str, Any]:
    """Everything the weights depend on besides the model they start from, as JSON."""
    described = {
        # Its place on a frontier changes no weight, and what it learns to say stands in the examples.
        "method": {key: value for key, value in asdict(method).items() if key != "in_full"}
        | {"curve": None, "answers": None},
        "settings": asdict(settings),
        "scales": None if scales is None else {str(layer): scale for layer, scale in scales.items()},
        "n_examples": len(examples),
        "examples": hash_value([[example.id, example.question, example.answer] for example in examples])[:16],
        "modality": collator.modality,
        "prompt": asdict(collator.processor.style),
        **({"features": "loop"} if collator.in_loop else {}),
        **({"replay": hash_value([asdict(row) for row in replay])[:16]} if replay else {}),
    }
    normalised: dict[str, Any] = json.loads(json.dumps(described))  # tuples become lists, as they are in the file
    return normalised


def require_same_run(state: Path, wanted: Mapping[str, Any]) -> None:
    """Write what this run is into `state`, or raise UserError if a checkpoint in it belongs to another run."""
    if not is_main():
        return
    file = state / RUN
    if any(next(state.glob(mark), None) is not None for mark in MARKS):
        if not file.exists():
            raise UserError(f"{state} has checkpoints but no {RUN}; delete the folder to train from the start.")
        found = differences(read_json(file), wanted)
        if found:
            raise UserError(
                f"{state} holds an interrupted training of another recipe ({in_words(found)}); continue with the "
                "recipe it began with, or delete the folder to train from the start."
            )
    write_json(file, wanted)


def last_complete_checkpoint(folder: Path) -> str | None:
    """Removes what a kill left half written; the Trainer would take it for a checkpoint. The same on every rank."""
    if not is_main():
        return share()
    complete: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).exists():
            complete[int(checkpoint.name.rpartition("-")[2])] = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return share(str(complete[max(complete)]) if complete else None)


def adaptor_phase(model: SpeechLM, folder: Path, run: Callable[[Path], list[TrainingRecord]]) -> list[TrainingRecord]:
    """Run the adaptor's phase in `folder`, or read its result if it was finished before."""
    from safetensors.torch import load_file, save_file

    if share((folder / DONE).exists() if is_main() else None):
        model.adaptor.load_state_dict(load_file(folder / DONE))
        records: list[TrainingRecord] = read_json(folder / RECORDS)
        return records
    records = run(folder)
    if is_main():
        write_json(folder / RECORDS, records)
        with replacing(folder / DONE) as temporary:
            save_file({name: value.contiguous() for name, value in model.adaptor.state_dict().items()}, temporary)
    return records


def keep_logs(state: Path, folder: Path) -> None:
    """Move TensorBoard's files out of the state folder before it is removed."""
    for phase, logs in (("adaptor", state / "adaptor" / "runs"), ("method", state / "runs")):
        if logs.exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.move(logs, folder / phase)
