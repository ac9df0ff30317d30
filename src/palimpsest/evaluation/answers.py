"""Answering the questions of a task: greedy, in batches, one JSON line per answer, resumable after a kill.

A model enters as an `Answerer`, a function from examples to answers, so that language models, speech LLMs and
cascades are evaluated by the same code. `text_answerer` makes one of any Hugging Face causal language model;
cascade.py makes one of a speech recogniser and a text answerer.

>>> answer = text_answerer(language_model, tokenizer, max_new_tokens=32)  # doctest: +SKIP
>>> rows = answer_questions(answer, task, "text", model=digest, out=path)  # doctest: +SKIP
>>> records = summarise(rows, "base", task, "text")  # doctest: +SKIP

Beside the answers `NAME.jsonl` stands `NAME.json`, the binding: what they are answers of. Rows of another task version,
modality, model or length are refused, never mixed in.

Shapes: batch = prompts answered together, seq = tokens of the longest prompt, new = tokens generated.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from typing_extensions import TypedDict

from palimpsest.data.examples import Example
from palimpsest.evaluation.endpoint import EndpointError
from palimpsest.evaluation.finite import NotFiniteError, finite_logits
from palimpsest.evaluation.generation import generation_settings, pad_left, without_own_settings
from palimpsest.evaluation.scoring import METRIC_VERSION, METRICS, score, words
from palimpsest.evaluation.tasks import Task
from palimpsest.files import (
    UserError,
    append_jsonl,
    drop_cut_line,
    hash_file,
    read_json,
    read_lines,
    write_json,
    write_jsonl,
)
from palimpsest.intervals import wilson
from palimpsest.models.cache import generation_cache
from palimpsest.models.compute import Arithmetic, many_forwards
from palimpsest.models.prompts import NEXT_TURN, PromptStyle, encode, render, tokenise, writes_tokens
from palimpsest.options import require_shape
from palimpsest.parallel import from_rank_0, gathered, rank, world_size
from palimpsest.records import Modality, QARecord

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


REMEDY = "restore the file, or delete it and run again"


class _Always(TypedDict):
    """What every line of a samples file has, of whatever version."""

    id: str
    question: str
    answers: list[str]
    prompt: str | None  # as the model saw it, template included
    prompt_tokens: int | None
    transcript: str | None  # of a cascade: what the recogniser wrote down
    response: str
    n_new_tokens: int
    verdicts: dict[str, bool]  # per metric
    empty: bool  # answered, but without a letter or digit
    refusal: bool  # see `is_refusal`
    loop: bool  # see `is_loop`
    failed: bool  # no answer could be had; counted as wrong
    error: str | None
    seconds: float  # the batch's time divided by its size


class SampleRow(_Always, total=False):
    """One line of a samples file; the fields here were added after the first files were written."""

    cut: bool  # stopped at max_new_tokens, without an end; what would have followed is not known
    recording: str | None  # what `recording_hash` gives of the recording that was asked; of text None


class _Bound(TypedDict):
    """What the answers of a samples file are answers of; it stands beside the file."""

    schema: int
    task: str
    task_version: str
    metric_version: str
    modality: str
    max_new_tokens: int
    model: str
    n: int


class Binding(_Bound, total=False):
    """With what was added after the first files were written."""

    compute: str  # the arithmetic; absent: float32
    answered_by: str  # the model's files alone, without a recogniser in front of it and whatever the dtype


REQUIRED, KNOWN = _Always.__annotations__.keys(), SampleRow.__annotations__.keys()


def resume(
    out: Path,
    binding: Mapping[str, Any],
    recordings: Mapping[str, str | None],
    notice: Callable[[str], None] | None = None,
) -> list[SampleRow]:
    """The rows of an earlier run of the same evaluation that still hold; [] and a new binding where there is none.

    A question that failed is asked again, for what it failed of may have been repaired, and so is one whose recording
    is another one now. Their rows, and a last line that was cut short, are removed from the file, so that appending
    can go on, and `notice` gets a sentence for each kind.

    Args:
        recordings: for each question id of the task, `recording_hash` of its recording; None where it is asked as text.

    Raises:
        UserError: the rows belong to another evaluation, or a complete line is not a row of a question of the task.
    """
    sidecar = out.with_suffix(".json")
    if not out.exists():
        write_json(sidecar, binding)
        return []
    before = read_json(sidecar)
    if not isinstance(before, dict):
        raise UserError(f"{sidecar} is damaged; {REMEDY}.")
    before = {"compute": "float32", **{key: binding[key] for key in ("answered_by",) if key in binding}, **before}
    differing = [
        f"{key} {before.get(key)!r} instead of {value!r}" for key, value in binding.items() if before.get(key) != value
    ]
    if differing:
        raise UserError(f"{out} holds another evaluation ({', '.join(differing)}); delete it or write elsewhere.")
    rows = _rows(out, recordings.keys())
    notice = notice or (lambda sentence: None)
    if drop_cut_line(out):  # killed in the middle of a line: that question is asked again
        notice(f"{out}:{len(rows) + 1} was cut in the middle; {len(rows)} answers are kept, this one is asked again.")
    failed = [row["id"] for row in rows if row["failed"]]
    changed = [
        row["id"]
        for row in rows
        if not row["failed"] and row.get("recording", recordings[row["id"]]) != recordings[row["id"]]
    ]
    if failed:
        notice(f"{out}: questions that had failed are asked again: {_some(failed)}.")
    if changed:
        notice(f"{out}: questions whose recording is another one now are asked again: {_some(changed)}.")
    if failed or changed:
        again = {*failed, *changed}
        rows = [row for row in rows if row["id"] not in again]
        write_jsonl(out, rows)
    return rows


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def recording_hash(example: Example) -> str | None:
    """Identifies the bytes of the example's recording; None where it has none or the file cannot be read."""
    try:
        return None if example.audio is None else hash_file(example.audio)[:16]
    except OSError:
        return None


