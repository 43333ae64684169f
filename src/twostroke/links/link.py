"""What a link is: it moves whole slots from a live peer's pool into our own, and decides nothing."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeVar

from twostroke.errors import HandoverFailed
from twostroke.kv.memory import Bytes, host_id
from twostroke.kv.pool import Slot
from twostroke.messages import PoolAddress, Posted

FAILED_SECONDS = 60.0  # so long, a way that failed is the last choice
Result = TypeVar("Result")


class Claim(NamedTuple):
    """On whose behalf slots are read. A peer that sends them itself sends only what it exports to this hand-over."""

    handover: str
    attempt: int
    posted: Posted | None = None  # where the owner's machine says whether the lease is alive


class Link(Protocol):
    """One way to reach other workers' pools."""

    name: str

    def reaches(self, peer: PoolAddress) -> bool:
        """Whether this is the way to a pool at such an address. It may be out of reach all the same."""
        ...

    async def read(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot], claim: Claim) -> bool | None:
        """Copy the peer's slots ``remote`` into our slots ``local``, pairwise. Whether the lease was alive afterwards;
        None if that cannot be seen from here.

        What was read may be torn or stale: it counts only if the lease was, or once the peer has confirmed that. Not
        interrupted by cancellation: when this returns or raises, nothing writes into ``local`` any more.

        Raises:
            HandoverFailed: the peer cannot be read.
        """
        ...

    def close(self) -> None:
        """Let go of every peer."""
        ...


def check_read(block_bytes: int, peer: PoolAddress, remote: Sequence[Slot]) -> None:
    """Refuse what the peer's own address rules out.

    Raises:
        HandoverFailed: its slots have another size than ours (``block_bytes``), or ``remote`` is not within its pool.
    """
    if peer.block_bytes != block_bytes:
        raise HandoverFailed(f"the peer's slots have {peer.block_bytes} bytes, ours {block_bytes}")
    for slot in (min(remote, default=0), max(remote, default=0)):
        if not 0 <= slot < peer.num_slots:
            raise HandoverFailed(f"slot {slot} is outside the peer's pool of {peer.num_slots}")


class Way(NamedTuple):
    """A link, and the address of a pool that it reaches."""

    link: Link
    pool: PoolAddress


class Failures:
    """Which ways failed lately. A link that hangs costs seconds: the next hand-overs shall not pay them again."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, str], float] = {}  # by link and instance, monotonic

    def add(self, way: Way) -> None:
        """It failed just now."""
        now = time.monotonic()
        self._until = {key: until for key, until in self._until.items() if until > now}
        self._until[way.link.name, way.pool.instance] = now + FAILED_SECONDS

    def recent(self, way: Way) -> bool:
        """Whether it failed lately."""
        return self._until.get((way.link.name, way.pool.instance), 0.0) > time.monotonic()


def choose(links: Sequence[Link], offers: Sequence[PoolAddress], failures: Failures) -> list[Way]:
    """Every way to a pool at one of the addresses that its owner offers, best first as our links are; those that failed
    lately last.

    Raises:
        HandoverFailed: there is none.
    """
    ways = [Way(link, pool) for link in links for pool in offers if link.reaches(pool)]
    if not ways:
        where = "this machine" if any(pool.host == host_id() for pool in offers) else "another machine"
        raise HandoverFailed(
            f"no link in common: the producer, on {where}, offers {', '.join(pool.memory.link for pool in offers)}; "
            f"the consumer reads over {', '.join(link.name for link in links)}"
        )
    return sorted(ways, key=failures.recent)


async def settled(work: "asyncio.Future[Result]", stop: Callable[[], object] = lambda: None) -> Result:
    """What other threads' work comes to. When we are cancelled, however often, it is told to stop and waited for."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop()
        while not work.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        raise


class MemoryLink:
    """The twin for tests: peers are arrays of this process, by instance."""

    name = "memory"

    def __init__(self, own: Bytes, peers: dict[str, Bytes]) -> None:
        self._own = own
        self._peers = peers

    def reaches(self, peer: PoolAddress) -> bool:
        """See ``Link.reaches``."""
        return peer.instance in self._peers

    async def read(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot], claim: Claim) -> None:
        """See ``Link.read``."""
        check_read(self._own.shape[1], peer, remote)
        slots = self._peers.get(peer.instance)
        if slots is None or slots.shape != (peer.num_slots, peer.block_bytes):
            raise HandoverFailed(f"no peer {peer.instance} with such a pool")
        self._own[list(local)] = slots[list(remote)]

    def close(self) -> None:
        """See ``Link.close``."""
        self._peers = {}
