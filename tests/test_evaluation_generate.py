from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from palimpsest.commands.evaluate import load_task
from palimpsest.data.examples import Example
from palimpsest.evaluation import answers as generate
from palimpsest.evaluation.answers import (
    Answer,
    answer_questions,
    decode_new,
    further_turn,
    summarise,
    text_answerer,
    verdicts_by_id,
)
from palimpsest.evaluation.generation import end_ids, pad_left
from palimpsest.evaluation.scoring import METRIC_VERSION, METRICS
from palimpsest.evaluation.tasks import Task
from palimpsest.files import UserError, read_json, read_jsonl
from palimpsest.models.embedded import checkpoint
from palimpsest.models.prompts import PromptStyle, turn_end
from tiny import tiny_llama, tiny_tokenizer

CITIES = ["Paris", "Rome", "Madrid", "Lisbon", "Vienna", "Bern", "Oslo"]
TASK = Task(
    "capitals",
    tuple(Example(f"q{i}", f"Capital {'very ' * (3 * i % 7)}{i}?", (c,), c) for i, c in enumerate(CITIES)),
)
TIMELESS = {"seconds": 0.0}


class Oracle:
    """Answers with the gold answer, or "London" for the ids in `wrong`; counts what it was asked."""

    def __init__(self, wrong: Sequence[str] = (), broken: Sequence[str] = (), stop_after: int = 99) -> None:
        self.wrong, self.broken, self.stop_after = wrong, broken, stop_after
        self.asked: list[list[str]] = []

    def __call__(self, examples: Sequence[Example], modality: str) -> list[Answer]:
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append([e.id for e in examples])
        for example in examples:
            if example.id in self.broken:
                raise UserError(f"The recording of {example.id} cannot be read.")
        return [Answer("London" if e.id in self.wrong else f"It is {e.answer}.", 3) for e in examples]


def run(answer: generate.Answerer, out: Path, batch_size: int = 2, **changes: object) -> list[generate.SampleRow]:
    arguments = {
        "task": TASK,
        "modality": "text",
        "model": "m",
        "out": out,
        "batch_size": batch_size,
        **changes,
    }
    return answer_questions(answer, **arguments)  # type: ignore[arg-type]


def timeless(rows: Sequence[generate.SampleRow]) -> list[dict]:
    return [{**row, **TIMELESS} for row in rows]


# -- the loop ------------------------------------------------------------------------------------------------
def test_rows_come_in_the_task_s_order_whatever_the_batch_size(tmp_path: Path) -> None:
    reference = run(Oracle(wrong=["q2"]), tmp_path / "1.jsonl", batch_size=1)
    assert [row["id"] for row in reference] == [e.id for e in TASK.examples]
    assert [row["verdicts"]["token_sequence"] for row in reference] == [i != 2 for i in range(7)]
    for size in (2, 3, 7, 50):
        rows = run(Oracle(wrong=["q2"]), tmp_path / f"{size}.jsonl", batch_size=size)
        assert timeless(rows) == timeless(reference) == timeless(read_jsonl(tmp_path / f"{size}.jsonl"))


def test_longest_questions_come_first_and_progress_is_told(tmp_path: Path) -> None:
    oracle, told = Oracle(), []
    run(oracle, tmp_path / "a.jsonl", batch_size=3, progress=lambda *counts: told.append(counts))
    lengths = [len(e.question) for ids in oracle.asked for i in ids for e in TASK.examples if e.id == i]
    assert lengths == sorted(lengths, reverse=True)
    assert told == [(0, 7), (3, 7), (6, 7), (7, 7)]


def test_a_killed_run_continues_and_ends_the_same(tmp_path: Path) -> None:
    whole = run(Oracle(), tmp_path / "whole.jsonl")
    out = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(Oracle(stop_after=2), out)
    assert len(read_jsonl(out)) == 4  # two batches of two were written before the kill
    second = Oracle()
    assert timeless(run(second, out)) == timeless(whole)
    assert sum(map(len, second.asked)) == 3
    third = Oracle()
    assert timeless(run(third, out)) == timeless(whole)
    assert third.asked == []


