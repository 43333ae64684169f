"""The host-memory tier: an arena of slots in a memory file, like a CPU worker's pool."""

import uuid
from collections.abc import Callable, Sequence

import numpy as np

from twostroke.errors import MemoryTooSmall
from twostroke.kv.keys import BlockKey
from twostroke.kv.memory import Area, Bytes, PoolMemory
from twostroke.store.eviction import Lru, Policy
from twostroke.store.slots import SlotTier
from twostroke.store.tier import Register

_THREADS = 2  # each way: what it takes to saturate memory, or the link to a GPU
AT_ONCE = 8  # blocks that a thread copies at once


class _Arena:
    """See ``Memory``: all slots are there from the start, and gone with the process."""

    def __init__(self, slots: int, slot_bytes: int, area: Area, register: Register | None) -> None:
        self.slot_bytes = slot_bytes
        self._count = slots
        self._area: Area | None = area  # until it is closed
        self._memory: PoolMemory | None = None
        self._register = register
        self._unregister: Callable[[], None] | None = None
        self.slots: Bytes = np.empty((0, slot_bytes), np.uint8)
        self.digests: list[bytes] = [b""] * slots

    def open(self) -> list[tuple[BlockKey, int]]:
        """See ``Medium.open``."""
        assert self._area is not None, "it is not closed"
        self._memory = PoolMemory(self._count, self.slot_bytes, uuid.uuid4().hex, self._area)
        self.slots = self._memory.slots
        if self._register is not None and self._unregister is None:
            self._unregister = self._register(self.slots)
        return []

    def size(self) -> int:
        """See ``Medium.size``."""
        return self._count

    def grow(self) -> int:
        """See ``Medium.grow``."""
        return self._count

    def forget(self, slot: int) -> None:
        """See ``Medium.forget``."""

    def close(self) -> None:
        """See ``Medium.close``."""
        if self._unregister is not None:
            self._unregister()
            self._unregister = None
        if self._area is not None:
            self._area.close()
        self._memory = self._area = None
        self.slots = self.slots[:0].copy()

    @property
    def memory(self) -> PoolMemory:
        """The slots, and where others on this machine find them."""
        assert self._memory is not None, "it is open"
        return self._memory


class Loan:
    """Blocks of the arena that stay where they are until ``release``."""

    def __init__(self, tier: "HostTier", keys: Sequence[BlockKey]) -> None:
        self._shelf = tier._shelf
        self.keys = keys
        self.memory = tier.arena.memory
        self.slots = self._shelf.pin(keys)
        self.digests = b"".join(tier.arena.digests[slot] for slot in self.slots)

    def release(self) -> None:
        """They may be evicted."""
        self._shelf.unpin(self.keys[: len(self.slots)], self.slots)


class HostTier(SlotTier):
    """See ``SlotTier``. Processes of the same user on this machine can map its arena, as they can a worker's pool."""

    def __init__(
        self,
        block_bytes: int,
        capacity: int,
        policy: Callable[[], Policy] = Lru,
        area: Area | None = None,
        *,
        at_once: int = AT_ONCE,
        register: Register | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        """A tier of at most ``capacity`` bytes of this machine's memory: of ``area``, or else all of it is taken now,
        since whoever opens a tier does not wait for so long.

        ``at_once``: blocks that one thread moves at once. ``register``: makes that memory one that a GPU copies
        from and to by itself, until what it returns is called. ``prepare``: see ``SlotTier``.

        Raises:
            MemoryTooSmall: it would not hold one block, or the machine has not enough memory left.
        """
        slots = capacity // block_bytes
        if slots < 1:
            raise MemoryTooSmall(f"a host tier of {capacity:,} bytes does not hold one block of {block_bytes:,}")
        area = area or Area(slots * block_bytes, "a host tier", "give it less")
        self.arena = _Arena(slots, block_bytes, area, register)
        super().__init__(
            "host", self.arena, policy, capacity=capacity, threads=_THREADS, at_once=at_once, prepare=prepare
        )

    def lend(self, keys: Sequence[BlockKey]) -> Loan:
        """Hold the longest prefix of these blocks that is here, for somebody who reads them by himself."""
        return Loan(self, keys)
