"""The three ways in which servers are asked, and how their streams are read. Pure."""

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from twostroke.bench.workload import Item, words

Dialect = Literal["completions", "chat", "generate"]
PATHS: dict[Dialect, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "generate": "/generate"}
MAX_EVENT = 4 << 20  # bytes; /generate repeats the whole text in every event

Count = Annotated[int, Meta(ge=0, le=1 << 40)]


class Asking(Struct, frozen=True):
    """How every request of a run is put."""

    dialect: Dialect = "completions"
    model: str | None = None
    text: bool = False  # prompts as words, for servers that take no token ids; chat always has words
    salt: str | None = None  # keeps a run from the prefix cache of earlier ones, where servers know ``cache_salt``
    ignore_eos: bool = True  # generate as many tokens as asked for

    def body(self, item: Item) -> bytes:
        """The request, as JSON."""
        if self.dialect == "generate":
            prompt: dict[str, object] = {"text": words(item.prompt)} if self.text else {"input_ids": item.prompt}
            knobs = {"max_new_tokens": item.output_len, "temperature": 0, "ignore_eos": self.ignore_eos}
            return msgspec.json.encode({**prompt, "sampling_params": knobs, "stream": True})
        if self.dialect == "chat":
            prompt = {"messages": [{"role": "user", "content": words(item.prompt)}]}
        else:
            prompt = {"prompt": words(item.prompt) if self.text else item.prompt}
        optional = {
            "model": self.model,
            "cache_salt": self.salt,
            "ignore_eos": self.ignore_eos or None,
        }
        fields = {
            "max_tokens": item.output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(prompt | fields | {k: v for k, v in optional.items() if v is not None})


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def shows(self) -> bool:
        """Is there a token in it, or the end? A chat's first chunk only names the role."""
        if self.delta is None:
            return True
        return bool(self.delta.content or self.delta.reasoning_content or self.finish_reason)


class _Cached(Struct):
    cached_tokens: Count | None = None


class _Usage(Struct):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    prompt_tokens_details: _Cached | None = None


class _Meta(Struct):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    cached_tokens: Count | None = None
    finish_reason: object = None


class _Chunk(Struct):
    """What any of the dialects puts into an event."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    meta_info: _Meta | None = None
    error: object = None


class BadStream(Exception):
    """The server's stream says that the request failed, or cannot be understood."""


class Reading:
    """One stream as it arrives. ``chunks`` is when a token was shown, in the caller's seconds."""

    def __init__(self) -> None:
        self.chunks: list[float] = []
        self.input_len: int | None = None
        self.cached: int | None = None
        self.complete = False
        self._counted: int | None = None
        self._rest = b""

    @property
    def output_len(self) -> int:
        """Tokens, as the server counts them; where it does not, events that showed some."""
        return len(self.chunks) if self._counted is None else self._counted

    def feed(self, data: bytes, now: float) -> None:
        """Take what was read at ``now``.

        Raises:
            BadStream: it is an error, no event stream, or an endless event.
        """
        *events, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > MAX_EVENT:
            raise BadStream(f"an event of more than {MAX_EVENT} bytes")
        for one in events:
            for payload in _payloads(one):
                self._take(payload, now)

    def _take(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.complete = True
            return
        try:
            chunk = msgspec.json.decode(payload, type=_Chunk)
        except msgspec.MsgspecError as error:
            raise BadStream(f"not a chunk: {error}") from error
        if chunk.error:
            raise BadStream(f"the stream ended with an error: {_brief(chunk.error)}")
        if any(choice.shows() for choice in chunk.choices):
            self.chunks.append(now)
        self.complete |= any(choice.finish_reason for choice in chunk.choices)
        if (usage := chunk.usage) is not None:
            details = usage.prompt_tokens_details
            self._count(usage.prompt_tokens, usage.completion_tokens, details.cached_tokens if details else None)
        if (meta := chunk.meta_info) is not None:
            self.chunks.append(now)
            self._count(meta.prompt_tokens, meta.completion_tokens, meta.cached_tokens)
            self.complete |= meta.finish_reason is not None

    def _count(self, prompt: int, output: int, cached: int | None) -> None:
        self.input_len, self._counted = prompt or self.input_len, output
        self.cached = self.cached if cached is None else cached


def _payloads(event: bytes) -> Iterator[bytes]:
    """The ``data:`` lines of an event; comments and other fields are none of ours."""
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            yield line[5:].strip()


def _brief(error: object) -> str:
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:300]
