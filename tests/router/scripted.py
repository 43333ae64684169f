"""Workers that follow a script, behind real sockets, and a router in front of them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import msgspec
from msgspec import Struct, structs
from starlette.types import Receive, Scope, Send

from twostroke.api.http import reply
from twostroke.api.server import Timeline
from twostroke.api.serving import bind, serve
from twostroke.config import RouterConfig
from twostroke.messages import (
    JOURNAL_HEADER,
    SECRET_HEADER,
    TICKET_HEADER,
    Assign,
    Drain,
    Slots,
    Ticket,
    TimelineEvent,
    WorkerInfo,
    encode,
)
from twostroke.router.router import Router

STREAM = [(b"content-type", b"text/event-stream"), (JOURNAL_HEADER.encode(), b"1")]


class Seen(Struct):
    """A request as a worker received it."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def ticket(self) -> Ticket | None:
        text = self.headers.get(TICKET_HEADER)
        return msgspec.json.decode(text, type=Ticket) if text else None


Answer = Callable[["ScriptedWorker", Send], Awaitable[None]]


def json_answer(body: bytes = b'{"ok":true}', status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> Answer:
    async def answer(worker: "ScriptedWorker", send: Send) -> None:
        await reply(send, body, status, [(b"content-type", b"application/json"), *headers])

    return answer


def frame(events: bytes, line: bytes = b"") -> bytes:
    """Events as a worker sends them, and the line of the journal that they add."""
    return b":%d %b\n%b" % (len(events), line, events)


def stream_answer(*events: bytes) -> Answer:
    """Send these events, without journal lines; before each but the first, wait for a permit of ``worker.gate``."""

    async def answer(worker: "ScriptedWorker", send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        for i, some in enumerate(events):
            if i:
                await worker.gate.acquire()
            await send({"type": "http.response.body", "body": frame(some), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return answer


async def hang(worker: "ScriptedWorker", send: Send) -> None:
    """Answer nothing, ever."""
    await asyncio.Event().wait()


class ScriptedWorker:
    """A worker that records what it is sent and answers as told."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.info = WorkerInfo(
            id=name,
            instance=f"{name}-first",
            role="both",
            url="",
            pid=1,
            state="ready",
            detail="serving",
            model="scripted",
            fingerprint="f",
            link="shm",
            slots=Slots(total=4, free=4, cached=0, leased=0),
            running=0,
            waiting=0,
            queued_tokens=0,
            threads=1,
            dtype="float32",
            block_tokens=16,
        )
        self.answer: Answer = json_answer()
        self.secret = ""
        self.info_delay = 0.0
        self.timeline_delay = 0.0
        self.info_body: bytes | None = None
        self.drained: Drain | None = None
        self.seen: list[Seen] = []
        self.gate = asyncio.Semaphore(0)
        self.asked = asyncio.Event()
        self.dropped = asyncio.Event()  # the router closed the connection before the answer was complete
        self._log = log
        self._stop = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        sock = bind("127.0.0.1", self._port)
        self._port = sock.getsockname()[1]
        self.info = structs.replace(self.info, url=self.url)
        self._stop.clear()
        self._serving = asyncio.create_task(serve(self, sock, shutdown_seconds=0, stop=self._stop))

    async def stop(self) -> None:
        self._stop.set()
        if self._serving:
            await self._serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        path: str = scope["path"]
        if path == "/internal/info":
            await self._info(headers, send)
        elif path == "/internal/drain":
            self.drained = msgspec.json.decode(await _body(receive), type=Drain)
            await reply(send, encode(self.info))
        elif path == "/internal/role":
            role = msgspec.json.decode(await _body(receive), type=Assign).role
            self.info = structs.replace(self.info, assigned=role)
            await reply(send, encode(self.info))
        elif path.startswith("/debug/requests/"):
            await asyncio.sleep(self.timeline_delay)
            event = TimelineEvent("prefill_started", self.info.id, 1.0)
            await reply(send, encode(Timeline(path.rsplit("/", 1)[1], [event])))
        else:
            await self._serve(Seen(path, headers, await _body(receive)), receive, send)

    async def _info(self, headers: dict[str, str], send: Send) -> None:
        await asyncio.sleep(self.info_delay)
        allowed = headers.get(SECRET_HEADER, "") == self.secret
        body = encode(self.info) if self.info_body is None else self.info_body
        await reply(send, body if allowed else b"", 200 if allowed else 401)

    async def _serve(self, seen: Seen, receive: Receive, send: Send) -> None:
        self.seen.append(seen)
        self._log.append(f"{self.info.id} asked")
        self.asked.set()
        answering = asyncio.ensure_future(self.answer(self, send))
        gone = asyncio.ensure_future(receive())
        await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not answering.done():
            answering.cancel()
            self.dropped.set()
            return
        self._log.append(f"{self.info.id} answered")
        answering.result()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event tells of."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the condition is another process's or library's
            await asyncio.sleep(0.01)


async def _body(receive: Receive) -> bytes:
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


class System(Struct):
    """A router, its workers in the router's order, and a client whose paths are the router's."""

    router: Router
    workers: list[ScriptedWorker]
    client: aiohttp.ClientSession
    log: list[str]

    async def look(self) -> None:
        """One heartbeat of every worker."""
        await self.router.registry.look()


@asynccontextmanager
async def system(
    prefill: int = 1,
    decode: int = 1,
    colocated: int = 0,
    *,
    secret: str = "",
    schedule: str = "concurrent",
    policy: str = "least-loaded",
    max_body: int = 1 << 20,
    on_loss: str = "continue",
    **more: object,
) -> AsyncIterator[System]:
    """Start everything on free ports. The heartbeat is the test's to give (``look``), the first one is given.

    ``more``: of the router's configuration.
    """
    log: list[str] = []
    names = [f"{pool}-{i}" for pool, n in (("p", prefill), ("d", decode), ("c", colocated)) for i in range(n)]
    workers = [ScriptedWorker(name, log) for name in names]
    async with AsyncExitStack() as stack:
        for worker in workers:
            worker.secret = secret
            await worker.start()
            stack.push_async_callback(worker.stop)
        urls = tuple(worker.url for worker in workers)
        settings = {
            "prefill": urls[:prefill],
            "decode": urls[prefill : prefill + decode],
            "colocated": urls[prefill + decode :],
            "schedule": schedule,
            "policy": policy,
            "max_body": max_body,
            "on_loss": on_loss,
            "short_prompt": 0,  # bodies of tests are short
            **more,
        }
        session = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
        router = Router(msgspec.convert(settings, RouterConfig), session, secret=secret)
        sock = bind("127.0.0.1", 0)
        base = f"http://127.0.0.1:{sock.getsockname()[1]}"
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(router.app, sock, shutdown_seconds=1, stop=stop))
        client = await stack.enter_async_context(aiohttp.ClientSession(base, auto_decompress=False))
        running = System(router, workers, client, log)
        await running.look()
        try:
            yield running
        finally:
            stop.set()
            await serving
            router.close()
