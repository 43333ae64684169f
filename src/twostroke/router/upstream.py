"""HTTP/1.1 to workers, for the token path alone: POST on kept connections, replies as bytes, nothing else.

aiohttp would do, at three times the cost of a request (``benchmarks/bench_router.py``), and the router makes two of
them for each of its own. Parsing is httptools' (llhttp), which also serves us in uvicorn.
"""

import asyncio
import ssl
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

import httptools

from twostroke.api.http import KEEP_ALIVE
from twostroke.errors import BadRequest

CONNECT_SECONDS = 5.0
SILENCE = 3.0  # seconds of waiting in which nothing comes, not even a sign of life: the connection is dead
_LOOKS = 6  # in that time. They are counted, not the time: a router that was held up itself has heard nobody
_MAX_HEAD = 64 << 10  # bytes
_HIGH = 1 << 20  # unread bytes at which a connection reads no more, until they are read


class Upstream:
    """Connections to any number of servers. Only idle ones are kept, and only as long as the other end does."""

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[_Connection]] = defaultdict(deque)
        self._watch = _Watch()

    def post(self, base: str, target: str, headers: Mapping[str, str], body: bytes) -> "Exchange":
        """Send ``body`` to ``base`` + ``target``; used with ``async with``, which gives the reply once it has begun.

        The server is expected to show signs of life if ``headers`` ask for them (``ALIVE_HEADER``).

        Raises:
            OSError: there is no such server, or it broke off, does not speak HTTP, or has gone silent (``Silent``). So
                do the reply's methods.
        """
        return Exchange(self, base, target, headers, body)

    def close(self) -> None:
        """Close idle connections."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    async def connection(self, base: str) -> "_Connection":
        """An idle one, or a new one."""
        idle, now = self._idle[base], time.monotonic()
        while idle:
            connection = idle.pop()  # the one that was used last
            if connection.usable and now - connection.idle_since < KEEP_ALIVE:
                return connection
            connection.close()
        parts = urlsplit(base)
        secure = parts.scheme == "https"
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._watch),
                parts.hostname or "",
                parts.port or (443 if secure else 80),
                ssl=ssl.create_default_context() if secure else None,
            )
        return connection

    def keep(self, base: str, connection: "_Connection") -> None:
        """Its exchange is over."""
        connection.idle_since = time.monotonic()
        idle = self._idle[base]
        idle.append(connection)
        while idle and not (idle[0].usable and connection.idle_since - idle[0].idle_since < KEEP_ALIVE):
            idle.popleft().close()


class Silent(TimeoutError):
    """The other end says nothing any more. Maybe it does not know, and goes on."""


class Exchange:
    """One request and its reply."""

    def __init__(self, upstream: Upstream, base: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        self._upstream = upstream
        self._base = base
        self._request = (target, headers, body)
        self._connection: _Connection

    @property
    def status(self) -> int:
        """Of the reply."""
        return self._connection.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Of the reply, names in lower case."""
        return self._connection.headers

    @property
    def streams(self) -> bool:
        """Whether the reply is an event stream."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def piece(self) -> bytes:
        """What has arrived, at least a byte; empty at the end."""
        return await self._connection.piece()

    async def pour(self, sink: Callable[[bytes], bool]) -> None:
        """Give pieces to ``sink`` as they arrive, without a turn of the event loop, until the reply ends or ``sink``
        returns False: that piece, and those behind it, are for ``piece``. It may raise ``ConnectionError``.
        """
        await self._connection.pour(sink)

    async def read(self) -> bytes:
        """The rest of the reply."""
        pieces = []
        while piece := await self._connection.piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def __aenter__(self) -> "Exchange":
        self._connection = await self._upstream.connection(self._base)
        try:
            self._connection.send(self._base, *self._request)
            await self._connection.begun()
        except BaseException:
            self._connection.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection.spent and self._connection.usable:
            self._upstream.keep(self._base, self._connection)
        else:
            self._connection.close()


class _Watch:
    """Looks after open connections, all in one turn of the event loop, as long as there are any."""

    def __init__(self) -> None:
        self._connections: set[_Connection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: "_Connection") -> None:
        """It is open."""
        self._connections.add(connection)
        if self._timer is None:
            self._later()

    def remove(self, connection: "_Connection") -> None:
        """It is closed."""
        self._connections.remove(connection)

    def _later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SILENCE / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        for connection in list(self._connections):
            connection.look()
        if self._connections:
            self._later()


class _Connection(asyncio.Protocol):
    """One exchange after the other."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch
        self.status = 0
        self.headers: dict[str, str] = {}
        self.idle_since = 0.0
        self.usable = True
        self.over = True  # no exchange, or its reply is complete
        self._transport: asyncio.Transport
        self._parser: httptools.HttpResponseParser
        self._begun = False
        self._head_bytes = 0
        self._pieces: deque[bytes] = deque()
        self._sink: Callable[[bytes], bool] | None = None
        self._unread = 0
        self._paused = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._quiet = 0  # looks in which somebody waited in vain

    @property
    def spent(self) -> bool:
        """Whether the reply is complete and was read: what is left of it would be the beginning of the next one."""
        return self.over and not self._pieces

    # the exchange

    def send(self, base: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        """Begin one."""
        lines = [f"POST {target} HTTP/1.1", f"host: {base.partition('://')[2]}", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1:
            raise BadRequest("a header has a line break")
        self.status, self.headers = 0, {}
        self.over = self._begun = False
        self._head_bytes = 0
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(head.encode("latin-1") + b"\r\n\r\n" + body)
        self._quiet = 0

    async def begun(self) -> None:
        """Until the reply's head is here."""
        while not self._begun:
            await self._change()

    async def piece(self) -> bytes:
        """See ``Exchange.piece``."""
        while not self._pieces and not self.over:
            await self._change()
        return self._taken() if self._pieces else b""

    async def pour(self, sink: Callable[[bytes], bool]) -> None:
        """See ``Exchange.pour``."""
        self._sink = sink
        try:
            while True:
                if self._pieces and not sink(data := self._taken()):
                    self._keep(data)
                if self._pieces or self.over:
                    return
                await self._change()
        finally:
            self._sink = None

    def close(self) -> None:
        """Also while the server is still answering: it sees us go."""
        self.usable = False
        self._transport.abort()

    def _keep(self, data: bytes) -> None:
        """It is read later."""
        self._pieces.append(data)
        self._unread += len(data)
        if self._unread > _HIGH and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _taken(self) -> bytes:
        """All that has arrived."""
        data = self._pieces.popleft() if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._unread = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    def look(self) -> None:
        """See ``_Watch``. It is given up when nothing came between one look and another for too many in a row."""
        self._quiet = self._quiet + 1 if self._waiter is not None else 0
        if self._quiet == _LOOKS:
            self._error = Silent(f"its connection has been silent for {SILENCE:.0f} s")
            self.close()
            self._wake()

    async def _change(self) -> None:
        if self._error is not None:
            raise self._error
        if not self.usable:
            raise ConnectionResetError("it closed the connection")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        self._watch.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._watch.remove(self)
        if not self.over:
            self._error = self._error or ConnectionResetError(
                "it broke off in the middle of its reply" if self._begun else "it closed the connection"
            )
        self._wake()

    def data_received(self, data: bytes) -> None:
        self._quiet = 0
        if self.over:  # nobody asked
            self.close()
            return
        if not self._begun:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if not self._begun and self._head_bytes > _MAX_HEAD:
                raise ConnectionError("the head of its reply is too long")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ConnectionError, ValueError) as error:
            self._error = self._error or ConnectionError(f"its reply is not HTTP: {error}")
            self.close()
        if self._sink is None or self._pieces or self.over or self._error is not None:
            self._wake()

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()
        self._begun = self.status >= 200

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        if self._sink is not None and not self._pieces:
            try:
                if self._sink(data):
                    return
            except ConnectionError as error:
                self._error = error
                raise
        self._keep(data)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._begun:
            self.over = True
            self.usable = self.usable and self._parser.should_keep_alive()
