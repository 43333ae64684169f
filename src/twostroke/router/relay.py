"""The token path: one client request to one or two workers, and the answering worker's bytes back.

The same body goes to both ends of a hand-over; a ticket in a header says which end a worker is. The decode worker's
reply is the answer, relayed as raw bytes. That worker copes by itself with a producer that is late or gone, so the
prefill worker's reply is waited for only where the serial schedule says so.

If the answering worker is lost, another one takes its place. Of a stream that the client has seen a part of, it
continues exactly there: the worker keeps a journal in its stream (``messages.Journal``), whose lines are taken out and
remembered here, unread, and given to the next worker. Nobody waits for a worker that answers no heartbeat.
"""

import asyncio
import io
from collections.abc import Sequence

import aiohttp
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from twostroke.api.http import ClientGone, unless_gone
from twostroke.api.lifecycle import Lifecycle
from twostroke.config import Policy, RouterConfig
from twostroke.errors import RequestError, Unavailable, WorkerLost
from twostroke.messages import JOURNAL_HEADER, SECRET_HEADER, TICKET_HEADER, Journal, Ticket, encode
from twostroke.router.policy import Colocated, Disaggregated, Route, choose, successor
from twostroke.router.registry import Registry, Worker
from twostroke.router.reply import Call, Events, Frames, Reply, read_call

LOSSES = 2  # workers that one request survives
_CONNECT_SECONDS = 5.0
_PRODUCER_GRACE = 2.0  # seconds that the prefill end gets once the answer is complete; then nobody needs it
_RELAYED = ("content-type", "retry-after", "cache-control")
_PASSED_OVER = (401, 409)  # a producer's refusals that say nothing about the request
_LARGE = 1 << 20  # bytes; aiohttp writes larger bodies in pieces only from a file

_UPSTREAM_ERRORS = (aiohttp.ClientError, OSError)  # a timeout is an OSError
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)


class _Refusal(Struct, frozen=True):
    """The producer's verdict that the request cannot be served."""

    status: int
    headers: dict[str, str]
    body: bytes


