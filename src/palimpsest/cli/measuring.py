"""Measurements of one model, outside a study: ask, evaluate, importance, deactivate, validate-importance."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.app import app


class Modality(StrEnum):
    text = "text"
    speech = "speech"
    cascade = "cascade"
    text_asr = "text_asr"


class Precision(StrEnum):
    float32 = "float32"
    float64 = "float64"


@app.command()
def ask(
    model: Annotated[
        str,
        typer.Option(help="Folder of a speech LLM, e.g. runs/demo/methods/lora/checkpoint; for text, any causal LM."),
    ] = "embedded:smollm2-135m-speech",
    audio: Annotated[Path | None, typer.Option(help="The question as a recording (wav, flac, …; up to 30 s).")] = None,
    text: Annotated[str | None, typer.Option(help="The question as text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Ask a speech LLM one question, as speech or as text; any causal LM answers text.

    Without --model it is the small speech LLM that comes with palimpsest.

    Example: palimpsest ask --audio question.wav
    """
    from palimpsest.ask import answer

    typer.echo(answer(model, audio=audio, text=text, max_new_tokens=max_new_tokens))


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Causal LM, speech LLM or audio LLM: embedded: name, folder, hub name.")],
    task: Annotated[str, typer.Option(help="facts, a manifest, llama_questions:FOLDER or web_questions:FOLDER.")],
    out: Annotated[Path, typer.Option(help="Folder for samples-MODALITY.jsonl and results-MODALITY.json.")],
    split: Annotated[str, typer.Option(help="Split of the task.")] = "test",
    modality: Annotated[Modality, typer.Option(help="How the questions are put.")] = Modality.text,
    asr: Annotated[str, typer.Option(help="Recogniser of the cascade.")] = "embedded:whisper-tiny.en",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda, cuda:1 …")] = "auto",
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Also the loss of every target answer.")] = False,
    judge_url: Annotated[
        str | None,
        typer.Option(help="Also ask an LLM judge: base of an OpenAI-compatible API; its key in PALIMPSEST_JUDGE_KEY."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
) -> None:
    """Answer the questions of a task and score the answers, each accuracy with its 95 % interval.

    Example: palimpsest evaluate --model embedded:smollm2-135m-instruct --task facts --split heldout --out runs/eval
    """
    from palimpsest.evaluate import evaluate_model

    for line in evaluate_model(
        model,
        task,
        out,
        split=split,
        modality=modality.value,
        asr=asr,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        device=device,
        perplexity=perplexity,
        judge_url=judge_url,
        judge_model=judge_model,
    ):
        typer.echo(line)


@app.command()
def importance(
    model: Annotated[str, typer.Option(help="Causal LM or speech LLM: embedded: name, folder, or hub name.")],
    data: Annotated[str, typer.Option(help="Question set with answers: facts or a manifest.")],
    out: Annotated[Path, typer.Option(help="Folder for the scores.")],
    split: Annotated[str, typer.Option(help="Split of the data.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many examples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    reductions: Annotated[
        str, typer.Option(help="Comma-separated: signed_sum, per_batch_abs, per_sequence_abs, fisher.")
    ] = "signed_sum,per_batch_abs",
    offload: Annotated[
        str | None,
        typer.Option(help="Keep the sums in host memory (cpu) or in a memory-mapped file (a folder)."),
    ] = None,
) -> None:
    """Score every weight of the transformer layers on questions given as text: |θ·∂L/∂θ| (Eq. 2).

    Example: palimpsest importance --model embedded:smollm2-135m-instruct --data facts --limit 64 --out runs/scores
    """
    from palimpsest.measure import score_model

    for line in score_model(
        model,
        data,
        out,
        split=split,
        limit=limit,
        batch_size=batch_size,
        reductions=tuple(reductions.split(",")),
        offload="cpu" if offload == "cpu" else Path(offload) if offload else None,
    ):
        typer.echo(line)


@app.command()
def deactivate(
    model: Annotated[str, typer.Option(help="The model that was scored.")],
    scores: Annotated[Path, typer.Option(help="Folder written by `palimpsest importance`.")],
    data: Annotated[str, typer.Option(help="Question set with answers to measure perplexity on.")],
    out: Annotated[Path, typer.Option(help="Folder for records.json.")],
    split: Annotated[str, typer.Option(help="Split of the data.")] = "heldout",
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    ratios: Annotated[str, typer.Option(help="Shares of the weights to zero, ascending, comma-separated.")] = "0.03",
    scopes: Annotated[
        str, typer.Option(help="Where the shares are counted: global, per_layer, per_matrix; comma-separated.")
    ] = "global",
    reduction: Annotated[str, typer.Option(help="Which of the scores.")] = "signed_sum",
    random_seeds: Annotated[int, typer.Option(min=0)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """Perplexity with the top, bottom and random weights set to zero (Table 1); several ratios give a curve.

    Example: palimpsest deactivate --model MODEL --scores runs/scores --data facts --ratios 0.01,0.1 --out runs/off
    """
    from palimpsest.measure import deactivate_model

    for line in deactivate_model(
        model,
        scores,
        data,
        out,
        split=split,
        limit=limit,
        ratios=ratios.split(","),
        scopes=scopes.split(","),
        reduction=reduction,
        random_seeds=random_seeds,
        batch_size=batch_size,
    ):
        typer.echo(line)


@app.command("validate-importance")
def validate_importance(
    model: Annotated[str, typer.Option(help="Causal LM or speech LLM: embedded: name, folder, or hub name.")],
    data: Annotated[str, typer.Option(help="Question set with answers: facts or a manifest.")],
    out: Annotated[Path, typer.Option(help="Folder for the measurements and records.json; started again, continues.")],
    splits: Annotated[str, typer.Option(help="Scored on the first, ablated on each; comma-separated.")] = (
        "train,heldout"
    ),
    limit: Annotated[int, typer.Option(min=1, help="Questions per split to ablate on; time grows with it.")] = 8,
    score_limit: Annotated[int | None, typer.Option(min=1, help="Also score on so many questions.")] = None,
    weights: Annotated[int, typer.Option(min=1, help="Weights to ablate, one by one.")] = 2000,
    reductions: Annotated[str, typer.Option(help="Comma-separated.")] = (
        "signed_sum,per_batch_abs,per_sequence_abs,fisher"
    ),
    batch_size: Annotated[int, typer.Option(min=1, help="Of the scores; matters to per_batch_abs.")] = 4,
    dtype: Annotated[Precision, typer.Option(help="Of the ablations.")] = Precision.float32,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Ablate a stratified sample of weights exactly (Eq. 1) and say how well each reduction ranks them.

    Example: palimpsest validate-importance --model embedded:smollm2-135m-instruct --data facts --out runs/validation
    """
    from palimpsest.ablation import validation

    records = validation.validate_importance(
        model,
        data,
        out,
        splits=splits.split(","),
        limit=limit,
        score_limit=score_limit,
        n_weights=weights,
        reductions=reductions.split(","),
        batch_size=batch_size,
        dtype=dtype.value,
        seed=seed,
    )
    for line in validation.table(records):
        typer.echo(line)
