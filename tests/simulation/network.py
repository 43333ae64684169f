"""HTTP between nodes, without sockets: what the real code uses of ``aiohttp.ClientSession``, to ASGI applications.

A connection keeps the order of what is said on it, as TCP does. It is broken when either process dies, or by a fault;
or it goes silent, and neither end is told. A request can arrive twice.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextvars import Context
from typing import BinaryIO, TypedDict, Unpack

import aiohttp
from multidict import CIMultiDict
from starlette.types import ASGIApp, Message

from tests.simulation.clock import Dice, Node
from twostroke.api.alive import AT_ONCE
from twostroke.router.upstream import SILENCE, Silent

LATENCY = 0.0005  # seconds
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_read=SILENCE)
NOWHERE = Context()  # the network is no node: what it brings arrives also at one that is stopped


class Faults:
    """What the network does to what is said, by probabilities."""

    def __init__(self) -> None:
        self.refused = 0.0  # of a request: it finds nobody
        self.cut = 0.0  # of a message: the connection breaks before it
        self.silenced = 0.0  # of a message: nothing more arrives, either way
        self.doubled = 0.0  # of a request: it arrives once more, a little later


NONE = Faults()  # on the way between a client and the router: there is nobody behind it to make them good


class Network:
    """Nodes by address."""

    def __init__(self, dice: Dice, say: Callable[[str], None]) -> None:
        self.dice = dice
        self.say = say
        self.faults = Faults()
        self.nodes: dict[str, tuple[Node, ASGIApp]] = {}  # address → process, ASGI application
        self.open: dict[Connection, None] = {}

    def session(self, node: Node) -> "Session":
        return Session(self, node)

    def broken_by(self, node: Node) -> None:
        """A process died: its connections break."""
        for connection in list(self.open):
            if node in (connection.client, connection.server):
                connection.cut()


class Connection:
    """One request and its reply."""

    def __init__(self, network: Network, client: Node, server: Node) -> None:
        self.network = network
        self.client = client
        self.server = server
        self.heard: asyncio.Queue[Message | None] = asyncio.Queue()  # by the client; None is the break
        self.gone = asyncio.Event()  # for the server: the client left
        self.silent = False
        self.closed = False
        self._free = 0.0  # when the last message has arrived
        network.open[self] = None

    def later(self, act: Callable[..., None], *args: object) -> None:
        """In the order of saying."""
        loop = asyncio.get_running_loop()
        self._free = max(self._free + 1e-9, loop.time() + self.network.dice.delay(LATENCY))
        loop.call_at(self._free, act, *args, context=NOWHERE)

    def tell(self, message: Message) -> None:
        """Server → client."""
        dice = self.network.dice
        faults = self.network.faults if self.client.inside else NONE
        if faults.cut and dice.chance(faults.cut):
            self.network.say(f"cut {self.server.name} -> {self.client.name}")
            self.cut()
        if faults.silenced and dice.chance(faults.silenced):
            self.network.say(f"silence {self.server.name} -> {self.client.name}")
            self.silent = True
        if not (self.silent or self.closed):
            self.later(self.heard.put_nowait, message)

    def leave(self) -> None:
        """The client closes."""
        if not self.closed:
            self.close()
            if not self.silent:
                self.later(self.gone.set)

    def cut(self) -> None:
        """Both ends learn that it is broken."""
        if not self.closed:
            self.close()
            if not self.silent:
                self.later(self.heard.put_nowait, None)
                self.later(self.gone.set)

    def close(self) -> None:
        self.closed = True
        self.network.open.pop(self, None)


class Options(TypedDict, total=False):
    """What is said of a request. The last two mean nothing here."""

    data: bytes | BinaryIO | None
    headers: dict[str, str]
    timeout: aiohttp.ClientTimeout
    allow_redirects: bool
    read_bufsize: int


class Session:
    """``aiohttp.ClientSession`` of one node."""

    def __init__(self, network: Network, node: Node) -> None:
        self._network = network
        self._node = node

    def post(self, url: str, **options: Unpack[Options]) -> "Exchange":
        return Exchange(self._network, self._node, "POST", url, **options)

    def get(self, url: str, **options: Unpack[Options]) -> "Exchange":
        return Exchange(self._network, self._node, "GET", url, **options)

    def request(self, method: str, url: str, **options: Unpack[Options]) -> "Exchange":
        return Exchange(self._network, self._node, method, url, **options)


class Exchange:
    """A request on its way: ``async with`` gives the reply."""

    def __init__(self, network: Network, node: Node, method: str, url: str, **options: Unpack[Options]) -> None:
        self._network = network
        self._node = node
        self._method = method
        self._host, _, path = url.removeprefix("http://").partition("/")
        self._path = "/" + path
        data = options.get("data")
        self._body = data if isinstance(data, bytes) else data.read() if data is not None else b""
        self._headers = options.get("headers") or {}
        self._timeout = options.get("timeout") or aiohttp.ClientTimeout(total=None)
        self._connection: Connection | None = None
        self.silent: type[OSError] = aiohttp.ServerTimeoutError  # what it raises when nothing comes in time

    async def __aenter__(self) -> "Reply":
        loop = asyncio.get_running_loop()
        total = self._timeout.total
        ends = loop.time() + total if total else None
        network = self._network
        network.say(f"{self._node.name} {self._method} {self._host}{self._path}")
        await asyncio.sleep(network.dice.delay(LATENCY))
        server, app = network.nodes[self._host]
        faults = network.faults if self._node.inside else NONE
        if server.dead or network.dice.chance(faults.refused):
            raise aiohttp.ClientConnectionError(f"{self._host} refuses")
        self._connection = connection = Connection(network, self._node, server)
        connection.later(self._arrive, connection, app)
        if faults.doubled and "internal" in self._path and network.dice.chance(faults.doubled):
            network.say(f"{self._host}{self._path} arrives twice")
            twin = Connection(network, self._node, server)
            loop.call_later(network.dice.delay(0.02), self._arrive, twin, app, context=NOWHERE)
            loop.call_later(network.dice.delay(0.5), twin.leave, context=NOWHERE)
        reply = Reply(connection, ends, self._timeout.sock_read, self.silent)
        try:
            await reply.start()
        except BaseException:
            connection.leave()
            raise
        return reply

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.leave()

    def _arrive(self, connection: Connection, app: ASGIApp) -> None:
        if connection.server.dead or connection.closed:
            return
        connection.server.run(self._serve(connection, app))

    async def _serve(self, connection: Connection, app: ASGIApp) -> None:
        """As an HTTP server does, in the server's process."""

        class Writer:
            """See ``twostroke.api.alive.AtOnce``."""

            def can_write(self) -> bool:
                return not ended

            def write_now(self, body: bytes) -> None:
                part: Message = {"type": "http.response.body", "body": body, "more_body": True}
                connection.tell(part if body else {"type": "interim"})

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self._method,
            "path": self._path,
            "raw_path": self._path.encode(),
            "root_path": "",
            "query_string": b"",
            "scheme": "http",
            "headers": [(name.lower().encode(), value.encode()) for name, value in self._headers.items()],
            "server": (self._host, 80),
            "client": ("client", 1),
            AT_ONCE: Writer(),
        }
        said = False

        async def receive() -> Message:
            nonlocal said
            if not said:
                said = True
                return {"type": "http.request", "body": self._body, "more_body": False}
            await connection.gone.wait()
            return {"type": "http.disconnect"}

        ended = False

        async def send(message: Message) -> None:
            nonlocal ended
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            connection.tell(message)

        await app(scope, receive, send)
        if not ended:
            connection.cut()


