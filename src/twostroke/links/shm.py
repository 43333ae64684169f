"""The shared-memory link: a same-host peer's pool is mapped once, then each slot is one memcpy."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from twostroke.kv.memory import Bytes, has_pool, map_peer
from twostroke.kv.pool import Slot
from twostroke.links.link import check_read
from twostroke.messages import PoolAddress


class SharedMemoryLink:
    """Reads pools of workers on this machine that run as the same user."""

    name = "shm"

    def __init__(self, own: Bytes) -> None:
        """``own``: our slots, ``uint8 [num_slots, block_bytes]``."""
        self._own = own
        self._peers: dict[PoolAddress, Bytes] = {}  # only the copying thread's
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="shm-link")  # copies saturate memory with one thread

    async def read(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot]) -> None:
        """See ``Link.read``."""
        copy = asyncio.get_running_loop().run_in_executor(self._copies, self._copy, peer, remote, local)
        try:
            await asyncio.shield(copy)
        except asyncio.CancelledError:
            while not copy.done():  # however often we are cancelled meanwhile
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([copy])
            raise

    def close(self) -> None:
        """See ``Link.close``."""
        self._copies.shutdown()
        self._peers.clear()

    def _copy(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot]) -> None:
        check_read(self._own, peer, remote)
        slots = self._peers.get(peer)
        if slots is None:
            # A pool's memory lives as long as anybody maps it: those of peers that are gone must not pile up.
            self._peers = {address: slots for address, slots in self._peers.items() if has_pool(address)}
            slots = self._peers[peer] = map_peer(peer)
        for source, target in zip(remote, local, strict=True):
            np.copyto(self._own[target], slots[source])  # releases the GIL