def test_a_line_cut_by_a_kill_is_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    plan = Oracle()
    whole = run(plan, out)
    lines = out.read_bytes().splitlines(keepends=True)
    missing = {"q3", "q4", "q5", "q6"}
    for cut in (1, len(lines[3]) // 2, len(lines[3]) - 1):  # the last: the whole row but its line feed
        out.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
        oracle, told = Oracle(), []
        assert timeless(run(oracle, out, notice=told.append)) == timeless(whole)
        assert told == [f"{out}:4 was cut in the middle; 3 answers are kept, this one is asked again."]
        assert timeless(run(Oracle(), out, notice=told.append)) == timeless(whole)
        assert len(told) == 1
        # In the batches of an uninterrupted run, those that lack an answer: padding then is the same to the last bit.
        assert oracle.asked == [ids for ids in plan.asked if missing & set(ids)]


def test_a_second_kill_after_a_cut_line_does_not_spoil_the_file(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    whole = run(Oracle(), out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1][:20])
    with pytest.raises(KeyboardInterrupt):
        run(Oracle(stop_after=1), out)
    assert len(read_jsonl(out)) == 3
    assert timeless(run(Oracle(), out)) == timeless(whole)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"garbage\n", "a.jsonl:2 is not JSON"),
        (b'{"id": "q1"}\n', "a.jsonl:2 is not a row of answers"),
        (b"\xff\xfe\n", "a.jsonl:2 is not JSON"),
        (b"[1]\n", "a.jsonl:2 is not a row"),
        (b"\n", "a.jsonl:2 is not JSON"),
    ],
)
def test_garbage_before_the_last_line_is_refused_and_nothing_is_lost(tmp_path: Path, line: bytes, message: str) -> None:
    out = tmp_path / "a.jsonl"
    run(Oracle(), out)
    lines = out.read_bytes().splitlines(keepends=True)
    damaged = lines[0] + line + b"".join(lines[2:]) + b'{"id": "q'
    out.write_bytes(damaged)
    with pytest.raises(UserError, match=message):
        run(Oracle(), out)
    assert out.read_bytes() == damaged


def test_rows_twice_or_of_other_questions_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    run(Oracle(), out)
    lines = out.read_text("utf-8").splitlines(keepends=True)
    out.write_text("".join([*lines, lines[0]]))
    with pytest.raises(UserError, match=r":8: the id 'q0' is there a second time"):
        run(Oracle(), out)
    out.write_text(lines[0].replace('"q0"', '"q9"'))
    with pytest.raises(UserError, match="'q9' is not in the task"):
        run(Oracle(), out)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "other"}, "model 'm' instead of 'other'"),
        ({"modality": "speech"}, "modality 'text' instead of 'speech'"),
        ({"max_new_tokens": 32}, "max_new_tokens 64 instead of 32"),
        ({"task": Task("capitals", TASK.examples, instruction="Be short.")}, "task_version"),
        ({"task": Task("capitals", TASK.examples[:3])}, "n 7 instead of 3"),
    ],
)
def test_samples_of_another_evaluation_are_refused(tmp_path: Path, changes: dict, named: str) -> None:
    out = tmp_path / "a.jsonl"
    run(Oracle(), out)
    before = out.read_bytes()
    with pytest.raises(UserError, match=named):
        run(Oracle(), out, **changes)
    assert out.read_bytes() == before


def test_samples_without_their_binding_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    run(Oracle(), out)
    assert read_json(tmp_path / "a.json")["task_version"] == TASK.version
    (tmp_path / "a.json").unlink()
    with pytest.raises(UserError, match=r"a\.json does not exist"):
        run(Oracle(), out)


