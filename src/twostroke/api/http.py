"""Raw ASGI: bounded bodies, replies, error objects, and noticing that the client has gone."""

import asyncio
from collections.abc import Coroutine

from msgspec import Struct
from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from twostroke.errors import Overloaded, TooLarge, TwostrokeError, Unavailable

KEEP_ALIVE = 3.0  # seconds that an idle connection to one of our servers may be used again; it keeps it a bit longer

Headers = list[tuple[bytes, bytes]]

EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # tells nginx to pass events on at once
]
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed the connection; there is nobody to reply to."""


class ErrorDetail(Struct, frozen=True):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Struct, frozen=True):
    """OpenAI's error object."""

    error: ErrorDetail


def error_object(error: TwostrokeError) -> bytes:
    """The error as OpenAI clients read it."""
    return encode(ErrorReply(ErrorDetail(error.message, error.kind, error.param, error.code)))


def header(scope: Scope, name: str) -> str | None:
    """The first header of this (lower-case) name."""
    wanted = name.encode()
    for key, value in scope["headers"]:
        if key == wanted:
            return str(value, "latin-1")
    return None


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body, of at most ``limit`` bytes.

    What is left of a larger one is never stored: the HTTP server drops it after the reply.

    Raises:
        TooLarge: it has, or says it has, more bytes.
        ClientGone: the client went away while sending.
    """
    declared = header(scope, "content-length") or ""
    size = int(declared) if declared.isdecimal() else 0
    pieces: list[bytes] = []
    received, more = 0, True
    while more and max(size, received) <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        received += len(pieces[-1])
        more = message.get("more_body", False)
    if max(size, received) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes")
    return b"".join(pieces)


async def unless_gone(work: Coroutine[None, None, None], receive: Receive) -> None:
    """Run ``work`` to its end, or cancel it as soon as the client disconnects. The body must have been read.

    Raises:
        ClientGone: the client went away; ``work`` has ended.
    """
    leash, over = asyncio.timeout(None), False
    watching = asyncio.ensure_future(_disconnected(receive))

    def gone(_: object) -> None:
        if not over:
            leash.reschedule(asyncio.get_running_loop().time())

    try:
        async with leash:
            watching.add_done_callback(gone)
            try:
                await work
            finally:
                over = True
    except TimeoutError:
        if leash.expired():
            raise ClientGone from None
        raise
    finally:
        watching.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def reply(send: Send, body: bytes, status: int = 200, headers: Headers | None = None) -> None:
    """Send a whole reply, JSON unless ``headers`` say otherwise."""
    named = headers or [(b"content-type", b"application/json")]
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*named, length]})
    await send({"type": "http.response.body", "body": body})


async def reply_error(send: Send, error: TwostrokeError) -> None:
    """Send an error object with its status, and ``Retry-After`` where waiting helps."""
    headers = [(b"content-type", b"application/json")]
    if isinstance(error, Overloaded | Unavailable):
        headers.append((b"retry-after", str(error.retry_after).encode()))
    await reply(send, error_object(error), error.status, headers)
