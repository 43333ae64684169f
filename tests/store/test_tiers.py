"""What every tier does, whatever it is made of."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.store.blocks import BYTES, FINGERPRINT, OTHER, Given, Taken, key, keys, many_at_once, owned
from twostroke.config import StoreConfig
from twostroke.errors import MemoryTooSmall
from twostroke.store.directory import DirectoryTier
from twostroke.store.disk import disk_tier
from twostroke.store.host import HostTier
from twostroke.store.process import tiers
from twostroke.store.segment import Segment
from twostroke.store.server import Server
from twostroke.store.service import ServiceTier
from twostroke.store.tier import Managed, MemoryTier, Tier
from twostroke.store.valkey import ValkeyTier

ROOM = 40  # blocks, at least
BUDGETS = {"memory": ROOM * BYTES, "host": ROOM * BYTES, "disk": 100 * 4096 + ROOM * 2 * 8192, "dir": 4 * ROOM * 8192}
BUDGETS["service"] = BUDGETS["valkey"] = BUDGETS["host"]
PERSISTENT = ["disk", "dir", "service", "valkey"]
Make = Callable[..., Tier]


@pytest.fixture
async def make(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """Makes a tier by name, closed as yet."""
    valkey = request.getfixturevalue("valkey") if "valkey" in request.node.name else 0
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    config = StoreConfig(memory=BUDGETS["service"] * 2, layouts=2)
    server = Server(listening, tiers(config), "secret", ttl=None, layouts=2)
    server.start()

    def tier(name: str, fingerprint: str = FINGERPRINT, budget: int | None = None, owner: str = "w") -> Tier:
        size = budget or BUDGETS[name]
        match name:
            case "host":
                return HostTier(BYTES, size)
            case "disk":
                return disk_tier(tmp_path / name, BYTES, fingerprint, size, owner)
            case "dir":
                return DirectoryTier(tmp_path / name, BYTES, fingerprint, size)
            case "valkey":
                return ValkeyTier("127.0.0.1", valkey, BYTES, fingerprint)
            case "service":
                return ServiceTier("127.0.0.1", port, BYTES, fingerprint, "secret")
            case _:
                return MemoryTier(capacity=size)

    yield tier
    await server.close()


@pytest.fixture(params=list(BUDGETS))
async def tier(request: pytest.FixtureRequest, make: Make) -> AsyncIterator[Tier]:
    one = make(request.param)
    await one.open()
    yield one
    await one.close()


async def test_blocks_come_back_as_they_were(tier: Tier) -> None:
    some = keys(*range(20))
    assert list(await tier.contains(some)) == [False] * 20
    assert await tier.put(some, Given(some)) == 20
    assert all(await tier.contains(some))
    target = Taken()
    assert await tier.get(some, target) == 20
    assert len(target.blocks) == 20
    assert target.right(some)
    assert tier.usage().blocks == 20


async def test_only_the_prefix_that_is_here_counts(tier: Tier) -> None:
    some = keys(1, 2, 4)
    await tier.put(some, Given(some))
    asked = keys(1, 2, 3, 4)
    target = Taken()
    assert await tier.get(asked, target) == 2
    assert target.right(asked)
    assert list(await tier.contains(keys(1, 2, 3))) == [True, True, False]
    assert await tier.get(keys(9), Taken()) == 0


async def test_a_block_that_is_here_is_not_written_again(tier: Tier) -> None:
    some = keys(1, 2)
    await tier.put(some, Given(some))
    assert await tier.put(keys(1, 2, 3), Given(keys(1, 2, 3))) == 3
    assert tier.usage().blocks == 3


async def test_a_source_that_has_not_everything(tier: Tier) -> None:
    some = keys(1, 2, 3)
    assert await tier.put(some, Given(some, gone=[1])) == 2
    assert await tier.get(keys(1), Taken()) == 1
    assert await tier.get(keys(2), Taken()) == 0
    assert await tier.get(keys(3), Taken()) == 1


async def test_a_target_that_wants_no_more(tier: Tier) -> None:
    some = keys(*range(10))
    await tier.put(some, Given(some))
    target = Taken(most=3)
    assert await tier.get(some, target) <= 3
    assert target.right(some)
    again = Taken()
    assert await tier.get(some, again) == 10


async def test_it_never_takes_more_than_its_budget(tier: Tier) -> None:
    if tier.name == "valkey":
        pytest.skip("its budget is its server's")
    for first in range(0, 400, 20):
        some = keys(*range(first, first + 20))
        await tier.put(some, Given(some))
        usage = tier.usage()
        assert usage.used <= usage.capacity
    usage = tier.usage()
    assert usage.evictions >= 100
    assert usage.blocks >= ROOM / 2
    target, last = Taken(), keys(*range(390, 400))
    assert await tier.get(last, target) == 10
    assert target.right(last)


MANAGED = {"memory": 40 * BYTES, "host": 40 * BYTES, "disk": 50 * 8192, "dir": 40 * 8192}  # and budgets


async def fill(tier: Tier) -> None:
    """More blocks than fit."""
    for first in range(1000, 1100, 20):
        some = keys(*range(first, first + 20))
        await tier.put(some, Given(some))


@pytest.mark.parametrize("name", MANAGED)
async def test_what_is_pinned_is_never_evicted_and_counts(make: Make, name: str) -> None:
    """Also after a restart, where blocks outlive it; unpinned and dropped, it goes like any other."""
    tier = make(name, budget=MANAGED[name])
    await tier.open()
    some = keys(*range(8))
    await tier.put(some, Given(some))
    assert isinstance(tier, Managed)
    assert await tier.pin(keys(*range(5), 77), True) == 5
    assert tier.usage().pinned == 5
    await fill(tier)
    if name in PERSISTENT:
        await tier.close()
        tier = make(name, budget=MANAGED[name])
        await tier.open()
        await fill(tier)
    assert isinstance(tier, Managed)
    assert list(await tier.contains(some)) == [True] * 5 + [False] * 3
    target = Taken()
    assert await tier.get(some, target) == 5
    assert target.right(some)
    assert {entry.key for entry in await tier.entries() if entry.pinned} == set(some[:5])
    usage = tier.usage()
    assert usage.pinned == 5
    assert usage.used <= usage.capacity
    assert await tier.pin(keys(0), False) == 1
    assert await tier.drop(keys(1, 2)) == 2
    await fill(tier)
    await fill(tier)
    assert list(await tier.contains(some)) == [False] * 3 + [True] * 2 + [False] * 3
    if name in PERSISTENT:
        await tier.close()
        tier = make(name, budget=MANAGED[name])
        await tier.open()
        assert list(await tier.contains(some)) == [False] * 3 + [True] * 2 + [False] * 3
    await tier.close()


@pytest.mark.parametrize("name", MANAGED)
async def test_a_budget_full_of_pinned_blocks_takes_nothing_more(make: Make, name: str) -> None:
    tier = make(name, budget=MANAGED[name])
    await tier.open()
    assert isinstance(tier, Managed)
    await fill(tier)
    there = [entry.key for entry in await tier.entries()]
    assert await tier.pin(there, True) == len(there)
    some = keys(*range(20))
    stored = await tier.put(some, Given(some))
    assert stored < 20
    assert tier.usage().used <= tier.usage().capacity
    assert all(await tier.contains(there))
    await tier.pin([*there, *some], True)
    again = keys(*range(100, 140))
    await tier.put(again, Given(again))
    assert await tier.put(keys(500), Given(keys(500))) == 0
    assert list(await tier.contains(keys(500))) == [False]
    await tier.close()


@pytest.mark.parametrize("name", ["host", "disk", "dir"])
async def test_a_tenant_has_no_more_than_its_quota(make: Make, name: str) -> None:
    """Its own blocks go, and nobody else's; so it is after a restart."""
    tier = make(name)
    slot = {"host": BYTES, "disk": 8192, "dir": 8192}[name]
    tier.quota = 10 * slot  # type: ignore[attr-defined]
    await tier.open()
    some, other = keys(*range(6)), owned("b", *range(6))
    await tier.put(some, Given(some))
    await tier.put(other, Given(other))
    for turn in range(2):
        for first in range(0, 60, 6):
            mine = owned("a", *range(first, first + 6))
            assert await tier.put(mine, Given(mine)) == 6
        has = await tier.contains(owned("a", *range(60)))
        assert 6 <= sum(has) <= 10
        assert all(has[54:])
        assert all(await tier.contains([*some, *other])), "others keep theirs"
        assert isinstance(tier, Managed)
        if turn or name == "host":
            break
        await tier.close()
        tier = make(name)
        tier.quota = 10 * slot  # type: ignore[attr-defined]
        await tier.open()
    assert isinstance(tier, Managed)
    await tier.pin(owned("a", *range(60)), True)
    mine = owned("a", *range(100, 112))
    assert await tier.put(mine, Given(mine)) < 5, "what it has pinned counts"
    assert await tier.put(other, Given(other)) == 6
    await tier.close()


