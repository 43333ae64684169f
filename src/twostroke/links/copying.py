"""What the links within one machine share: a thread that alone opens peers' pools, copies, and closes them."""

import asyncio
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import HandoverFailed
from twostroke.kv.board import alive
from twostroke.kv.memory import Bytes, host_id, map_peer, started
from twostroke.kv.pool import Slot
from twostroke.links.link import Claim, check_read, settled
from twostroke.messages import PoolAddress, Posted

SWEEP_SECONDS = 1.0

Mapped = TypeVar("Mapped")
Slots = NDArray[np.uint64]


class CopyingLink(ABC, Generic[Mapped]):
    """Reads pools of workers on this machine: each is mapped once, until its process is gone or the link is closed.

    A pool's memory lives as long as anybody maps it. A worker that is started again needs its own back, so peers that
    are gone are let go within ``SWEEP_SECONDS``, whether anything is read or not.
    """

    name: str

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._peers: dict[PoolAddress, tuple[bytes, Mapped]] = {}  # with their start; only the copying thread's
        self._boards: dict[PoolAddress, tuple[bytes, Bytes]] = {}  # of the same peers
        self._copies = ThreadPoolExecutor(1, thread_name_prefix=f"{self.name}-link")  # one saturates the memory
        self._sweeper: asyncio.Task[None] | None = None

    def reaches(self, peer: PoolAddress) -> bool:
        """See ``Link.reaches``."""
        return peer.memory.link == self.name and peer.host == host_id()

    async def read(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot], claim: Claim) -> bool | None:
        """See ``Link.read``."""
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep())
        loop = asyncio.get_running_loop()
        return await settled(loop.run_in_executor(self._copies, self._read, peer, remote, local, claim.posted))

    def close(self) -> None:
        """See ``Link.close``."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._copies.submit(self._drop, lambda _pid, _start: True)
        self._copies.shutdown()

    @abstractmethod
    def _map(self, peer: PoolAddress) -> Mapped:
        """Make a pool readable. ``HandoverFailed`` if it cannot be, or is not what the address says."""

    @abstractmethod
    def _copy(self, source: Mapped, remote: Sequence[Slot], local: Sequence[Slot]) -> None:
        """Copy slots pairwise. When this returns or raises, nothing is written any more."""

    @abstractmethod
    def _unmap(self, source: Mapped) -> None:
        """Let go of a pool. Does not raise."""

    def _read(
        self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot], posted: Posted | None
    ) -> bool | None:
        check_read(self._block_bytes, peer, remote)
        self._drop(_gone)
        if peer not in self._peers:
            if peer.host != host_id():
                raise HandoverFailed(f"the peer's pool is on another machine: {self.name} cannot reach it")
            start = started(peer.pid)
            if start is None:
                raise HandoverFailed("the peer's process is gone")
            self._peers[peer] = start, self._map(peer)
        start, source = self._peers[peer]
        self._copy(source, remote, local)
        if posted is None or (posted.board.pid, posted.board.instance) != (peer.pid, peer.instance):
            return None
        return None if _gone(peer.pid, start) else self._alive(posted, start)  # what it left behind is still mapped

    def _alive(self, posted: Posted, start: bytes) -> bool | None:
        """What the peer's board says; None if that cannot be mapped."""
        known = self._boards.get(posted.board)
        if known is None:
            try:
                known = self._boards[posted.board] = start, map_peer(posted.board)
            except HandoverFailed:
                return None
        return alive(known[1], posted)

    def _drop(self, which: Callable[[int, bytes], bool]) -> None:
        for board, (start, _) in list(self._boards.items()):
            if which(board.pid, start):
                del self._boards[board]
        for peer, (start, source) in list(self._peers.items()):
            if which(peer.pid, start):
                del self._peers[peer]
                self._unmap(source)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await asyncio.get_running_loop().run_in_executor(self._copies, self._drop, _gone)


def _gone(pid: int, start: bytes) -> bool:
    return started(pid) != start


class Runs(NamedTuple):
    """The fewest copies that move slots pairwise."""

    remote: Slots  # the first slot of each copy
    local: Slots
    counts: Slots  # how many follow each other

    def listed(self) -> list[tuple[Slot, Slot, int]]:
        """One by one."""
        return list(zip(self.remote.tolist(), self.local.tolist(), self.counts.tolist(), strict=True))


def runs(remote: Sequence[Slot], local: Sequence[Slot]) -> Runs:
    """Slots that follow each other at both ends are copied at once."""
    # By way of array, which takes in a list three times as fast.
    theirs, ours = (np.frombuffer(array("Q", slots), np.uint64) for slots in (remote, local))
    assert len(theirs) == len(ours), "slots are pairs"
    jumps = np.flatnonzero((np.diff(theirs) != 1) | (np.diff(ours) != 1)) + 1
    firsts = np.concatenate(([0], jumps))[: len(theirs)]
    counts = np.diff(np.append(firsts, len(theirs))).astype(np.uint64)
    return Runs(theirs[firsts], ours[firsts], counts)
