"""The account of a pool's slots: who holds them, which are cached, which are free. Pure bookkeeping, no memory.

Each slot is in exactly one state, so ``free + cached + leased == total`` always holds:

- *free*: holds nothing worth keeping.
- *leased*: at least one lease holds it. A slot that may still be written has exactly one lease.
- *cached*: no lease holds it, but it holds a full block under a key; evicted least recently used first.

Not thread-safe: the engine guards it with its lock.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from twostroke.kv.keys import BlockKey
from twostroke.messages import Slots

Slot = int


class Pool:
    """Hands out slots of one memory and remembers which block keys they hold."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holds = [0] * total  # leases on each slot
        self._leased = 0  # slots with any
        self._key: list[BlockKey | None] = [None] * total
        self._slot: dict[BlockKey, Slot] = {}
        self._cached: OrderedDict[Slot, None] = OrderedDict()  # oldest first

    @property
    def available(self) -> int:
        """Slots that an allocation may take: free ones, and cached ones that it would evict."""
        return len(self._free) + len(self._cached)

    def counts(self) -> Slots:
        """The account. ``leased`` is kept apart from the others, so that the sum is a real check. It is asked for each
        second, while a step waits: no time to look at every slot.
        """
        return Slots(total=self.total, free=len(self._free), cached=len(self._cached), leased=self._leased)

    def lease(self) -> "Lease":
        """A new lease that holds nothing yet."""
        return Lease(self)

    def match(self, keys: Iterable[BlockKey]) -> list[Slot]:
        """Slots of the longest prefix of ``keys`` that is here. They are not held: a lease must ``share`` them."""
        slots = []
        for key in keys:
            slot = self._slot.get(key)
            if slot is None:
                break
            slots.append(slot)
        return slots

    def find(self, keys: Iterable[BlockKey]) -> dict[BlockKey, Slot]:
        """Where those of the blocks are that are here. They are not held either."""
        return {key: slot for key in keys if (slot := self._slot.get(key)) is not None}

    def publish(self, slot: Slot, key: BlockKey) -> None:
        """The full block in ``slot`` is complete and can be found by ``key`` from now on.

        If another slot already holds that block, this one stays anonymous and is free again once released.
        """
        assert self._holds[slot], f"slot {slot} is published but nobody holds it"
        if key not in self._slot and self._key[slot] is None:
            self._slot[key] = slot
            self._key[slot] = key

    def _allocate(self) -> Slot:
        if not self._free:
            slot, _ = self._cached.popitem(last=False)
            self._forget(slot)
        else:
            slot = self._free.pop()
        self._holds[slot] = 1
        self._leased += 1
        return slot

    def _hold(self, slot: Slot) -> None:
        assert self._holds[slot] or slot in self._cached, f"slot {slot} is free and cannot be shared"
        self._cached.pop(slot, None)
        self._leased += not self._holds[slot]
        self._holds[slot] += 1

    def _drop(self, slot: Slot) -> None:
        assert self._holds[slot] > 0, f"slot {slot} is dropped twice"
        self._holds[slot] -= 1
        if self._holds[slot]:
            return
        self._leased -= 1
        if self._key[slot] is None:
            self._free.append(slot)
        else:
            self._cached[slot] = None

    def _forget(self, slot: Slot) -> None:
        key = self._key[slot]
        if key is not None:
            del self._slot[key]
            self._key[slot] = None


class Lease:
    """A hold on slots, in block order. ``release`` is its one end, whatever the reason; after it the lease is dead."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.slots: list[Slot] = []
        self.alive = True

    def share(self, slots: Sequence[Slot]) -> None:
        """Also hold ``slots``, which somebody else holds or which are cached."""
        assert self.alive, "a dead lease cannot hold slots"
        for slot in slots:
            self._pool._hold(slot)
        self.slots += slots

    def grow(self, count: int) -> bool:
        """Add ``count`` slots with undefined content, evicting cached blocks as needed. All of them, or none."""
        assert self.alive, "a dead lease cannot hold slots"
        if count > self._pool.available:
            return False
        self.slots += [self._pool._allocate() for _ in range(count)]
        return True

    def release(self) -> None:
        """Let go of every slot. Later blocks first, so that a prefix is evicted after what depends on it."""
        if not self.alive:
            return
        self.alive = False
        for slot in reversed(self.slots):
            self._pool._drop(slot)
        self.slots = []
