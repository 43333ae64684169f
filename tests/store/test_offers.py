"""Blocks that the cache service copies out of a worker's memory, and what it must not believe of them."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.engine.rig import until
from tests.store.blocks import BYTES, FINGERPRINT, Taken, key, keys, payload
from tests.store.test_service import MANY, MEMORY, client, serving
from twostroke.config import DiskTier, StoreConfig
from twostroke.errors import HandoverFailed
from twostroke.kv.copying import copy_digested
from twostroke.kv.memory import Bytes, PoolMemory
from twostroke.links.staging import HostStaging
from twostroke.messages import PoolAddress
from twostroke.store import ends
from twostroke.store import server as serverside
from twostroke.store.format import seal
from twostroke.store.frames import Copied, Done, Kept, Offer
from twostroke.store.server import Server
from twostroke.store.service import ServiceTier, Session
from twostroke.store.shelf import Shelf
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


def shelf(server: Server) -> Shelf:
    """Of the only layout's first tier."""
    (shop,) = [task.result() for task in server._shops.values()]
    return shop._tiers[0]._shelf


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


async def test_slots_that_were_used_again_meanwhile_hold_no_blocks(
    service: tuple[Server, int], pool: PoolMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the service takes longer than anybody waits: its copies are of whatever is there by then."""
    late = source(pool)

    def copied_later(target: Bytes, block: memoryview) -> bytes:
        late.close()
        pool.slots[:] = memoryview(payload(key(999)))
        return copy_digested(target, block)

    async with client(service[1]) as tier:
        with monkeypatch.context() as patch:
            patch.setattr(ends, "copy_digested", copied_later)
            assert await tier.put(MANY, late) == tier.offered == 0
        assert not any(await tier.contains(MANY))
        assert shelf(service[0]).free == shelf(service[0]).total, "and take no room"


@pytest.mark.parametrize("says", ["no", "nothing", "goodbye"])
async def test_who_does_not_say_that_blocks_were_kept_has_stored_none(
    service: tuple[Server, int], pool: PoolMemory, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody finds them before that either."""
    monkeypatch.setattr(serverside, "PATIENCE", 0.2)
    server, port = service

    def offer(session: Session) -> int:
        assert session.ask(Offer(b"".join(MANY), pool.address, ORDER, b""), Copied) == Copied(0, mapped=True)
        assert shelf(server).filling == len(MANY)
        assert not shelf(server).stored
        if says == "goodbye":
            session.wire.abort()
        elif says == "no":
            session.say(Kept(kept=False))
        return session.hear(Done).count

    async with client(port) as tier:
        await tier.open()
        if says == "no":
            assert await tier._run(offer) == 0
        else:
            with pytest.raises(TierFailed):
                await tier._run(offer)
        await until(lambda: shelf(server).free == shelf(server).total)
        assert not any(await tier.contains(MANY))
        assert await tier.put(MANY, source(pool)) == len(MANY)


async def test_a_block_that_is_not_what_its_digest_says_is_never_used(
    service: tuple[Server, int], pool: PoolMemory
) -> None:
    """One of those that come with digests, as out of an outbox."""
    digests = [seal(memoryview(payload(one))).digest for one in (*MANY[:5], key(999), *MANY[6:])]
    async with client(service[1]) as tier:
        offer = Offer(b"".join(MANY), pool.address, ORDER, b"".join(digests))
        copied = await tier._run(lambda session: session.ask(offer, Copied))
        assert copied == Copied(len(MANY), mapped=True)
        target = Taken()
        assert await tier.get(MANY, target) == 5
        assert target.right(MANY)


async def test_a_disk_finds_blocks_again_only_if_they_were_kept(tmp_path: Path, pool: PoolMemory) -> None:
    config = StoreConfig(disk=DiskTier(tmp_path, 1 << 20))
    gone, here = MANY[::2], MANY[1::2]
    async with serving(config) as (_, port), client(port) as tier:

        def offer(session: Session) -> int:
            session.ask(Offer(b"".join(gone), pool.address, ORDER[::2], b""), Copied)
            return session.ask(Kept(kept=False), Done).count

        assert await tier._run(offer) == 0
        kept = SlotsEnd(ORDER[1::2], lambda: HostStaging(pool.slots), pool.address)
        assert await tier.put(here, kept) == tier.offered == len(here)
    async with serving(config) as (_, port), client(port) as tier:
        assert await tier.contains(MANY) == [False, True] * (len(MANY) // 2)
        target = Taken()
        assert await tier.get(here, target) == len(here)
        assert target.right(here)


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
    assert closed.where(1) is not None
    closed.close()
    assert closed.where(1) is None
    async with client(service[1]) as tier:
        assert await tier.put(MANY, closed) == 0
        assert not any(await tier.contains(MANY))


@pytest.mark.parametrize(
    ("slots", "digests"),
    [([len(MANY)], 1), ([0, 1], 1), ([0], 2), ([], 0), ([len(MANY)], 0), ([0, 1], 0)],
    ids=["beyond", "too many slots", "too many digests", "nothing", "beyond, no digests", "too many, no digests"],
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

    def ask(session: Session) -> list[Copied]:
        offers = [Offer(keys(1)[0], other.address, [0], digests) for digests in (bytes(16), b"")]
        return [session.ask(offer, Copied) for offer in offers]

    tier = ServiceTier("127.0.0.1", service[1], BYTES, FINGERPRINT, "s")
    assert await tier._run(ask) == [Copied(0, mapped=False)] * 2
    await tier.close()
    other.close()
