"""A server that speaks ``/v1/completions`` as told, behind a real socket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
from starlette.types import Receive, Scope, Send

from twostroke.api.http import read_body, reply
from twostroke.api.serving import bind, serve

STREAM = [(b"content-type", b"text/event-stream")]
CHUNK = b'data: {"choices":[{"index":0,"text":"x"}]}\n\n'
END = b'data: {"choices":[{"index":0,"text":"x","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
Answer = Callable[["Server", Send], Awaitable[None]]


class Server:
    """Remembers what it was sent; ``answer`` says what it does about it."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.bodies: list[dict[str, object]] = []
        self.paths: list[str] = []
        self.ids: list[str] = []
        self.arrived = asyncio.Condition()
        self.url = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":  # somebody asks for timelines
            await reply(send, b"", 404)
            return
        body = await read_body(scope, receive, 1 << 24)
        async with self.arrived:
            self.paths.append(scope["path"])
            self.ids += [value.decode() for name, value in scope["headers"] if name == b"x-request-id"]
            self.bodies.append(msgspec.json.decode(body or b"{}"))
            self.arrived.notify_all()
        await self.answer(self, send)


async def two_tokens(server: Server, send: Send) -> None:
    """A whole answer."""
    await send({"type": "http.response.start", "status": 200, "headers": STREAM})
    await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
    await send({"type": "http.response.body", "body": END})


async def refuse(server: Server, send: Send) -> None:
    """503."""
    await reply(send, b'{"error":{"message":"busy"}}', 503)


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Server]:
    """The server, until the block ends."""
    server, stop = Server(answer), asyncio.Event()
    sock = bind("127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    task = asyncio.create_task(serve(server, sock, shutdown_seconds=0, stop=stop))
    try:
        yield server
    finally:
        stop.set()
        await task
