"""A tier that is a cache service: the client's end. Each of a few threads uses a connection by itself. On the service's
machine blocks are read out of its memory, which holds them meanwhile, and it reads them out of ours: out of the pool,
or, where that is a GPU's, out of an outbox that the GPU writes. Elsewhere they go over the connection.
"""

import logging
import os
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from msgspec import Struct

from twostroke.errors import HandoverFailed, MemoryTooSmall
from twostroke.kv.direct import aligned
from twostroke.kv.keys import BlockKey
from twostroke.kv.memory import Bytes, PoolMemory, host_id, map_peer
from twostroke.links.framing import HEADER, NONCE, Kind, Wanted
from twostroke.links.wire import Wire
from twostroke.messages import Manage, Managed, PoolAddress, TierReport
from twostroke.store.format import Corrupt, Sealed, verify
from twostroke.store.frames import (
    BLOCK,
    FRAMING,
    MANAGE_SECONDS,
    MAX_KEYS,
    OPERATOR,
    Answer,
    Ask,
    Borrow,
    Challenge,
    Copied,
    Done,
    Get,
    Has,
    Hello,
    Kept,
    Lent,
    Mask,
    Offer,
    Order,
    Outcome,
    Put,
    Returned,
)
from twostroke.store.threads import Threads
from twostroke.store.tier import Place, Register, Source, Target, TierFailed, Usage

log = logging.getLogger(__name__)
PATIENCE = 2.0  # seconds: to connect, and without a byte
SLOWEST = 32 << 20  # bytes a second
_OFFER_BYTES = 256 << 20  # that the service copies at once out of a pool
_OUTBOX_BYTES = 8 << 20  # the same out of an outbox, which has room for some of them
_AHEAD = 2  # of these, that it has not answered while we prepare another
_THREADS = 4
_LEAST = 8  # blocks that are worth a connection of their own
Result = TypeVar("Result")


class Session:
    """One connection whose other end has proved itself. Used by one thread."""

    def __init__(self, host: str, port: int, fingerprint: bytes, block_bytes: int, secret: str) -> None:
        """Connect. ``OSError`` if that fails, ``TierFailed`` if the service refuses."""
        self.maps = True  # whether the service's memory can be mapped, as far as we know
        self.offers = True  # whether it can map ours
        self._block_bytes = block_bytes
        self._buffer = aligned(block_bytes)[:block_bytes]
        self.outbox: Outbox | None = None  # made when it is first used
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.wire = Wire(socket.socket(family, socket.SOCK_STREAM), FRAMING)
        try:
            self.wire.connect(str(address[0]), port, PATIENCE)
            self.wire.greet(Hello(os.urandom(NONCE), fingerprint, block_bytes), Challenge, secret, PATIENCE)
        except BaseException:
            self.wire.close()
            raise

    def close(self) -> None:
        """Hang up."""
        self.wire.close()
        if self.outbox is not None:
            self.outbox.close()

    def say(self, content: Struct) -> None:
        """Send a message."""
        self.wire.say(content, PATIENCE)

    def hear(self, wanted: type[Wanted], seconds: float = 0.0) -> Wanted:
        """Receive a message, which may begin to come so much later."""
        return self.wire.hear(wanted, self._deadline() + seconds)

    def ask(self, content: Struct, wanted: type[Wanted]) -> Wanted:
        """Send a message and receive the answer."""
        self.say(content)
        return self.hear(wanted)

    def blocks(self) -> Iterator[tuple[int, Sealed]]:
        """Blocks with their indices, not yet verified, each good until the next; up to ``Done``."""
        while True:
            kind, size = FRAMING.parse_header(self.wire.take(HEADER.size, self._deadline()), self._block_bytes)
            if kind is Kind.MESSAGE:
                FRAMING.parse_message(self.wire.take(size, self._deadline()), Done)
                return
            index, digest = BLOCK.unpack(self.wire.take(BLOCK.size, self._deadline()))
            yield index, Sealed(self.payload(), digest)

    def payload(self) -> memoryview:
        """The next block's, as of those that were lent; good until the next."""
        self.wire.receive(self._buffer, self._deadline())
        return self._buffer

    def send(self, index: int, block: Sealed) -> None:
        """Send a block."""
        seconds = PATIENCE + self._block_bytes / SLOWEST
        self.wire.send(FRAMING.block_head(block.payload, index, block.digest), block.payload, seconds=seconds)

    def _deadline(self) -> float:
        return time.monotonic() + PATIENCE + self._block_bytes / SLOWEST


