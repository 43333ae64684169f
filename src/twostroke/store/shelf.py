"""The account of a tier's slots: which hold a block, which are being written, which are free. Pure, no memory.

Each slot is in exactly one state, so ``free + filling + stored + bad == total`` always holds. A slot that is pinned is
being read, and keeps its block until it is not. A block that is protected is not evicted until somebody says so.

Not thread-safe: a tier touches it on the event loop alone.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import compress

from twostroke.kv.keys import BlockKey
from twostroke.store.eviction import Policy, Quotas

_MOST_BAD = 8  # at most one slot in this many is set aside


class Shelf:
    """Hands out slots of one medium and remembers which block is in which."""

    def __init__(self, total: int, policy: Policy, quotas: Quotas | None = None) -> None:
        self.total = total
        self.evictions = 0
        self._policy = policy  # knows the blocks that may be evicted
        self._quotas = quotas or Quotas()
        self._protected: set[BlockKey] = set()
        self._free = list(range(total - 1, -1, -1))  # low numbers first, so that a file grows from its start
        self._slot: dict[BlockKey, int] = {}
        self._filling: dict[BlockKey, int] = {}
        self._pins: dict[BlockKey, int] = {}
        self._bad: list[int] = []
        self._held: dict[int, bool] = {}  # slots of discarded blocks that are still being read: are they bad?

    @property
    def stored(self) -> int:
        """How many blocks can be found."""
        return len(self._slot)

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def filling(self) -> int:
        """Slots that are being written, or still being read though their block is given up."""
        return len(self._filling) + len(self._held)

    @property
    def bad(self) -> int:
        """Slots that are set aside."""
        return len(self._bad)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which of the blocks are here. To ask is to use them: a prefix is younger than what depends on it."""
        found = list(map(self._slot.__contains__, keys))
        here = list(compress(keys, found))
        here.reverse()
        if self._protected:
            here = [key for key in here if key not in self._protected]
        self._policy.touch(here)
        self._quotas.touch(here)
        return found

    @property
    def protected(self) -> Set[BlockKey]:
        """Blocks that are not evicted."""
        return self._protected

    def slots(self) -> Mapping[BlockKey, int]:
        """Every block that can be found, and where."""
        return self._slot

    def restore(self, slots: Iterable[tuple[BlockKey, int]], protected: Collection[int] = ()) -> None:
        """Blocks that were found in these slots of an empty shelf, the next to be evicted first. Of a block that is
        there twice the last counts. ``protected``: slots of those that are.
        """
        self._slot = dict(slots)
        for key in self._slot:
            self._quotas.enter(key)
        self._protected.update(key for key, slot in self._slot.items() if slot in protected)
        self._may_go([key for key in self._slot if key not in self._protected])
        taken = set(self._slot.values())
        self._free = [slot for slot in range(self.total - 1, -1, -1) if slot not in taken]

    def extend(self, total: int) -> None:
        """The medium has ``total`` slots now."""
        self._free = [*range(total - 1, self.total - 1, -1), *self._free]
        self.total = total

    def pin(self, keys: Sequence[BlockKey]) -> list[int]:
        """Slots of the longest prefix of ``keys`` that is here; they keep their blocks until ``unpin``."""
        slots = []
        for key in keys:
            slot = self._slot.get(key)
            if slot is None:
                break
            self._pins[key] = self._pins.get(key, 0) + 1
            slots.append(slot)
        return slots

    def unpin(self, keys: Iterable[BlockKey], slots: Iterable[int]) -> None:
        """Blocks that were pinned in these slots are no longer read."""
        pins, held = self._pins, self._held
        for key, slot in zip(keys, slots, strict=True):
            if count := pins.pop(key) - 1:
                pins[key] = count
            elif slot in held:
                self._put_away(slot, held.pop(slot))

    def protect(self, keys: Iterable[BlockKey]) -> dict[BlockKey, int]:
        """Those of the blocks that are here are not evicted from now on. They, and their slots."""
        found = self._find(keys)
        for key in found.keys() - self._protected:
            self._policy.remove(key)
            self._quotas.remove(key)
        self._protected.update(found)
        return found

    def expose(self, keys: Iterable[BlockKey]) -> dict[BlockKey, int]:
        """Those of the blocks that are here may be evicted again. They, and their slots."""
        found = self._find(keys)
        for key in found.keys() & self._protected:
            self._protected.remove(key)
            self._may_go([key])
        return found

    def take(self, keys: Iterable[BlockKey]) -> dict[BlockKey, int]:
        """Slots to write blocks into, evicting others as needed: of those that are not here, as far as what could go
        for them is neither in use nor protected.
        """
        here, filling, pins = self._slot, self._filling, self._pins
        taken: dict[BlockKey, int] = {}
        for key in keys:
            if key not in here and key not in filling and key not in pins and self._has_room(key):
                taken[key] = filling[key] = self._free.pop()
                self._quotas.enter(key)
        return taken

    def publish(self, keys: Sequence[BlockKey]) -> None:
        """Blocks are written as a whole, and can be found from now on."""
        self._slot.update(zip(keys, map(self._filling.pop, keys), strict=True))
        self._may_go(keys)

    def cancel(self, keys: Iterable[BlockKey]) -> None:
        """Blocks could not be written."""
        for key in keys:
            self._free.append(self._filling.pop(key))
            self._quotas.leave(key)

    def discard(self, key: BlockKey, *, bad: bool = True) -> None:
        """Give up a block. If it is damaged its slot is set aside, since the next one might fare no better there."""
        slot = self._slot.pop(key, None)
        if slot is None:
            return
        if key in self._protected:
            self._protected.remove(key)
        else:
            self._policy.remove(key)
            self._quotas.remove(key)
        self._quotas.leave(key)
        if key in self._pins:
            self._held[slot] = bad
        else:
            self._put_away(slot, bad)

    def _find(self, keys: Iterable[BlockKey]) -> dict[BlockKey, int]:
        return {key: slot for key in keys if (slot := self._slot.get(key)) is not None}

    def _has_room(self, key: BlockKey) -> bool:
        """Whether there is a free slot that the block may have, now that another went for it if need be."""
        if self._quotas.full(key):
            victim = self._quotas.evict(key, self._pins.__contains__)
            if victim is not None:
                self._policy.remove(victim)
        elif self._free:
            return True
        else:
            victim = self._policy.evict(self._pins.__contains__)
            if victim is not None:
                self._quotas.remove(victim)
        if victim is None:
            return False
        self._evicted(victim)
        return True

    def _may_go(self, keys: Sequence[BlockKey]) -> None:
        self._policy.add(keys)
        self._quotas.add(keys)

    def _evicted(self, key: BlockKey) -> None:
        self._free.append(self._slot.pop(key))
        self._quotas.leave(key)
        self.evictions += 1

    def _put_away(self, slot: int, bad: bool) -> None:
        if not bad:
            self._free.append(slot)
            return
        self._bad.insert(0, slot)
        if len(self._bad) * _MOST_BAD > self.total:
            self._free.insert(0, self._bad.pop())
