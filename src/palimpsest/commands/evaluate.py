"""palimpsest evaluate: one model on one task, outside a study."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.evaluation.tasks import NewTokensOption
from palimpsest.files import UserError, hash_value, locked, write_json
from palimpsest.models import MODEL
from palimpsest.models.compute import Choice, ComputeOption, DeviceOption, DtypeOption, WeightDtype
from palimpsest.progress import Reporter
from palimpsest.records import MOST_CUT, Modality, PerplexityRecord

if TYPE_CHECKING:
    from palimpsest.evaluation.answers import Answerer, SampleRow
    from palimpsest.evaluation.endpoint import Endpoint
    from palimpsest.evaluation.judge import Judge, Judged
    from palimpsest.evaluation.tasks import Task


FaultyAudio = Literal["error", "wrong"]
HUB_NAMES = {
    "fixie-ai/llama-questions": "llama_questions",
    "fixie-ai/spoken-web-questions": "web_questions",
    "chiyuanhsiao/spoken-web-questions": "web_questions",
}


@dataclass(frozen=True)
class Options:
    """Answer the questions of a task and score the answers, each accuracy with its 95 % interval.

    Example: palimpsest evaluate --model embedded:smollm2-135m-instruct --task facts --split heldout --out runs/eval

    Example: palimpsest evaluate --url http://localhost:8000/v1 --task facts --split heldout --out runs/served
    """

    model: Annotated[str | None, Doc(f"{MODEL} With --url: the name there, if it serves more than one.")]
    task: Annotated[str, Doc("facts, a manifest, llama_questions:FOLDER or web_questions:FOLDER.")]
    out: Annotated[Path, Doc("Folder for samples-MODALITY.jsonl and results-MODALITY.json.")]
    split: Annotated[str, Doc("Split of the task.")] = "test"
    modality: Annotated[Modality, Doc("How the questions are put.")] = "text"
    asr: Annotated[str, Doc("Recogniser of the cascade.")] = "embedded:whisper-tiny.en"
    limit: Annotated[int | None, Ge(1), Doc("Only the first questions.")] = None
    max_new_tokens: NewTokensOption = 64
    batch_size: Annotated[int, Ge(1), Doc("Questions after which answers are on disk.")] = 16
    url: Annotated[
        str | None, Doc("Ask the model behind an OpenAI-compatible endpoint: the base of the API, http://HOST:8000/v1.")
    ] = None
    url_key: Annotated[str, Doc("Environment variable that has the key of --url.")] = "OPENAI_API_KEY"
    url_body: Annotated[str | None, Doc("JSON object of further fields of every request to --url.")] = None
    url_timeout: Annotated[int, Ge(1), Doc("Seconds that --url may be silent.")] = 120
    concurrency: Annotated[int, Ge(1), Doc("Requests to --url that are under way at a time.")] = 4
    device: DeviceOption = "auto"
    dtype: DtypeOption = None
    compute: ComputeOption = "auto"
    faulty_audio: Annotated[
        FaultyAudio, Doc("A silent, broken or cut recording: an error, or its question counts as wrong.")
    ] = "error"
    perplexity: Annotated[bool, Doc("Also the loss of every target answer.")] = False
    judge_url: Annotated[
        str | None,
        Doc("Also ask an LLM judge: base of an OpenAI-compatible API; its key in PALIMPSEST_JUDGE_KEY."),
    ] = None
    judge_model: Annotated[str | None, Doc("The judge's name there.")] = None


def run(options: Options) -> Iterator[str]:
    with locked(options.out):
        yield from _run(options)


def _run(options: Options) -> Iterator[str]:
    """Answer, score, write samples and results to `out`; yields the lines of a small table.

    The model is any causal LM (text, and transcripts), a SpeechLM or an audio LLM of transformers (speech too).
    Raises UserError for bad input before the model is loaded.
    """
    from palimpsest.data.speech import speak
    from palimpsest.evaluation.answers import answer_questions, qa_record, summarise
    from palimpsest.evaluation.floors import floor_records
    from palimpsest.evaluation.judge import METRIC, judge_rows
    from palimpsest.models.loading import choose_device, reading_notes

    modality, out = options.modality, options.out
    judge, task, asked = _check(options)
    model = str(options.model if isinstance(asked, str) else asked.model)  # as the records call it
    transcribed = modality in ("cascade", "text_asr")
    answered_by = _require_one_model(options, asked)
    unspoken = modality != "text" and any(example.audio is None for example in task.examples)
    reporter = Reporter(1 + unspoken + options.perplexity + (judge is not None))
    if unspoken:
        with reporter.step("speaking the questions") as advance:
            task = replace(task, examples=tuple(speak(task.examples, out / "audio", progress=advance)))
    device = choose_device(options.device)
    with reporter.step(f"{task.name} from {modality}") as advance:
        answer, compute = _answerer(options, asked, device)
        rows = answer_questions(
            answer,
            task,
            modality,
            model=_identity(options, asked, answered_by, transcribed),
            answered_by=answered_by,
            out=out / f"samples-{modality}.jsonl",
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            compute=compute.dtype if isinstance(asked, str) else "unknown",
            progress=advance,
            notice=reporter.note,
        )
    floors = floor_records(rows, model, task, modality)
    results: dict[str, Any] = {"schema": 1, "qa": summarise(rows, model, task, modality), "qa_floors": floors}
    if isinstance(asked, str):
        results["compute"] = {**asdict(compute), "device": device, "weights": options.dtype}  # null: the default
    else:
        results["compute"] = {"dtype": "unknown", "reason": f"by {asked.place}", "device": None, "weights": None}
        results["endpoint"] = {"url": asked.place, "model": asked.model, "body": dict(asked.body)}
    results["seconds_per_question"] = sum(row["seconds"] for row in rows) / len(rows)
    judged = None
    if options.perplexity and isinstance(asked, str):
        with reporter.step(f"perplexity from {modality}") as advance:
            results["perplexity"] = [_perplexity(options, asked, device, compute, task, answered_by, advance)]
    if judge is not None:
        with reporter.step(f"judged by {judge.model}") as advance:
            judged = judge_rows(judge, rows, out / f"samples-{modality}.judge.jsonl", advance)
        results["qa"].append(qa_record(rows, judged.verdicts, model, task, modality, METRIC, judge.version))
        results["judge"] = {"model": judge.model, "version": judge.version, "failed": judged.failed}
    if transcribed:
        from palimpsest.evaluation.cascade import word_error_rate

        if any(row["transcript"] is not None for row in rows):
            results["word_error_rate"] = word_error_rate((row["question"], row["transcript"]) for row in rows)
    write_json(out / f"results-{modality}.json", results)
    if modality != "speech" and isinstance(asked, str):
        yield from reading_notes(model)
    yield from _lines(rows, results, judged, options.max_new_tokens)


def _require_one_model(options: Options, asked: str | Endpoint) -> str:
    """What the model's files alone are called; UserError where the folder has answers or losses of another model."""
    from palimpsest.evaluation.answers import models_in_folder
    from palimpsest.models.loading import fingerprint

    mine = fingerprint(str(options.model)) if isinstance(asked, str) else asked.identity
    written = [f"samples-{options.modality}.json", *([f"losses-{options.modality}.json"] if options.perplexity else [])]
    names = {mine, *(hash_value([mine, dtype]) for dtype in get_args(WeightDtype))}  # as earlier versions called it
    others = [file for name, file in models_in_folder(options.out, written).items() if name not in names]
    if others:
        raise UserError(f"{others[0]} is of another model; give each model an --out of its own.")
    return mine


