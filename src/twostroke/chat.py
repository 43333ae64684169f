"""A chat with a running server, in the terminal."""

import http.client
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from twostroke.config import api_keys
from twostroke.errors import StartupError

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 300.0  # between two pieces of an answer
_DONE = b"[DONE]"


class Message(Struct, frozen=True):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatBody(Struct, frozen=True, omit_defaults=True):
    """Body of ``/v1/chat/completions``."""

    model: str
    messages: list[Message]
    temperature: float
    max_tokens: int | None = None
    stream: bool = False


class _Delta(Struct, frozen=True):
    content: str | None = None


class _Choice(Struct, frozen=True):
    delta: _Delta = _Delta()


class _ErrorDetail(Struct, frozen=True):
    message: str = "unknown error"


class _Event(Struct, frozen=True):
    """What a chat reads of a stream event, or of an error reply."""

    choices: list[_Choice] = []
    error: _ErrorDetail | None = None


class _Model(Struct, frozen=True):
    id: str


class _Models(Struct, frozen=True):
    data: list[_Model]


class Refused(Exception):
    """The server answered with an error. It is shown as a line, and the chat goes on."""


class Chat:
    """A conversation. Its history is what the server is sent each time; the server keeps none."""

    def __init__(self, url: str, *, system: str | None, temperature: float, max_tokens: int | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StartupError(f"{url!r} is not a URL such as http://127.0.0.1:8000")
        self._url = url
        self._https = parts.scheme == "https"
        self._address = parts.netloc
        self._path = parts.path.rstrip("/")
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._key = {"authorization": f"Bearer {keys[0]}"} if (keys := api_keys()) else {}
        self._opening = [Message("system", system)] if system else []
        self._history = list(self._opening)
        self._model = ""

    def run(self) -> int:
        """Talk until the input ends; the exit code: 1 if piped input got an error for an answer.

        Raises:
            StartupError: there is no server at the URL.
        """
        self._model = self._ask_model()
        terminal = sys.stdin.isatty()
        if terminal:
            import readline  # noqa: F401 - importing it gives input() line editing and history

            print(f"{self._model} at {self._url}. /reset forgets, /exit leaves, Ctrl-C stops an answer.")
        refused = False
        for line in _lines(terminal):
            if line == "/exit":
                break
            if line == "/reset":
                self._history = list(self._opening)
            elif line:
                refused |= not self._turn(line)
        return int(refused and not terminal)

    def _turn(self, question: str) -> bool:
        """Ask and print. What was said before Ctrl-C stopped an answer stays in the history; a failed turn does not."""
        self._history.append(Message("user", question))
        said: list[str] = []
        try:
            with closing(self._answer()) as pieces:
                for piece in pieces:
                    said.append(piece)
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" …", end="")
        except (Refused, OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
            self._history.pop()
            if said:
                print()
            print(f"twostroke: {error or type(error).__name__}", file=sys.stderr)
            return False
        print()
        self._history.append(Message("assistant", "".join(said)))
        return True

    def _answer(self) -> Generator[str, None, None]:
        """The pieces of the answer to the history. Closing the connection, at any end, aborts the request."""
        body = ChatBody(self._model, self._history, self._temperature, self._max_tokens, stream=True)
        connection = self._connect()
        try:
            headers = {"content-type": "application/json", **self._key}
            connection.request("POST", f"{self._path}/v1/chat/completions", msgspec.json.encode(body), headers)
            reply = connection.getresponse()
            if reply.status != 200:
                raise Refused(_error_of(reply.read()) or f"status {reply.status}")
            yield from _pieces(reply)
        finally:
            connection.close()

    def _ask_model(self) -> str:
        try:
            connection = self._connect()
            connection.request("GET", f"{self._path}/v1/models", headers=self._key)
            reply = connection.getresponse()
            body = reply.read()
            connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise StartupError(f"no server answers at {self._url} ({error}); start one with `twostroke up`") from error
        if reply.status != 200:
            raise StartupError(f"{self._url} cannot answer yet: {_error_of(body) or f'status {reply.status}'}")
        try:
            return msgspec.json.decode(body, type=_Models).data[0].id
        except (msgspec.MsgspecError, IndexError) as error:
            raise StartupError(f"{self._url} is not an OpenAI-compatible server") from error

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self._address, timeout=_CONNECT_SECONDS)
        connection.connect()
        connection.sock.settimeout(_ANSWER_SECONDS)
        return connection


def _pieces(reply: http.client.HTTPResponse) -> Iterator[str]:
    """The text in a stream of events.

    Raises:
        Refused: an event is an error, or the stream breaks off.
    """
    for line in reply:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == _DONE:
            return
        event = msgspec.json.decode(data, type=_Event)
        if event.error:
            raise Refused(event.error.message)
        for choice in event.choices:
            if choice.delta.content:
                yield choice.delta.content
    raise Refused("the server broke off")


def _error_of(body: bytes) -> str | None:
    try:
        event = msgspec.json.decode(body, type=_Event)
    except msgspec.MsgspecError:
        return None
    return event.error.message if event.error else None


def _lines(terminal: bool) -> Iterator[str]:
    """What the user says: on a terminal with a prompt until Ctrl-D, else line by line."""
    while True:
        try:
            yield input("> " if terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()  # nothing to stop: a fresh line
    if terminal:
        print()
