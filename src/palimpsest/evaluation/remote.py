"""A model behind an OpenAI-compatible endpoint (vLLM, llama.cpp's server, a hosted API) as an answerer.

>>> endpoint = Endpoint("http://localhost:8000/v1", "my-model")  # doctest: +SKIP
>>> answer = endpoint_answerer(endpoint)  # doctest: +SKIP
>>> rows = answer_questions(answer, task, "text", model=endpoint.identity, out=path)  # doctest: +SKIP

The server applies the chat template and decodes: its template, its arithmetic. It is asked for greedy decoding.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

from palimpsest.data.examples import Example
from palimpsest.evaluation.answers import Answer, Answerer
from palimpsest.evaluation.endpoint import (
    PASSING,
    Completion,
    Endpoint,
    EndpointError,
    NoReply,
    complete,
    plain_session,
    retried,
    served_models,
)
from palimpsest.evaluation.spoken import recordings
from palimpsest.files import UserError
from palimpsest.models import SAMPLE_RATE
from palimpsest.models.prompts import PromptStyle
from palimpsest.records import Modality

OF_THE_QUESTION = {400, 413, 422}  # too long, say; other questions may be answered


def require_endpoint(endpoint: Endpoint) -> Endpoint:
    """The endpoint itself, with the name of the one model that it serves where none was given.

    Raises:
        EndpointError: nobody is there, the key is refused, or it is not clear which model is meant.
    """
    given = endpoint.model is not None
    try:
        with plain_session():
            names = served_models(endpoint)
    except NoReply as error:
        # A key may be good for questions alone, and a server may have no list.
        if error.there and given and error.status != 401:
            return endpoint
        _refused(endpoint, error)
    if given:
        return endpoint
    if len(names) != 1:
        served = f"serves {', '.join(names[:10])}" if names else "lists no model"
        raise EndpointError(f"{endpoint.place} {served}; name one with --model.")
    return endpoint.serving(names[0])


def endpoint_answerer(
    endpoint: Endpoint,
    max_new_tokens: int = 64,
    concurrency: int = 4,
    instruction: str = PromptStyle.speech_instruction,
) -> Answerer:
    """Greedy answers to questions given as text, or as speech where the endpoint's model takes `input_audio`.

    With speech the user turn is the recording, as WAV at 16 kHz, then `instruction`; with text it is the question
    alone. `concurrency`: requests under way at a time. A question that the endpoint refuses, or gives no reply to after
    all attempts, fails alone.

    Raises EndpointError, from the answerer, where asking on is no use: a refused key, an unknown model, nobody there,
    or no answer to any of several questions.
    """
    answered = an_api = False  # an_api: anything but web pages has come

    def asked(messages: list[dict[str, Any]]) -> Completion:
        nonlocal an_api
        try:
            found = complete(endpoint, messages, max_new_tokens)
        except NoReply as error:
            if error.page and not an_api:  # of another server: it will not change
                raise NoReply(str(error), again=False, there=False) from error
            an_api = an_api or error.there
            raise
        an_api = True
        return found

    def ask(stopped: threading.Event, modality: Modality, example: Example) -> Answer | NoReply:
        try:
            messages = [{"role": "user", "content": _content(example, modality, instruction)}]
        except UserError as error:  # its recording cannot be read
            return Answer("", 0, error=str(error))
        try:
            found = retried(
                partial(asked, messages),
                attempts=endpoint.attempts,
                pause=endpoint.pause,
                stopped=stopped.is_set,
            )
        except NoReply as error:
            if not error.there or (error.status is not None and error.status not in PASSING | OF_THE_QUESTION):
                stopped.set()
                _refused(endpoint, error)
            return error
        if found.text is None and not found.cut:
            return NoReply("the endpoint sent a completion without text.")
        text = (found.text or "").strip()  # None: cut within thoughts that the server keeps apart
        return Answer(text, found.n_new or 0, prompt_tokens=found.n_prompt, cut=found.cut)

    def answer(examples: Sequence[Example], modality: Modality) -> list[Answer]:
        nonlocal answered
        if modality not in ("text", "speech"):
            raise UserError(f"An endpoint was asked to answer from {modality}; it can answer from text and speech.")
        stopped = threading.Event()
        with plain_session(), ThreadPoolExecutor(concurrency) as pool:
            found = list(pool.map(partial(ask, stopped, modality), examples))
        failures = [one for one in found if isinstance(one, NoReply)]
        if len(failures) == len(found):
            of_the_endpoint = any(one.status not in OF_THE_QUESTION for one in failures)
            if (len(found) > 1) + (not answered) + of_the_endpoint >= 2:  # one thing alone may be chance
                last = failures[-1]
                remedy = "Raise --url-timeout, or lower --concurrency," if last.late else "Correct that"
                raise EndpointError(
                    f"{endpoint.model} at {endpoint.place} answered none of {len(found)} questions, the last because "
                    f"{last} {remedy} and run again; answers had before are kept."
                )
        answered = answered or any(isinstance(one, Answer) and one.error is None for one in found)
        return [Answer("", 0, error=_sentence(one)) if isinstance(one, NoReply) else one for one in found]

    return answer


def _refused(endpoint: Endpoint, error: NoReply) -> NoReturn:
    """Raise EndpointError for what no further question would change."""
    remedy = {
        None: "start it, or correct --url",
        401: f"set {endpoint.key_variable} to a key that it takes",
        403: f"set {endpoint.key_variable} to a key that it takes",
        404: "check the path in --url and --model, the name that it knows",
    }.get(error.status, "correct --url")
    raise EndpointError(f"{endpoint.place}: {error} To go on, {remedy}; answers had before are kept.") from error


def _sentence(error: NoReply) -> str:
    reason = str(error)
    return reason[0].upper() + reason[1:]


def _content(example: Example, modality: Modality, instruction: str) -> Any:
    if modality == "text":
        return example.question.strip()
    recording = {"data": base64.b64encode(_wav(recordings([example])[0])).decode(), "format": "wav"}
    return [{"type": "input_audio", "input_audio": recording}, {"type": "text", "text": instruction}]


def _wav(audio: Any) -> bytes:
    """16-bit WAV of mono float32 at 16 kHz."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, audio, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()
