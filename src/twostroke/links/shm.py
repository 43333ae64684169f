"""The shared-memory link: a same-host peer's memory file is mapped once, then each slot is one memcpy."""

from collections.abc import Sequence

from twostroke.kv.copying import copy, kernels
from twostroke.kv.memory import Bytes, map_peer
from twostroke.kv.pool import Slot
from twostroke.links.copying import CopyingLink
from twostroke.messages import MemoryFile, PoolAddress


class SharedMemoryLink(CopyingLink[Bytes]):
    """Reads pools of CPU workers on this machine that run as the same user."""

    name = MemoryFile.link

    def __init__(self, own: Bytes) -> None:
        """``own``: our slots, ``uint8 [num_slots, block_bytes]``."""
        super().__init__(block_bytes=own.shape[1])
        self._own = own
        kernels()

    def _map(self, peer: PoolAddress) -> Bytes:
        return map_peer(peer)

    def _copy(self, source: Bytes, remote: Sequence[Slot], local: Sequence[Slot]) -> None:
        for theirs, ours in zip(remote, local, strict=True):
            copy(self._own[ours], source[theirs])

    def _unmap(self, source: Bytes) -> None:
        """It is unmapped with its last reference."""
