"""The account of a tier's slots."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.store.blocks import key, keys
from twostroke.store.eviction import POLICIES, Lru, S3Fifo
from twostroke.store.shelf import Shelf


def full(*numbers: int) -> Shelf:
    """A shelf that holds exactly these."""
    shelf = Shelf(len(numbers), Lru())
    for one in keys(*numbers):
        assert shelf.take(one) is not None
        shelf.publish(one)
    return shelf


def test_a_block_is_found_once_it_is_published() -> None:
    shelf = Shelf(2, Lru())
    assert shelf.take(key(1)) == 0
    assert shelf.contains(keys(1)) == [False]
    assert shelf.take(key(1)) is None
    shelf.publish(key(1))
    assert shelf.contains(keys(1, 2)) == [True, False]
    assert shelf.take(key(1)) is None


def test_what_is_read_is_not_evicted() -> None:
    shelf = full(1, 2)
    assert shelf.pin(keys(1, 3)) == [0]
    assert shelf.take(key(4)) == 1
    assert shelf.take(key(5)) is None
    shelf.unpin(key(1), 0)
    assert shelf.take(key(5)) == 0
    assert shelf.evictions == 2


def test_asking_for_a_prefix_keeps_its_beginning_longest() -> None:
    shelf = full(1, 2, 3)
    shelf.contains(keys(1, 2, 3))
    for number in (4, 5, 6):
        assert shelf.take(key(number)) is not None
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
    assert shelf.take(key(20)) == 3


def test_a_damaged_block_that_others_read_is_given_up_when_they_are_done() -> None:
    shelf = full(*range(8))
    (slot,) = shelf.pin(keys(1))
    shelf.discard(key(1))
    assert shelf.contains(keys(1)) == [False]
    assert shelf.take(key(1)) is None
    shelf.unpin(key(1), slot)
    assert shelf.bad == 1


def test_a_medium_that_grows() -> None:
    shelf = Shelf(0, Lru())
    assert shelf.take(key(1)) is None
    shelf.extend(3)
    assert [shelf.take(one) for one in keys(1, 2, 3, 4)] == [0, 1, 2, None]


class Account(RuleBasedStateMachine):
    """Whatever happens, every slot is in one state, and no two blocks share one."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf(5, S3Fifo())
        self.filling: list[bytes] = []
        self.pins: list[tuple[bytes, int]] = []

    @rule(number=st.integers(0, 9))
    def take(self, number: int) -> None:
        slot = self.shelf.take(key(number))
        if slot is not None:
            assert slot not in [pinned for _, pinned in self.pins]
            self.filling.append(key(number))

    @precondition(lambda self: self.filling)
    @rule(fine=st.booleans())
    def finish(self, fine: bool) -> None:
        one = self.filling.pop()
        (self.shelf.publish if fine else self.shelf.cancel)(one)

    @rule(number=st.integers(0, 9))
    def pin(self, number: int) -> None:
        self.pins += [(key(number), slot) for slot in self.shelf.pin(keys(number))]

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        self.shelf.unpin(*self.pins.pop(0))

    @rule(number=st.integers(0, 9))
    def discard(self, number: int) -> None:
        self.shelf.discard(key(number))

    @rule()
    def extend(self) -> None:
        if self.shelf.total < 12:
            self.shelf.extend(self.shelf.total + 1)

    @invariant()
    def adds_up(self) -> None:
        shelf = self.shelf
        assert shelf.free + shelf.filling + shelf.stored + shelf.bad == shelf.total


TestAccount = Account.TestCase
TestAccount.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("policy", POLICIES.values())
@given(found=st.lists(st.integers(0, 7), unique=True))
def test_what_was_there_before_a_restart(policy: type[Lru], found: list[int]) -> None:
    shelf = Shelf(8, policy())
    shelf.restore((key(number), number) for number in found)
    assert all(shelf.contains([key(number) for number in found]))
    assert (shelf.stored, shelf.free) == (len(found), 8 - len(found))
    taken = {shelf.take(key(100 + i)) for i in range(shelf.free)}
    assert taken == set(range(8)) - set(found)