def manage(host: str, port: int, secret: str, order: Manage) -> Managed:
    """Have a running service do something to its blocks.

    Raises:
        TierFailed, OSError: it refuses, or is not there.
    """
    session = Session(host, port, OPERATOR, 1, secret)
    try:
        session.say(Order(order))
        return session.hear(Outcome, MANAGE_SECONDS).managed
    finally:
        session.close()


class Outbox:
    """Memory of ours that the service can map, for a few offers at a time of blocks that lie where it cannot."""

    def __init__(self, slots: int, block_bytes: int, register: Register) -> None:
        self._memory = PoolMemory(slots, block_bytes, f"outbox-{os.urandom(8).hex()}")
        self._unregister = register(self._memory.slots)
        self._next = 0

    def fill(self, indexes: Sequence[int], source: Source) -> tuple[list[int], list[bytes | None]]:
        """Copy blocks into the next slots: which these are, and the digests. Those before them stay as they are, up to
        ``slots`` in all.
        """
        count = len(self._memory.slots)
        slots = [(self._next + nth) % count for nth in range(len(indexes))]
        self._next = (self._next + len(indexes)) % count
        return slots, source.fill(indexes, self._memory.slots, slots)

    @property
    def address(self) -> PoolAddress:
        """Where the service finds it."""
        return self._memory.address

    def close(self) -> None:
        """Give the memory back."""
        self._unregister()
        self._memory.close()