SLOW = """
import multiprocessing, os, shutil, signal, sys, time
from pathlib import Path
from palimpsest.data.examples import Example
from palimpsest.evaluation.answers import Answer, answer_questions
from palimpsest.evaluation.tasks import Task

task = Task("slow", tuple(Example(f"q{i:02d}", f"What is {i:02d}?", (str(i),), str(i)) for i in range(30)))

def work(out, pause):
    def answer(examples, modality):
        time.sleep(pause)
        with out.with_suffix(".asked").open("a") as file:
            file.write("".join(e.id + chr(10) for e in examples))
        return [Answer(f"It is {e.answer}.", 3, f"<user>{e.question}", 5) for e in examples]

    answer_questions(answer, task, "text", model="m", out=out, batch_size=2)

def start(out, pause):
    process = multiprocessing.get_context("fork").Process(target=work, args=(out, pause))  # torch has no threads yet
    process.start()
    return process

def ended(process):
    process.join()
    return process.exitcode

whole, out = (Path(sys.argv[1]) / name for name in ("whole.jsonl", "killed.jsonl"))
uninterrupted, process = start(whole, 0.0), start(out, 0.1)
deadline = time.monotonic() + 120
while not out.exists() or out.read_bytes().count(b"\\n") < 6:
    assert process.is_alive()
    assert time.monotonic() < deadline
    time.sleep(0.005)
os.kill(process.pid, signal.SIGKILL)
assert ended(process) == -signal.SIGKILL
assert ended(uninterrupted) == 0
for file in (out, out.with_suffix(".asked")):
    shutil.copy(file, file.with_suffix(file.suffix + ".left"))
assert ended(start(out, 0.0)) == 0
"""


def test_after_sigkill_it_continues_at_the_next_batch_and_nothing_is_asked_or_written_twice(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SLOW, str(tmp_path)], check=True)
    left = read_jsonl(tmp_path / "killed.jsonl.left")
    assert 6 <= len(left) < 30
    asked = (tmp_path / "killed.asked.left").read_text().splitlines()
    assert timeless(read_jsonl(tmp_path / "killed.jsonl")) == timeless(read_jsonl(tmp_path / "whole.jsonl"))  # type: ignore[arg-type]
    again = (tmp_path / "killed.asked").read_text().splitlines()[len(asked) :]
    # Everything that was not on disk, and nothing that was; at most the batch in progress at the kill is asked twice.
    assert again == [f"q{i:02d}" for i in range(30) if f"q{i:02d}" not in {row["id"] for row in left}]
    assert len(set(asked) & set(again)) <= 2


# -- failures ------------------------------------------------------------------------------------------------
def test_a_failed_sample_is_listed_and_counted_wrong(tmp_path: Path) -> None:
    rows = run(Oracle(broken=["q1", "q4"]), tmp_path / "a.jsonl", batch_size=3)
    assert [row["id"] for row in rows if row["failed"]] == ["q1", "q4"]
    assert rows[1]["error"] == "The recording of q1 cannot be read."
    records = summarise(rows, "base", TASK, "text")
    assert {r["metric"]: (r["n"], r["correct"], r["n_failed"], r["n_empty"]) for r in records} == dict.fromkeys(
        METRICS, (7, 5, 2, 0)
    )
    assert verdicts_by_id(rows, "substring")["q4"] is False


def test_a_failed_sample_is_asked_again_by_the_next_run_and_the_others_are_not(tmp_path: Path) -> None:
    whole = run(Oracle(), tmp_path / "whole.jsonl", batch_size=3)
    out, said = tmp_path / "a.jsonl", []
    run(Oracle(broken=["q1", "q4"]), out, batch_size=3)
    still = Oracle(broken=["q4"])
    assert [row["id"] for row in run(still, out, batch_size=3, notice=said.append) if row["failed"]] == ["q4"]
    assert said == [f"{out}: questions that had failed are asked again: q1, q4."]
    repaired = Oracle()
    assert timeless(run(repaired, out, batch_size=3)) == timeless(whole) == timeless(read_jsonl(out))  # type: ignore[arg-type]
    assert len(repaired.asked) == 1, "only the batch that lacks an answer"
    run(last := Oracle(), out, batch_size=3)
    assert last.asked == []