def read_finished(out: Path) -> tuple[dict[str, Any], list[SampleRow]]:
    """The binding and the rows of an evaluation that ran to its end; changes nothing.

    Raises:
        UserError: there is none, a line is cut or damaged, rows are missing, or an id comes twice.
    """
    if not out.is_file():
        raise UserError(f"{out} does not exist; run the evaluation first.")
    binding = read_json(out.with_suffix(".json"))
    require_shape(binding, Binding, str(out.with_suffix(".json")), REMEDY)
    rows = _rows(out)
    if len(rows) != binding["n"]:
        raise UserError(
            f"{out} holds {len(rows)} of {binding['n']} answers; run the evaluation again, it continues there."
        )
    return binding, rows


def models_in_folder(folder: Path, besides: Collection[str] = ()) -> dict[str, Path]:
    """A file of each model, by its own files, that answers or losses in a folder of `palimpsest evaluate` are of.

    besides: names of files that are not looked at. Earlier versions did not record of what model losses are, nor,
    behind a recogniser, answers; such files are not there.
    """
    found: dict[str, Path] = {}
    for file in sorted([*folder.glob("samples-*.json"), *folder.glob("losses-*.json")]):
        binding = {} if file.name in besides else read_json(file)
        if not isinstance(binding, dict):
            continue
        of_model = binding.get("model") if binding.get("modality") in ("text", "speech") else None
        if name := binding.get("answered_by", of_model):
            found.setdefault(str(name), file)
    return found


