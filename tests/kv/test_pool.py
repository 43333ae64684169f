"""The account of slots: examples, and any sequence of operations against a model of it."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from twostroke.kv.keys import BlockKey, block_keys, root_key
from twostroke.kv.pool import Lease, Pool
from twostroke.messages import Slots

ROOT = root_key("layout", "")


def keys_of(*tokens: int) -> list[BlockKey]:
    return block_keys(ROOT, tokens, 1)


def filled(pool: Pool, *tokens: int) -> Lease:
    """A lease of blocks that hold these tokens, one a block, published."""
    lease = pool.lease()
    assert lease.grow(len(tokens))
    for slot, key in zip(lease.slots, keys_of(*tokens), strict=True):
        pool.publish(slot, key)
    return lease


def test_a_new_pool_is_free() -> None:
    assert Pool(5).counts() == Slots(total=5, free=5, cached=0, leased=0)


def test_grow_takes_all_or_nothing() -> None:
    pool = Pool(4)
    lease = pool.lease()
    assert lease.grow(3)
    assert not lease.grow(2)
    assert len(set(lease.slots)) == 3
    assert pool.counts() == Slots(total=4, free=1, cached=0, leased=3)


def test_unpublished_slots_are_free_after_release_and_published_ones_cached() -> None:
    pool = Pool(4)
    lease = filled(pool, 1, 2)
    lease.grow(1)
    lease.release()
    assert pool.counts() == Slots(total=4, free=2, cached=2, leased=0)
    assert len(pool.match(keys_of(1, 2))) == 2


def test_match_is_the_longest_prefix() -> None:
    pool = Pool(4)
    lease = filled(pool, 1, 2, 3)
    assert pool.match(keys_of(1, 2, 3, 4)) == lease.slots
    assert pool.match(keys_of(1, 2, 9)) == lease.slots[:2]
    assert pool.match(keys_of(2, 3)) == []


def test_match_stops_at_a_hole() -> None:
    pool = Pool(4)
    lease = pool.lease()
    lease.grow(2)
    first, second, third = keys_of(1, 2, 3)
    pool.publish(lease.slots[0], first)
    pool.publish(lease.slots[1], third)
    assert pool.match([first, second, third]) == lease.slots[:1]


def test_a_shared_block_stays_until_its_last_lease_ends() -> None:
    pool = Pool(2)
    one = filled(pool, 1)
    two = pool.lease()
    two.share(pool.match(keys_of(1)))
    one.release()
    assert pool.counts().leased == 1
    assert not pool.lease().grow(2)
    two.release()
    assert pool.counts() == Slots(total=2, free=1, cached=1, leased=0)


def test_the_second_copy_of_a_block_stays_anonymous() -> None:
    pool = Pool(4)
    first = filled(pool, 1)
    second = filled(pool, 1)
    assert pool.match(keys_of(1)) == first.slots
    second.release()
    assert pool.counts() == Slots(total=4, free=3, cached=0, leased=1)


def test_a_slot_keeps_the_key_it_was_published_under() -> None:
    pool = Pool(1)
    lease = filled(pool, 1)
    pool.publish(lease.slots[0], keys_of(2)[0])
    assert pool.match(keys_of(2)) == []
    assert pool.match(keys_of(1)) == lease.slots


def test_free_slots_go_before_cached_ones() -> None:
    pool = Pool(3)
    filled(pool, 1).release()
    pool.lease().grow(2)
    assert len(pool.match(keys_of(1))) == 1


def test_the_least_recently_used_block_is_evicted_first() -> None:
    pool = Pool(3)
    for token in (1, 2, 3):
        filled(pool, token).release()
    used = pool.lease()
    used.share(pool.match(keys_of(1)))
    used.release()
    held = pool.lease()
    left = []
    for _ in range(3):
        held.grow(1)
        left.append([token for token in (1, 2, 3) if pool.match(keys_of(token))])
    assert left == [[1, 3], [1], []]


def test_of_one_prefix_the_last_block_is_evicted_first() -> None:
    pool = Pool(3)
    filled(pool, 1, 2, 3).release()
    held = pool.lease()
    left = []
    for _ in range(3):
        held.grow(1)
        left.append(len(pool.match(keys_of(1, 2, 3))))
    assert left == [2, 1, 0]


def test_releasing_twice_is_harmless() -> None:
    pool = Pool(2)
    lease, other = filled(pool, 1), pool.lease()
    lease.release()
    other.share(pool.match(keys_of(1)))
    lease.release()
    assert pool.counts().leased == 1
    assert not lease.alive
    assert other.alive


def test_a_dead_lease_holds_nothing_any_more() -> None:
    pool = Pool(2)
    lease = filled(pool, 1)
    slots = list(lease.slots)
    lease.release()
    with pytest.raises(AssertionError, match="dead lease"):
        lease.grow(1)
    with pytest.raises(AssertionError, match="dead lease"):
        lease.share(slots)
    assert lease.slots == []


def test_a_free_slot_is_neither_shared_nor_published() -> None:
    pool = Pool(2)
    with pytest.raises(AssertionError, match="free and cannot be shared"):
        pool.lease().share([0])
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.publish(0, keys_of(1)[0])


class Chain:
    """What a lease should hold: slots in order, and the tokens of its blocks (one a block) as far as they are known."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.slots: list[int] = []
        self.tokens: list[int] = []  # of the first blocks, which are complete: they are never written again

    @property
    def writable(self) -> list[int]:
        return self.slots[len(self.tokens) :]