def _identity(options: Options, asked: str | Endpoint, mine: str, transcribed: bool) -> str:
    """What answers are bound to: the model's files (`mine`) and a recogniser's that is asked; weights of a dtype given.

    Of a model behind an endpoint only address and name are known.
    """
    from palimpsest.models.loading import fingerprint

    if not isinstance(asked, str):
        return f"{mine}, after {fingerprint(options.asr)}" if transcribed else mine
    parts = [mine, *([fingerprint(options.asr)] if transcribed else [])]
    parts += [] if options.dtype is None else [options.dtype]
    return hash_value(parts) if len(parts) > 1 else parts[0]


def _check(options: Options) -> tuple[Judge | None, Task, str | Endpoint]:
    """What is known to be wrong before a model is loaded; (the judge, the task, where the model is)."""
    from palimpsest.evaluation.judge import Judge
    from palimpsest.models.given import require_recordings
    from palimpsest.models.loading import model_kind, resolve

    modality, url, name = options.modality, options.judge_url, options.judge_model
    if (url is None) != (name is None):
        raise UserError("A judge needs both --judge-url and --judge-model; give the other one too.")
    if options.perplexity and modality not in ("text", "speech"):
        raise UserError("A cascade has no perplexity; leave out --perplexity, or use --modality text or speech.")
    judge = Judge(url, name) if url is not None and name is not None else None
    if options.model is None and options.url is None:
        raise UserError("Nothing is asked: give --model, or the address of an endpoint with --url.")
    endpoint = _endpoint(options)
    recordings = options.out / "audio" if modality != "text" else None  # of a table that holds them
    task = load_task(
        options.task, split=options.split, limit=options.limit, audio=recordings, faulty_audio=options.faulty_audio
    )
    if endpoint is not None:
        from palimpsest.evaluation.remote import require_endpoint

        return judge, task, require_endpoint(endpoint)
    where = resolve(str(options.model))
    if modality == "speech" and model_kind(where) == "language_model":
        raise UserError(f"{options.model} takes no audio; evaluate it with --modality text or cascade.")
    if modality == "speech" and model_kind(where) == "speech_lm":
        require_recordings(str(options.model))
    if options.perplexity and model_kind(where) == "audio_llm":
        raise UserError(f"Perplexity of the audio LLM {options.model} cannot be measured yet; leave out --perplexity.")
    return judge, task, where


