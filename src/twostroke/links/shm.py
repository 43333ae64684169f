"""The shared-memory link: a same-host peer's pool is mapped once, then each slot is one memcpy."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from twostroke.errors import HandoverFailed
from twostroke.kv.memory import Bytes, map_peer
from twostroke.kv.pool import Slot
from twostroke.messages import PoolAddress


class SharedMemoryLink:
    """Reads pools of workers on this machine that run as the same user."""

    name = "shm"

    def __init__(self, own: Bytes) -> None:
        """``own``: our slots, ``uint8 [num_slots, block_bytes]``."""
        self._own = own
        self._peers: dict[str, Bytes] = {}  # by instance
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="shm-link")  # copies saturate memory with one thread

    async def read(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot]) -> None:
        """See ``Link.read``."""
        copy = asyncio.get_running_loop().run_in_executor(self._copies, self._copy, peer, remote, local)
        try:
            await asyncio.shield(copy)
        except asyncio.CancelledError:
            await asyncio.wait([copy])
            raise

    def close(self) -> None:
        """See ``Link.close``."""
        self._copies.shutdown()
        self._peers.clear()

    def _copy(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot]) -> None:
        if peer.block_bytes != self._own.shape[1]:
            raise HandoverFailed(f"the peer's slots have {peer.block_bytes} bytes, ours {self._own.shape[1]}")
        if max(remote) >= peer.num_slots:
            raise HandoverFailed(f"slot {max(remote)} is outside the peer's pool of {peer.num_slots}")
        slots = self._peers.get(peer.instance)
        if slots is None:
            slots = self._peers[peer.instance] = map_peer(peer)
        for source, target in zip(remote, local, strict=True):
            np.copyto(self._own[target], slots[source])  # releases the GIL