def test_a_kill_while_failed_samples_are_asked_again_leaves_no_id_twice(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    whole = run(Oracle(), tmp_path / "whole.jsonl", batch_size=1)
    run(Oracle(broken=["q1", "q4", "q6"]), out, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        run(Oracle(stop_after=1), out, batch_size=1)
    assert len({row["id"] for row in read_jsonl(out)}) == len(read_jsonl(out)) == 5
    assert timeless(run(Oracle(), out, batch_size=1)) == timeless(whole)


def test_a_run_in_which_everything_failed_goes_on_when_the_cause_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=r"Correct that and run again"):
        run(Oracle(broken=[e.id for e in TASK.examples]), out)
    assert not any(row["failed"] for row in run(Oracle(), out))


def test_a_recording_that_is_another_one_now_is_asked_again(tmp_path: Path) -> None:
    files = [tmp_path / f"{e.id}.flac" for e in TASK.examples]
    for file in files:
        file.write_bytes(file.name.encode())
    spoken = Task("capitals", tuple(replace(e, audio=f) for e, f in zip(TASK.examples, files, strict=True)))
    out, said = tmp_path / "a.jsonl", []
    arguments = {"task": spoken, "modality": "speech", "batch_size": 1}
    run(Oracle(), out, **arguments)
    files[3].write_bytes(b"another voice")
    oracle = Oracle()
    run(oracle, out, notice=said.append, **arguments)
    assert oracle.asked == [["q3"]]
    assert said == [f"{out}: questions whose recording is another one now are asked again: q3."]
    run(typed := Oracle(), tmp_path / "text.jsonl", task=spoken)
    files[3].write_bytes(b"a third one")
    run(typed_again := Oracle(), tmp_path / "text.jsonl", task=spoken)
    assert typed.asked
    assert typed_again.asked == [], "what was typed does not depend on the recording"


def test_rows_of_a_version_without_the_newer_fields_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    run(Oracle(), out)
    older = [{key: row[key] for key in row if key in generate.REQUIRED} for row in read_jsonl(out)]
    out.write_text("".join(json.dumps(row) + "\n" for row in older))
    run(oracle := Oracle(), out)
    assert oracle.asked == []


def test_a_run_in_which_everything_fails_is_an_error_not_zero_percent(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"None of the 7 questions .* The recording of q0 cannot be read"):
        run(Oracle(broken=[e.id for e in TASK.examples]), tmp_path / "a.jsonl")


def test_defects_stop_the_run(tmp_path: Path) -> None:
    def defective(examples: Sequence[Example], modality: str) -> list[Answer]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(defective, tmp_path / "a.jsonl")
    with pytest.raises(RuntimeError, match="1 answers to 2 examples"):
        run(lambda examples, modality: [Answer("Paris", 1)], tmp_path / "b.jsonl")


def test_empty_refused_and_looping_answers_are_flagged(tmp_path: Path) -> None:
    said = {"q0": " … ", "q1": "I'm sorry, I can't.", "q2": "Madrid Madrid Madrid Madrid Madrid Madrid"}
    rows = run(lambda batch, _: [Answer(said.get(e.id, e.answer), 1) for e in batch], tmp_path / "a.jsonl")
    flags = {name: [row["id"] for row in rows if row[name]] for name in ("empty", "refusal", "loop", "failed")}
    assert flags == {"empty": ["q0"], "refusal": ["q1"], "loop": ["q2"], "failed": []}
    assert summarise(rows, "base", TASK, "text")[0]["n_empty"] == 1


def test_summary_by_hand(tmp_path: Path) -> None:
    rows = run(Oracle(wrong=["q0", "q1"]), tmp_path / "a.jsonl")
    first = summarise(rows, "lora", TASK, "cascade")[0]
    assert first == {
        "method": "lora",
        "task": "capitals",
        "modality": "cascade",
        "n": 7,
        "correct": 5,
        "accuracy": pytest.approx(5 / 7),
        "ci_low": pytest.approx(0.3589, abs=1e-4),  # Wilson, (p̂ + z²/2n ± z·sqrt(p̂q̂/n + z²/4n²)) / (1 + z²/n)
        "ci_high": pytest.approx(0.9178, abs=1e-4),
        "metric": "token_sequence",
        "metric_version": METRIC_VERSION,
        "n_empty": 0,
        "n_failed": 0,
        "n_refusal": 0,
        "n_loop": 0,
        "n_cut": 0,
        "source": "measured",
    }
    with pytest.raises(UserError, match="6 answers of lora"):
        summarise(rows[1:], "lora", TASK, "cascade")


# -- a language model as an answerer -------------------------------------------------------------------------
@pytest.mark.parametrize("chat", [True, False])
def test_answers_of_a_model_do_not_depend_on_the_batch_size(tmp_path: Path, chat: bool) -> None:
    model, tokenizer = tiny_llama(eos_token_id=3), tiny_tokenizer(chat)
    answer = text_answerer(model, tokenizer, max_new_tokens=12)
    reference = run(answer, tmp_path / "1.jsonl", batch_size=1)
    assert any(row["response"] for row in reference)
    assert len({row["response"] for row in reference}) > 1
    for size in (3, 7):
        assert timeless(run(answer, tmp_path / f"{size}.jsonl", batch_size=size)) == timeless(reference)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0},
        {"suppress_tokens": list(range(7, 200))},
        {"bad_words_ids": [[number] for number in range(7, 200)]},
        {"forced_eos_token_id": 3, "encoder_no_repeat_ngram_size": 1, "no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 9.0, "sequence_bias": [[[number], -99.0] for number in range(7, 200)]},
        {"max_time": 1e-9, "min_new_tokens": 6, "output_hidden_states": "last", "prompt_lookup_num_tokens": 2},
    ],
)
def test_a_model_s_answer_is_the_greedy_continuation_of_its_template(own: dict[str, Any]) -> None:
    """Token by token from the logits, without generate, cache or padding, and without the checkpoint's own taste."""
    model, tokenizer = tiny_llama(eos_token_id=3), tiny_tokenizer()
    settings = model.generation_config
    for key, value in own.items():
        setattr(settings, key, value)
    (given,) = text_answerer(model, tokenizer, max_new_tokens=6, style=PromptStyle("Be short."))(
        TASK.examples[:1], "text"
    )
    prompt = "<s><system>Be short.<end>\n<user>Capital 0?<end>\n<assistant>"
    assert given.prompt == prompt
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert given.prompt_tokens == len(ids)
    new: list[int] = []
    while len(new) < 6 and new[-1:] not in ([2], [3]):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    assert given.n_new_tokens == len(new)
    assert model.generation_config is settings
    assert given.response == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_instruction_and_plain_prompt() -> None:
    model = tiny_llama()
    templated = text_answerer(model, tiny_tokenizer(), 2, instruction="One word.")(TASK.examples[:1], "text")
    assert templated[0].prompt == "<s><user>One word.\nCapital 0?<end>\n<assistant>"
    plain = text_answerer(model, tiny_tokenizer(chat=False), 2)(TASK.examples[:1], "text")
    assert plain[0].prompt == "Question: Capital 0?\nAnswer:"


