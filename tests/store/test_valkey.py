"""The Valkey tier over a real server. What all tiers do is in test_tiers.py."""

import asyncio

import pytest
import redis

from tests.store.blocks import BYTES, FINGERPRINT, Given, Taken, keys
from twostroke.store import valkey as module
from twostroke.store.tier import TierFailed
from twostroke.store.valkey import ValkeyTier

MANY = keys(*range(40))


async def opened(port: int) -> ValkeyTier:
    tier = ValkeyTier("127.0.0.1", port, BYTES, FINGERPRINT)
    await tier.open()
    return tier


async def test_more_than_the_server_keeps_is_evicted_by_it(valkey: int) -> None:
    tier = await opened(valkey)
    for first in range(0, 8000, 200):
        some = keys(*range(first, first + 200))
        await tier.put(some, Given(some))
    usage = tier.usage()
    assert usage.evictions > 0
    assert 0 < usage.blocks < 8000
    target, last = Taken(), keys(*range(7990, 8000))
    assert await tier.get(last, target) >= 0
    assert target.right(last)
    await tier.close()


async def test_damaged_and_foreign_values_are_removed(valkey: int) -> None:
    tier = await opened(valkey)
    await tier.put(MANY, Given(MANY))
    raw = redis.Redis(port=valkey)
    names = [tier._key(key) for key in MANY]
    value = raw.get(names[2])
    assert isinstance(value, bytes)
    for index, other in enumerate([value[:-1], value[:500] + b"x" + value[501:], b"", b"x" * 2000, value]):
        raw.set(names[10 + index], other)
    target = Taken()
    assert await tier.get(MANY, target) == 10
    assert target.right(MANY)
    assert len(target.blocks) == 35
    assert not any(await tier.contains(MANY[10:15]))
    assert tier._damaged == 5
    await tier.put(MANY, Given(MANY))
    assert await tier.get(MANY, Taken()) == 40
    raw.close()
    await tier.close()


async def test_a_server_that_is_full_and_evicts_nothing(valkey: int) -> None:
    tier = await opened(valkey)
    raw = redis.Redis(port=valkey)
    raw.config_set("maxmemory-policy", "noeviction")
    raw.config_set("maxmemory", "1mb")
    assert await tier.put(MANY, Given(MANY)) == 0
    raw.config_set("maxmemory", "8mb")
    assert await tier.put(MANY, Given(MANY)) == 40
    raw.close()
    await tier.close()


async def test_no_server_and_one_that_hangs(valkey: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    nobody = ValkeyTier("127.0.0.1", 1, BYTES, FINGERPRINT)
    with pytest.raises(TierFailed):
        await nobody.open()
    await nobody.close()
    tier = await opened(valkey)
    await tier.put(MANY, Given(MANY))
    raw = redis.Redis(port=valkey)
    raw.client_pause(1500)
    with pytest.raises(TierFailed):
        await tier.get(MANY, Taken())
    await asyncio.sleep(1.5)
    target = Taken()
    assert await tier.get(MANY, target) == 40
    assert target.right(MANY)
    raw.close()
    await tier.close()
