"""What a link is: it moves whole slots from a live peer's pool into our own, and decides nothing."""

from collections.abc import Sequence
from typing import Protocol

from twostroke.errors import HandoverFailed
from twostroke.kv.memory import Bytes
from twostroke.kv.pool import Slot
from twostroke.messages import PoolAddress


class Link(Protocol):
    """One way to reach other workers' pools."""

    name: str

    async def read(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot]) -> None:
        """Copy the peer's slots ``remote`` into our slots ``local``, pairwise.

        What was read may be torn or stale: it counts only once the peer has confirmed its lease afterwards. Not
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
    for slot in remote:
        if not 0 <= slot < peer.num_slots:
            raise HandoverFailed(f"slot {slot} is outside the peer's pool of {peer.num_slots}")


class MemoryLink:
    """The twin for tests: peers are arrays of this process, by instance."""

    name = "memory"

    def __init__(self, own: Bytes, peers: dict[str, Bytes]) -> None:
        self._own = own
        self._peers = peers

    async def read(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot]) -> None:
        """See ``Link.read``."""
        check_read(self._own.shape[1], peer, remote)
        slots = self._peers.get(peer.instance)
        if slots is None or slots.shape != (peer.num_slots, peer.block_bytes):
            raise HandoverFailed(f"no peer {peer.instance} with such a pool")
        self._own[list(local)] = slots[list(remote)]

    def close(self) -> None:
        """See ``Link.close``."""
        self._peers = {}
