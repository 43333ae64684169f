"""The account of a tier's slots."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.store.blocks import key, keys
from twostroke.kv.keys import NOBODY, TENANT_BYTES, BlockKey, tenant_of
from twostroke.store.eviction import POLICIES, Lru, Quotas, S3Fifo
from twostroke.store.shelf import Shelf


def take(shelf: Shelf, key: BlockKey) -> int | None:
    """A slot for one block."""
    return shelf.take([key]).get(key)


def full(*numbers: int) -> Shelf:
    """A shelf that holds exactly these."""
    shelf = Shelf(len(numbers), Lru())
    for one in keys(*numbers):
        assert take(shelf, one) is not None
        shelf.publish([one])
    return shelf


def test_a_block_is_found_once_it_is_published() -> None:
    shelf = Shelf(2, Lru())
    assert take(shelf, key(1)) == 0
    assert shelf.contains(keys(1)) == [False]
    assert take(shelf, key(1)) is None
    shelf.publish([key(1)])
    assert shelf.contains(keys(1, 2)) == [True, False]
    assert take(shelf, key(1)) is None


def test_what_is_read_is_not_evicted() -> None:
    shelf = full(1, 2)
    assert shelf.pin(keys(1, 3)) == [0]
    assert take(shelf, key(4)) == 1
    assert take(shelf, key(5)) is None
    shelf.unpin(keys(1), [0])
    assert take(shelf, key(5)) == 0
    assert shelf.evictions == 2


def test_asking_for_a_prefix_keeps_its_beginning_longest() -> None:
    shelf = full(1, 2, 3)
    shelf.contains(keys(1, 2, 3))
    for number in (4, 5, 6):
        assert take(shelf, key(number)) is not None
        assert shelf.contains(keys(1, 2, 3)).count(True) == 6 - number
    assert shelf.contains(keys(1)) == [False]


def test_a_damaged_blocks_slot_is_set_aside_but_not_too_many() -> None:
    shelf = full(*range(16))
    shelf.discard(key(3))
    shelf.discard(key(3))
    assert (shelf.bad, shelf.free) == (1, 0)
    shelf.discard(key(4))
    shelf.discard(key(5))
    assert (shelf.bad, shelf.free) == (2, 1)
    assert take(shelf, key(20)) == 3


def test_a_damaged_block_that_others_read_is_given_up_when_they_are_done() -> None:
    shelf = full(*range(8))
    (slot,) = shelf.pin(keys(1))
    shelf.discard(key(1))
    assert shelf.contains(keys(1)) == [False]
    assert take(shelf, key(1)) is None
    shelf.unpin(keys(1), [slot])
    assert shelf.bad == 1


def test_a_medium_that_grows() -> None:
    shelf = Shelf(0, Lru())
    assert take(shelf, key(1)) is None
    shelf.extend(3)
    assert shelf.take(keys(1, 2, 2, 3, 4)) == dict(zip(keys(1, 2, 3), range(3), strict=True))


def test_what_is_protected_is_never_evicted() -> None:
    shelf = full(1, 2, 3)
    assert shelf.protect(keys(2, 9)) == {key(2): 1}
    for number in range(10, 20):
        assert take(shelf, key(number)) is not None
        shelf.publish([key(number)])
        assert shelf.contains(keys(2)) == [True]
    shelf.protect(keys(18, 19))
    assert take(shelf, key(20)) is None, "all of it is protected"
    assert shelf.expose(keys(2)) == {key(2): 1}
    assert take(shelf, key(20)) == 1


def of(tenant: int, number: int) -> bytes:
    """A block of a tenant; of nobody if that is 0."""
    return bytes([tenant] * TENANT_BYTES) + key(number)[TENANT_BYTES:]


def test_a_tenant_gives_up_its_own_blocks_first() -> None:
    """Though there is room; and nobody else's go for it."""
    shelf = Shelf(8, Lru(), Quotas(3, Lru))
    for number in range(3):
        for tenant in (0, 1):
            take(shelf, of(tenant, number))
            shelf.publish([of(tenant, number)])
    shelf.contains([of(1, 0)])
    assert take(shelf, of(1, 3)) is not None
    assert shelf.contains([of(1, 0), of(1, 1), of(1, 2)]) == [True, False, True]
    assert (shelf.free, shelf.evictions) == (2, 1)
    for number in (3, 4):
        assert take(shelf, of(0, number)) is not None, "who has no salt has no quota"
    shelf.publish([of(1, 3)])
    shelf.protect([of(1, 0), of(1, 2), of(1, 3)])
    assert take(shelf, of(1, 4)) is None, "it has pinned as much as it may have"
    assert take(shelf, of(2, 4)) is not None


def one(number: int) -> bytes:
    """Blocks of three tenants, one of which is nobody."""
    return of(number % 3, number)


class Account(RuleBasedStateMachine):
    """Whatever happens, every slot is in one state, and no two blocks share one."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf(5, S3Fifo(), Quotas(2, S3Fifo))
        self.filling: list[bytes] = []
        self.pins: list[tuple[bytes, int]] = []
        self.pinned: set[bytes] = set()

    @rule(number=st.integers(0, 9))
    def take(self, number: int) -> None:
        slot = take(self.shelf, one(number))
        if slot is not None:
            assert slot not in [pinned for _, pinned in self.pins]
            self.filling.append(one(number))

    @precondition(lambda self: self.filling)
    @rule(fine=st.booleans())
    def finish(self, fine: bool) -> None:
        (self.shelf.publish if fine else self.shelf.cancel)([self.filling.pop()])

    @rule(number=st.integers(0, 9))
    def pin(self, number: int) -> None:
        self.pins += [(one(number), slot) for slot in self.shelf.pin([one(number)])]

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        key, slot = self.pins.pop(0)
        self.shelf.unpin([key], [slot])

    @rule(number=st.integers(0, 9))
    def discard(self, number: int) -> None:
        self.shelf.discard(one(number))
        self.pinned.discard(one(number))

    @rule(number=st.integers(0, 9), on=st.booleans())
    def protect(self, number: int, on: bool) -> None:
        found = (self.shelf.protect if on else self.shelf.expose)([one(number)])
        assert found.keys() <= self.shelf.slots().keys()
        self.pinned = self.pinned | found.keys() if on else self.pinned - found.keys()

    @rule()
    def extend(self) -> None:
        if self.shelf.total < 12:
            self.shelf.extend(self.shelf.total + 1)

    @invariant()
    def adds_up(self) -> None:
        shelf = self.shelf
        assert shelf.free + shelf.filling + shelf.stored + shelf.bad == shelf.total
        assert shelf.protected == self.pinned <= shelf.slots().keys()
        has = Counter(map(tenant_of, [*shelf.slots(), *self.filling]))
        assert all(count <= 2 for tenant, count in has.items() if tenant != NOBODY)


TestAccount = Account.TestCase
TestAccount.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("policy", POLICIES.values())
@given(found=st.lists(st.integers(0, 7), unique=True))
def test_what_was_there_before_a_restart(policy: type[Lru], found: list[int]) -> None:
    shelf = Shelf(8, policy())
    shelf.restore((key(number), number) for number in found)
    assert all(shelf.contains([key(number) for number in found]))
    assert (shelf.stored, shelf.free) == (len(found), 8 - len(found))
    taken = {take(shelf, key(100 + i)) for i in range(shelf.free)}
    assert taken == set(range(8)) - set(found)