class Upstream:
    """The router's ``Upstream`` of one node."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def post(self, base: str, target: str, headers: dict[str, str], body: bytes) -> Exchange:
        exchange = self._session.post(base + target, headers=headers, data=body, timeout=_TIMEOUT)
        exchange.silent = Silent
        return exchange

    def close(self) -> None: ...


class Reply:
    """What the code uses of ``aiohttp.ClientResponse``."""

    def __init__(
        self, connection: Connection, ends: float | None, silence: float | None, silent: type[OSError]
    ) -> None:
        self._connection = connection
        self._ends = ends
        self._silence = silence
        self._silent = silent
        self._done = False
        self._kept = b""  # what ``pour`` could not get rid of
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.content = self

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0]

    @property
    def content_length(self) -> int | None:
        size = self.headers.get("content-length")
        return None if size is None else int(size)

    async def start(self) -> None:
        while (message := await self._next())["type"] == "interim":
            pass
        self.status = message["status"]
        self.headers.extend((name.decode(), value.decode()) for name, value in message["headers"])

    async def _next(self) -> Message:
        loop = asyncio.get_running_loop()
        ends = [at for at in (self._ends, loop.time() + self._silence if self._silence else None) if at is not None]
        try:
            async with asyncio.timeout_at(min(ends) if ends else None):
                message = await self._connection.heard.get()
        except TimeoutError:
            raise self._silent("nothing came in time") from None
        if message is None:
            raise aiohttp.ClientPayloadError("the connection broke")
        return message

    @property
    def streams(self) -> bool:
        return self.content_type == "text/event-stream"

    async def piece(self) -> bytes:
        """The next bytes; empty at the end."""
        if self._kept:
            kept, self._kept = self._kept, b""
            return kept
        while not self._done:
            message = await self._next()
            self._done = not message.get("more_body", False)
            if body := message.get("body"):
                return bytes(body)
        return b""

    async def pour(self, sink: Callable[[bytes], bool]) -> None:
        """Pieces to ``sink`` while it takes them."""
        while piece := await self.piece():
            if not sink(piece):
                self._kept = piece
                return

    async def iter_any(self) -> AsyncIterator[bytes]:
        while not self._done:
            message = await self._next()
            self._done = not message.get("more_body", False)
            if message.get("body"):
                yield message["body"]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        rest = b""
        async for piece in self.iter_any():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line + b"\n"
        if rest:
            yield rest

    async def read(self, limit: int = -1) -> bytes:
        return b"".join([piece async for piece in self.iter_any()])
