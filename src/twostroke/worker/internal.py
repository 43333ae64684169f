"""The worker's endpoints for routers and other workers. All need the cluster secret when one is set."""

import hmac
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Protocol, TypeVar

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from twostroke.api.http import header, read_body, reply, unless_gone
from twostroke.api.server import route
from twostroke.errors import BadRequest, Unauthorized, Unavailable
from twostroke.messages import (
    SECRET_HEADER,
    Abandon,
    Assign,
    Attach,
    Confirm,
    Confirmed,
    Drain,
    Manage,
    Managed,
    Role,
    Sampled,
    WorkerInfo,
    Writing,
    decode,
    encode,
)
from twostroke.worker.producer import Producer

_MAX_MESSAGE = 64 << 10  # bytes
_LINES = [(b"content-type", b"application/x-ndjson")]
Message = TypeVar("Message", Attach, Confirm, Drain, Manage, Assign, Abandon, Writing)
Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]


class Inside(Protocol):
    """What these endpoints need of a worker."""

    def info(self) -> WorkerInfo: ...

    def drain(self, seconds: float | None = None) -> None: ...

    async def manage(self, order: Manage) -> Managed: ...

    def assign(self, role: Role) -> None: ...

    def writes(self, message: Writing) -> bool: ...

    @property
    def producer(self) -> Producer | None: ...


def internal_routes(worker: Inside, secret: str) -> list[Route]:
    """``/internal/*``."""

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            given = header(scope, SECRET_HEADER) or ""
            if secret and not hmac.compare_digest(given.encode(), secret.encode()):
                raise Unauthorized(f"internal endpoints need the cluster secret in {SECRET_HEADER}")
            await endpoint(scope, receive, send)

        return checked

    async def info(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, encode(worker.info()))

    async def confirm(scope: Scope, receive: Receive, send: Send) -> None:
        message = await _read(scope, receive, Confirm)
        await reply(send, encode(_producer(worker).confirm(message)))

    async def abandon(scope: Scope, receive: Receive, send: Send) -> None:
        message = await _read(scope, receive, Abandon)
        _producer(worker).abandon(message)
        await reply(send, b"")

    async def writing(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, encode(Confirmed(worker.writes(await _read(scope, receive, Writing)))))

    async def drain(scope: Scope, receive: Receive, send: Send) -> None:
        worker.drain((await _read(scope, receive, Drain)).seconds)
        await reply(send, encode(worker.info()))

    async def manage(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, encode(await worker.manage(await _read(scope, receive, Manage))))

    async def assign(scope: Scope, receive: Receive, send: Send) -> None:
        worker.assign((await _read(scope, receive, Assign)).role)
        await reply(send, encode(worker.info()))

    async def attach(scope: Scope, receive: Receive, send: Send) -> None:
        message = await _read(scope, receive, Attach)
        await unless_gone(_stream(_producer(worker), message, scope["server"][0], send), receive)

    return [
        route("/internal/info", guarded(info), "GET"),
        route("/internal/drain", guarded(drain), "POST"),
        route("/internal/store", guarded(manage), "POST"),
        route("/internal/role", guarded(assign), "POST"),
        route("/internal/handover/attach", guarded(attach), "POST"),
        route("/internal/handover/confirm", guarded(confirm), "POST"),
        route("/internal/handover/abandon", guarded(abandon), "POST"),
        route("/internal/handover/writing", guarded(writing), "POST"),
    ]


def _producer(worker: Inside) -> Producer:
    if worker.producer is None:
        raise Unavailable("the worker is starting")
    return worker.producer


async def _read(scope: Scope, receive: Receive, type_: type[Message]) -> Message:
    try:
        return decode(await read_body(scope, receive, _MAX_MESSAGE) or b"{}", type_)
    except ValueError as error:
        raise BadRequest(f"{type_.__name__}: {error}") from None


async def _stream(producer: Producer, message: Attach, reached: str, send: Send) -> None:
    """One event a line. The status waits for the first event, so that a refusal has its own. The first token goes with
    the last blocks, which follow at once.
    """
    started, lines = False, b""
    async with aclosing(producer.attach(message, reached)) as events:
        async for event in events:
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": _LINES})
            lines += encode(event) + b"\n"
            if not isinstance(event, Sampled):
                await send({"type": "http.response.body", "body": lines, "more_body": True})
                lines = b""
    await send({"type": "http.response.body", "body": b""})
