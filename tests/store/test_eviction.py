"""Which block goes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.blocks import key, keys
from twostroke.config import EvictionPolicy
from twostroke.store.eviction import POLICIES, Lru, Policy, S3Fifo


def nobody(_: bytes) -> bool:
    return False


def test_lru_evicts_what_was_not_asked_for_for_longest() -> None:
    lru = Lru()
    for one in keys(1, 2, 3):
        lru.add([one])
    lru.touch(keys(1))
    assert [lru.evict(nobody) for _ in range(4)] == [key(2), key(3), key(1), None]


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_spared_stays(name: EvictionPolicy) -> None:
    policy = POLICIES[name]()
    for one in keys(1, 2, 3):
        policy.add([one])
    assert policy.evict(lambda one: one != key(2)) == key(2)
    assert policy.evict(lambda _: True) is None
    policy.remove(key(1))
    assert policy.evict(nobody) == key(3)
    assert policy.evict(nobody) is None


def hit_rate(policy: Policy, trace: list[int], capacity: int) -> float:
    """Of a cache of so many blocks."""
    here: set[bytes] = set()
    hits = 0
    for one in map(key, trace):
        if one in here:
            hits += 1
            policy.touch([one])
            continue
        if len(here) == capacity:
            victim = policy.evict(nobody)
            assert victim is not None
            here.remove(victim)
        here.add(one)
        policy.add([one])
    return hits / len(trace)


@pytest.mark.parametrize("length", [10, 50, 99])
def test_lru_keeps_a_long_prompt_whole(length: int) -> None:
    """Though others were there before, and used more often."""
    policy, capacity = Lru(), 100
    for number in range(capacity):
        policy.add([key(number)])
    policy.touch([key(number) for number in range(capacity)])
    prompt = [key(1000 + number) for number in range(length)]
    for one in prompt:
        assert policy.evict(lambda _: False) not in prompt
        policy.add([one])


def test_s3_fifo_survives_scans_that_lru_does_not() -> None:
    """A set that is used over and over, and between any two rounds more blocks than fit that never come back."""
    rng, trace, fresh = random.Random(1), [], iter(range(10_000, 10**9))
    for _ in range(30):
        trace += rng.sample(range(50), 50)
        trace += [next(fresh) for _ in range(120)]
    assert hit_rate(Lru(), trace, 100) < 0.05
    assert hit_rate(S3Fifo(), trace, 100) > 0.2


@given(st.sampled_from(list(POLICIES)), st.lists(st.tuples(st.sampled_from("atre"), st.integers(0, 9)), max_size=200))
def test_a_policy_knows_exactly_what_is_there(name: EvictionPolicy, steps: list[tuple[str, int]]) -> None:
    policy, here = POLICIES[name](), set()
    for step, number in steps:
        one = key(number)
        match step:
            case "a" if one not in here:
                policy.add([one])
                here.add(one)
            case "t" if one in here:
                policy.touch([one])
            case "r" if one in here:
                policy.remove(one)
                here.remove(one)
            case "e":
                victim = policy.evict(nobody)
                assert (victim is None) == (not here)
                here.discard(victim or b"")
    evicted = [policy.evict(nobody) for _ in range(len(here))]
    assert set(evicted) == here
    assert policy.evict(nobody) is None