class PoolMachine(RuleBasedStateMachine):
    """Sequences that share prefixes come and go; ``cache`` is what must be findable, oldest use first."""

    chains = Bundle("chains")

    @initialize(total=st.integers(1, 8))
    def start(self, total: int) -> None:
        self.pool = Pool(total)
        self.alive: list[Chain] = []
        self.named: dict[int, BlockKey] = {}  # slot → the key under which it is found
        self.cache: list[int] = []  # slots that nobody holds, in the order in which they will be evicted

    def held(self) -> set[int]:
        return {slot for chain in self.alive for slot in chain.slots}

    @rule(target=chains, tokens=st.lists(st.integers(0, 1), max_size=5))
    def begin(self, tokens: list[int]) -> Chain:
        """A lease shares what is known of a prompt."""
        keys = keys_of(*tokens)
        chain = Chain(self.pool.lease())
        slots = self.pool.match(keys)
        by_key = {key: slot for slot, key in self.named.items()}
        expected = [by_key[key] for key in itertools.takewhile(by_key.__contains__, keys)]
        assert slots == expected
        chain.lease.share(slots)
        self.cache = [slot for slot in self.cache if slot not in slots]
        chain.slots, chain.tokens = list(slots), tokens[: len(slots)]
        self.alive.append(chain)
        return chain

    @rule(target=chains, chain=chains)
    def export(self, chain: Chain) -> Chain:
        """A second lease holds the complete blocks of another."""
        second = Chain(self.pool.lease())
        if chain in self.alive:
            second.lease.share(chain.slots[: len(chain.tokens)])
            second.slots, second.tokens = chain.slots[: len(chain.tokens)], list(chain.tokens)
        self.alive.append(second)
        return second

    @rule(chain=chains, count=st.integers(0, 4))
    def grow(self, chain: Chain, count: int) -> None:
        if chain not in self.alive:
            return
        free = self.pool.total - len(self.held()) - len(self.cache)
        assert self.pool.available == free + len(self.cache)
        grew = chain.lease.grow(count)
        assert grew == (count <= free + len(self.cache))
        if not grew:
            return
        evicted, self.cache = self.cache[: max(0, count - free)], self.cache[max(0, count - free) :]
        for slot in evicted:
            del self.named[slot]
        added = chain.lease.slots[len(chain.slots) :]
        assert len(added) == count
        assert not set(added) & self.held(), "a slot that may be written is in two hands"
        assert set(evicted) <= set(added), "the least recently used blocks go first"
        chain.slots += added

    @rule(chain=chains, token=st.integers(0, 1))
    def publish(self, chain: Chain, token: int) -> None:
        """The next block of a lease is complete."""
        if chain not in self.alive or not chain.writable:
            return
        slot = chain.writable[0]
        chain.tokens.append(token)
        key = keys_of(*chain.tokens)[-1]
        self.pool.publish(slot, key)
        if key not in self.named.values():
            self.named[slot] = key

    @rule(chain=consumes(chains))
    def release(self, chain: Chain) -> None:
        self._release(chain)

    @rule(target=chains, chain=consumes(chains))
    def release_twice(self, chain: Chain) -> Chain:
        """The second time, the slots may be in other hands already."""
        self._release(chain)
        chain.lease.release()
        return chain

    def _release(self, chain: Chain) -> None:
        chain.lease.release()
        if chain not in self.alive:
            return
        self.alive.remove(chain)
        gone = [slot for slot in reversed(chain.slots) if slot not in self.held()]
        self.cache += [slot for slot in gone if slot in self.named]

    @invariant()
    def the_account_balances(self) -> None:
        counts = self.pool.counts()
        assert counts.free + counts.cached + counts.leased == counts.total == self.pool.total
        assert (counts.cached, counts.leased) == (len(self.cache), len(self.held()))

    @invariant()
    def leases_hold_what_they_should(self) -> None:
        for chain in self.alive:
            assert chain.lease.alive
            assert chain.lease.slots == chain.slots
            assert len(set(chain.slots)) == len(chain.slots)

    @invariant()
    def what_may_be_written_is_in_one_hand_and_cannot_be_found(self) -> None:
        for chain in self.alive:
            for slot in chain.writable:
                assert sum(slot in other.slots for other in self.alive) == 1
                assert slot not in self.named

    @invariant()
    def exactly_the_named_blocks_are_found(self) -> None:
        for length in range(1, 4):
            for tokens in itertools.product((0, 1), repeat=length):
                key = keys_of(*tokens)[-1]
                assert self.pool.match([key]) == [slot for slot, name in self.named.items() if name == key]

    def teardown(self) -> None:
        for chain in list(getattr(self, "alive", [])):
            self._release(chain)
            self.the_account_balances()
        if hasattr(self, "pool"):
            assert self.pool.counts().leased == 0


PoolMachine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestPool = PoolMachine.TestCase