class ServiceTier:
    """See ``Tier``."""

    def __init__(
        self,
        host: str,
        port: int,
        block_bytes: int,
        fingerprint: str,
        secret: str,
        *,
        register: Register | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        """``secret``: the cluster's. For a GPU's pool: ``register`` makes memory one that it copies from and to by
        itself, until what that returns is called; ``prepare`` is called once in each thread that moves blocks.
        """
        self.name = "service"
        self._where = (host, port)
        self._block_bytes = block_bytes
        self._fingerprint = bytes.fromhex(fingerprint)
        self._secret = secret
        self._host = host_id()
        self._threads = Threads(_THREADS, self.name)
        self._sessions: set[Session] = set()
        self._idle: list[Session] = []
        self._reports: list[TierReport] = []
        self._damaged = 0
        self._memory: tuple[PoolAddress, Bytes] | None = None  # the service's, mapped
        self._lock = threading.Lock()  # of that
        self._register, self._prepare = register, prepare
        self._near = True  # whether the service is on our machine, as far as we know
        self.mapped = 0  # blocks that were read out of it
        self.offered = 0  # blocks that it has read out of ours

    async def open(self) -> None:
        """See ``Tier.open``."""
        self._reports = (await self._run(lambda session: session.ask(Ask(), Answer))).tiers
        if self._prepare is not None:
            await self._threads.all(self._prepare)
            await self._run(self._meet)

    async def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """See ``Tier.contains``."""
        found: list[bool] = []
        for first in range(0, len(keys), MAX_KEYS):
            some = keys[first : first + MAX_KEYS]
            mask = (await self._run(lambda session, some=some: session.ask(Has(b"".join(some)), Mask))).mask  # type: ignore[misc]
            if len(mask) != len(some):
                raise TierFailed("the service answered for other blocks")
            found += [bool(here) for here in mask]
        return found

    async def get(self, keys: Sequence[BlockKey], target: Target) -> int:
        """See ``Tier.get``."""
        came: set[int] = set()

        def some(session: Session, first: int, end: int) -> None:
            came.update(self._get(session, keys[first:end], first, target))

        await self._parts(some, len(keys))
        return next(index for index in range(len(keys) + 1) if index not in came)

    async def put(self, keys: Sequence[BlockKey], source: Source) -> int:
        """See ``Tier.put``."""

        def some(session: Session, first: int, end: int) -> int:
            offer = self._offer if self._register is None else self._offer_by_outbox
            done, stored = offer(session, keys[first:end], first, source)
            for at in range(first + done, end, MAX_KEYS):
                stored += _put(session, keys[at : min(end, at + MAX_KEYS)], at, source)
            return stored

        stored = await self._parts(some, len(keys))
        self._reports = (await self._run(lambda session: session.ask(Ask(), Answer))).tiers
        return sum(stored)

    def usage(self) -> Usage:
        """See ``Tier.usage``: the service's, of this layout and all workers, when it was last asked."""
        reports = self._reports
        return Usage(
            capacity=sum(report.capacity for report in reports),
            used=sum(report.used for report in reports),
            blocks=max((report.blocks for report in reports), default=0),
            evictions=sum(report.evictions for report in reports),
            damaged=self._damaged + sum(report.damaged for report in reports),
        )

    async def close(self) -> None:
        """See ``Tier.close``."""
        self._threads.close()
        for session in list(self._sessions):
            session.wire.abort()
            session.close()
        self._memory = None

    async def _parts(self, work: Callable[[Session, int, int], Result], count: int) -> list[Result]:
        """Let two threads do ``work`` on one half each of so many blocks, if there are enough."""
        parts = max(1, min(2, count // _LEAST))
        edges = [count * part // parts for part in range(parts + 1)]
        try:
            return await self._threads.each(
                lambda part: self._with_session(lambda session: work(session, edges[part], edges[part + 1])), parts
            )
        except OSError as error:
            raise TierFailed(str(error)) from error

    def _offer(self, session: Session, keys: Sequence[BlockKey], first: int, source: Source) -> tuple[int, int]:
        """Have the service copy blocks out of our pool, and tell it whether they were there all the time: how many of
        the first keys that is, none if it cannot, and how many of them it has now.
        """
        size, stored = max(1, min(MAX_KEYS, _OFFER_BYTES // self._block_bytes)), 0
        for at in range(0, len(keys), size):
            some = keys[at : at + size]
            indexes = range(first + at, first + at + len(some))
            places = self._places(source, indexes)
            if places is None or not session.offers:
                return at, stored
            offer = Offer(b"".join(some), places[0].pool, [place.slot for place in places], b"")
            session.say(offer)
            session.offers = session.hear(Copied, len(some) * self._block_bytes / SLOWEST).mapped
            if not session.offers:
                return at, stored
            count = session.ask(Kept(places == self._places(source, indexes)), Done).count
            self.offered += count
            stored += count
        return len(keys), stored

    def _places(self, source: Source, indexes: range) -> list[Place] | None:
        """Where blocks are now; None if they are not all in one pool on our machine."""
        places = [place for place in map(source.where, indexes) if place is not None]
        if len(places) < len(indexes) or any(place.pool != places[0].pool for place in places):
            return None
        return places if places[0].pool.host == self._host else None

    def _offer_by_outbox(
        self, session: Session, keys: Sequence[BlockKey], first: int, source: Source
    ) -> tuple[int, int]:
        """The same for blocks that lie where it cannot look, by copies: it copies these while more are made."""
        size, waiting = max(1, min(MAX_KEYS, _OUTBOX_BYTES // self._block_bytes)), deque[Offer]()
        done = stored = 0

        def hear() -> None:
            nonlocal done, stored
            offer, copied = waiting.popleft(), session.hear(Copied)
            session.offers = session.offers and copied.mapped
            done += len(offer.slots) if session.offers else 0
            stored += copied.count if session.offers else 0

        for at in range(0, len(keys), size):
            if not self._near or not session.offers:
                break
            outbox = self._outbox(session, (_AHEAD + 2) * size)
            slots, digests = outbox.fill(range(first + at, first + min(at + size, len(keys))), source)
            whole = [digest for digest in digests if digest is not None]
            if len(whole) < len(slots):
                break
            waiting.append(Offer(b"".join(keys[at : at + size]), outbox.address, slots, b"".join(whole)))
            session.say(waiting[-1])
            if len(waiting) > _AHEAD:
                hear()
        while waiting:
            hear()
        self.offered += stored
        return done, stored

    def _outbox(self, session: Session, slots: int) -> Outbox:
        """This connection's, made when it is first used."""
        if session.outbox is None:
            assert self._register is not None, "a GPU's"
            try:
                session.outbox = Outbox(slots, self._block_bytes, self._register)
            except MemoryTooSmall as error:
                raise TierFailed(f"there is no memory for an outbox: {error.message}") from error
        return session.outbox

    def _get(self, session: Session, keys: Sequence[BlockKey], first: int, target: Target) -> set[int]:
        """Indices of the blocks that came whole."""
        lent, came = self._borrow(session, keys, first, target)
        keys, first = keys[lent:], first + lent
        if not keys:
            return came
        session.say(Get(b"".join(keys)))
        for index, block in session.blocks():
            if not 0 <= index < len(keys):
                raise TierFailed("the service sent a block that was not asked for")
            try:
                verify(block)
            except Corrupt:
                self._damaged += 1
                continue
            if target.place(first + index, block):
                came.add(first + index)
        return came

    def _borrow(self, session: Session, keys: Sequence[BlockKey], first: int, target: Target) -> tuple[int, set[int]]:
        """Have the service hold the first blocks in its memory, as many as are there, and read them: how many these
        are, and indices of those that came whole.
        """
        lent = session.ask(Borrow(b"".join(keys), self._host if session.maps else None), Lent)
        count = len(lent.slots)
        if count > len(keys) or len(lent.digests) != 16 * count:
            raise TierFailed("the service lent other blocks")
        if not count:
            return 0, set()
        memory = None if lent.pool is None else self._map(lent.pool)
        session.maps = memory is not None
        if memory is None and lent.pool is not None:
            session.ask(Returned([]), Done)
            return self._borrow(session, keys, first, target)
        digests = [lent.digests[at : at + 16] for at in range(0, 16 * count, 16)]
        if memory is None:
            results = [_placed(target, first + nth, session.payload(), digest) for nth, digest in enumerate(digests)]
        elif max(lent.slots) >= len(memory):
            raise TierFailed("the service lent a slot outside its memory")
        else:
            results = target.take(range(first, first + count), memory, lent.slots, digests)
        came = {first + nth for nth, result in enumerate(results) if result is True}
        damaged = [nth for nth, result in enumerate(results) if isinstance(result, Corrupt)]
        session.ask(Returned(damaged), Done)  # they were held all the time
        self._damaged += len(damaged)
        self.mapped += len(came) if memory is not None else 0
        return count, came

    def _meet(self, session: Session) -> None:
        """Have the service's memory mapped before anybody waits for that."""
        lent = session.ask(Borrow(b"", self._host), Lent)
        self._near = lent.pool is not None and self._map(lent.pool) is not None

    def _map(self, pool: PoolAddress) -> Bytes | None:
        """The service's memory; None if it cannot be mapped."""
        with self._lock:
            if self._memory is None or self._memory[0] != pool:
                self._memory = None
                try:
                    if pool.block_bytes == self._block_bytes:
                        self._memory = pool, map_peer(pool)
                        if self._register is not None:  # until no thread reads it any more
                            weakref.finalize(self._memory[1], self._register(self._memory[1]))
                except HandoverFailed as error:
                    log.info("the cache service's memory is not mapped: %s", error.message)
            return self._memory[1] if self._memory is not None else None

    async def _run(self, work: Callable[[Session], Result]) -> Result:
        try:
            return await self._threads.run(lambda: self._with_session(work))
        except OSError as error:
            raise TierFailed(str(error)) from error

    def _with_session(self, work: Callable[[Session], Result]) -> Result:
        """Call ``work`` with a session that nobody uses."""
        session = self._idle_session() or Session(*self._where, self._fingerprint, self._block_bytes, self._secret)
        self._sessions.add(session)
        try:
            result = work(session)
        except BaseException:
            self._drop(session)
            raise
        self._idle.append(session)
        return result

    def _idle_session(self) -> Session | None:
        """The one that was used last, whose buffers at both ends are in the caches. None if there is none."""
        while self._idle:
            with suppress(IndexError):  # another thread has taken it
                session = self._idle.pop()
                if session.wire.quiet:
                    return session
                self._drop(session)
        return None

    def _drop(self, session: Session) -> None:
        session.close()
        self._sessions.discard(session)


def _placed(target: Target, index: int, payload: memoryview, digest: bytes) -> bool | Corrupt:
    """Verify a block and place it."""
    try:
        return target.place(index, verify(Sealed(payload, digest)))
    except Corrupt as error:
        return error


def _put(session: Session, keys: Sequence[BlockKey], first: int, source: Source) -> int:
    """How many of the blocks the service has now."""
    wanted = session.ask(Put(b"".join(keys)), Mask).mask
    if len(wanted) != len(keys):
        raise TierFailed("the service answered for other blocks")
    for index, want in enumerate(wanted):
        block = source.block(first + index) if want else None
        if block is not None:
            session.send(index, block)
    session.say(Done(0))
    return session.hear(Done).count
