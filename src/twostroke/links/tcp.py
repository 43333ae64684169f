"""The TCP link: a worker sends slots of its pool to another, straight out of one memory and into the other.

Both ends prove that they know the cluster secret, without sending it. That keeps strangers out; nothing is encrypted.
Each block comes with its checksum: a damaged one is fetched again, once. Frames are in ``frames.py``.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import xxhash

from twostroke.errors import HandoverFailed
from twostroke.kv.pool import Lease, Slot
from twostroke.links.frames import BLOCK, FRAMING, MAX_SLOTS, Challenge, Hello, Read
from twostroke.links.framing import HEADER, NONCE, Kind
from twostroke.links.link import Claim, check_read, settled
from twostroke.links.staging import Staging
from twostroke.links.wire import Listener, Wire
from twostroke.messages import PoolAddress, TcpEndpoint

PATIENCE = 2.0  # seconds: to connect, to wait for the next bytes, and by which a transfer may fall behind computing
IDLE_SECONDS = 60.0  # the server closes a connection on which nothing was asked for so long, the client after half
SEND_SECONDS = 60.0  # in which a client takes a block, however slow the network: whether it is too slow, it decides
SWEEP_SECONDS = 1.0  # after which a kept connection is closed that the other end has closed
_READS = 8  # of a link at once, or parts of them
_PARTS = 2  # of a read, each with a connection and a thread at both ends: one receives while the other verifies
_LEAST_PART = 4 << 20  # bytes that are worth it
_HEAD = HEADER.size + BLOCK.size  # bytes in front of a block; a refusal, which has a reason, is longer

log = logging.getLogger(__name__)
Pairs = Sequence[tuple[Slot, Slot]]  # theirs, ours


# -- the consumer's end ----------------------------------------------------------------------------------------------


class TcpLink:
    """Reads pools of workers that serve them with ``TcpServer``. Connections are kept for the next read."""

    name = TcpEndpoint.link

    def __init__(
        self, own: PoolAddress, staging: Callable[[], Staging], secret: str, *, slowest: Callable[[], float]
    ) -> None:
        """A link that knows nobody yet.

        Args:
            own: our pool, which ``staging`` gives access to.
            secret: the cluster's, which peers must know.
            slowest: bytes a second below which reading takes longer than computing.
        """
        self._slowest = slowest
        self._own = own
        self._staging = staging
        self._secret = secret
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()  # of the idle ones
        self._threads = ThreadPoolExecutor(_READS, thread_name_prefix="tcp-link")
        self._sweeper: asyncio.Task[None] | None = None

    def reaches(self, peer: PoolAddress) -> bool:
        """See ``Link.reaches``."""
        return isinstance(peer.memory, TcpEndpoint)

    async def read(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot], claim: Claim) -> None:
        """See ``Link.read``."""
        check_read(self._own.block_bytes, peer, remote)
        pairs = list(zip(remote, local, strict=True))
        assert all(0 <= slot < self._own.num_slots for slot in local), "we write into our own slots"
        if not pairs:
            return
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep())
        parts = max(1, min(_PARTS, len(pairs) * peer.block_bytes // _LEAST_PART))
        edges = [len(pairs) * part // parts for part in range(parts + 1)]
        transfer = _Transfer(parts)
        works = [
            self._threads.submit(self._read, peer, pairs[first:end], claim, transfer) for first, end in pairwise(edges)
        ]

        def stop() -> None:
            for work in works:
                work.cancel()  # if it has not begun
            transfer.stop(HandoverFailed("the read was cancelled"))

        await settled(asyncio.gather(*map(asyncio.wrap_future, works), return_exceptions=True), stop)
        if transfer.failure is not None:  # the first one; those of the other parts follow from it
            raise transfer.failure

    def close(self) -> None:
        """See ``Link.close``."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._threads.shutdown()
        while self._idle:
            self._idle.pop().wire.close()

    def _read(self, peer: PoolAddress, pairs: Pairs, claim: Claim, transfer: "_Transfer") -> None:
        """One part of a read, over a connection of its own. If it fails it stops the other parts too."""
        connection: _Connection | None = None
        try:
            connection = self._reuse(peer) or self._connect(peer, transfer)
            transfer.uses(connection.wire)
            damaged = connection.fetch(pairs, claim, transfer)
            if damaged:
                log.warning("%d of %d blocks arrived damaged and are fetched again", len(damaged), len(pairs))
                damaged = connection.fetch(damaged, claim, transfer)
            if damaged:
                raise HandoverFailed(f"the block in the peer's slot {damaged[0][0]} arrived damaged twice")
            transfer.leaves(connection.wire)
        except BaseException as error:
            if connection is not None:
                connection.wire.close()
            broke = isinstance(error, OSError)
            transfer.stop(HandoverFailed(f"the TCP link to the peer broke: {error}") if broke else error)
            raise
        connection.since = time.monotonic()
        with self._lock:
            self._idle.append(connection)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._reuse(None)

    def _reuse(self, peer: PoolAddress | None) -> "_Connection | None":
        """A connection to the peer that nobody uses. All that have become useless are closed."""
        found: _Connection | None = None
        oldest = time.monotonic() - IDLE_SECONDS / 2
        with self._lock:
            idle, self._idle = self._idle, []
            for connection in idle:
                if connection.since < oldest or not connection.wire.quiet:
                    connection.wire.close()
                elif found is None and connection.peer == peer:
                    found = connection
                else:
                    self._idle.append(connection)
        return found

    def _connect(self, peer: PoolAddress, transfer: "_Transfer") -> "_Connection":
        """Both ends prove that they know the secret.

        Raises:
            HandoverFailed: the peer does not know it, broke the protocol, or serves another pool.
            OSError: it cannot be reached, or took too long.
        """
        endpoint = peer.memory
        if not isinstance(endpoint, TcpEndpoint):
            raise HandoverFailed(f"the peer's pool is {endpoint.kind}: {self.name} cannot reach it")
        family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        raw = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        wire = Wire(raw, FRAMING)
        try:
            transfer.uses(wire)
            wire.connect(endpoint.host, endpoint.port, PATIENCE)
            challenge = wire.greet(Hello(os.urandom(NONCE)), Challenge, self._secret, PATIENCE)
            if (challenge.instance, challenge.num_slots) != (peer.instance, peer.num_slots) or (
                challenge.block_bytes != peer.block_bytes
            ):
                raise HandoverFailed("the peer's pool belongs to another instance, or is not what its address says")
            return _Connection(peer, wire, self._staging(), self._slowest)
        except BaseException:
            wire.close()
            raise


