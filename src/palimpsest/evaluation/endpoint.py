"""One request to an OpenAI-compatible endpoint: a greedy chat completion, and when to try again.

Requests are those of `huggingface_hub.InferenceClient`. The key is read from an environment variable for each of them,
and stands nowhere else.

>>> with plain_session():  # doctest: +SKIP
...     complete(Endpoint("http://localhost:8000/v1", "my-model"), [{"role": "user", "content": "Who?"}]).text
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from palimpsest.files import UserError

T = TypeVar("T")
KEY_VARIABLE = "OPENAI_API_KEY"
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # may be over when asked again
LONGEST_PAUSE = 60.0  # seconds, whatever a server asks for


class EndpointError(UserError):
    """No question will be answered by asking on: a refused key, an unknown model, nobody there."""


class NoReply(Exception):
    """A request came to nothing; the message, the end of a sentence with its full stop, says why."""

    def __init__(
        self,
        reason: str,
        *,
        status: int | None = None,
        pause: float = 0.0,
        again: bool = True,
        there: bool = True,
        late: bool = False,
        page: bool = False,
    ) -> None:
        super().__init__(reason)
        self.status = status  # of HTTP, where there was an answer that is no success
        self.pause = pause  # seconds that the server asks to wait
        self.again = again  # whether the same request may be answered later
        self.there = there  # whether anybody was reached
        self.late = late  # whether it took longer than the endpoint's timeout
        self.page = page  # whether there was a web page in place of it: of another server, or of one that is busy


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently.

    `url` is the base of the API, such as http://localhost:8000/v1, or the whole address of its chat completions.
    """

    url: str
    model: str | None  # the name that the endpoint knows; None: the one that it serves, see remote.require_endpoint
    key_variable: str = KEY_VARIABLE
    timeout: float = 120.0  # seconds without a byte
    attempts: int = 4
    pause: float = 1.0  # seconds before the second attempt; twice that before the third, and so on
    body: Mapping[str, Any] = field(default_factory=dict)  # further fields of every request
    option: str = "--url"  # what errors call the address

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number
            usable = False
        if not usable:
            raise UserError(f"{self.option} {self.url!r} is no http address; give the base such as https://HOST/v1.")
        if parts.username is not None or parts.password is not None:
            raise UserError(
                f"{self.option} has a name or password in it, which would be written to disk; set {self.key_variable}."
            )

    @property
    def address(self) -> str:
        """Of the chat completions: /v1 is added where the address has no path at all."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/") or "/v1"
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        return parts._replace(path=path, fragment="").geturl()

    @property
    def place(self) -> str:
        """The base as it is shown and written: without what follows a question mark, which may hold a key."""
        return urlsplit(self.address)._replace(query="").geturl().removesuffix("/chat/completions")

    @property
    def identity(self) -> str:
        """What answers are bound to. Weights behind an endpoint have no fingerprint: a name is all that is known."""
        further = f" with {json.dumps(self.body, sort_keys=True, ensure_ascii=False)}" if self.body else ""
        return f"{self.model} at {self.place}{further}"

    @property
    def key(self) -> str:
        """Raises UserError for one that no header can hold."""
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError(f"{self.key_variable} holds characters that no key has; set it again.")
        return key

    def serving(self, model: str) -> Endpoint:
        return replace(self, model=model)


class Completion(NamedTuple):
    text: str | None  # None: the message has no text
    cut: bool  # stopped at its limit of tokens
    n_prompt: int | None  # tokens, where the server counts them
    n_new: int | None


def complete(endpoint: Endpoint, messages: Sequence[Mapping[str, Any]], max_tokens: int | None = None) -> Completion:
    """The first choice of a chat completion at temperature 0. Within `plain_session`.

    Raises:
        NoReply: there is none.
    """
    from huggingface_hub import InferenceClient

    key = endpoint.key
    # Without a key of its own the client would send the hub's token, to whatever host this is.
    headers: Any = None if key else {"authorization": None}
    client = InferenceClient(base_url=endpoint.address, api_key=key or None, timeout=endpoint.timeout, headers=headers)
    with _failures(endpoint):
        reply: Any = client.chat_completion(
            list(messages),  # type: ignore[arg-type]  # it takes plain mappings too
            model=endpoint.model,
            max_tokens=max_tokens,
            temperature=0.0,
            extra_body=dict(endpoint.body),
        )
    try:
        choice = reply["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise NoReply(f"the endpoint sent no chat completion: {json.dumps(reply)[:80]}.") from error
    if not isinstance(text, str | None):
        raise NoReply("the endpoint sent a completion whose content is no text.", again=False)
    if text is not None:  # a server that counts in UTF-16 may cut a character in half, which no file can hold
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    usage = reply.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    n_prompt, n_new = (
        count if isinstance(count := counts.get(name), int) else None for name in ("prompt_tokens", "completion_tokens")
    )
    return Completion(text, finish == "length", n_prompt, n_new)


def served_models(endpoint: Endpoint) -> list[str]:
    """The names that the endpoint lists. Within `plain_session`.

    Raises:
        NoReply: there is no list.
    """
    from huggingface_hub import get_session

    headers = {"authorization": f"Bearer {key}"} if (key := endpoint.key) else {}
    address = endpoint.address.replace("/chat/completions", "/models")
    with _failures(endpoint):
        listed = get_session().get(address, headers=headers, timeout=endpoint.timeout).json()
    try:
        return [str(model["id"]) for model in listed["data"]]
    except (KeyError, TypeError) as error:
        raise NoReply("the endpoint sent no list of models.") from error


def retried(ask: Callable[[], T], *, attempts: int, pause: float, stopped: Callable[[], bool] = lambda: False) -> T:
    """What `ask` gives, tried again after `pause` seconds, twice that, and so on, or after what the server asks for.

    Raises:
        NoReply: the last one, or the first that asking again does not help.
    """
    for attempt in range(1, attempts + 1):
        if stopped():
            raise NoReply("asking was stopped.")
        try:
            return ask()
        except NoReply as error:
            if not error.again or attempt == attempts:
                raise
            time.sleep(min(max(pause * 2 ** (attempt - 1), error.pause), LONGEST_PAUSE))
    raise ValueError(f"{attempts} attempts are none")


# ---------------------------------------------------------------------------------------------------------------------
# The hub's client on hosts that are not the hub
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def plain_session() -> Iterator[None]:
    """Within the block the hub's HTTP session, one for the process, is fit for any host.

    It follows no redirect, which would carry key and questions to another host, reports every status but success, and
    is not stopped by HF_HUB_OFFLINE, which is about the hub.
    """
    from huggingface_hub import get_session

    session = get_session()
    before = session.follow_redirects, session.event_hooks
    session.follow_redirects, session.event_hooks = False, {"response": [_require_success]}
    try:
        yield
    finally:
        session.follow_redirects, session.event_hooks = before


def _require_success(response: Any) -> None:
    """Before the hub's own reading of statuses, which takes every host for the hub."""
    response.read()
    if response.is_success:
        if response.text.lstrip().startswith("<"):
            raise NoReply("the endpoint sent a web page where JSON belongs.", page=True)
        return
    seconds = response.headers.get("retry-after", "").strip()
    raise NoReply(
        f"the endpoint answered {response.status_code} {response.reason_phrase}{_said(response)}.",
        status=response.status_code,
        pause=float(seconds) if seconds.isdecimal() else 0.0,
        again=response.status_code in PASSING,
    )


def _said(response: Any) -> str:
    """What the server says is wrong, in brackets: {"error": {"message": …}}, as OpenAI and vLLM do; or its text."""
    try:
        said = response.json()
        for key in ("error", "message"):
            said = said.get(key, said) if isinstance(said, Mapping) else said
    except ValueError:
        said = "" if "html" in response.headers.get("content-type", "") else response.text
    words = " ".join(said.split()) if isinstance(said, str) else ""
    return f" ({words[:200].rstrip('.')})" if words else ""


@contextmanager
def _failures(endpoint: Endpoint) -> Iterator[None]:
    """Whatever can go wrong in a request, as NoReply."""
    from huggingface_hub import errors

    transport: Any = errors.HTTPError  # type: ignore[attr-defined]  # httpx's, by whatever name the hub has it
    try:
        yield
    except errors.InferenceTimeoutError as error:
        raise NoReply(f"the endpoint did not answer within {endpoint.timeout:g} seconds.", late=True) from error
    except transport as error:
        there = type(error).__name__ not in ("ConnectError", "ConnectTimeout")
        raise NoReply(f"the endpoint could not be reached ({error or type(error).__name__}).", there=there) from error
    except ValueError as error:
        raise NoReply(f"the endpoint sent no JSON ({error}).") from error
