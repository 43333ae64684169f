"""Blocks that the cache service copies out of a worker's memory, and what it must not believe of them."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.engine.rig import until
from tests.store.blocks import BYTES, FINGERPRINT, Taken, key, keys, payload
from tests.store.test_service import MANY, MEMORY, client, serving
from twostroke.errors import HandoverFailed
from twostroke.kv.memory import Bytes, PoolMemory
from twostroke.links.staging import HostStaging
from twostroke.messages import PoolAddress
from twostroke.store import server as serverside
from twostroke.store.format import Sealed
from twostroke.store.frames import Copied, Offer
from twostroke.store.server import Server
from twostroke.store.service import ServiceTier, Session
from twostroke.store.tier import TierFailed
from twostroke.worker.offload import SlotsEnd

ORDER = [(7 * index + 3) % len(MANY) for index in range(len(MANY))]  # the slot of each block


@pytest.fixture
def pool() -> Iterator[PoolMemory]:
    memory = PoolMemory(len(MANY), BYTES, "worker")
    for one, slot in zip(MANY, ORDER, strict=True):
        memory.slots[slot] = memoryview(payload(one))
    yield memory
    memory.close()


def source(pool: PoolMemory) -> SlotsEnd:
    return SlotsEnd(ORDER, lambda: HostStaging(pool.slots), pool.address)


@pytest.fixture
async def service() -> AsyncIterator[tuple[Server, int]]:
    async with serving(MEMORY) as (server, port):
        yield server, port


async def test_they_are_copied_out_of_the_workers_memory(service: tuple[Server, int], pool: PoolMemory) -> None:
    server, port = service
    async with client(port) as tier:
        assert await tier.put(MANY, source(pool)) == len(MANY)
        assert tier.offered == len(MANY)
        assert await tier.put(MANY, source(pool)) == len(MANY)
        pool.slots[:] = 0  # the service has copies
        target = Taken()
        assert await tier.get(MANY, target) == len(MANY)
        assert target.right(MANY)
        mapped = [memory for _, memory in server._maps.values()]
        assert all(memory is mapped[0] for memory in mapped), "once for all connections"
    await until(lambda: not server._maps)


async def test_a_slot_that_was_used_again_meanwhile_holds_no_block(
    service: tuple[Server, int], pool: PoolMemory
) -> None:
    """As when the service takes longer than anybody waits: its copy is of whatever is there by then."""

    class Late(SlotsEnd):
        def block(self, index: int) -> Sealed | None:
            block = super().block(index)
            if index == 5:
                pool.slots[ORDER[5]] = memoryview(payload(key(999)))
            return block

    async with client(service[1]) as tier:
        await tier.put(MANY, Late(ORDER, lambda: HostStaging(pool.slots), pool.address))
        assert tier.offered == len(MANY)
        target = Taken()
        assert await tier.get(MANY, target) == 5
        assert target.right(MANY)


async def test_several_offers_at_once(
    service: tuple[Server, int], pool: PoolMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twostroke.store.service._OFFER_BYTES", 3 * BYTES)
    async with client(service[1]) as tier:
        assert await tier.put(MANY, source(pool)) == tier.offered == len(MANY)
        pool.slots[:] = 0
        target = Taken()
        assert await tier.get(MANY, target) == len(MANY)
        assert target.right(MANY)


@pytest.mark.parametrize("size", [3 * BYTES, 1 << 20], ids=["several offers", "one"])
async def test_memory_that_the_service_cannot_map_is_sent(
    service: tuple[Server, int], pool: PoolMemory, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twostroke.store.service._OFFER_BYTES", size)

    def refuse(_: PoolAddress) -> Bytes:
        raise HandoverFailed("no")

    monkeypatch.setattr(serverside, "map_peer", refuse)
    async with client(service[1]) as tier:
        assert await tier.put(MANY, source(pool)) == len(MANY)
        assert tier.offered == 0
        target = Taken()
        assert await tier.get(MANY, target) == len(MANY)
        assert target.right(MANY)


async def test_a_source_that_is_closed_gives_nothing(service: tuple[Server, int], pool: PoolMemory) -> None:
    closed = source(pool)
    closed.close()
    async with client(service[1]) as tier:
        assert await tier.put(MANY, closed) == 0
        assert not any(await tier.contains(MANY))


@pytest.mark.parametrize(
    ("slots", "digests"),
    [([len(MANY)], 1), ([0, 1], 1), ([0], 2), ([], 0)],
    ids=["beyond the memory", "too many slots", "too many digests", "nothing"],
)
async def test_offers_that_are_none(
    service: tuple[Server, int], pool: PoolMemory, slots: list[int], digests: int
) -> None:
    async with client(service[1]) as tier:
        with pytest.raises(TierFailed, match="other blocks"):
            await tier._run(
                lambda session: session.ask(Offer(keys(1)[0], pool.address, slots, bytes(16 * digests)), Copied)
            )
        assert not any(await tier.contains(MANY))


async def test_blocks_of_another_size_are_not_looked_at(service: tuple[Server, int]) -> None:
    other = PoolMemory(1, BYTES + 1, "other")

    def ask(session: Session) -> Copied:
        return session.ask(Offer(keys(1)[0], other.address, [0], bytes(16)), Copied)

    tier = ServiceTier("127.0.0.1", service[1], BYTES, FINGERPRINT, "s")
    assert await tier._run(ask) == Copied(0, mapped=False)
    await tier.close()
    other.close()
