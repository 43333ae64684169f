"""The cache service: tiers of its own, for any number of workers. ``service.py`` is the client's end.

Each connection has a thread, which reads requests and sends blocks straight out of the tier's memory; index and
decisions are the event loop's, as everywhere in the store.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import takewhile
from typing import Any, TypeVar

from twostroke.errors import HandoverFailed, StartupError
from twostroke.kv.direct import aligned
from twostroke.kv.keys import BlockKey
from twostroke.kv.memory import Bytes, host_id, map_peer
from twostroke.links.framing import HEADER, NONCE, Kind
from twostroke.links.wire import Listener, Wire
from twostroke.messages import Manage, Managed, ManagedTier, PoolAddress, TierReport
from twostroke.store.ends import Offered, Outlet, Taken
from twostroke.store.format import Corrupt, Sealed, verify
from twostroke.store.frames import (
    BLOCK,
    FRAMING,
    MANAGE_SECONDS,
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
    Request,
    Returned,
    parse_request,
    split,
)
from twostroke.store.host import HostTier, Loan
from twostroke.store.management import Whole, manage
from twostroke.store.service import PATIENCE, SLOWEST
from twostroke.store.slots import SlotTier
from twostroke.store.store import Hold, Store
from twostroke.store.tier import Source, TierFailed

log = logging.getLogger(__name__)
IDLE_SECONDS = 600.0  # a connection on which nothing was asked for so long is closed
INBOX_BYTES = 4 << 20  # of blocks that are received while as many are stored
AT_ONCE = 2  # offers of a connection: what one waits for, threads and the event loop, the other copies meanwhile
_CALL_SECONDS = 30.0
Result = TypeVar("Result")
Make = Callable[[str, int], Sequence[SlotTier]]  # tiers for a layout: fingerprint, bytes of a block


class _Nothing:
    """A hold on no blocks: the service has no pool above its tiers."""

    keys: Sequence[BlockKey] = ()

    @property
    def source(self) -> Source:
        raise AssertionError("nothing is held")

    def release(self) -> None:
        """There is nothing to release."""


class _NoPool:
    """See ``Origin``."""

    def hold(self, keys: Sequence[BlockKey]) -> Hold:
        """See ``Origin.hold``."""
        return _Nothing()


class Shop:
    """The blocks of one layout. All methods are called on the event loop."""

    def __init__(self, tiers: Sequence[SlotTier], block_bytes: int, ttl: float | None) -> None:
        """``ttl``: seconds after which a block is forgotten that nobody has written again."""
        self._tiers = tiers
        self.store = Store(tiers, block_bytes)
        self.block_bytes = block_bytes
        self._ttl = ttl
        self._born: OrderedDict[BlockKey, float] = OrderedDict()  # monotonic: clocks may be moved

    async def open(self) -> None:
        """Open the tiers. What is in them already is as old as this start."""
        await self.store.open(_NoPool())

    async def has(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which of the blocks are here."""
        found = await asyncio.gather(*(stage.contains(keys) for stage in self.store.stages))
        return [any(here) and self._fresh(key) for key, here in zip(keys, zip(*found, strict=True), strict=True)]

    async def get(self, keys: Sequence[BlockKey], target: Outlet) -> None:
        """Give those of the first blocks that are here, from whatever tier, to ``target``."""
        where = await self.store.find(list(takewhile(self._fresh, keys)))
        done = 0
        while done < len(where):
            level = where[done]
            end = next((i for i in range(done, len(where)) if where[i] != level), len(where))
            end = min(end, done + self.store.batch)
            target.first = done
            got = await self.store.get(level, keys[done:end], target)
            if level and got:
                self.store.offer(keys[done : done + got])
            done += got
            if not got:
                break

    async def lend(self, keys: Sequence[BlockKey]) -> Loan | None:
        """Hold the first blocks that are in the first tier. None if that is not memory."""
        tier = self._tiers[0]
        if not isinstance(tier, HostTier) or not self.store.stages[0].in_service:
            return None
        fresh = list(takewhile(self._fresh, keys))
        await self.store.stages[0].contains(fresh)  # they are used
        loan = tier.lend(fresh)
        self.store.stages[0].count("hits", len(loan.slots))
        return loan

    async def check(self, keys: Sequence[BlockKey]) -> None:
        """Give up those blocks of the first tier that are damaged there, and not on the way to whoever says so."""
        for key in keys:
            await self.store.stages[0].run(self._tiers[0].get([key], Whole()))

    async def put(self, keys: Sequence[BlockKey], source: Source) -> int:
        """Store blocks; how many of them are here now. They sink from the first tier into the others."""
        stored = await self.store.stages[0].put(keys, source)
        now = time.monotonic()
        for key in keys:
            self._born[key] = now
            self._born.move_to_end(key)
        self.store.offer(keys, below=1)
        return stored

    async def expire(self) -> None:
        """Give up what is too old, but not what is pinned."""
        if self._ttl is None:
            return
        oldest, old = time.monotonic() - self._ttl, []
        while self._born and next(iter(self._born.values())) < oldest:
            old.append(self._born.popitem(last=False)[0])
        for stage, tier in zip(self.store.stages, self._tiers, strict=True):
            with suppress(TierFailed):
                await stage.run(tier.drop([key for key in old if not tier.is_pinned(key)]))

    async def manage(self, layout: str, order: Manage) -> list[ManagedTier]:
        """What people ask."""
        return await manage(self.store.stages, layout, order)

    def _fresh(self, key: BlockKey) -> bool:
        if self._ttl is None or any(tier.is_pinned(key) for tier in self._tiers):
            return True
        now = time.monotonic()
        return now < self._born.setdefault(key, now) + self._ttl


