"""Which block goes when a tier is full, or its tenant has as many as it may. Pure: keys in, a victim out.

``Lru`` keeps whatever fits. ``S3Fifo`` resists scans: a block that is used once, such as those of a long prompt that
never comes back, passes through a small queue without pushing out what is used again. The price: a new prompt that is
longer than that queue, a tenth of a tier, loses its beginning before it can be used. So it has to be asked for.
(S3-FIFO: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.) ``benchmarks/bench_store.py``
compares them.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from twostroke.config import EvictionPolicy
from twostroke.kv.keys import NOBODY, BlockKey, Tenant, tenant_of


class Policy(Protocol):
    """Knows the keys of a tier, and in which order they go."""

    def add(self, keys: Iterable[BlockKey]) -> None:
        """Blocks that were not there are stored, the last of them last."""
        ...

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Blocks that are there were asked for, the last of them last."""
        ...

    def remove(self, key: BlockKey) -> None:
        """A block is gone, for another reason than eviction."""
        ...

    def evict(self, spared: Callable[[BlockKey], bool]) -> BlockKey | None:
        """The next to go, which is forgotten by this. None if all are ``spared``."""
        ...


class Lru:
    """The one that was not asked for for the longest time."""

    def __init__(self) -> None:
        self._keys: OrderedDict[BlockKey, None] = OrderedDict()  # the next to go first

    def add(self, keys: Iterable[BlockKey]) -> None:
        """See ``Policy.add``."""
        self._keys.update(dict.fromkeys(keys))

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """See ``Policy.touch``."""
        move = self._keys.move_to_end
        for key in keys:
            move(key)

    def remove(self, key: BlockKey) -> None:
        """See ``Policy.remove``."""
        del self._keys[key]

    def evict(self, spared: Callable[[BlockKey], bool]) -> BlockKey | None:
        """See ``Policy.evict``."""
        victim = next((key for key in self._keys if not spared(key)), None)
        if victim is not None:
            del self._keys[victim]
        return victim


class S3Fifo:
    """Three first-in-first-out queues: *small* for what is new, *main* for what was asked for again, and *ghost*, which
    remembers what left small unasked for, so that it enters main when it comes back.
    """

    _SHARE = 10  # small holds one part in this many
    _MOST = 3  # uses that are counted

    def __init__(self) -> None:
        self._small: OrderedDict[BlockKey, int] = OrderedDict()  # with how often each was asked for since it came
        self._main: OrderedDict[BlockKey, int] = OrderedDict()
        self._ghost: OrderedDict[BlockKey, None] = OrderedDict()

    def add(self, keys: Iterable[BlockKey]) -> None:
        """See ``Policy.add``."""
        for key in keys:
            if key in self._ghost:
                del self._ghost[key]
                self._main[key] = 0
            else:
                self._small[key] = 0

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """See ``Policy.touch``."""
        small, main, most = self._small, self._main, self._MOST
        for key in keys:
            queue = small if key in small else main
            if (uses := queue[key]) < most:
                queue[key] = uses + 1

    def remove(self, key: BlockKey) -> None:
        """See ``Policy.remove``."""
        del (self._small if key in self._small else self._main)[key]

    def evict(self, spared: Callable[[BlockKey], bool]) -> BlockKey | None:
        """See ``Policy.evict``."""
        # Each turn takes one use off a key, moves it to main, or passes over one that is spared.
        patience = (self._MOST + 2) * (len(self._small) + len(self._main))
        for _ in range(patience):
            if self._small and (len(self._small) * self._SHARE >= len(self._small) + len(self._main) or not self._main):
                key, uses = self._small.popitem(last=False)
                if uses:
                    self._main[key] = 0
                elif spared(key):
                    self._small[key] = 0
                else:
                    self._remember(key)
                    return key
            else:
                key, uses = self._main.popitem(last=False)
                if uses or spared(key):
                    self._main[key] = max(uses - 1, 0)
                else:
                    return key
        return None

    def _remember(self, key: BlockKey) -> None:
        self._ghost[key] = None
        if len(self._ghost) > len(self._small) + len(self._main):
            self._ghost.popitem(last=False)


class Quotas:
    """How many blocks each tenant has, and which of them goes when it has as many as it may. Blocks without a salt are
    nobody's, and not limited.
    """

    def __init__(self, most: int | None = None, policy: Callable[[], Policy] = Lru) -> None:
        """``most``: blocks of one tenant; None is no limit. ``policy``: of each tenant's own blocks."""
        self._most = most
        self._policy = policy
        self._has: Counter[Tenant] = Counter()
        self._order: dict[Tenant, Policy] = {}

    def full(self, key: BlockKey) -> bool:
        """Whether one of its tenant's blocks must go before this one comes."""
        return self._most is not None and self._has[tenant_of(key)] >= self._most and tenant_of(key) != NOBODY

    def enter(self, key: BlockKey) -> None:
        """A block is to be stored: it counts from now on."""
        if self._most is not None:
            self._has[tenant_of(key)] += 1

    def leave(self, key: BlockKey) -> None:
        """A block that had entered is gone, or did not come after all."""
        if self._most is None:
            return
        tenant = tenant_of(key)
        self._has[tenant] -= 1
        if not self._has[tenant]:
            del self._has[tenant]
            self._order.pop(tenant, None)

    def add(self, keys: Iterable[BlockKey]) -> None:
        """They may be evicted from now on. See ``Policy.add``."""
        if self._most is not None:
            for key in keys:
                if (tenant := tenant_of(key)) not in self._order:
                    self._order[tenant] = self._policy()
                self._order[tenant].add([key])

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """See ``Policy.touch``."""
        if self._most is not None:
            for key in keys:
                self._order[tenant_of(key)].touch([key])

    def remove(self, key: BlockKey) -> None:
        """It may not be evicted any more. See ``Policy.remove``."""
        if self._most is not None:
            self._order[tenant_of(key)].remove(key)

    def evict(self, key: BlockKey, spared: Callable[[BlockKey], bool]) -> BlockKey | None:
        """Which of its tenant's blocks goes for this one; it is forgotten by this. None if all are ``spared``."""
        order = self._order.get(tenant_of(key))
        return None if order is None else order.evict(spared)


POLICIES: dict[EvictionPolicy, Callable[[], Policy]] = {"lru": Lru, "s3-fifo": S3Fifo}
