"""The Mooncake tier over a real master. What all tiers do is checked here, too: its memory is what its clients add."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from tests.store.blocks import BYTES, FINGERPRINT, OTHER, Given, Taken, keys, many_at_once
from tests.store.conftest import Master
from twostroke.config import MooncakeTier as Config
from twostroke.config import WorkerConfig
from twostroke.errors import StartupError
from twostroke.kv.layout import Layout
from twostroke.store.tier import TierFailed
from twostroke.worker.loading import _make_tier

if TYPE_CHECKING:
    from mooncake.store import MooncakeDistributedStore

    from twostroke.store.mooncake import MooncakeTier

MANY = keys(*range(40))
MEMORY = 32 << 20  # bytes


async def opened(master: Master, fingerprint: str = FINGERPRINT, size: int = BYTES, memory: int = 0) -> "MooncakeTier":
    from twostroke.store.mooncake import MooncakeTier

    tier = MooncakeTier("127.0.0.1", master.port, size, fingerprint, memory)
    await tier.open()
    return tier


def client(port: int, memory: int) -> "MooncakeDistributedStore":
    """A client of Mooncake's own, such as another worker has."""
    from mooncake.store import MooncakeDistributedStore

    one = MooncakeDistributedStore()
    where = {"local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "protocol": "tcp"}
    sizes = {"global_segment_size": str(memory), "local_buffer_size": str(1 << 20)}
    assert one.setup({**where, **sizes, "master_server_addr": f"127.0.0.1:{port}"}) == 0
    return one


@pytest.fixture(scope="module")
def owned(mooncake_package: None) -> "Iterator[tuple[Master, MooncakeDistributedStore]]":
    """A master, and a client that has added memory. It takes 3 s to leave again."""
    master = Master()
    master.start()
    owner = client(master.port, MEMORY)
    yield master, owner
    owner.close()
    master.kill()


@pytest.fixture
async def tier(owned: "tuple[Master, MooncakeDistributedStore]") -> "AsyncIterator[MooncakeTier]":
    """Of a worker that adds no memory to a store that has some."""
    master, owner = owned
    owner.remove_all(True)
    one = await opened(master)
    yield one
    await one.close()


async def test_blocks_come_back_as_they_were(
    tier: "MooncakeTier", owned: "tuple[Master, MooncakeDistributedStore]"
) -> None:
    assert not any(await tier.contains(MANY))
    assert await tier.put(MANY, Given(MANY, gone=[7])) == 39
    assert await tier.put(MANY[:9], Given(MANY)) == 9
    assert all(await tier.contains(MANY))
    target = Taken()
    assert await tier.get(MANY, target) == 40
    assert target.right(MANY)
    assert await tier.get(MANY[:3] + keys(99) + MANY[3:], Taken()) == 3
    assert await tier.get(MANY, Taken(most=3)) <= 3
    assert (tier.usage().blocks, tier.usage().damaged) == (40, 0)
    other = await opened(owned[0])  # another worker of this model, and one of another model
    stranger = await opened(owned[0], OTHER)
    assert await other.get(MANY, Taken()) == 40
    assert not any(await stranger.contains(MANY))
    await other.close()
    await stranger.close()


async def test_many_at_once(tier: "MooncakeTier") -> None:
    await many_at_once(tier)


async def test_damaged_and_foreign_objects_are_removed(
    tier: "MooncakeTier", owned: "tuple[Master, MooncakeDistributedStore]"
) -> None:
    await tier.put(MANY, Given(MANY))
    raw = owned[1]
    names = [tier._name(one) for one in MANY]
    value = raw.get(names[2])
    for index, other in enumerate([value[:-1], value[:500] + b"x" + value[501:], value + b"x", b"x" * 2000, value]):
        assert raw.remove(names[10 + index], True) == 0
        assert raw.put(names[10 + index], other) == 0
    target = Taken()
    assert await tier.get(MANY, target) == 10
    assert target.right(MANY)
    assert len(target.blocks) == 35
    assert not any(await tier.contains(MANY[10:15]))
    assert tier.usage().damaged == 5
    await tier.put(MANY, Given(MANY))
    assert await tier.get(MANY, Taken()) == 40


async def test_a_store_without_memory_and_one_that_is_full(mooncake: Master) -> None:
    size = 1 << 20
    tier = await opened(mooncake, size=size)
    assert await tier.put(MANY, Given(MANY, size=size)) == 0
    await tier.close()
    tier = await opened(mooncake, size=size, memory=MEMORY)
    try:
        assert 0 < await tier.put(MANY, Given(MANY, size=size)) < 40  # what is leased is not evicted
        target = Taken()
        await tier.get(MANY, target)
        assert target.blocks, "though the first ones may have been evicted meanwhile"
        assert target.right(MANY, size)
        more = keys(*range(100, 110))
        for _ in range(50):  # the master evicts, when it gets round to it
            if await tier.put(more, Given(more, size=size)) == 10:
                break
            await asyncio.sleep(0.2)
        assert await tier.get(more, Taken()) == 10
        assert tier.usage().capacity == MEMORY
    finally:
        await tier.close()  # or its threads go on in other tests


async def test_a_master_that_is_gone_and_comes_back(mooncake: Master) -> None:
    tier = await opened(mooncake, memory=MEMORY)
    await tier.put(MANY, Given(MANY))
    mooncake.kill()
    for call in (tier.contains(MANY), tier.get(MANY, Taken()), tier.put(MANY, Given(MANY)), tier.open()):
        with pytest.raises(TierFailed):
            await call
    mooncake.start()  # it knows nothing any more; its clients come back with their memory
    for _ in range(100):
        try:
            await tier.open()
            if await tier.put(MANY, Given(MANY)) == 40:
                break
        except TierFailed:
            pass
        await asyncio.sleep(0.1)
    target = Taken()
    assert await tier.get(MANY, target) == 40
    assert target.right(MANY)
    await tier.close()


async def test_a_master_that_hangs_holds_up_nobody_else(mooncake: Master) -> None:
    tier = await opened(mooncake)
    assert mooncake.process is not None
    mooncake.process.send_signal(signal.SIGSTOP)
    asking = asyncio.create_task(_outcome(tier))
    for _ in range(10):  # neither the event loop nor any other thread
        await asyncio.sleep(0.02)
    assert not asking.done()
    mooncake.process.send_signal(signal.SIGCONT)
    await asking
    assert list(await tier.contains(MANY[:1])) == [False]
    await tier.close()


async def _outcome(tier: "MooncakeTier") -> bool:
    try:
        await tier.contains(MANY)
    except TierFailed:
        return False
    return True


async def test_no_master(mooncake: Master) -> None:
    mooncake.kill()
    with pytest.raises(TierFailed):
        await opened(mooncake)
    mooncake.start()


async def test_a_buffer_of_a_failed_call_is_not_used_again_soon(tier: "MooncakeTier") -> None:
    await tier.put(MANY, Given(MANY))
    before = {id(one) for one in tier._free}
    assert before

    class Broken(Taken):
        def place(self, index: int, block: object) -> bool:
            raise TierFailed("as if a transfer had failed")

    with pytest.raises(TierFailed):
        await tier.get(MANY[:1], Broken())
    late = id(tier._late[0][1])
    assert late in before
    for _ in range(5):
        assert await tier.get(MANY, Taken()) == 40
    assert late not in {id(one) for one in tier._free}
    tier._late[0] = (0.0, tier._late[0][1])
    assert await tier.get(MANY, Taken()) == 40
    assert late in {id(one) for one in tier._free}


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake", None)
    monkeypatch.delitem(sys.modules, "twostroke.store.mooncake", raising=False)
    monkeypatch.delitem(sys.modules, "mooncake.store", raising=False)
    layout = Layout(2, 2, 16, 16, "float32", "weights")
    with pytest.raises(StartupError, match=r"pip install 'twostroke\[mooncake\]'"):
        _make_tier(Config("127.0.0.1", 50051), layout, torch.device("cpu"), WorkerConfig(), "", pytest.fail)
