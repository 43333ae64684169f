"""Signs of life in a reply: whoever waits for it can tell a slow worker from a connection that has gone silent.

Heartbeats say that a worker lives; they come on connections of their own. What a router waits for comes on another,
which a box between the two may have forgotten without telling either end. So a reply that says nothing for
``ALIVE_SECONDS`` says that: before its head by an interim response (102, RFC 2518), in a stream with a journal by an
empty frame. Only who asks for it by ``ALIVE_HEADER`` gets it, and only when there is nothing else to say.
"""

import asyncio
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from twostroke.api.http import header
from twostroke.messages import ALIVE_HEADER, ALIVE_SECONDS, JOURNAL_HEADER

AT_ONCE = "twostroke.at_once"  # in the scope, of the HTTP server: see ``AtOnce``
_FRAME = b":0 \n"
_JOURNAL = JOURNAL_HEADER.encode()


class AtOnce(Protocol):
    """Writes between two messages of a reply without waiting for anything."""

    def can_write(self) -> bool:
        """Whether the client reads fast enough, and the reply is not over."""
        ...

    def write_now(self, body: bytes) -> None:
        """Where it can be written: these bytes of the body; if it has not begun, an interim response instead."""
        ...


class Alive:
    """Has the replies of an ASGI application show signs of life."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer: AtOnce | None = scope.get(AT_ONCE)
        if writer is None or header(scope, ALIVE_HEADER) is None:
            await self._app(scope, receive, send)
            return
        signs = _Signs(send, writer)
        try:
            await self._app(scope, receive, signs)
        finally:
            signs.end()


class _Signs:
    """Sends one reply. It looks twice in ``ALIVE_SECONDS``, so that a message costs it no look at the clock."""

    def __init__(self, send: Send, writer: AtOnce) -> None:
        self._send = send
        self._writer = writer
        self._sign: bytes | None = b""  # None: there is no place for one
        self._quiet = 0  # looks since something was said
        self._again()

    async def __call__(self, message: Message) -> None:
        self._quiet = 0
        if message["type"] == "http.response.start":
            journaled = any(name == _JOURNAL for name, _ in message.get("headers", ()))
            self._sign = _FRAME if journaled else None
        elif not message.get("more_body", False):
            self._sign = None
        await self._send(message)

    def end(self) -> None:
        """The reply is over, or given up."""
        self._timer.cancel()

    def _again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(ALIVE_SECONDS / 2, self._look)

    def _look(self) -> None:
        self._quiet += 1
        if self._quiet >= 2 and self._sign is not None:
            if self._writer.can_write():  # with its buffer full, the connection has something to say
                self._writer.write_now(self._sign)
            self._quiet = 0
        self._again()


class _Joining:
    """A transport that writes the head of a reply together with what follows in the same turn of the loop.

    uvicorn writes them one after the other, and uvloop at once: two system calls, and the reader wakes up twice. Of the
    router's time for a request that was a seventh.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.is_closing = transport.is_closing
        self.get_extra_info = transport.get_extra_info

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which can also write at once (``AtOnce``), and joins writes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the loop."""
        super().connection_made(transport)
        self.transport = _Joining(transport)  # type: ignore[assignment]

    def on_message_begin(self) -> None:
        """Called by the parser."""
        super().on_message_begin()
        self.scope[AT_ONCE] = self  # type: ignore[literal-required]

    def can_write(self) -> bool:
        """See ``AtOnce``."""
        cycle = self.cycle
        return not (
            self.flow.write_paused or cycle.disconnected or cycle.response_complete or self.transport.is_closing()
        )

    def write_now(self, body: bytes) -> None:
        """See ``AtOnce``."""
        if not self.cycle.response_started:
            self.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        elif self.cycle.chunked_encoding and body:
            self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