@pytest.mark.parametrize("name", ["host", "disk", "dir"])
async def test_a_budget_smaller_than_one_request(make: Make, name: str) -> None:
    """What is kept is its beginning, at first; and the budget always."""
    tier = make(name, budget={"host": 5 * BYTES, "disk": 2 * 4096 + 5 * 8192, "dir": 5 * 8192}[name])
    await tier.open()
    many = keys(*range(60))
    for _ in range(2):
        stored = await tier.put(many, Given(many))
        assert 0 < stored <= 20
        usage = tier.usage()
        assert usage.used <= usage.capacity
        target = Taken()
        assert await tier.get(many, target) <= stored
        assert target.right(many)
    await tier.close()


async def test_many_at_once(tier: Tier) -> None:
    await many_at_once(tier)


@pytest.mark.parametrize("name", PERSISTENT)
async def test_blocks_outlive_the_process(make: Make, name: str) -> None:
    some = keys(*range(20))
    tier = make(name)
    await tier.open()
    await tier.put(some, Given(some))
    await tier.close()
    tier = make(name)
    await tier.open()
    target = Taken()
    assert await tier.get(some, target) == 20
    assert target.right(some)
    assert tier.usage().blocks == 20
    await tier.close()


@pytest.mark.parametrize("name", PERSISTENT)
async def test_another_layout_finds_nothing_and_harms_nothing(make: Make, name: str) -> None:
    some = keys(1, 2, 3)
    tier, other = make(name), make(name, OTHER)
    await tier.open()
    await other.open()
    await tier.put(some, Given(some))
    assert not any(await other.contains(some))
    assert await other.get(some, Taken()) == 0
    await tier.close()
    await other.close()
    tier = make(name)
    await tier.open()
    assert await tier.get(some, Taken()) == 3
    await tier.close()