class Server:
    """Listens, and serves each connection in a thread of its own."""

    def __init__(self, listening: socket.socket, make: Make, secret: str, *, ttl: float | None, layouts: int) -> None:
        """Takes the socket over. ``make`` is called once for each of at most ``layouts`` layouts."""
        self._listener = Listener(listening, FRAMING, self._serve, "store-server")
        self._make = make
        self._secret = secret
        self._ttl = ttl
        self._most = layouts
        self._shops: dict[tuple[bytes, int], asyncio.Task[Shop]] = {}
        self._maps: dict[Wire, tuple[PoolAddress, Bytes]] = {}  # clients' memory
        self._mapping = threading.Lock()  # of it: threads of one client come at once
        self._loop = asyncio.get_running_loop()
        self._sweeping = asyncio.create_task(self._sweep())
        self._closed = False

    def start(self) -> None:
        """Answer."""
        self._listener.start()

    async def close(self) -> None:
        """End every connection, and let go of all tiers."""
        self._closed = True
        self._sweeping.cancel()
        await asyncio.to_thread(self._listener.close, _CALL_SECONDS)
        for shop in self._shops.values():
            with suppress(TierFailed, StartupError):
                await (await shop).store.close()

    async def _sweep(self) -> None:
        while self._ttl is not None:
            await asyncio.sleep(min(self._ttl / 4, 30.0))
            for shop in self._open_shops().values():
                await shop.expire()

    async def _manage(self, order: Manage) -> Managed:
        shops = self._open_shops().items()
        return Managed([tier for layout, shop in shops for tier in await shop.manage(layout, order)])

    def _open_shops(self) -> dict[str, Shop]:
        return {
            fingerprint.hex(): task.result()
            for (fingerprint, _), task in self._shops.items()
            if task.done() and not task.cancelled() and task.exception() is None
        }

    async def _shop(self, hello: Hello) -> Shop:
        """Of a layout, opened when it is first asked for. ``TierFailed`` if there are too many."""
        layout = (hello.fingerprint, hello.block_bytes)
        if layout not in self._shops:
            if len(self._shops) >= self._most:
                raise TierFailed(f"this service keeps blocks of {self._most} layouts (--layouts), and has as many")
            self._shops[layout] = asyncio.create_task(self._open(hello))
        try:
            return await asyncio.shield(self._shops[layout])
        except StartupError as error:
            raise TierFailed(error.message) from error

    async def _open(self, hello: Hello) -> Shop:
        tiers = await asyncio.to_thread(self._make, hello.fingerprint.hex(), hello.block_bytes)
        shop = Shop(tiers, hello.block_bytes, self._ttl)
        await shop.open()
        log.info("layout %s: blocks of %d bytes", hello.fingerprint.hex(), hello.block_bytes)
        return shop

    # -- in threads ----------------------------------------------------------------------------------------------

    def _serve(self, wire: Wire) -> None:
        hello = wire.hear(Hello, time.monotonic() + PATIENCE)
        wire.admit(hello, Challenge(os.urandom(NONCE)), self._secret, PATIENCE)
        try:
            if hello.fingerprint == OPERATOR:
                self._obey(wire)
            shop = self._call(self._shop(hello))
            inbox = _Inbox(wire, shop.block_bytes)
            while True:
                self._answer(wire, shop, inbox, _request(wire))
        finally:
            self._maps.pop(wire, None)

    def _obey(self, wire: Wire) -> None:
        """Do what people ask, until they hang up."""
        while True:
            request = _request(wire)
            if not isinstance(request, Order):
                raise TierFailed("this connection is for no layout")
            wire.say(Outcome(self._call(self._manage(request.manage), MANAGE_SECONDS)), PATIENCE)

    def _answer(self, wire: Wire, shop: Shop, inbox: "_Inbox", request: Request) -> None:
        match request:
            case Has(keys):
                wire.say(Mask(bytes(self._call(shop.has(split(keys))))), PATIENCE)
            case Get(keys):
                outlet = Outlet(wire)
                try:
                    self._call(shop.get(split(keys), outlet))
                finally:
                    outlet.close()
                wire.say(Done(outlet.sent), PATIENCE)
            case Put(keys):
                wanted = split(keys)
                mask = [not here for here in self._call(shop.has(wanted))]
                wire.say(Mask(bytes(mask)), PATIENCE)
                wire.say(Done(self._take(shop, inbox, wanted) + mask.count(False)), PATIENCE)
            case Offer():
                self._copy(wire, shop, request) if request.digests else self._copy_and_ask(wire, shop, request)
            case Borrow():
                self._lend(wire, shop, request)
            case Ask():
                wire.say(Answer(self._call(_reports(shop))), PATIENCE)
            case Order():
                raise TierFailed("this connection is for blocks of one layout")

    def _take(self, shop: Shop, inbox: "_Inbox", keys: Sequence[BlockKey]) -> int:
        """Store what a client sends, while it sends more: how many of the blocks are here now."""
        stored, storing = 0, None
        for blocks in inbox.batches(len(keys)):
            stored += storing.result(_CALL_SECONDS) if storing else 0
            storing = self._begin(shop.put([keys[index] for index in blocks], Taken(list(blocks.values()))))
        return stored + (storing.result(_CALL_SECONDS) if storing else 0)

    def _lend(self, wire: Wire, shop: Shop, request: Borrow) -> None:
        """Whoever can map our memory reads blocks there; to others they are sent out of it."""
        loan = self._call(shop.lend(split(request.keys)))
        if loan is None:
            wire.say(Lent(None, [], b""), PATIENCE)
            return
        maps, patience = request.host == host_id(), PATIENCE + shop.block_bytes / SLOWEST
        try:
            wire.say(Lent(loan.memory.address if maps else None, loan.slots, loan.digests), PATIENCE)
            for slot in () if maps else loan.slots:
                wire.send(loan.memory.slots[slot].data, seconds=patience)
            if loan.slots:
                deadline = time.monotonic() + PATIENCE + len(loan.slots) * shop.block_bytes / SLOWEST
                damaged = wire.hear(Returned, deadline).damaged
                if max(damaged, default=0) >= len(loan.slots):
                    raise TierFailed("the client returned other blocks")
                self._call(shop.check([loan.keys[index] for index in damaged]))
                wire.say(Done(len(loan.slots)), PATIENCE)
        finally:
            self._loop.call_soon_threadsafe(loan.release)

    def _copy(self, wire: Wire, shop: Shop, offer: Offer) -> None:
        """Have what is offered with digests copied, and with it what else is meanwhile: answers come in order."""
        copying = deque([self._begin_copy(wire, shop, offer)])
        while copying:
            if len(copying) < AT_ONCE and not wire.quiet:
                following = _request(wire)
                if not isinstance(following, Offer) or not following.digests:
                    raise TierFailed("the client asked for something else before it had heard of its offers")
                copying.append(self._begin_copy(wire, shop, following))
                continue
            stored = copying.popleft()
            wire.say(Copied(0 if stored is None else stored.result(_CALL_SECONDS), mapped=stored is not None), PATIENCE)

    def _begin_copy(self, wire: Wire, shop: Shop, offer: Offer) -> "Future[int] | None":
        """None if its memory cannot be mapped."""
        payloads = self._payloads(wire, shop, offer)
        if payloads is None:
            return None
        if len(offer.digests) != 16 * len(payloads):
            raise TierFailed("the client offered other blocks")
        digests = [offer.digests[at : at + 16] for at in range(0, len(offer.digests), 16)]
        return self._begin(shop.put(split(offer.keys), Taken([*map(Sealed, payloads, digests)])))

    def _copy_and_ask(self, wire: Wire, shop: Shop, offer: Offer) -> None:
        """Have what is offered without digests copied; it counts if the client says that it held it meanwhile."""
        payloads = self._payloads(wire, shop, offer)
        if payloads is None:
            wire.say(Copied(0, mapped=False), PATIENCE)
            return
        offered = Offered(payloads)
        storing = self._begin(shop.put(split(offer.keys), offered))
        storing.add_done_callback(lambda _: offered.read.set())
        try:
            if not offered.read.wait(_CALL_SECONDS):
                raise TierFailed("the tier takes too long")
            wire.say(Copied(0, mapped=True), PATIENCE)
            offered.held.set_result(wire.hear(Kept, time.monotonic() + PATIENCE).kept)
        finally:
            if not offered.held.done():  # it has hung up, or is too slow
                offered.held.set_result(False)
        wire.say(Done(storing.result(_CALL_SECONDS)), PATIENCE)

    def _payloads(self, wire: Wire, shop: Shop, offer: Offer) -> list[memoryview] | None:
        """What is offered, in the client's memory. None if that cannot be mapped."""
        memory = self._map(wire, offer.pool, shop.block_bytes)
        if memory is None:
            return None
        if len(split(offer.keys)) != len(offer.slots) or max(offer.slots, default=0) >= len(memory):
            raise TierFailed("the client offered other blocks")
        return [memory[slot].data for slot in offer.slots]

    def _map(self, wire: Wire, pool: PoolAddress, block_bytes: int) -> Bytes | None:
        """A client's memory, mapped once for all of its connections; None if it cannot be."""
        if pool.host != host_id() or pool.block_bytes != block_bytes:
            return None
        with self._mapping:
            mapped = next((memory for known, memory in list(self._maps.values()) if known == pool), None)
            try:
                self._maps[wire] = pool, map_peer(pool) if mapped is None else mapped
            except HandoverFailed as error:
                log.info("a client's memory is not mapped: %s", error.message)
                return None
        return self._maps[wire][1]

    def _call(self, work: Coroutine[Any, Any, Result], seconds: float = _CALL_SECONDS) -> Result:
        """What it comes to on the event loop."""
        return self._begin(work).result(seconds)

    def _begin(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        if self._closed:
            work.close()
            raise TierFailed("the service is shutting down")
        return asyncio.run_coroutine_threadsafe(work, self._loop)


class _Inbox:
    """What a connection's blocks are received into: memory that has been used before is several times as fast."""

    def __init__(self, wire: Wire, block_bytes: int) -> None:
        self._wire = wire
        self._block_bytes = block_bytes
        self._most = max(1, INBOX_BYTES // block_bytes)  # blocks of a batch
        self._memory: memoryview | None = None

    def batches(self, most: int) -> Iterator[dict[int, Sealed]]:
        """Blocks by index below ``most``, verified, up to ``Done``. Each batch is good until the next but one is asked
        for.
        """
        size, seen, first = self._block_bytes, set[int](), 0
        if self._memory is None:
            self._memory = aligned(2 * self._most * size)
        while True:
            blocks: dict[int, Sealed] = {}
            for place in range(first, first + self._most):
                received = self._receive(self._memory[place * size : (place + 1) * size])
                if received is None:
                    yield blocks
                    return
                index, block = received
                if index >= most or index in seen:
                    raise TierFailed("other blocks were sent than were asked for")
                seen.add(index)
                with suppress(Corrupt):  # damaged on the way: the client keeps it
                    blocks[index] = verify(block)
            yield blocks
            first = self._most - first

    def _receive(self, space: memoryview) -> tuple[int, Sealed] | None:
        """The next block's index, and the block in ``space``; None if there is none."""
        wire, deadline = self._wire, time.monotonic() + PATIENCE + self._block_bytes / SLOWEST
        kind, size = FRAMING.parse_header(wire.take(HEADER.size, deadline), self._block_bytes)
        if kind is Kind.MESSAGE:
            FRAMING.parse_message(wire.take(size, deadline), Done)
            return None
        index, digest = BLOCK.unpack(wire.take(BLOCK.size, deadline))
        wire.receive(space, deadline)
        return index, Sealed(space, digest)


async def _reports(shop: Shop) -> list[TierReport]:
    return shop.store.reports()


def _request(wire: Wire) -> Request:
    """The next one."""
    return parse_request(wire.body(time.monotonic() + IDLE_SECONDS))