def _endpoint(options: Options) -> Endpoint | None:
    """That of --url, as yet unasked."""
    from palimpsest.evaluation.endpoint import Endpoint

    if options.url is None:
        return None
    if options.perplexity:
        raise UserError("An endpoint gives no losses of target answers; leave out --perplexity.")
    if options.dtype is not None:
        raise UserError("Weights behind --url are what the server loaded; leave out --dtype.")
    if options.model is not None and not options.model.strip():
        raise UserError("--model is empty; give the name that the endpoint knows the model by, or leave it out.")
    try:
        body = json.loads(options.url_body or "{}")
    except ValueError as error:
        raise UserError(f"--url-body is not JSON ({error}); give an object such as '{{\"seed\": 0}}'.") from error
    if not isinstance(body, dict):
        raise UserError("--url-body is no JSON object; give one such as '{\"seed\": 0}'.")
    return Endpoint(options.url, options.model, options.url_key, options.url_timeout, body=body)


def load_task(
    source: str,
    *,
    name: str | None = None,
    split: str = "test",
    limit: int | None = None,
    audio: Path | None = None,
    faulty_audio: FaultyAudio = "error",
) -> Task:
    """The task of a question set, by name or path; see `data.sources.load_examples` for what can be read.

    `name` is what the records call the task, by default `task_name(source)`. With `limit`, the first examples are
    taken. `audio`: the folder that recordings inside a table are written to; with it all recordings are checked, as
    `faulty_audio` says.
    """
    from palimpsest.data.sources import load_examples
    from palimpsest.evaluation.tasks import Task

    examples = load_examples(source, split, limit=limit, audio=audio, faulty_audio=faulty_audio)
    return Task(name or task_name(source), tuple(examples))


def task_name(source: str) -> str:
    """A hub set's usual name, so that its rows stand beside the published ones; else file or folder, without suffix."""
    return HUB_NAMES.get(source, Path(source.rpartition(":")[2]).stem)


def _answerer(options: Options, asked: str | Endpoint, device: str) -> tuple[Answerer, Choice]:
    """The model as it is asked, and the arithmetic in which it answers: behind an endpoint, that of the recogniser."""
    from palimpsest.evaluation.answers import text_answerer
    from palimpsest.models.compute import choose_compute
    from palimpsest.models.loading import load_audio_llm, load_speech_lm, load_text_model, model_kind

    limit, dtype = options.max_new_tokens, options.dtype or "float32"
    if not isinstance(asked, str):
        from palimpsest.evaluation.remote import endpoint_answerer

        answer = endpoint_answerer(asked, limit, options.concurrency)
        return _transcribing(options, answer, device, choose_compute(options.compute, device))
    where, kind = asked, model_kind(asked)
    if kind == "audio_llm":
        from palimpsest.evaluation.audio_llm import audio_llm_answerer

        audio_llm, audio_processor = load_audio_llm(where, dtype=options.dtype or "auto", device=device)
        weights = str(audio_llm.dtype).removeprefix("torch.")
        compute = choose_compute(options.compute, device, weights=weights)
        answer = audio_llm_answerer(audio_llm, audio_processor, limit, compute=compute.dtype)
    else:
        compute = choose_compute(options.compute, device, weights=dtype)
    if kind == "speech_lm" and options.modality == "speech":
        from palimpsest.evaluation.spoken import recording_answerer

        return recording_answerer(*load_speech_lm(where, dtype=dtype, device=device), limit, compute.dtype), compute
    if kind != "audio_llm":
        language_model, processor = load_text_model(where, dtype=dtype, device=device)
        answer = text_answerer(language_model, processor.tokenizer, limit, processor.style, compute=compute.dtype)
    return _transcribing(options, answer, device, compute)