class Relay:
    """The ASGI application of the token path."""

    def __init__(
        self,
        registry: Registry,
        session: aiohttp.ClientSession,
        lifecycle: Lifecycle,
        config: RouterConfig,
        *,
        secret: str,
    ) -> None:
        self._registry = registry
        self._session = session
        self._lifecycle = lifecycle
        self._policy: Policy = config.policy
        self._serial = config.schedule == "serial"
        self._continues = config.on_loss == "continue"
        self._max_body = config.max_body
        self._secret = {SECRET_HEADER: secret} if secret else {}
        self.in_flight = 0
        self._turn = 0
        self._producers: set[asyncio.Task[_Refusal | None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request until it is answered or its client has gone, which ends it on both workers.

        Raises:
            RequestError: it cannot be answered, or not to the end. ``Boundary`` tells the client.
        """
        call = await read_call(scope, receive, self._max_body)
        self._stamp(call, "received", body_bytes=len(call.body))
        self.in_flight += 1
        try:
            await unless_gone(self._attempts(call, Reply(send)), receive)
        except ClientGone:
            self._stamp(call, "aborted", reason="the client disconnected")
            raise
        except RequestError as error:
            self._stamp(call, "failed", reason=error.message)
            raise
        else:
            self._stamp(call, "finished")
        finally:
            self.in_flight -= 1

    async def _attempts(self, call: Call, reply: Reply) -> None:
        """Route the call; when the worker that answers is lost, begin again or continue on another one."""
        lost: list[Worker] = []
        reason = ""
        while True:
            route = self._choose(reply, lost)
            if lost:
                self._stamp(call, "continued" if reply.started else "retried", reason=reason)
            try:
                await self._along(route, call, len(lost), reply)
            except WorkerLost as error:
                lost.append(route.worker if isinstance(route, Colocated) else route.decode)
                if len(lost) > LOSSES or (reply.started and not reply.can_continue):
                    raise
                reason = error.message
            else:
                return

    def _choose(self, reply: Reply, lost: Sequence[Worker]) -> Route[Worker]:
        """A route without the workers that this request was lost on."""
        workers = [worker for worker in self._registry.workers if worker not in lost]
        self._turn += 1
        if not reply.started:
            return choose(workers, self._policy, self._turn - 1)
        try:
            return Colocated(successor(workers, self._policy, self._turn - 1))
        except Unavailable as error:
            raise WorkerLost(f"worker {lost[-1].id} was lost, and the answer cannot go on: {error.message}") from error

    async def _along(self, route: Route[Worker], call: Call, attempt: int, reply: Reply) -> None:
        if isinstance(route, Colocated):
            self._stamp(call, "routed", worker=route.worker.id, attempt=attempt)
            await self._answer(call, route.worker, None, reply)
            return
        self._stamp(call, "routed", prefill=route.prefill.id, decode=route.decode.id, attempt=attempt)
        producer = asyncio.create_task(self._produce(call, route.prefill, Ticket(call.handover, "produce", attempt)))
        self._producers.add(producer)
        producer.add_done_callback(self._producers.discard)
        try:
            if self._serial and (refusal := await producer):
                await reply.whole(refusal.status, refusal.headers, refusal.body)
                return
            await self._answer(call, route.decode, self._consume_ticket(route, call, attempt), reply)
        except BaseException:
            producer.cancel()
            raise
        if not producer.done():
            asyncio.get_running_loop().call_later(_PRODUCER_GRACE, producer.cancel)

    def _consume_ticket(self, route: Disaggregated[Worker], call: Call, attempt: int) -> Ticket | None:
        """None when the producer is known to be lost: the decode worker need not look for it."""
        if route.prefill.state == "lost":
            return None
        return Ticket(call.handover, "consume", attempt, route.prefill.url)

    async def _produce(self, call: Call, worker: Worker, ticket: Ticket) -> _Refusal | None:
        """The prefill end. Its failures are stamped, and left to the decode worker to make good."""
        try:
            with worker.held(len(call.body)):
                async with worker.alive(), self._post(call, worker, ticket) as upstream:
                    body = await upstream.read()
        except _UPSTREAM_ERRORS as error:
            why = self._lose(worker, error)
            self._stamp(call, "producer_failed", worker=worker.id, reason=why)
            return None
        if upstream.status < 400:
            return None
        self._stamp(call, "producer_failed", worker=worker.id, status=upstream.status)
        if upstream.status == 503:
            self._registry.lose(worker, "it answers 503")
        if upstream.status >= 500 or upstream.status in _PASSED_OVER:
            return None
        return _Refusal(upstream.status, _relayed(upstream), body)

    async def _answer(self, call: Call, worker: Worker, ticket: Ticket | None, reply: Reply) -> None:
        """Relay the reply of the worker that answers.

        Raises:
            WorkerLost: it cannot be reached, takes no requests, breaks off, or cannot continue the answer.
        """
        journal = Journal(len(reply.journal), call.created) if self._continues else None
        try:
            with worker.held(len(call.body)):
                async with worker.alive(), self._post(call, worker, ticket, journal, bytes(reply.journal)) as upstream:
                    if upstream.status == 503:
                        raise aiohttp.ClientError("it answers 503")
                    if reply.started and JOURNAL_HEADER not in upstream.headers:
                        raise WorkerLost(f"worker {worker.id} cannot continue the answer: status {upstream.status}")
                    await self._pass_on(call, upstream, reply)
        except _UPSTREAM_ERRORS as error:
            why = self._lose(worker, error)
            if not reply.done:
                raise WorkerLost(f"worker {worker.id} failed: {why}") from error
            await reply.end_stream(b"")

    async def _pass_on(self, call: Call, upstream: aiohttp.ClientResponse, reply: Reply) -> None:
        """An event stream goes on piece by piece; anything else once whole, so that a broken one can be retried."""
        headers = _relayed(upstream)
        if upstream.content_type != "text/event-stream":
            body = await upstream.read()
            self._stamp(call, "first_byte")
            await reply.whole(upstream.status, headers, body)
            return
        cutter = Frames() if JOURNAL_HEADER in upstream.headers else Events()
        async for piece in upstream.content.iter_any():
            part = cutter.feed(piece)
            if not reply.started and part.events:
                self._stamp(call, "first_byte")
            await reply.stream(upstream.status, headers, part)
        rest = cutter.end()
        if not reply.started:
            raise aiohttp.ClientError("it answers with an empty stream")
        await reply.end_stream(rest)

    def _post(
        self, call: Call, worker: Worker, ticket: Ticket | None, journal: Journal | None = None, lines: bytes = b""
    ) -> "aiohttp.client._RequestContextManager":
        headers = {**call.headers, **self._secret}
        if ticket:
            headers[TICKET_HEADER] = encode(ticket).decode()
        if journal:
            headers[JOURNAL_HEADER] = encode(journal).decode()
        body = lines + call.body
        return self._session.post(
            worker.url + call.target,
            data=body if len(body) < _LARGE else io.BytesIO(body),
            headers=headers,
            allow_redirects=False,
            timeout=_TIMEOUT,
        )

    def _lose(self, worker: Worker, error: Exception) -> str:
        """Why the worker is lost: if it was given up, the registry knows."""
        why = worker.detail if worker.state == "lost" else str(error) or type(error).__name__
        self._registry.lose(worker, why)
        return why

    def _stamp(self, call: Call, event: str, **detail: str | int | float) -> None:
        self._lifecycle.stamp(call.id, event, **detail)


def _relayed(upstream: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: upstream.headers[name] for name in _RELAYED if name in upstream.headers}
