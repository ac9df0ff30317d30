"""The step of a study that measures the loss of every held-out answer, of the base and of each method."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from palimpsest.files import write_json
from palimpsest.progress import Advance
from palimpsest.study.workspace import Modality, Workspace, folder_of


def perplexity_step(ws: Workspace, name: str) -> None:
    """NAME/perplexity/: losses-MODALITY.jsonl per example and records.json; speech of models that hear."""
    inputs = {
        "model": ws.model_inputs(name, heard=True),
        "features": ws.fingerprint("features"),
        "prompt": asdict(ws.config.prompt),
        "batch_size": ws.config.deactivation.batch_size,
    }

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.evaluation.perplexity import measure_losses

        modalities: list[Modality] = ["text", "speech"] if ws.hears(name) else ["text"]
        examples, size = ws.groups["heldout"], ws.config.deactivation.batch_size
        records = []
        for modality in modalities:
            model = ws.language_model(name) if modality == "text" else ws.speech_lm(name)
            collator = ws.collator(modality, "heldout")
            records.append(
                measure_losses(model, collator, examples, size, folder, method=name, task="heldout", progress=advance)
            )
        write_json(folder / "records.json", records)

    ws.step(f"{folder_of(name)}/perplexity", "perplexity", inputs, write)