class _Transfer:
    """One read, which the event loop can stop while threads carry out its parts."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.failure: BaseException | None = None  # why it was stopped
        self._lock = threading.Lock()
        self._wires: set[Wire] = set()

    def uses(self, wire: Wire) -> None:
        """It waits on this wire from now on. ``HandoverFailed`` if it is stopped."""
        with self._lock:
            self._wires.add(wire)
        self.check()

    def leaves(self, wire: Wire) -> None:
        """It waits on this wire no longer. ``HandoverFailed`` if it is stopped."""
        with self._lock:
            self._wires.discard(wire)
        self.check()

    def check(self) -> None:
        """``HandoverFailed`` if it is stopped."""
        if self.failure is not None:
            raise HandoverFailed("the read was stopped")

    def stop(self, why: BaseException) -> None:
        """End it, as soon as can be."""
        with self._lock:
            self.failure = self.failure or why
            for wire in self._wires:
                wire.abort()


@dataclass
class _Connection:
    """A connection whose other end has proved itself."""

    peer: PoolAddress
    wire: Wire
    staging: Staging
    slowest: Callable[[], float]  # bytes a second
    serial: int = 0  # of the last ``Read``
    behind: float = 0.0  # seconds later than over the slowest link
    since: float = 0.0  # idle since

    def fetch(self, pairs: Pairs, claim: Claim, transfer: _Transfer) -> Pairs:
        """Bring slots over; those that arrived damaged. Errors as for ``block``."""
        damaged = []
        for start in range(0, len(pairs), MAX_SLOTS):
            batch = pairs[start : start + MAX_SLOTS]
            self.serial += 1
            request = Read(self.serial, claim.handover, claim.attempt, [theirs for theirs, _ in batch])
            self.wire.say(request, PATIENCE)
            head = self.wire.take(_HEAD, time.monotonic() + PATIENCE)
            for index, (theirs, ours) in enumerate(batch):
                transfer.check()
                if not self.block(head if index == 0 else None, theirs, ours, transfer.parts):
                    damaged.append((theirs, ours))
        return damaged

    def block(self, head: bytearray | None, theirs: Slot, ours: Slot, sharing: int = 1) -> bool:
        """Receive the next block; whether it is whole. ``sharing``: connections that share the network's speed.

        Raises:
            HandoverFailed: the peer refuses it, broke the protocol, or is too slow.
            OSError: the connection broke or went silent.
        """
        start, slowest = time.monotonic(), self.slowest()
        fair = sharing * self.peer.block_bytes / slowest
        deadline = start + PATIENCE - self.behind + fair
        head = head or self.wire.take(_HEAD, deadline)
        kind, size = FRAMING.parse_header(head[: HEADER.size], self.peer.block_bytes)
        if kind is Kind.MESSAGE:
            body = head[HEADER.size :] + self.wire.take(max(0, size - BLOCK.size), deadline)
            FRAMING.parse_message(body[:size], Read)  # a refusal raises
            raise HandoverFailed("the peer sent a message instead of a block")
        serial, slot, digest = BLOCK.unpack_from(head, HEADER.size)
        if (serial, slot) != (self.serial, theirs):
            raise HandoverFailed(f"the peer sent slot {slot} of request {serial}, not {theirs} of {self.serial}")
        space = self.staging.space(ours)
        self.wire.receive(space, deadline, PATIENCE)
        whole: bool = xxhash.xxh3_128_digest(space) == digest
        if whole:
            self.staging.store(ours)
        self.behind = max(0.0, self.behind + time.monotonic() - start - fair)
        if self.behind > PATIENCE:
            raise HandoverFailed(
                f"the TCP link to the peer is slower than {slowest / 2**20:.3g} MiB/s, as fast as this worker computes"
            )
        return whole


# -- the producer's end ----------------------------------------------------------------------------------------------


class TcpServer:
    """Sends slots of our pool to workers that know the secret and name a hand-over that exports them to it."""

    def __init__(
        self, listening: socket.socket, pool: PoolAddress, staging: Callable[[], Staging], secret: str
    ) -> None:
        """Takes the socket over. Whoever connects is answered after ``start``."""
        host, port = listening.getsockname()[:2]
        self.address = msgspec.structs.replace(pool, memory=TcpEndpoint(host, port))
        self._staging = staging
        self._secret = secret
        self._exported: Callable[[str, int], Lease | None] = lambda _handover, _attempt: None
        self._listener = Listener(listening, FRAMING, self._serve, "tcp-server")

    def start(self, exported: Callable[[str, int], Lease | None]) -> None:
        """Answer. ``exported``: what a hand-over, by id and attempt, may read now; called from any thread."""
        self._exported = exported
        self._listener.start()

    def close(self) -> None:
        """End every connection. When this returns, nothing reads the pool any more."""
        self._listener.close()

    def _serve(self, wire: Wire) -> None:
        pool, hello = self.address, wire.hear(Hello, time.monotonic() + PATIENCE)
        challenge = Challenge(os.urandom(NONCE), pool.instance, pool.num_slots, pool.block_bytes)
        wire.admit(hello, challenge, self._secret, PATIENCE)
        staging, serial = self._staging(), 0
        while True:
            request = wire.hear(Read, time.monotonic() + IDLE_SECONDS)
            serial += 1
            if request.serial != serial:
                raise HandoverFailed(f"request {request.serial} came instead of request {serial}")
            self._answer(wire, staging, request)

    def _answer(self, wire: Wire, staging: Staging, request: Read) -> None:
        lease = self._exported(request.handover, request.attempt)
        held = set(lease.slots) if lease is not None else set()
        for slot in request.slots:
            if lease is None or not lease.alive or slot not in held:
                name = f"attempt {request.attempt} of hand-over {request.handover}"
                raise HandoverFailed(f"slot {slot} is not exported to {name}")
            content = staging.load(slot)
            head = FRAMING.block_head(content, request.serial, slot, xxhash.xxh3_128_digest(content))
            wire.send(head, content, seconds=SEND_SECONDS, silence=PATIENCE)