def _transcribing(options: Options, answer: Answerer, device: str, compute: Choice) -> tuple[Answerer, Choice]:
    """The same in the modalities in which the model gets what a recogniser wrote down."""
    if options.modality in ("text", "speech"):
        return answer, compute
    from palimpsest.evaluation.cascade import cascade_answerer, transcribe
    from palimpsest.models.loading import load_asr

    write_down = partial(transcribe, *load_asr(options.asr, device=device), compute=compute.dtype)
    return cascade_answerer(write_down, answer), compute


def _perplexity(
    options: Options, where: str, device: str, compute: Choice, task: Task, identity: str, advance: Any
) -> PerplexityRecord:
    """The losses of the target answers of a language model (text) or a SpeechLM (speech), loaded once more."""
    from palimpsest.data.collate import Collator
    from palimpsest.data.features import Features, compute_features
    from palimpsest.evaluation.perplexity import measure_losses
    from palimpsest.models.loading import load_speech_lm, load_text_model

    asked: Any
    dtype = options.dtype or "float32"
    examples = [example for example in task.examples if not example.fault]
    if options.modality == "speech":
        asked, processor = load_speech_lm(where, dtype=dtype, device=device)
        folder = options.out / "features"
        compute_features(asked.encoder, processor, examples, folder, compute=compute.dtype)
        collator = Collator(processor, "speech", Features(folder))
    else:
        asked, processor = load_text_model(where, dtype=dtype, device=device)
        collator = Collator(processor, "text")
    return measure_losses(
        asked,
        collator,
        examples,
        options.batch_size,
        options.out,
        method=str(options.model),
        task=task.name,
        progress=advance,
        compute=compute.dtype,
        identity=identity,
    )


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------
def _lines(rows: Sequence[SampleRow], results: Mapping[str, Any], judged: Judged | None, limit: int) -> Iterator[str]:
    by_chance = {(floor["metric"], floor["floor"]): floor for floor in results["qa_floors"]}
    for record in results["qa"]:
        line = f"{record['metric']:<24} {record['correct']:>4}/{record['n']}  {100 * record['accuracy']:5.1f} %  "
        line += _interval(record)
        for kind, name in FLOORS.items():
            if floor := by_chance.get((record["metric"], kind)):
                line += f"  {name} {100 * floor['value']:.1f} % {_interval(floor)}"
        yield line
    for measured in results.get("perplexity", ()):
        yield (
            f"perplexity               {measured['perplexity']:.4g} ({measured['loss']:.4f} nats per token, "
            f"{measured['n_tokens']} tokens of {measured['n_examples']} answers)"
        )
    if judged is not None and judged.failed:
        first = next(iter(judged.failed))
        yield (
            f"not judged, counted as wrong: {len(judged.failed)} ({', '.join(list(judged.failed)[:5])}), the first "
            f"because {judged.failed[first]} Run again to ask about them again."
        )
    flags: tuple[Literal["empty", "refusal", "loop", "failed"], ...] = ("empty", "refusal", "loop", "failed")
    n_cut = sum(row.get("cut", False) for row in rows)
    counts = {flag: sum(row[flag] for row in rows) for flag in flags} | {"cut": n_cut}
    yield "answers that are          " + ", ".join(f"{flag}: {n}" for flag, n in counts.items())
    if n_cut > MOST_CUT * len(rows):
        yield (
            f"warning: {n_cut} of {len(rows)} answers ({100 * n_cut / len(rows):.0f} %) were cut at {limit} new tokens "
            "without an end, and what would have followed was not scored; raise --max-new-tokens, with another --out."
        )
    yield from (f"failed: {row['id']}: {row['error']}" for row in rows if row["failed"])
    if "word_error_rate" in results:
        yield f"word error rate          {100 * results['word_error_rate']:.1f} %"
    yield f"seconds per question     {results['seconds_per_question']:.2f}"
    yield f"computed in              {results['compute']['dtype']} ({results['compute']['reason']})"


FLOORS = {"unrelated": "unrelated", "echo_in_sentence": "echoed"}


def _interval(record: Mapping[str, Any]) -> str:
    return f"[{100 * record['ci_low']:.1f}, {100 * record['ci_high']:.1f}]"
