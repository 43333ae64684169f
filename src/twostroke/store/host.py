"""The host-memory tier: an arena of slots in a memory file, like a CPU worker's pool."""

import uuid
from collections.abc import Callable, Sequence

from twostroke.errors import MemoryTooSmall
from twostroke.kv.keys import BlockKey
from twostroke.kv.memory import PoolMemory
from twostroke.store.direct import copy
from twostroke.store.eviction import Policy, S3Fifo
from twostroke.store.format import Sealed
from twostroke.store.slots import SlotTier

_THREADS = 2  # what it takes to saturate memory


class _Arena:
    """See ``Medium``: all slots are there from the start, and gone with the process."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._slots = slots
        self._memory: PoolMemory | None = None
        self._digests: list[bytes] = [b""] * slots

    def open(self) -> list[tuple[BlockKey, int]]:
        """See ``Medium.open``."""
        self._memory = PoolMemory(self._slots, self.slot_bytes, uuid.uuid4().hex)
        return []

    def size(self) -> int:
        """See ``Medium.size``."""
        return self._slots

    def grow(self) -> int:
        """See ``Medium.grow``."""
        return self._slots

    def read(self, slot: int, key: BlockKey) -> Sealed:
        """See ``Medium.read``."""
        return Sealed(self._view(slot), self._digests[slot])

    def write(self, slot: int, key: BlockKey, block: Sealed) -> None:
        """See ``Medium.write``."""
        copy(self._view(slot), block.payload)
        self._digests[slot] = block.digest

    def commit(self, slots: Sequence[int]) -> None:
        """See ``Medium.commit``."""

    def forget(self, slot: int) -> None:
        """See ``Medium.forget``."""

    def close(self) -> None:
        """See ``Medium.close``."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _view(self, slot: int) -> memoryview:
        assert self._memory is not None, "it is open"
        view: memoryview = self._memory.slots[slot].data
        return view


def host_tier(block_bytes: int, capacity: int, policy: Callable[[], Policy] = S3Fifo) -> SlotTier:
    """A tier of at most ``capacity`` bytes of this machine's memory; all of it is taken when it opens.

    Raises:
        MemoryTooSmall: it would not hold one block.
    """
    slots = capacity // block_bytes
    if slots < 1:
        raise MemoryTooSmall(f"a host tier of {capacity:,} bytes does not hold one block of {block_bytes:,}")
    return SlotTier("host", _Arena(slots, block_bytes), policy, capacity=capacity, threads=_THREADS)
