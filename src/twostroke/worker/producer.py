"""The producer's end of hand-overs: drives the pure machine with what the router, the engine and consumers do."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable

import msgspec

from twostroke.engine.engine import Engine, Job, Update
from twostroke.errors import Conflict, HandoverFailed, RequestError
from twostroke.handover.machine import PRODUCER, Machine, ProducerAction, ProducerEvent, ProducerState
from twostroke.kv.board import Board
from twostroke.kv.keys import prompt_key
from twostroke.kv.pool import Lease
from twostroke.messages import (
    PROTOCOL,
    Abandon,
    Alive,
    Attach,
    Confirm,
    Confirmed,
    Ended,
    Event,
    Opened,
    Output,
    PoolAddress,
    Posted,
    Published,
    Request,
    Sampled,
    TcpEndpoint,
)

_ANOTHER_PROMPT = "the producer and the consumer were sent different prompts"
_GIVEN_UP = "the router gave it up"
_REMEMBERED = 4096  # hand-overs that are over, so that whoever comes late is told at once


class Export:
    """One hand-over that this worker produces. Every published block is held by ``lease``, until the end."""

    def __init__(
        self,
        attempt: int,
        engine: Engine,
        *,
        lease_seconds: float,
        attach_timeout: float,
        board: Board | None,
        closed: Callable[["Export"], None],
    ) -> None:
        self.attempt = attempt
        self.posted: Posted | None = None  # where readers see whether the lease is alive
        self.prompt = ""  # ``prompt_key`` of what is handed over, as who came first said
        self.lease = engine.lease()
        self.job: Job | None = None
        self.first: Output | None = None  # the first token, once it is sampled
        self.error: str | None = None
        self.changed = asyncio.Event()  # there is something to publish, or this is over
        self._closed = closed
        self._board = board
        self._engine = engine
        self._request: Request | None = None
        self._loads = False
        self._machine = Machine(PRODUCER, ProducerState.NEW)
        self._seconds = {ProducerState.EXPECTED: attach_timeout}
        self._lease_seconds = lease_seconds
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def open(self) -> bool:
        """Whether the lease is alive."""
        return self._machine.state is not ProducerState.CLOSED

    def is_for(self, prompt: str) -> bool:
        """Whether this is a hand-over of ``prompt``; until somebody has said so, it may be."""
        self.prompt = self.prompt or prompt
        return self.prompt == prompt

    def accepts(self, event: ProducerEvent) -> bool:
        """Whether the event is legal now."""
        return self._machine.accepts(event)

    def on(self, event: ProducerEvent) -> None:
        """Take an event and do what it calls for. After the end, events are late and mean nothing."""
        if self.open:
            for action in self._machine.on(event):
                self._do(action)
            self._settle()

    def request(self, request: Request, *, loads: bool = False) -> Job:
        """The router's request came: compute it, exporting its blocks. The returned job gives its one token.

        ``loads``: somebody else brings blocks first, see ``Engine.submit``.
        """
        self._request, self._loads = request, loads
        self.on(ProducerEvent.REQUEST)
        assert self.job is not None, "REQUEST computes"
        return self.job

    def fail(self, reason: str) -> None:
        """End early; an attached consumer is told why."""
        self.error = self.error or reason  # the first reason is the true one
        self.on(ProducerEvent.FAIL)

    def _do(self, action: ProducerAction) -> None:
        match action:
            case ProducerAction.COMPUTE:
                assert self._request is not None, "only REQUEST computes"
                self._stop_clock()
                self.job = self._engine.submit(self._request, loads=self._loads, exports=self.lease)
            case ProducerAction.PUBLISH:
                self.changed.set()
            case ProducerAction.RENEW:
                self._stop_clock()
                seconds = self._seconds.get(self._machine.state, self._lease_seconds)
                self._deadline = asyncio.get_running_loop().call_later(seconds, self.on, ProducerEvent.EXPIRE)
            case ProducerAction.ABORT:
                assert self.job is not None, "only what computes is aborted"
                self._engine.abort(self.job)
                self.job.push(HandoverFailed("the consumer left before the prefill was done"))
            case ProducerAction.RELEASE:
                self._unpost()  # first: once it is released, the slots can be written
                self._engine.release(self.lease)

    def post(self) -> Posted | None:
        """Have it said on the board that the lease is alive. None: whoever reads has to ask."""
        self.posted = self._board.post() if self._board is not None else None
        return self.posted

    def _unpost(self) -> None:
        if self.posted is not None and self._board is not None:
            self._board.clear(self.posted)
        self.posted = None

    def _settle(self) -> None:
        if not self.open:
            self._unpost()
            self._stop_clock()
            self.changed.set()
            self._closed(self)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()


class Producer:
    """All hand-overs that this worker produces, by id."""

    def __init__(
        self,
        engine: Engine,
        pools: tuple[PoolAddress, ...],
        *,
        lease_seconds: float,
        attach_timeout: float,
        queue_timeout: float,
        heartbeat: float,
        progress_timeout: float,
        board: Board | None = None,
    ) -> None:
        """``pools``: every way in which our one pool can be read. ``board``: where readers on this machine see which
        leases are alive. After ``progress_timeout`` seconds without a step the
        engine counts as stuck, and consumers get no more signs of life.
        """
        self._engine = engine
        self._pools = pools
        self._lease_seconds = lease_seconds
        self._attach_timeout = attach_timeout
        self._queue_timeout = queue_timeout
        self._heartbeat = heartbeat
        self._progress_timeout = progress_timeout
        self._board = board
        self._exports: dict[str, Export] = {}
        self._over: OrderedDict[tuple[str, int], str] = (
            OrderedDict()
        )  # id, or how all of a ticket's begin, and attempt → why

    async def produce(
        self, request: Request, handover: str, attempt: int, *, loads: bool = False
    ) -> AsyncGenerator[tuple[Job, Update], None]:
        """Compute a prompt for a consumer; give its job's updates, the last of which is the first token.

        ``loads``: somebody else brings blocks once it is admitted, see ``Engine.submit``.

        Leaving early ends the hand-over.

        Raises:
            Conflict: the same hand-over was asked for before, or its consumer has another prompt.
            RequestError: the prefill failed, or the consumer ended it.
        """
        self._check(handover, attempt)
        export = self._export(handover, attempt)
        if not export.accepts(ProducerEvent.REQUEST) or export.attempt != attempt:
            raise Conflict(f"hand-over {handover} is under way already, as attempt {export.attempt}")
        if not export.is_for(prompt_key(self._engine.model.layout.fingerprint, request.salt, request.prompt)):
            export.fail(_ANOTHER_PROMPT)
            raise Conflict(f"hand-over {handover}: {_ANOTHER_PROMPT}")
        reason = "the prefill was aborted"
        try:
            job = export.request(request, loads=loads)
            async for update in job.updates(self._queue_timeout):
                if isinstance(update, Output):
                    export.first = update
                    export.on(ProducerEvent.FINISH)
                else:
                    export.on(ProducerEvent.PROGRESS)
                yield job, update
        except RequestError as error:
            reason = error.message
            raise
        finally:
            if export.first is None:
                export.fail(reason)

    def refuse(self, handover: str, attempt: int, reason: str) -> None:
        """The request of this hand-over was turned down: tell its consumer, now or when it comes."""
        export = self._exports.get(handover)
        if export is not None:
            export.fail(reason)
        else:
            self._bury(handover, attempt, reason)

    async def attach(self, message: Attach, reached: str) -> AsyncGenerator[Event, None]:
        """Publish a hand-over to its consumer, from block ``message.have`` on, until it ends.

        ``reached`` is the address of ours at which the consumer did reach us.

        Raises:
            Conflict: the consumer has another layout, protocol or prompt, is late, or is not the only one.
        """
        export = self._admit(message)
        export.on(ProducerEvent.ATTACH)
        complete = False
        try:
            yield Opened(tuple(_at(pool, reached) for pool in self._pools), export.post())
            async for event in self._events(export, message.have):
                yield event
            complete = True
        finally:
            # After the last event the stream is over; what the consumer still reads ends by release or expiry.
            if not complete:
                export.on(ProducerEvent.DETACH)

    def confirm(self, message: Confirm) -> Confirmed:
        """Whether what the consumer has read was leased all the time; with ``release``, the end of the hand-over."""
        export = self._exports.get(message.handover)
        event = ProducerEvent.RELEASE if message.release else ProducerEvent.CONFIRM
        alive = (
            export is not None
            and message.instance == self._pools[0].instance
            and message.attempt == export.attempt
            and message.blocks <= len(export.lease.slots)
            and export.accepts(event)
        )
        if alive and export is not None:
            export.on(event)
        return Confirmed(alive)

    def abandon(self, message: Abandon) -> None:
        """End the hand-overs of a ticket, also those that are yet to come: the router's word may overtake its request.
        With no consumer they would hold their slots until they expire.
        """
        for handover, export in list(self._exports.items()):
            if _of_ticket(handover) == message.handover + "/" and export.attempt == message.attempt:
                export.fail(_GIVEN_UP)
        self._bury(message.handover + "/", message.attempt, _GIVEN_UP)

    def exported(self, handover: str, attempt: int) -> Lease | None:
        """What a hand-over holds for its consumer; none if it is over. From any thread."""
        export = self._exports.get(handover)
        return export.lease if export is not None and export.attempt == attempt else None

    def close(self) -> None:
        """End every hand-over."""
        for export in list(self._exports.values()):
            export.fail("the producer shuts down")

    @property
    def open(self) -> int:
        """Hand-overs that are under way."""
        return len(self._exports)

    def _admit(self, message: Attach) -> Export:
        fingerprint = self._engine.model.layout.fingerprint
        if message.protocol != PROTOCOL or message.fingerprint != fingerprint:
            raise Conflict(
                f"layouts differ: the consumer has {message.fingerprint} (protocol {message.protocol}), "
                f"the producer {fingerprint} (protocol {PROTOCOL}); serve the same model, dtype and block size"
            )
        self._check(message.handover, message.attempt)
        export = self._export(message.handover, message.attempt)
        if not export.accepts(ProducerEvent.ATTACH) or export.attempt != message.attempt:
            raise Conflict(f"hand-over {message.handover} has a consumer already, or is attempt {export.attempt}")
        if not export.is_for(message.prompt):
            raise Conflict(f"hand-over {message.handover}: {_ANOTHER_PROMPT}")
        return export

    async def _events(self, export: Export, sent: int) -> AsyncGenerator[Event, None]:
        """What happens to an export. The first token goes before the last blocks: it must not wait for them. A consumer
        that sees by itself that the lease is alive has nothing to say at the end: it hangs up.
        """
        sampled, begun = False, time.monotonic()
        while export.open:
            if export.first is not None and not sampled:
                sampled = True
                yield Sampled(export.first)
            if slots := export.lease.slots[sent:]:
                yield Published(sent, slots)
                sent += len(slots)
            if sampled and export.posted is None:
                break
            try:
                async with asyncio.timeout(self._heartbeat):
                    await export.changed.wait()
            except TimeoutError:
                if time.monotonic() - max(begun, self._engine.stepped) < self._progress_timeout:
                    yield Alive()
            export.changed.clear()
        yield Ended(None if sampled else export.error or "the producer gave up waiting for the request")

    def _export(self, handover: str, attempt: int) -> Export:
        """The present export of a hand-over. A newer attempt takes the place of an older one."""
        export = self._exports.get(handover)
        if export is not None and export.attempt < attempt:
            export.fail(f"attempt {attempt} took its place")
            export = None
        return export or self._new(handover, attempt)

    def _new(self, handover: str, attempt: int) -> Export:
        def closed(export: Export) -> None:
            del self._exports[handover]
            self._bury(handover, attempt, export.error or "it was released, or expired")

        export = Export(
            attempt,
            self._engine,
            lease_seconds=self._lease_seconds,
            attach_timeout=self._attach_timeout,
            board=self._board,
            closed=closed,
        )
        self._exports[handover] = export
        return export

    def _check(self, handover: str, attempt: int) -> None:
        """``Conflict`` if it is over."""
        if reason := self._over.get((handover, attempt)) or self._over.get((_of_ticket(handover), attempt)):
            raise Conflict(f"hand-over {handover} is over: {reason}")

    def _bury(self, handover: str, attempt: int, reason: str) -> None:
        self._over[handover, attempt] = reason
        if len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)


def _of_ticket(handover: str) -> str:
    """How the names of all hand-overs of its ticket begin."""
    return handover[: handover.rfind("/") + 1]


def _at(pool: PoolAddress, reached: str) -> PoolAddress:
    """The address for a consumer that reached us at ``reached``: whoever listens on all addresses has no other name."""
    memory = pool.memory
    if isinstance(memory, TcpEndpoint) and memory.host in ("0.0.0.0", "::"):  # noqa: S104 - not a bind
        return msgspec.structs.replace(pool, memory=msgspec.structs.replace(memory, host=reached))
    return pool