def _rows(out: Path, ids: Set[str] | None = None) -> list[SampleRow]:
    """Every complete line, of a question in `ids`; without `ids` every line, of any question."""
    rows: dict[str, SampleRow] = {}
    for where, row in read_lines(out, REMEDY, finished=ids is None):
        if not isinstance(row, dict) or not REQUIRED <= row.keys() <= KNOWN:
            raise UserError(f"{where} is not a row of answers; {REMEDY}.")
        require_shape(row, SampleRow, where, REMEDY)
        id = row["id"]
        if id in rows or (ids is not None and id not in ids):
            what = "is there a second time" if id in rows else "is not in the task"
            raise UserError(f"{where}: the id {id!r} {what}; {REMEDY}.")
        rows[id] = row  # type: ignore[assignment]
    return list(rows.values())


# ------------------------------------------------------------------------------------------------------------
# What went wrong in an answer, by plain rules over its words
# ------------------------------------------------------------------------------------------------------------
_REFUSAL = re.compile(
    r"(?:(?:i am|i m|im) )?(?:very )?(?:sorry|afraid|unable to|not able to|not sure)\b"
    r"|i (?:apologi[sz]e|can ?not|can t|could not|couldn t|(?:don t|do not) (?:know|have))\b"
    r"|as an ai\b|unfortunately\b|it is not possible to\b"
)


def is_refusal(response: str) -> bool:
    """Whether the response opens with an English apology or with not knowing or not being able to."""
    return _REFUSAL.match(" ".join(words(response))) is not None


