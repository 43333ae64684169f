"""Endpoints by which workers come and go, and operators direct them. All need the cluster secret when one is set."""

import hmac
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from twostroke.api.http import read_body
from twostroke.errors import BadRequest, Unauthorized
from twostroke.messages import SECRET_HEADER, Assign, Drain, Join, Leave, decode, encode
from twostroke.router.registry import Registry
from twostroke.router.worker import Worker

_MAX_MESSAGE = 16 << 10  # bytes
_ANYWHERE = ("0.0.0.0", "::")  # noqa: S104 - not a bind
Message = TypeVar("Message", Join, Leave, Drain, Assign)
Endpoint = Callable[[Request], Awaitable[Response]]


def control_routes(registry: Registry, secret: str) -> list[Route]:
    """``/internal/join`` and ``leave`` for workers, ``/workers/{id}/drain`` and ``role`` for people."""

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def checked(request: Request) -> Response:
            given = request.headers.get(SECRET_HEADER, "")
            if secret and not hmac.compare_digest(given.encode(), secret.encode()):
                raise Unauthorized(f"this endpoint needs the cluster secret (TWOSTROKE_SECRET) in {SECRET_HEADER}")
            return await endpoint(request)

        return checked

    async def join(request: Request) -> Response:
        message = await _read(request, Join)
        return _report(await registry.join(message, _reachable(message.url, request)))

    async def leave(request: Request) -> Response:
        message = await _read(request, Leave)
        registry.leave(message, _reachable(message.url, request))
        return Response()

    async def drain(request: Request) -> Response:
        worker = registry.find(request.path_params["id"])
        await registry.drain(worker, await _read(request, Drain))
        return _report(worker)

    async def assign(request: Request) -> Response:
        worker = registry.find(request.path_params["id"])
        await registry.assign(worker, await _read(request, Assign))
        return _report(worker)

    return [
        Route(path, guarded(endpoint), methods=["POST"])
        for path, endpoint in (
            ("/internal/join", join),
            ("/internal/leave", leave),
            ("/workers/{id:path}/drain", drain),
            ("/workers/{id:path}/role", assign),
        )
    ]


def _reachable(url: str, request: Request) -> str:
    """The worker's URL as it is seen from here: who listens on all addresses is where its message came from.

    Raises:
        BadRequest: this is no URL of a worker.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not url.startswith("http://") or host is None or port is None:
        raise BadRequest(f"{url!r} is not the URL of a worker, such as http://127.0.0.1:8100")
    if host in _ANYWHERE and request.client:
        host = request.client.host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _read(request: Request, type_: type[Message]) -> Message:
    body = await read_body(request.scope, request.receive, _MAX_MESSAGE)
    try:
        return decode(body or b"{}", type_)
    except ValueError as error:
        raise BadRequest(f"{type_.__name__}: {error}") from None


def _report(worker: Worker) -> Response:
    return Response(encode(worker.report()), media_type="application/json")
