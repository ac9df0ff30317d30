"""`palimpsest evaluate --url`, against a real HTTP server on localhost that answers as vLLM does."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import soundfile

from chat_server import chat_server, completion, refusal
from forked import forked
from palimpsest.commands import evaluate
from palimpsest.data.examples import Example
from palimpsest.data.speech import read_audio
from palimpsest.evaluation import endpoint as requests
from palimpsest.evaluation.endpoint import Endpoint, EndpointError, NoReply, complete, plain_session, retried
from palimpsest.evaluation.remote import endpoint_answerer
from palimpsest.files import UserError, read_json, read_jsonl

KEY = "sk-secret-4711"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, instead of sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(requests.time, "sleep", slept.append)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return slept


@pytest.fixture
def task(tmp_path: Path) -> str:
    rows = [
        {"id": f"q{i}", "question": f"What is {i}?", "answer": f"It is {i}.", "answers": [str(i)]} for i in range(10)
    ]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "numbers.jsonl")


def evaluated(url: str, task: str, out: Path, model: str | None = "tiny", **options: Any) -> list[str]:
    return list(evaluate.run(evaluate.Options(model, task, out, **{"url": url, "batch_size": 4, **options})))


def number(messages: list[dict[str, Any]]) -> int:
    """Of the question."""
    return int(messages[-1]["content"].removeprefix("What is ").removesuffix("?"))


def knows_even_ones(messages: list[dict[str, Any]], _: int) -> str:
    asked = number(messages)
    return f"That is {asked}." if asked % 2 == 0 else "Who knows"


def test_questions_are_asked_scored_and_bound(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # which is about the hub
    out, two = tmp_path / "out", threading.Barrier(2, timeout=20)

    def together(messages: list[dict[str, Any]], n: int) -> str:
        two.wait()  # for a second request that is under way
        return knows_even_ones(messages, n)

    with chat_server(together) as server:
        lines = evaluated(server.url, task, out, model=None, max_new_tokens=9, url_body='{"seed": 3}')
        rows, results = read_jsonl(out / "samples-text.jsonl"), read_json(out / "results-text.json")
        assert [row["id"] for row in rows] == [f"q{i}" for i in range(10)]
        assert [row["response"] for row in rows[:2]] == ["That is 0.", "Who knows"]
        assert {(row["n_new_tokens"], row["prompt_tokens"], row["prompt"], row["cut"]) for row in rows} == {
            (3, 7, None, False),
            (2, 7, None, False),
        }
        record = next(row for row in results["qa"] if row["metric"] == "token_sequence_numbers")
        assert (record["method"], record["correct"], record["n"], record["n_failed"]) == ("tiny", 5, 10, 0)
        assert results["endpoint"] == {"url": server.url, "model": "tiny", "body": {"seed": 3}}
        assert results["compute"]["dtype"] == "unknown"
        assert any(line.startswith("token_sequence_numbers      5/10") for line in lines)
        body = server.requests[0]
        assert {key: body[key] for key in ("model", "temperature", "max_tokens", "seed")} == {
            "model": "tiny",
            "temperature": 0,
            "max_tokens": 9,
            "seed": 3,
        }
        assert body["messages"] == [{"role": "user", "content": body["messages"][0]["content"]}]
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        assert 2 <= server.most_at_a_time <= 4
        assert set(server.paths) == {"/v1/models", "/v1/chat/completions"}
        bound = read_json(out / "samples-text.json")
        assert bound["model"] == f'tiny at {server.url} with {{"seed": 3}}'
        assert all(KEY.encode() not in file.read_bytes() for file in out.rglob("*") if file.is_file())

        evaluated(server.url, task, out, max_new_tokens=9, url_body='{"seed": 3}')
        assert len(server.requests) == 10, "what is there is not asked again"
        with pytest.raises(
            UserError, match=r"holds another evaluation \(model .* instead of .*delete it or write elsewh"
        ):
            evaluated(server.url, task, out, max_new_tokens=9)
    with chat_server(knows_even_ones) as elsewhere:
        with pytest.raises(UserError, match="holds another evaluation"):
            evaluated(elsewhere.url, task, out, max_new_tokens=9, url_body='{"seed": 3}')
        assert not elsewhere.requests
    assert huggingface_hub.get_session().follow_redirects, "the hub's session is as before"
    assert huggingface_hub.get_session().event_hooks["request"]


def test_no_key_is_sent_where_none_is_set_not_even_the_hubs(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_hub")
    monkeypatch.setenv("MY_KEY", KEY)
    with chat_server(knows_even_ones) as server:
        evaluated(server.url, task, tmp_path / "a")
        assert not any("authorization" in headers for headers in server.headers)
        evaluated(server.url, task, tmp_path / "b", url_key="MY_KEY", limit=1)
        assert server.headers[-1]["authorization"] == f"Bearer {KEY}"


def test_what_passes_is_asked_again_with_longer_pauses(task: str, tmp_path: Path, no_waiting: list[float]) -> None:
    def shaky(messages: list[dict[str, Any]], n: int) -> Any:
        return {1: refusal(429), 2: refusal(503), 3: (200, "<html>busy</html>")}.get(n) or knows_even_ones(messages, n)

    with chat_server(shaky) as server:
        evaluated(server.url, task, tmp_path / "out", concurrency=1)
        assert len(server.requests) == 13
    assert no_waiting == [1, 2, 4]
    assert not any(row["failed"] for row in read_jsonl(tmp_path / "out" / "samples-text.jsonl"))


def test_the_servers_own_pause_is_kept_within_reason(no_waiting: list[float]) -> None:
    pauses = [NoReply("busy.", pause=seconds) for seconds in (0, 30, 3600)]

    def ask() -> str:
        if pauses:
            raise pauses.pop(0)
        return "here"

    assert retried(ask, attempts=4, pause=1) == "here"
    assert no_waiting == [1, 30, 60]


def test_a_question_that_is_refused_fails_alone_and_is_asked_again(task: str, tmp_path: Path) -> None:
    def too_long(messages: list[dict[str, Any]], n: int) -> Any:
        if number(messages) == 3:
            return refusal(400, "This model's maximum context length is 8 tokens.")
        return refusal(500) if number(messages) == 6 else knows_even_ones(messages, n)

    out = tmp_path / "out"
    with chat_server(too_long) as server:
        lines = evaluated(server.url, task, out)
        assert len(server.requests) == 8 + 1 + 4, "what cannot pass is asked once, what may pass four times"
    failed = {row["id"]: row["error"] for row in read_jsonl(out / "samples-text.jsonl") if row["failed"]}
    assert failed == {
        "q3": "The endpoint answered 400 Bad Request (This model's maximum context length is 8 tokens).",
        "q6": "The endpoint answered 500 Internal Server Error (no).",
    }
    assert any(line.startswith("failed: q3: The endpoint answered 400") for line in lines)


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            refusal(401, "Invalid API key."),
            r"answered 401 Unauthorized \(Invalid API key\)\. To go on, set OPENAI_API_KEY",
        ),
        (refusal(403), "set OPENAI_API_KEY to a key that it takes"),
        ((307, {}), "answered 307"),
        ((200, "{cut"), "answered none of 4 questions, the last because the endpoint sent no JSON"),
        ((200, {"choices": []}), r"none of 4 questions, the last because the endpoint sent no chat completion: \{"),
        (refusal(503, "loading"), r"none of 4 questions, the last because the endpoint answered 503 .*\(loading\)"),
        (
            refusal(400, "temperature is not supported"),
            r"none of 4 questions, .*\(temperature is not supported\)\. Corr",
        ),
    ],
)
def test_an_endpoint_that_answers_nothing_stops_the_run(task: str, tmp_path: Path, reply: Any, sentence: str) -> None:
    with chat_server(lambda messages, n: reply) as server:
        with pytest.raises(EndpointError, match=sentence) as raised:
            evaluated(server.url, task, tmp_path / "out")
        assert len(server.requests) <= 16, "the first batch, at most four times"
    assert "\n" not in str(raised.value)
    assert read_jsonl_or_nothing(tmp_path / "out" / "samples-text.jsonl") == []


def read_jsonl_or_nothing(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.exists() else []


def test_who_is_not_there_and_what_is_not_served(task: str, tmp_path: Path) -> None:
    with pytest.raises(
        EndpointError, match=r"http://127\.0\.0\.1:9/v1: the endpoint could not be reached .*start it, or"
    ):
        evaluated("http://127.0.0.1:9", task, tmp_path / "out")
    with chat_server(knows_even_ones, models=["a", "b"]) as server:
        with pytest.raises(EndpointError, match=r"serves a, b; name one with --model"):
            evaluated(server.url, task, tmp_path / "out", model=None)
        with pytest.raises(
            EndpointError, match=r"answered 404 .*The model `tiny` does not exist.*--model, the name that"
        ):
            evaluated(server.url, task, tmp_path / "out")
        assert len(server.requests) <= 4
    assert not (tmp_path / "out" / "results-text.json").exists()


def test_a_web_page_in_place_of_answers_is_not_asked_again(task: str, tmp_path: Path, no_waiting: list[float]) -> None:
    with chat_server(lambda messages, n: (200, "\n<!doctype html><html>")) as server:
        with pytest.raises(EndpointError, match=r"v1: the endpoint sent a web page .*\. To go on, .*correct --url"):
            evaluated(server.url, task, tmp_path / "out")
        assert len(server.requests) <= 4, "those that were under way"
    assert no_waiting == []


def test_the_remedy_for_late_answers_is_the_option(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any) -> Any:
        raise NoReply("the endpoint did not answer within 1 seconds.", late=True)

    monkeypatch.setattr("palimpsest.evaluation.remote.complete", late)
    said = r"within 1 seconds\. Raise --url-timeout, or lower --concurrency, and run again"
    with chat_server(lambda messages, n: "yes") as server, pytest.raises(EndpointError, match=said):
        evaluated(server.url, task, tmp_path / "out")


def test_an_answer_that_is_late_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = time.monotonic() + 0.5

    def slow(messages: list[dict[str, Any]], n: int) -> str:
        while time.monotonic() < wait:
            pass
        return "late"

    with chat_server(slow) as server, plain_session():
        with pytest.raises(NoReply, match=r"not answer within 0\.1 seconds") as raised:
            complete(Endpoint(server.url, "tiny", timeout=0.1), [{"role": "user", "content": "?"}])
        assert raised.value.late


def test_cut_thoughts_and_an_answer_without_text() -> None:
    replies = {
        "cut": completion("one two", {"model": "tiny"}, "length"),
        "thought": completion(None, {"model": "tiny"}, "length"),
        "nothing": completion(None, {"model": "tiny"}),
        "uncounted": {"choices": [{"message": {"content": " yes "}}]},
        "halved": completion("a \ud83d b \U0001f600", {"model": "tiny"}),
    }
    examples = [Example(name, name, ("x",), "x") for name in replies]
    with chat_server(lambda messages, n: (200, replies[messages[0]["content"]])) as server:
        answers = endpoint_answerer(Endpoint(server.url, "tiny"))(examples, "text")
    cut, thought, nothing, uncounted, halved = answers
    assert halved.response == "a \ufffd b \U0001f600"
    assert (cut.response, cut.cut, cut.n_new_tokens) == ("one two", True, 2)
    assert (thought.response, thought.cut, thought.error) == ("", True, None)
    assert nothing.error == "The endpoint sent a completion without text."
    assert (uncounted.response, uncounted.n_new_tokens, uncounted.prompt_tokens) == ("yes", 0, None)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h:8000/v1", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/v1/", "http://h:8000/v1/chat/completions"),
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h/api/openai", "http://h/api/openai/chat/completions"),
        ("http://h/x/chat/completions?api-version=1", "http://h/x/chat/completions?api-version=1"),
    ],
)
def test_odd_addresses(url: str, address: str) -> None:
    endpoint = Endpoint(url, "m")
    assert endpoint.address == address
    assert endpoint.place == address.partition("/chat/completions")[0], "what may hold a key is not shown"


@pytest.mark.parametrize("path", ["", "/v1", "/some/where", "/v1/chat/completions"])
def test_odd_addresses_are_asked(path: str) -> None:
    with chat_server(lambda messages, n: "yes") as server, plain_session():
        root = server.url.removesuffix("/v1")
        assert complete(Endpoint(root + path, "tiny"), [{"role": "user", "content": "?"}]).text == "yes"
        assert server.paths == [Endpoint(root + path, "tiny").address.removeprefix(root)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "--url 'localhost:8000' is no http address"),
        ({"url": "http://h:port/v1"}, "no http address"),
        ({"url": "https://me:pw@h/v1"}, "would be written to disk; set OPENAI_API_KEY"),
        ({"url": None, "model": None}, "give --model, or the address of an endpoint with --url"),
        ({"model": " "}, "--model is empty"),
        ({"perplexity": True}, "leave out --perplexity"),
        ({"dtype": "bfloat16"}, "leave out --dtype"),
        ({"url_body": "{"}, "--url-body is not JSON"),
        ({"url_body": "[1]"}, "--url-body is no JSON object"),
    ],
)
def test_bad_options_are_refused_first(task: str, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluated(**{"url": "http://h/v1", "task": task, "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_recordings_are_sent_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", rng.normal(0, 0.1, 8_000), 16_000)
    rows = [{"id": n, "question": f"What {n}?", "answer": "It.", "audio": f"{n}.wav"} for n in "ab"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    heard: list[Any] = []

    def hears(messages: list[dict[str, Any]], n: int) -> str:
        audio, text = messages[0]["content"]
        assert text == {"type": "text", "text": "Answer the question asked in the speech."}
        assert (audio["type"], audio["input_audio"]["format"]) == ("input_audio", "wav")
        heard.append(soundfile.read(io.BytesIO(base64.b64decode(audio["input_audio"]["data"])), dtype="float32"))
        return "It."

    with chat_server(hears) as server:
        evaluated(server.url, str(tmp_path / "t.jsonl"), tmp_path / "out", modality="speech", concurrency=1)
    assert all(row["verdicts"]["token_sequence"] for row in read_jsonl(tmp_path / "out" / "samples-speech.jsonl"))
    assert [rate for _, rate in heard] == [16_000, 16_000]
    for (samples, _), name in zip(heard, "ab", strict=True):
        assert np.array_equal(samples, read_audio(tmp_path / f"{name}.wav"))


CHILD = """
import os
from pathlib import Path
from palimpsest.commands import evaluate
Path({pid!r}).write_text(str(os.getpid()))
options = evaluate.Options("tiny", {task!r}, Path({out!r}), url={url!r}, batch_size=3, concurrency=1)
print("\\n".join(evaluate.run(options)))
"""


def test_a_killed_run_ends_as_one_that_was_not(task: str, tmp_path: Path) -> None:
    """SIGKILL while the eighth question is asked: two batches of three are on disk, nothing of the third."""

    def child(url: str, out: Path) -> Any:
        code = CHILD.format(pid=str(tmp_path / "pid"), task=task, out=str(out), url=url)
        return forked("import palimpsest.commands.evaluate, palimpsest.evaluation.remote, huggingface_hub", code)

    def killing(messages: list[dict[str, Any]], n: int) -> str:
        if n == 8:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        return knows_even_ones(messages, n)

    def rows(out: Path) -> list[Any]:
        return [{**row, "seconds": 0} for row in read_jsonl(out / "samples-text.jsonl")]

    with chat_server(killing) as server:
        assert child(server.url, tmp_path / "killed").returncode == -signal.SIGKILL
        assert len(rows(tmp_path / "killed")) == 6
        done = child(server.url, tmp_path / "killed")
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == 8 + 4
        evaluated(server.url, task, tmp_path / "whole", batch_size=3)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_the_command_line_needs_no_model_with_an_address() -> None:
    from typer.testing import CliRunner

    from palimpsest.cli import app

    result = CliRunner().invoke(app, ["evaluate", "--url", "nowhere", "--task", "facts", "--out", "x"])
    assert isinstance(result.exception, UserError), result.output
    assert "no http address" in str(result.exception)
