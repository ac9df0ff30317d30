"""A small HTTP server that answers as vLLM does: /v1/chat/completions, /v1/models, and its errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]  # status, and what is sent: a text as it stands, anything else as JSON


class ChatServer:
    """`reply(messages, number of the request)` is the text of a completion, or a whole reply."""

    def __init__(self, reply: Callable[[list[dict[str, Any]], int], str | Reply], models: Sequence[str]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most_at_a_time = self._under_way = 0
        lock, chat = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                chat.paths.append(self.path)
                found = self.path.split("?")[0].endswith("/models")
                listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
                self.send(200 if found else 404, listed if found else {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    chat.requests.append(body)
                    chat.headers.append({name.lower(): value for name, value in self.headers.items()})
                    chat.paths.append(self.path)
                    number = len(chat.requests)
                    chat._under_way += 1
                    chat.most_at_a_time = max(chat.most_at_a_time, chat._under_way)
                if body["model"] not in models:
                    said: Any = 404, _error(f"The model `{body['model']}` does not exist.", 404)
                else:
                    said = reply(body["messages"], number)
                with lock:
                    chat._under_way -= 1
                self.send(*(said if isinstance(said, tuple) else (200, completion(said, body))))

            def send(self, status: int, content: Any) -> None:
                payload = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                with suppress(OSError):  # whoever asked is gone
                    self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _error(message: str, status: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


def completion(text: str | None, body: dict[str, Any], finish: str = "stop") -> dict[str, Any]:
    """What vLLM sends; a word counts as a token."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": []},
                "logprobs": None,
                "finish_reason": finish,
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": len((text or "").split()), "total_tokens": 9},
    }


def refusal(status: int, message: str = "no") -> Reply:
    return status, _error(message, status)


@contextmanager
def chat_server(
    reply: Callable[[list[dict[str, Any]], int], str | Reply], models: Sequence[str] = ("tiny",)
) -> Iterator[ChatServer]:
    server = ChatServer(reply, models)
    try:
        yield server
    finally:
        server.close()