def is_loop(response: str) -> bool:
    """Whether some run of words stands at least three times in a row, over at least six words in all."""
    spoken = words(response)
    return any(
        spoken[start : start + width * repeats] == spoken[start : start + width] * repeats
        for width in range(1, len(spoken) // 3 + 1)
        for repeats in [max(3, -(-6 // width))]  # one word six times, two or more words three times
        for start in range(len(spoken) - width * repeats + 1)
    )


class Answer(NamedTuple):
    """What a model answered to one example; see `SampleRow` for the optional fields."""

    response: str
    n_new_tokens: int  # the end-of-turn token included, padding after it not
    prompt: str | None = None
    prompt_tokens: int | None = None
    transcript: str | None = None
    cut: bool = False
    error: str | None = None  # why there is none; the others of its batch were answered


Answerer = Callable[[Sequence[Example], Modality], list[Answer]]
"""One answer per example, in order; UserError, OSError or ValueError where an example cannot be answered,
NotFiniteError where the model's logits are NaN or infinite, EndpointError where nobody answers: these stop it."""


# ------------------------------------------------------------------------------------------------------------
# The main path
# ------------------------------------------------------------------------------------------------------------
def answer_questions(
    answer: Answerer,
    task: Task,
    modality: Modality,
    *,
    model: str,
    out: Path,
    answered_by: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    compute: Arithmetic | Literal["unknown"] = "float32",
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
    distributed: bool = False,
) -> list[SampleRow]:
    """Answer every question of the task and write `out`, a JSON-lines file with one `SampleRow` each.

    Rows are appended and flushed batch by batch; a second call continues after the last complete batch. When
    all questions are answered, the file is put into the order of the task, so that it does not depend on
    `batch_size`.

    An example that cannot be answered (its recording is unreadable, say) is asked again alone, then listed
    with `failed` and `error` and counted as wrong; the next call asks it again. Errors other than UserError,
    OSError and ValueError are defects, or memory running out: they stop the run, and the next call continues
    where this one stopped.

    Args:
        model: fingerprint of everything `answer` uses (weights, system prompt); it binds the file to it.
        answered_by: of the model's files alone, without the recogniser or a dtype; recorded beside it.
        max_new_tokens, compute: what `answer` was made with ("unknown": behind an endpoint); recorded, and part of
            what a resumed file must match.
        progress: called as progress(answered, total), first with what an earlier run left.
        notice: gets a sentence when questions of an earlier run are asked again, see `resume`.
        distributed: every rank calls, with a replica of the model, and answers every n-th of the batches, which are
            those of one process. They go on together, a batch each, and rank 0 appends the rows of all: what a kill
            can lose is one batch of each. Every rank has the rows of all.

    Raises:
        UserError: `out` belongs to another evaluation or is damaged (see `resume`), every single question
            failed, the model gives NaN or infinite logits, or its endpoint is of no use.
    """
    if batch_size < 1:
        raise UserError(f"A batch size of {batch_size} was given; use 1 or more.")
    binding = {
        "schema": 1,
        "task": task.name,
        "task_version": task.version,
        "metric_version": METRIC_VERSION,
        "modality": modality,
        "max_new_tokens": max_new_tokens,
        "model": model,
        "n": len(task.examples),
        "compute": compute,
        **({} if answered_by is None else {"answered_by": answered_by}),
    }

    def begin() -> tuple[dict[str, str | None], list[SampleRow]]:
        recordings = {e.id: None if modality == "text" else recording_hash(e) for e in task.examples}
        return recordings, resume(out, binding, recordings, notice)

    place, ranks = (rank(), world_size()) if distributed else (0, 1)
    recordings, before = from_rank_0(begin) if distributed else begin()
    rows = {row["id"]: row for row in before}
    # Longest first: memory runs out in the first batch or never. Similar lengths together: little padding.
    # A batch that an earlier run left unfinished is answered again as a whole: its padding, and with it the last bits
    # of every logit, depends on who is in it, and a resumed run must end as an uninterrupted one.
    plan = sorted(task.examples, key=lambda e: (-len(e.question), e.id))
    if progress is not None:
        progress(len(rows), len(task.examples))
    planned = (plan[start : start + batch_size] for start in range(0, len(plan), batch_size))
    todo = [batch for batch in planned if not all(example.id in rows for example in batch)]
    for start in range(0, len(todo), ranks):
        mine = todo[start + place] if start + place < len(todo) else []
        new = [row for row in _answer_batch(answer, mine, modality) if row["id"] not in rows]
        if distributed:
            new = list(itertools.chain.from_iterable(gathered(new)))
        for row in new:
            row["recording"] = recordings[row["id"]]
        if place == 0:
            append_jsonl(out, new)
        rows |= {row["id"]: row for row in new}
        if progress is not None:
            progress(len(rows), len(task.examples))
    ordered = [rows[example.id] for example in task.examples]
    if place == 0:
        write_jsonl(out, ordered)
    if all(row["failed"] for row in ordered):
        raise UserError(
            f"None of the {len(ordered)} questions of {task.name} could be answered, the first because: "
            f"{ordered[0]['error']} Correct that and run again."
        )
    return ordered


def _answer_batch(answer: Answerer, batch: Sequence[Example], modality: Modality) -> list[SampleRow]:
    if modality != "text" and any(example.fault for example in batch):
        asked = iter(_answer_batch(answer, [example for example in batch if not example.fault], modality))
        return [
            _row(example, Answer("", 0), 0.0, f"{example.fault} ({example.audio})") if example.fault else next(asked)
            for example in batch
        ]
    if not batch:
        return []
    started = time.perf_counter()
    try:
        answers = answer(batch, modality)
    except (NotFiniteError, EndpointError):  # no fault of the question, and the next ones would fail alike
        raise
    except (UserError, OSError, ValueError) as error:
        if len(batch) == 1:
            return [_row(batch[0], Answer("", 0), time.perf_counter() - started, str(error) or repr(error))]
        return [row for example in batch for row in _answer_batch(answer, [example], modality)]
    seconds = (time.perf_counter() - started) / len(batch)
    if len(answers) != len(batch):  # not a ValueError: no single example is to blame
        raise RuntimeError(f"the answerer gave {len(answers)} answers to {len(batch)} examples")
    return [_row(example, given, seconds, given.error) for example, given in zip(batch, answers, strict=True)]


def _row(example: Example, given: Answer, seconds: float, error: str | None = None) -> SampleRow:
    failed = error is not None
    verdicts = score(given.response, example.answers, example.question)
    return {
        "id": example.id,
        "question": example.question,
        "answers": list(example.answers),
        "prompt": given.prompt,
        "prompt_tokens": given.prompt_tokens,
        "transcript": given.transcript,
        "response": given.response,
        "n_new_tokens": given.n_new_tokens,
        "verdicts": verdicts,
        "empty": not failed and not words(given.response),
        "refusal": is_refusal(given.response),
        "loop": is_loop(given.response),
        "failed": failed,
        "error": error,
        "seconds": seconds,
        "cut": given.cut,
    }


# ------------------------------------------------------------------------------------------------------------
# A causal language model as an answerer
# ------------------------------------------------------------------------------------------------------------
def text_answerer(
    language_model: Any,
    tokenizer: Any,
    max_new_tokens: int = 64,
    style: PromptStyle | None = None,
    instruction: str | None = None,
    compute: Arithmetic = "float32",
) -> Answerer:
    """Greedy answers of a Hugging Face causal language model to questions given as text.

    The prompt is the tokenizer's chat template with the question (after `instruction`, if any) as the user
    turn, and the system turn, date and arguments of `style`; without a template it is "Question: …", a line
    feed and "Answer:". It is tokenised once and holds exactly one begin-of-text. An answer ends at the
    tokenizer's end-of-text, at the end ids of the model's generation settings and at what ends a turn of the
    template; nothing else is taken from these settings (`without_own_settings`). Without a template it also ends
    where the model begins a line with "Question:" or "Answer:".

    `compute` is the arithmetic; in float32 the answers do not depend on the batch. The model is put into eval mode.
    """
    style = style or PromptStyle()
    settings = generation_settings(language_model, tokenizer, max_new_tokens)
    longest = getattr(language_model.config, "max_position_embeddings", None)

    def answer(examples: Sequence[Example], modality: Modality) -> list[Answer]:
        if modality != "text":
            raise UserError(f"A language model was asked to answer from {modality}; it can answer from text only.")
        prompts, ids = [], []
        for example in examples:
            question = example.question.strip()
            user = question if instruction is None else f"{instruction}\n{question}"
            if writes_tokens(tokenizer):
                ids.append(tokenise(tokenizer, user, style)[0])
                prompts.append(tokenizer.decode(ids[-1], skip_special_tokens=False))
            else:
                prompt, templated = render(tokenizer, user, style)
                prompts.append(prompt)
                ids.append(encode(tokenizer, prompt, start=not templated))
            if longest is not None and len(ids[-1]) + max_new_tokens > longest:
                raise UserError(
                    f"Question {example.id!r} takes {len(ids[-1])} tokens and with {max_new_tokens} new ones "
                    f"does not fit into the model's {longest} positions; shorten it."
                )
        input_ids, attention_mask = pad_left(ids, settings["pad_token_id"])
        language_model.eval()
        with torch.inference_mode(), many_forwards(language_model, compute), without_own_settings(language_model):
            output = language_model.generate(
                input_ids=input_ids.to(language_model.device),
                attention_mask=attention_mask.to(language_model.device),
                logits_processor=finite_logits(language_model, names_of(examples)),
                **generation_cache(language_model),
                **settings,
            )
        new = output[:, input_ids.shape[1] :]
        return decoded(tokenizer, new, settings, prompts, map(len, ids), further_turn(tokenizer))

    return answer


def names_of(examples: Sequence[Example]) -> list[str]:
    """What an error calls the rows of a batch."""
    return [f"question {example.id!r}" for example in examples]


class Decoded(NamedTuple):
    text: str
    n_new_tokens: int  # up to the end, the end id included
    cut: bool  # there was no end: generation stopped at its limit


def decode_new(
    tokenizer: Any, new: Int[Tensor, "batch new"], end: Sequence[int], turn: re.Pattern[str] | None = None
) -> list[Decoded]:
    """Every row of generated tokens up to its first end id, or to where its text begins a further `turn`."""
    decoded = []
    for row in new.tolist():
        stop = next((position for position, id in enumerate(row) if id in end), None)
        kept = row if stop is None else row[:stop]
        text, n_new, cut = (
            tokenizer.decode(kept, skip_special_tokens=True),
            len(kept) + (stop is not None),
            stop is None,
        )
        if turn is not None and (found := turn.search(text)):
            # As many tokens as it takes to begin the turn: what generation would have made, had it stopped there.
            reached = (
                n for n in range(1, len(kept)) if turn.search(tokenizer.decode(kept[:n], skip_special_tokens=True))
            )
            text, n_new, cut = text[: found.start()], next(reached, len(kept)), False
        decoded.append(Decoded(text.strip(), n_new, cut))
    return decoded


def decoded(
    tokenizer: Any,
    new: Int[Tensor, "batch new"],
    settings: Mapping[str, Any],
    prompts: Iterable[str | None],
    lengths: Iterable[int],
    turn: re.Pattern[str] | None = None,
) -> list[Answer]:
    """The answers in what `generate` made with `settings`, with the prompts and their lengths in tokens."""
    texts = decode_new(tokenizer, new, settings["eos_token_id"] or (), turn)
    return [
        Answer(one.text, one.n_new_tokens, prompt, n, cut=one.cut)
        for one, prompt, n in zip(texts, prompts, lengths, strict=True)
    ]


def further_turn(tokenizer: Any) -> re.Pattern[str] | None:
    """What ends an answer besides the end ids: without a chat template, the next turn of the plain prompt."""
    return NEXT_TURN if tokenizer.chat_template is None and not writes_tokens(tokenizer) else None


# ------------------------------------------------------------------------------------------------------------
# Summary
# ------------------------------------------------------------------------------------------------------------
def summarise(rows: Sequence[SampleRow], method: str, task: Task, modality: Modality) -> list[QARecord]:
    """One record per metric; failed and empty samples stay in the denominator, as wrong.

    Raises:
        UserError: when the rows are not the task's questions in the task's order.
    """
    if [row["id"] for row in rows] != [example.id for example in task.examples]:
        raise UserError(
            f"The {len(rows)} answers of {method} are not those to the {len(task.examples)} questions of "
            f"{task.name}; evaluate the whole task first."
        )
    return [
        qa_record(rows, verdicts_by_id(rows, metric), method, task, modality, metric, METRIC_VERSION)
        for metric in METRICS
    ]


def qa_record(
    rows: Sequence[SampleRow],
    verdicts: Mapping[str, bool],
    method: str,
    task: Task,
    modality: Modality,
    metric: str,
    metric_version: str,
) -> QARecord:
    """The accuracy of `rows` by any metric that gives a verdict per question id: a rule, or a judge."""
    correct = sum(verdicts[row["id"]] for row in rows)
    low, high = wilson(correct, len(rows))
    record: QARecord = {
        "method": method,
        "task": task.name,
        "modality": modality,
        "n": len(rows),
        "correct": correct,
        "accuracy": correct / len(rows),
        "ci_low": low,
        "ci_high": high,
        "metric": metric,
        "metric_version": metric_version,
        "n_empty": sum(row["empty"] for row in rows),
        "n_failed": sum(row["failed"] for row in rows),
        "n_refusal": sum(row["refusal"] for row in rows),
        "n_loop": sum(row["loop"] for row in rows),
        "source": "measured",
    }
    if all("cut" in row for row in rows):  # of older rows it is not known
        record["n_cut"] = sum(row["cut"] for row in rows)
    return record


def verdicts_by_id(rows: Iterable[SampleRow], metric: str) -> dict[str, bool]:
    """What `comparison.pairs.compare` takes for one method: question id -> right? Failed samples are wrong."""
    return {row["id"]: row["verdicts"][metric] for row in rows}