@pytest.mark.parametrize(("name", "least"), [("host", BYTES), ("disk", Segment.file_bytes(1, BYTES))])
def test_a_budget_that_holds_no_block_is_refused(make: Make, name: str, least: int) -> None:
    make(name, budget=least)
    with pytest.raises(MemoryTooSmall, match="does not hold one block"):
        make(name, budget=least - 1)


async def test_two_workers_on_one_disk_do_not_meet(make: Make) -> None:
    one, other, late = make("disk", owner="a"), make("disk", owner="a"), make("disk", owner="b/../x")
    for tier in (one, other, late):
        await tier.open()
    await one.put(keys(1), Given(keys(1)))
    assert list(await other.contains(keys(1))) == [False]
    for tier in (one, other, late):
        await tier.close()
    back = make("disk", owner="a")
    await back.open()
    assert list(await back.contains(keys(1))) == [True]
    await back.close()


async def test_two_nodes_share_a_directory(make: Make) -> None:
    one, other = make("dir"), make("dir")
    await one.open()
    await other.open()
    some = keys(*range(6))
    await one.put(some, Given(some))
    assert all(await other.contains(some))
    target = Taken()
    assert await other.get(some, target) == 6
    assert target.right(some)
    await asyncio.gather(*(tier.put(keys(*range(6, 16)), Given(keys(*range(6, 16)))) for tier in (one, other)))
    assert await one.get(keys(*range(16)), Taken()) == 16
    await one.close()
    await other.close()


async def test_what_another_node_has_evicted_is_not_there(make: Make, tmp_path: Path) -> None:
    one = make("dir")
    await one.open()
    some = keys(1, 2, 3)
    await one.put(some, Given(some))
    next((tmp_path / "dir").glob(f"*/??/{key(2).hex()}")).unlink()
    assert await one.get(some, Taken()) == 1
    assert list(await one.contains(some)) == [True, False, True]
    assert one.usage().damaged == 0
    await one.close()


async def test_a_host_tiers_threads_are_ready_when_it_opens() -> None:
    ready: list[str] = []
    tier = HostTier(BYTES, 8 * BYTES, prepare=lambda: ready.append(threading.current_thread().name))
    await tier.open()
    assert sorted(ready) == ["host-1", "host-2", "host-read-1", "host-read-2"]
    some = keys(*range(5))
    assert await tier.put(some, Given(some)) == await tier.get(some, Taken()) == 5
    assert len(ready) == 4
    await tier.close()
