"""The token path: one client request to one or two workers, and the answering worker's bytes back.

The same body goes to both ends of a hand-over; a ticket in a header says which end a worker is. The decode worker's
reply is the answer, relayed as raw bytes. That worker copes by itself with a producer that is late or gone, so the
prefill worker's reply is waited for only where the serial schedule says so.

If the answering worker is lost, another one takes its place. Of a stream that the client has seen a part of, it
continues exactly there: the worker keeps a journal in its stream (``messages.Journal``), whose lines are taken out and
remembered here, unread, and given to the next worker. Nobody waits for a worker that answers no heartbeat, nor on a
connection that shows no sign of life (``api/alive.py``); such a worker is then told that the request is over.

A decode worker without slots for the prompt says so at once. Then the prefill is given up, and the request goes to
another one, or waits in line (``backlog.py``). Any other refusal is passed on once nobody else can be asked.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

from msgspec import Struct
from starlette.types import Receive, Scope, Send

from twostroke.api.alive import AT_ONCE
from twostroke.api.http import ClientGone, unless_gone
from twostroke.api.lifecycle import Lifecycle
from twostroke.config import RouterConfig
from twostroke.errors import RequestError, Unavailable, WorkerLost
from twostroke.messages import (
    ALIVE_HEADER,
    ATTEMPT_HEADER,
    JOURNAL_HEADER,
    SECRET_HEADER,
    TICKET_HEADER,
    Abandon,
    Journal,
    Ticket,
    encode,
)
from twostroke.router.backlog import Backlog, Line, Place
from twostroke.router.policy import ANY, Colocated, Disaggregated, Prompt, Route, Rules, choose, successor
from twostroke.router.prefix import PrefixMap, chain, tokens_of
from twostroke.router.registry import Registry
from twostroke.router.reply import Call, Frames, Refusal, Reply, read_call
from twostroke.router.upstream import SILENCE, Exchange, Silent, Upstream
from twostroke.router.worker import UPSTREAM_ERRORS, Hold, Wait, Worker

_PRODUCER_GRACE = 2.0  # seconds that the prefill end gets once the answer is complete; then nobody needs it
_RELAYED = ("content-type", "retry-after", "cache-control")
_PASSED_OVER = (401, 409)  # a producer's refusals that say nothing about the request
_BUSY = (429, 503)  # refusals that say nothing about the request: another worker may serve it


class _Refused(Exception):
    """A worker takes no more; nothing was sent to the client yet."""

    def __init__(self, worker: Worker, refusal: Refusal) -> None:
        super().__init__(f"worker {worker.id} answers {refusal.status}")
        self.worker = worker
        self.refusal = refusal


class _Trip(Struct, eq=False):
    """One request on its way: where it has been."""

    call: Call
    reply: Reply
    place: Place
    number: int  # in the line, should it have to wait for room
    hashes: Sequence[int]  # of its prompt's beginning
    prompt: Prompt = ANY
    attempt: int = 0
    lost: list[Worker] = []  # that it was lost on
    full: list[Worker] = []  # that had no place for it lately
    reason: str = ""  # of the latest attempt but the first
    wait: Wait | None = None  # for the worker that answers


class Relay:
    """The ASGI application of the token path."""

    def __init__(
        self,
        registry: Registry,
        lifecycle: Lifecycle,
        config: RouterConfig,
        *,
        secret: str,
    ) -> None:
        self._registry = registry
        self._upstream = Upstream()
        self._lifecycle = lifecycle
        self._rules = Rules(config.policy, config.short_prompt)
        self._serial = config.schedule == "serial"
        self._continues = config.on_loss == "continue"
        self._max_body = config.max_body
        self._retries = config.retries
        self._queue_timeout = config.queue_timeout
        self._secret = {SECRET_HEADER: secret} if secret else {}
        self._prefixes = PrefixMap()
        self._producers: set[asyncio.Task[Refusal | None]] = set()
        self._telling: set[asyncio.Task[None]] = set()
        self._turn = 0
        self.backlog = Backlog(config.max_queue)
        self.line = Line()
        self.in_flight = 0
        self.counts: Counter[str] = Counter()  # of what went otherwise than planned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request until it is answered or its client has gone, which ends it on both workers.

        Raises:
            RequestError: it cannot be answered, or not to the end. ``Boundary`` tells the client.
        """
        place = self.backlog.enter()
        self.in_flight += 1
        try:
            call = await read_call(scope, receive, self._max_body)
            hashes = chain(call.body, call.tenant) if self._rules.policy == "prefix-aware" else ()
            await self._serve(
                _Trip(
                    call,
                    Reply(send, scope.get(AT_ONCE), keeps=self._continues),
                    place,
                    self.line.number(),
                    hashes,
                ),
                receive,
            )
        finally:
            self.in_flight -= 1
            place.leave(served=False)
            self.line.room()

    async def _serve(self, trip: _Trip, receive: Receive) -> None:
        self._stamp(trip, "received", body_bytes=len(trip.call.body))
        try:
            await unless_gone(self._attempts(trip), receive)
        except ClientGone:
            self._stamp(trip, "aborted", reason="the client disconnected")
            raise
        except RequestError as error:
            self._stamp(trip, "failed", reason=error.message)
            raise
        else:
            self._stamp(trip, "finished")

    async def _attempts(self, trip: _Trip) -> None:
        """Route the request. When the worker that answers is lost, begin again or continue on another one; when it has
        no place, try another one, then wait in line for room, or pass its refusal on.
        """
        reply = trip.reply
        if self.line:
            await self._stand_in_line(trip)
        while True:
            route = self._choose(trip)
            if trip.attempt:
                self._note(trip, "continued" if reply.started else "retried")
            try:
                await self._along(route, trip)
            except _Refused as refused:
                trip.full.append(refused.worker)
                if self._other_place(trip):
                    trip.reason = str(refused)
                elif refused.refusal.no_room:
                    await self._stand_in_line(trip)
                else:
                    await reply.whole(refused.refusal.status, refused.refusal.headers, refused.refusal.body)
                    return
            except WorkerLost as error:
                trip.lost.append(route.worker if isinstance(route, Colocated) else route.decode)
                if len(trip.lost) > self._retries or (reply.started and not reply.can_continue):
                    raise
                trip.reason = error.message
            else:
                return
            trip.attempt += 1

    def _other_place(self, trip: _Trip) -> bool:
        """Whether a request that was refused may try another worker. A prefill worker is none: it would decode."""
        return len(trip.full) <= self._retries and any(w.pool != "prefill" and w.ready for w in self._open(trip))

    async def _stand_in_line(self, trip: _Trip) -> None:
        """Wait until a decode worker may have room."""
        self.line.refused()
        trip.full.clear()
        trip.reason = "no decode worker had room"
        self._note(trip, "queued")
        await self.line.turn(trip.number, self._queue_timeout)

    def _open(self, trip: _Trip) -> list[Worker]:
        return [w for w in self._registry.workers if w not in trip.lost and w not in trip.full]

    def _choose(self, trip: _Trip) -> Route[Worker]:
        """A route without the workers that this request was lost on, or refused by."""
        known = self._prefixes.match(trip.hashes) if trip.hashes else {}
        prompt = trip.prompt = Prompt(tokens_of(len(trip.call.body) + len(trip.reply.journal)), known)
        self._turn += 1
        if not trip.reply.started:
            route = choose(self._open(trip), self._rules, self._turn - 1, prompt)
        else:
            try:
                route = Colocated(successor(self._open(trip), self._rules, self._turn - 1, prompt))
            except Unavailable as error:
                raise WorkerLost(
                    f"worker {trip.lost[-1].id} was lost, and the answer cannot go on: {error.message}"
                ) from error
        if trip.hashes:  # at once, for who comes meanwhile; but a decode worker knows it only once it is there
            computes = route.worker if isinstance(route, Colocated) else route.prefill
            self._prefixes.remember(trip.hashes, [computes.key])
        return route

    async def _along(self, route: Route[Worker], trip: _Trip) -> None:
        attempt = trip.attempt
        if isinstance(route, Colocated):
            self._stamp(trip, "routed", worker=route.worker.id, attempt=attempt)
            await self._answer(trip, route.worker, None)
            return
        self._stamp(trip, "routed", prefill=route.prefill.id, decode=route.decode.id, attempt=attempt)
        ticket = Ticket(trip.call.handover, "produce", attempt)
        producer = asyncio.create_task(self._produce(trip, route.prefill, ticket))
        self._producers.add(producer)
        producer.add_done_callback(self._producers.discard)
        try:
            if self._serial and (refusal := await producer):
                if refusal.status in _BUSY:
                    raise _Refused(route.prefill, refusal)
                await trip.reply.whole(refusal.status, refusal.headers, refusal.body)
                return
            await self._answer(trip, route.decode, self._consume_ticket(route, trip))
        except BaseException:
            producer.cancel()
            if not trip.reply.started:  # else the decode worker has attached, and releases what it does not need
                self._tell(route.prefill, "/internal/handover/abandon", encode(Abandon(trip.call.handover, attempt)))
            raise
        if not producer.done():
            asyncio.get_running_loop().call_later(_PRODUCER_GRACE, producer.cancel)

    def _consume_ticket(self, route: Disaggregated[Worker], trip: _Trip) -> Ticket | None:
        """None when the producer is known to be lost: the decode worker need not look for it."""
        if route.prefill.state == "lost":
            return None
        return Ticket(trip.call.handover, "consume", trip.attempt, route.prefill.url, waits=False)

    async def _produce(self, trip: _Trip, worker: Worker, ticket: Ticket) -> Refusal | None:
        """The prefill end. Its failures are stamped, and left to the decode worker to make good; but a prefill worker
        that is busy is passed over, as long as the client has seen nothing.
        """
        try:
            with worker.held(trip.prompt.missing(worker), answers=False) as hold:
                async with worker.alive(), self._post(trip, worker, ticket) as upstream:
                    body = await upstream.read()
                    hold.failed = upstream.status >= 500
        except UPSTREAM_ERRORS as error:
            why = self._lose(worker, error)
            self._stamp(trip, "producer_failed", worker=worker.id, reason=why)
            return None
        if upstream.status < 400:
            return None
        self._stamp(trip, "producer_failed", worker=worker.id, status=upstream.status)
        if upstream.status == 503:
            self._registry.lose(worker, "it answers 503")
        if upstream.status >= 500 or upstream.status in _PASSED_OVER:
            return None
        refusal = Refusal(upstream.status, _relayed(upstream), body)
        if refusal.status in _BUSY and trip.attempt == ticket.attempt and trip.wait and not trip.reply.started:
            trip.wait.end(_Refused(worker, refusal))
        return refusal

    async def _answer(self, trip: _Trip, worker: Worker, ticket: Ticket | None) -> None:
        """Relay the reply of the worker that answers.

        Raises:
            WorkerLost: it cannot be reached, takes no requests, breaks off, or cannot continue the answer.
            _Refused: it, or the prefill worker, takes no more now.
        """
        call, reply = trip.call, trip.reply
        journal = Journal(len(reply.journal), call.created, trip.attempt)
        tokens = trip.prompt.tokens if ticket else trip.prompt.missing(worker)
        try:
            with worker.held(tokens, computes=ticket is None) as hold:
                async with (
                    worker.alive() as trip.wait,
                    self._post(trip, worker, ticket, journal, bytes(reply.journal)) as upstream,
                ):
                    hold.failed = upstream.status >= 500
                    if reply.started and JOURNAL_HEADER not in upstream.headers:
                        raise WorkerLost(f"worker {worker.id} cannot continue the answer: status {upstream.status}")
                    if upstream.status in _BUSY:
                        raise _Refused(worker, Refusal(upstream.status, _relayed(upstream), await upstream.read()))
                    await self._pass_on(trip, hold, upstream)
                    if trip.hashes and ticket and upstream.status == 200:
                        self._prefixes.remember(trip.hashes, [worker.key])
        except _Refused as refused:
            if refused.refusal.status == 503:
                self._registry.lose(refused.worker, "it answers 503")
            raise
        except UPSTREAM_ERRORS as error:
            why = self._lose(worker, error)
            if isinstance(error, Silent):
                self._tell(worker, "/abort_request", encode({"rid": trip.call.id}), attempt=trip.attempt)
            if not reply.done:
                raise WorkerLost(f"worker {worker.id} failed: {why}") from error
            await reply.end_stream()

    async def _pass_on(self, trip: _Trip, hold: Hold, upstream: Exchange) -> None:
        """An event stream goes on piece by piece, and once it has begun without a turn of the event loop where the
        client reads fast enough; anything else once whole, so that a broken one can be retried.
        """
        headers, reply = _relayed(upstream), trip.reply
        if not upstream.streams:
            body = await upstream.read()
            self._begun(trip, hold)
            await reply.whole(upstream.status, headers, body)
            return
        if JOURNAL_HEADER not in upstream.headers:
            raise ConnectionError("its stream has no journal")
        frames = Frames()
        while piece := await upstream.piece():
            part = frames.feed(piece)
            if part.events:
                self._begun(trip, hold)
            await reply.stream(upstream.status, headers, part)
            if reply.started:
                await upstream.pour(partial(reply.pass_on, frames))
        frames.end()
        if not reply.started:
            raise ConnectionError("it answers with an empty stream")
        await reply.end_stream()

    def _begun(self, trip: _Trip, hold: Hold) -> None:
        """There is something for the client."""
        if hold.begin() and not trip.reply.started:
            self._stamp(trip, "first_byte")
            trip.place.leave(served=True)

    def _post(
        self, trip: _Trip, worker: Worker, ticket: Ticket | None, journal: Journal | None = None, lines: bytes = b""
    ) -> Exchange:
        headers = {**trip.call.headers, ALIVE_HEADER: "1", **self._secret}
        if ticket:
            headers[TICKET_HEADER] = encode(ticket).decode()
        if journal:
            headers[JOURNAL_HEADER] = encode(journal).decode()
        return self._upstream.post(worker.url, trip.call.target, headers, lines + trip.call.body)

    def _tell(self, worker: Worker, path: str, message: bytes, attempt: int | None = None) -> None:
        """Have a worker end what it may think is still waited for. Unheard, that ends by its own deadline."""
        headers = self._secret if attempt is None else {**self._secret, ATTEMPT_HEADER: str(attempt)}
        task = asyncio.create_task(self._post_only(worker, path, headers, message))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _post_only(self, worker: Worker, path: str, headers: Mapping[str, str], message: bytes) -> None:
        with suppress(*UPSTREAM_ERRORS):
            async with asyncio.timeout(SILENCE), self._upstream.post(worker.url, path, headers, message) as reply:
                await reply.read()

    def close(self) -> None:
        """Let go of idle connections."""
        self._upstream.close()

    def _lose(self, worker: Worker, error: Exception) -> str:
        """Why the worker is lost: if it was given up, the registry knows."""
        why = worker.detail if worker.state == "lost" else str(error) or type(error).__name__
        self._registry.lose(worker, why)
        return why

    def _note(self, trip: _Trip, event: str) -> None:
        """Stamp something that went otherwise than planned, and why."""
        self.counts[event] += 1
        self._stamp(trip, event, reason=trip.reason)

    def _stamp(self, trip: _Trip, event: str, **detail: str | int | float) -> None:
        self._lifecycle.stamp(trip.call.id, event, **detail)


def _relayed(upstream: Exchange) -> dict[str, str]:
    return {name: upstream.headers[name] for name in _RELAYED if name in upstream.headers}