@pytest.mark.parametrize("chat", [True, False])
def test_exactly_one_begin_of_text_with_a_tokenizer_that_adds_its_own(chat: bool) -> None:
    tokenizer, seen = tiny_tokenizer(chat), []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model = tiny_llama()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    text_answerer(model, tokenizer, 1)(TASK.examples[:1], "text")
    assert tokenizer("a")["input_ids"][0] == 1
    assert seen[0][0].tolist().count(1) == 1
    assert seen[0][0, 0] == 1


def test_the_end_of_the_template_ends_an_answer_that_nothing_else_would_end() -> None:
    """A base model's tokenizer ends texts by another token than its template ends turns."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.eos_token, model.generation_config.eos_token_id = "</s>", 2
    assert end_ids(model, tokenizer) == [2, 3]
    lyon, on = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Lyon", "<user>Paris?<end>"))
    written = iter([*lyon, 3, *on])
    model.generate = lambda input_ids, **settings: torch.cat([input_ids, torch.tensor([[*written]])], dim=1)
    (answer,) = text_answerer(model, tokenizer, 32)(TASK.examples[:1], "text")
    assert (answer.response, answer.n_new_tokens, answer.cut) == ("Lyon", 5, False)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, None),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),  # no token ends its turns
        ("{% for m in messages %}<user>{{ m.content }}{{ ' <system>' if m.role == 'assistant' }}{% endfor %}", 6),
        (
            "{% for m in messages %}<user>{{ m.content }}<s>  <end>{% endfor %}",
            3,
        ),  # what begins a text ends nothing
        ("{% for m in messages %}{{ raise_exception('no') }}{% endfor %}", None),  # refused where a prompt is written
    ],
)
def test_what_ends_a_turn_of_a_template(template: str | None, end: int | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert turn_end(tokenizer) == end


def test_every_end_id_ends_an_answer_and_a_missing_pad_id_is_no_problem() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.eos_token_id = [2, 50]
    assert end_ids(model, tokenizer) == [3, 2, 50]
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    answer = text_answerer(model, tokenizer, 8)
    together = answer(TASK.examples, "text")
    assert together == [answer([example], "text")[0] for example in TASK.examples]


def test_decoding_stops_at_the_first_end_id() -> None:
    tokenizer = tiny_tokenizer()
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    new = torch.tensor([[a, b, 3, 0], [a, 2, b, b], [3, 0, 0, 0], [a, b, a, b]])
    assert decode_new(tokenizer, new, [3, 2]) == [("ab", 3, False), ("a", 2, False), ("", 1, False), ("abab", 4, True)]
    assert decode_new(tokenizer, torch.tensor([[a, b, 3]]), [3]) == [("ab", 3, False)], "an end as the last token"


def test_a_base_model_s_answer_ends_where_the_next_turn_begins() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    spoken = [
        " Paris.\nQuestion: What is next?\nAnswer: Rome",
        " Paris.\n\n Answer: Rome",
        " Paris. Question: asked on the same line",
        "\nQuestion: What",
        " Paris\nQuestions: few",
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in spoken]
    width = max(map(len, ids))
    new = torch.tensor([row + [2] + [0] * (width - len(row)) for row in ids])
    found = decode_new(tokenizer, new, [2], further_turn(tokenizer))
    assert [one.text for one in found] == ["Paris.", "Paris.", spoken[2].strip(), "", spoken[4].strip()]
    assert not any(one.cut for one in found)
    assert found[0].n_new_tokens == len(" Paris.\nQuestion:"), "one token a byte, up to the colon"
    assert found[2].n_new_tokens == len(spoken[2]) + 1
    cut = decode_new(tokenizer, torch.tensor([ids[0][:30], ids[2][:30]]), [2], further_turn(tokenizer))
    assert [(one.text, one.cut) for one in cut] == [("Paris.", False), (spoken[2][:30].strip(), True)]
    assert further_turn(tiny_tokenizer()) is None, "a chat model may write such a line in its answer"


class Parrot(torch.nn.Module):
    """A "language model" that goes on with `text`, whatever it is asked."""

    def __init__(self, tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.config, self.generation_config = tiny_llama().config, tiny_llama().generation_config
        self.device, self.ids = torch.device("cpu"), tokenizer(text, add_special_tokens=False)["input_ids"]
        self.get_input_embeddings = tiny_llama().get_input_embeddings

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: object) -> torch.Tensor:
        new = torch.tensor([self.ids[:max_new_tokens]] * len(input_ids))
        return torch.cat([input_ids, new], dim=1)


def test_a_model_without_a_chat_template_is_scored_on_its_own_answer_alone(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    parrot = Parrot(tokenizer, " Paris.\nQuestion: Capital of Spain?\nAnswer: Madrid.")
    rows = run(text_answerer(parrot, tokenizer), tmp_path / "a.jsonl")
    assert {row["response"] for row in rows} == {"Paris."}
    assert [row["id"] for row in rows if row["verdicts"]["token_sequence"]] == ["q0"], "Madrid is not its answer"


def test_answers_that_reach_the_limit_are_counted(tmp_path: Path) -> None:
    answers = {e.id: Answer("It is", 4, cut=i < 3) for i, e in enumerate(TASK.examples)}
    rows = run(lambda batch, _: [answers[e.id] for e in batch], tmp_path / "a.jsonl")
    assert [row["cut"] for row in rows] == [True] * 3 + [False] * 4
    assert {record["n_cut"] for record in summarise(rows, "base", TASK, "text")} == {3}
    (given,) = text_answerer(tiny_llama(eos_token_id=3), tiny_tokenizer(), max_new_tokens=2)(TASK.examples[:1], "text")
    assert (given.n_new_tokens, given.cut) == (2, True)
    older = [{key: row[key] for key in row if key != "cut"} for row in rows]
    assert "n_cut" not in summarise(older, "base", TASK, "text")[0], "not known of rows of an older version"  # type: ignore[arg-type]


def test_pad_left_by_hand() -> None:
    input_ids, mask = pad_left([[5], [6, 7, 8]], pad=9)
    assert input_ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_a_language_model_answers_text_only_and_within_its_positions(tmp_path: Path) -> None:
    answer = text_answerer(tiny_llama(max_position_embeddings=50), tiny_tokenizer(), max_new_tokens=8)
    with pytest.raises(UserError, match="from text only"):
        answer(TASK.examples[:1], "speech")
    rows = run(answer, tmp_path / "a.jsonl", batch_size=7)  # the longer questions fail, the others are answered
    assert {row["failed"] for row in rows} == {True, False}
    assert all("does not fit" in str(row["error"]) for row in rows if row["failed"])
    assert json.loads((tmp_path / "a.jsonl").read_text("utf-8").splitlines()[0])["id"] == "q0"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stops_the_evaluation_and_is_named(tmp_path: Path, value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight .* 1 of 1536 values .* question 'q"):
        run(text_answerer(model, tiny_tokenizer(), 4), tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def test_logits_that_are_not_finite_though_the_weights_are_name_the_question(tmp_path: Path) -> None:
    model = tiny_llama()

    def overflow(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        logits[-1, -1, 7] = float("inf")
        return logits

    model.lm_head.register_forward_hook(overflow)
    longest = max(TASK.examples, key=lambda e: len(e.question))
    with pytest.raises(UserError, match=rf"numbers at question '{longest.id}' though its weights are finite"):
        run(text_answerer(model, tiny_tokenizer(), 4), tmp_path / "a.jsonl", batch_size=1)


def test_tokens_excluded_with_minus_infinity_are_fine(tmp_path: Path) -> None:
    model = tiny_llama()

    def exclude(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        logits[..., :5] = float("-inf")
        return logits

    model.lm_head.register_forward_hook(exclude)
    assert not any(row["failed"] for row in run(text_answerer(model, tiny_tokenizer(), 4), tmp_path / "a.jsonl"))


@pytest.mark.slow
def test_in_float32_the_embedded_model_answers_the_same_in_batches_of_any_size(tmp_path: Path) -> None:
    folder = checkpoint("embedded:smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = text_answerer(model, AutoTokenizer.from_pretrained(folder))
    task = load_task("facts", split="heldout", limit=24)
    found = {}
    for size in (1, 5, 24):
        rows = answer_questions(answer, task, "text", model="x", out=tmp_path / f"{size}.jsonl", batch_size=size)
        found[size] = timeless(rows)
    assert found[1] == found[5] == found[24]
    assert len({row["response"] for row in found[1]}) > 12


# -- the reference number ------------------------------------------------------------------------------------
DATA = Path(os.environ.get("PALIMPSEST_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not (DATA / "llama_questions").is_dir(), reason="needs the Llama Questions folder")
def test_the_embedded_model_on_llama_questions(tmp_path: Path) -> None:
    """79 of 300 under plain token-sequence containment, counted by an independent script beforehand."""
    folder = checkpoint("embedded:smollm2-135m-instruct")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    task = load_task(str(DATA / "llama_questions"))
    out, short = tmp_path / "a.jsonl", 32
    answer = text_answerer(model, tokenizer, short)
    rows = answer_questions(answer, task, "text", model="x", out=out, max_new_tokens=short)
    correct = {record["metric"]: record["correct"] for record in summarise(rows, "base", task, "text")}
    assert correct == {"token_sequence": 79, "token_sequence_numbers": 92, "substring": 87, "any_order": 80}
