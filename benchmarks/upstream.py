"""A worker without a model, for measuring routers alone: answers at once with canned tokens.

Written on bare sockets, so that as little as possible of what is measured is its own time. The body of a request is
JSON: ``max_tokens``; ``stream``; ``gap``, seconds before each token of a stream, 0 is one turn of the loop.

    python -m benchmarks.upstream PORT [GAP]
"""

import asyncio
import sys
from contextlib import suppress
from typing import cast

import msgspec
import uvloop
from msgspec import Struct

from twostroke.api.http import DONE
from twostroke.api.serving import bind
from twostroke.messages import ALIVE_SECONDS, JOURNAL_HEADER, Slots, WorkerInfo, encode

TOKEN = b'data: {"id":"cmpl-0","object":"text_completion","choices":[{"index":0,"text":" token"}]}\n\n'
WHOLE = b'{"id":"cmpl-0","object":"text_completion","choices":[{"index":0,"text":" token"}]}'
_JOURNAL = f"\r\n{JOURNAL_HEADER}:".encode()
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
_LENGTH = b"\r\ncontent-length:"
_PRODUCE = b'"side":"produce"'  # of our router's ticket: the prefill end has no answer to stream


class Ask(Struct):
    """What of a body matters here."""

    max_tokens: int = 1
    stream: bool = False
    gap: float | None = None  # None: as the command line says
    first: float | None = None  # the gap before the first one, if it is another


_ask = msgspec.json.Decoder(Ask)


def _reply(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Upstream(asyncio.Protocol):
    """One connection; requests come one after the other."""

    def __init__(self, info: bytes, gap: float) -> None:
        self._info = info
        self._gap = gap
        self._buffer = b""
        self._transport: asyncio.Transport
        self._streaming: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def connection_lost(self, exc: Exception | None) -> None:
        if self._streaming is not None:
            self._streaming.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        head = self._buffer[:end].lower()
        at = head.find(_LENGTH)
        size = int(head[at + len(_LENGTH) : head.index(b"\r\n", at + 2)]) if at >= 0 else 0
        if len(self._buffer) < end + size:
            return
        body, self._buffer = self._buffer[end : end + size], self._buffer[end + size :]
        if not head.startswith((b"post /v1/", b"post /generate")):
            self._transport.write(_reply(self._info))
            return
        ask = _ask.decode(body)
        if ask.stream and _PRODUCE not in head:
            self._streaming = asyncio.create_task(self._stream(ask, journaled=_JOURNAL in head))
        else:
            self._transport.write(_reply(WHOLE))

    async def _stream(self, ask: Ask, *, journaled: bool) -> None:
        """Each token is a write of its own; with a journal when the router asks for it."""
        self._transport.write(_STREAM + (f"{JOURNAL_HEADER}: 1\r\n\r\n".encode() if journaled else b"\r\n"))
        gap = self._gap if ask.gap is None else ask.gap
        for token in range(ask.max_tokens):
            rest = gap if token or ask.first is None else ask.first
            while journaled and rest > ALIVE_SECONDS:
                await asyncio.sleep(ALIVE_SECONDS)
                rest -= ALIVE_SECONDS
                self._transport.write(_chunk(b":0 \n"))  # a sign of life
            await asyncio.sleep(rest)  # a token is a turn of the loop, as it is with a model
            line = b":%d [[0,[%d],null,0]]\n" % (len(TOKEN), token) if journaled else b""
            self._transport.write(_chunk(line + TOKEN))
        end = b":%d \n" % len(DONE) if journaled else b""
        self._transport.write(_chunk(end + DONE) + b"0\r\n\r\n")


async def main(port: int, gap: float) -> None:
    """Serve until a signal."""
    info = encode(
        WorkerInfo(
            id=f"upstream-{port}", instance=str(port), role="both", url=f"http://127.0.0.1:{port}", pid=0,
            state="ready", detail="", model="none", fingerprint="", link="none",
            slots=Slots(total=0, free=0, cached=0, leased=0), running=0, waiting=0, queued_tokens=0, threads=1,
        )
    )  # fmt: skip
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(info, gap), sock=bind("127.0.0.1", port))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        uvloop.run(main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0))
