"""The router process: the token path to ``relay.py``, everything else answered or relayed here.

Imports neither torch nor transformers, so that it starts in under a second.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence

import aiohttp
import msgspec
import uvloop
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.routing import Router as Pages
from starlette.types import ASGIApp, Receive, Scope, Send

from twostroke.api.http import KEEP_ALIVE, read_body
from twostroke.api.keys import Guard
from twostroke.api.lifecycle import Gauges, Lifecycle
from twostroke.api.server import Boundary, Health, Timeline
from twostroke.api.serving import bind, serve, settled
from twostroke.config import RouterConfig, cluster_secret
from twostroke.errors import MethodNotAllowed, NotFound, Unavailable, WorkerLost
from twostroke.messages import SECRET_HEADER, TimelineEvent, encode
from twostroke.router.control import control_routes
from twostroke.router.gauges import WorkerGauges
from twostroke.router.policy import Pool, Rules, choose
from twostroke.router.registry import Registry
from twostroke.router.relay import Relay
from twostroke.router.worker import Worker

SHUTDOWN_SECONDS = 10.0  # for requests in flight, once the router is told to stop
TOKEN_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/generate"})
RELAYED_PATHS = (
    "/v1/models",
    "/health_generate",
    "/get_model_info",
    "/model_info",
    "/get_server_info",
    "/server_info",
)
_ROOM_SECONDS = 0.25  # between tries of who waits for room: requests of others end unseen
_ASK = aiohttp.ClientTimeout(total=5.0)  # a worker that only has to look something up
_GLANCE = aiohttp.ClientTimeout(total=1.0)  # a person waits, and the others' answers are good without this one's
_GENERATE = aiohttp.ClientTimeout(total=30.0)  # /health_generate waits for a token
_JSON = "application/json"


class Router:
    """Everything that the router serves; ``app`` is the ASGI application."""

    def __init__(self, config: RouterConfig, session: aiohttp.ClientSession, *, secret: str) -> None:
        groups: list[tuple[tuple[str, ...], Pool]] = [
            (config.prefill, "prefill"),
            (config.decode, "decode"),
            (config.colocated, "colocated"),
        ]
        urls = [(url.rstrip("/"), pool) for group, pool in groups for url in group]
        self.registry = Registry(urls, session, secret=secret, heartbeat=config.heartbeat)
        self.app: ASGIApp = Boundary(Guard(self._dispatch, config.api_keys, secret))
        self._config = config
        self._session = session
        self._secret = {SECRET_HEADER: secret} if secret else {}
        self._lifecycle = Lifecycle("router")
        self._relay = Relay(self.registry, self._lifecycle, config, secret=secret)
        self._lifecycle.watch(self._gauges)
        self._lifecycle.collect(WorkerGauges(self.registry, self._relay))
        self._pages = Pages(
            [
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/workers", self._workers),
                Route("/metrics", self._metrics),
                Route("/debug/requests/{id:path}", self._timeline),
                Route("/abort_request", self._abort, methods=["POST"]),
                *control_routes(self.registry, secret),
                *(Route(path, self._from_a_worker) for path in RELAYED_PATHS),
            ],
            redirect_slashes=False,
        )

    async def watch(self) -> None:
        """Look at every worker each heartbeat, and whether there is room for who waits, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.registry.watch())
            while True:
                await asyncio.sleep(_ROOM_SECONDS)
                self._relay.line.room()

    def close(self) -> None:
        """Let go of idle connections."""
        self._relay.close()

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Requests for tokens go by the short way."""
        if scope["path"] not in TOKEN_PATHS:
            await self._pages(scope, receive, send)
        elif scope["method"] == "POST":
            await self._relay(scope, receive, send)
        else:
            raise MethodNotAllowed(f"{scope['method']} is not allowed on {scope['path']}")

    # about the router itself

    async def _health(self, request: Request) -> Response:
        """The process lives, whatever its workers do."""
        return _json(Health("ready", "routing"))

    async def _ready(self, request: Request) -> Response:
        """200 when some route can be served and no worker is still on its way."""
        try:
            choose(self.registry.workers, Rules(), 0)
        except Unavailable as error:
            return _json(Health("starting", error.message), 503)
        if waited_for := self.registry.waited_for():
            return _json(Health("starting", "; ".join(f"{w.id} is {w.state}: {w.detail}" for w in waited_for)), 503)
        return _json(Health("ready", "routing"))

    async def _workers(self, request: Request) -> Response:
        """All workers, as they are now."""
        await self.registry.look()
        return _json([worker.report() for worker in self.registry.workers])

    async def _metrics(self, request: Request) -> Response:
        return Response(self._lifecycle.metrics(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _timeline(self, request: Request) -> Response:
        """What the router and all workers remember of a request, by time; and who could not be asked."""
        id_: str = request.path_params["id"]
        workers = self.registry.workers
        answers = await asyncio.gather(*(self._timeline_of(worker, id_) for worker in workers))
        events = [*self._lifecycle.timeline(id_), *(event for answer in answers if answer for event in answer)]
        missing = {
            worker.id: f"is {worker.state}: {worker.detail}" if worker.state == "lost" else "does not answer"
            for worker, answer in zip(workers, answers, strict=True)
            if answer is None
        }
        if not events:
            whom = "; ".join(f"{worker} {why}" for worker, why in missing.items())
            raise NotFound(
                f"no request {id_!r} is remembered" + (f", as far as could be asked: {whom}" if whom else "")
            )
        return _json(Timeline(id_, sorted(events, key=lambda event: event.time), missing))

    async def _timeline_of(self, worker: Worker, id_: str) -> Sequence[TimelineEvent] | None:
        """Empty if the worker does not know the request, None if it does not say: the rest is still worth seeing."""
        if worker.state == "lost":
            return None
        try:
            reply = await self._ask(worker, "GET", f"/debug/requests/{id_}", limit=_GLANCE)
            return msgspec.json.decode(reply.body, type=Timeline).events if reply.status_code == 200 else ()
        except (WorkerLost, ValueError, RecursionError):
            return None

    def _gauges(self) -> Gauges:
        waiting = self._relay.backlog.waiting
        return Gauges(self._relay.in_flight - waiting, waiting, tasks=len(asyncio.all_tasks()))

    # asked of workers

    async def _from_a_worker(self, request: Request) -> Response:
        """What every worker answers alike: ask the first that is ready."""
        for worker in self.registry.workers:
            if worker.ready:
                path, key = request.url.path, request.headers.get("authorization")
                limit = _GENERATE if path == "/health_generate" else _ASK
                return await self._ask(worker, "GET", path, limit=limit, key=key)
        raise Unavailable("no worker is ready")

    async def _abort(self, request: Request) -> Response:
        """Any worker may have the request, and those that do not have it do not mind."""
        body = await read_body(request.scope, request.receive, self._config.max_body)
        present = [worker for worker in self.registry.workers if worker.state in ("ready", "draining")]
        key = request.headers.get("authorization")
        asked = (self._ask(worker, "POST", "/abort_request", body, key=key) for worker in present)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        replies = [answer for answer in answers if isinstance(answer, Response)]
        if not replies:
            raise Unavailable("no worker is ready")
        return min(replies, key=lambda reply: reply.status_code)

    async def _ask(
        self,
        worker: Worker,
        method: str,
        path: str,
        body: bytes | None = None,
        limit: aiohttp.ClientTimeout = _ASK,
        key: str | None = None,
    ) -> Response:
        """What a worker says. ``key``: the client's, which the worker may want to see as we did."""
        headers = {**self._secret, "content-type": _JSON, **({"authorization": key} if key else {})}
        try:
            async with self._session.request(
                method, worker.url + path, data=body, headers=headers, timeout=limit
            ) as reply:
                return Response(await reply.read(), reply.status, media_type=reply.headers.get("content-type", _JSON))
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerLost(f"worker {worker.id} does not answer: {error}") from error


def _json(message: object, status: int = 200) -> Response:
    return Response(encode(message), status, media_type=_JSON)


def run(config: RouterConfig) -> int:
    """Route until SIGINT or SIGTERM; the exit code.

    Raises:
        StartupError: the port is taken, or the address is not ours.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("twostroke").setLevel(logging.INFO)
    sock = bind(config.host, config.port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(config, sock))
    return 0


async def _run(config: RouterConfig, sock: socket.socket) -> None:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
    async with aiohttp.ClientSession(
        connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        router = Router(config, session, secret=cluster_secret())
        watching = asyncio.create_task(router.watch())
        settled()
        try:
            await serve(router.app, sock, shutdown_seconds=SHUTDOWN_SECONDS)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            router.close()
