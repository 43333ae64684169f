"""The host tier under a pool in GPU memory: blocks go between the two without a copy in between."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch

from tests.store.blocks import keys
from twostroke.links.staging import Staging, of_thread, staging
from twostroke.store.format import seal
from twostroke.store.host import HostTier
from twostroke.worker.offload import SlotsEnd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
if torch.cuda.is_available():
    from cuda.bindings import runtime

    from twostroke.kv.cuda_memory import CudaPool, register

SLOTS, BYTES = 200, 300_032
GPU = torch.device("cuda", 0)
MANY = keys(*range(SLOTS))
ORDER = random.Random(3).sample(range(SLOTS), SLOTS)
Access = Callable[[], Staging]


@pytest.fixture
def pool() -> "Iterator[CudaPool]":
    pool = CudaPool(SLOTS, BYTES, "test", GPU)
    pool.slots.copy_(torch.randint(0, 256, (SLOTS, BYTES), dtype=torch.uint8, device=GPU))
    torch.cuda.synchronize()
    yield pool
    pool.close()


@pytest.fixture
def access(pool: "CudaPool") -> Access:
    return of_thread(staging(pool.slots))


@pytest.fixture(params=[True, False], ids=["registered", "pageable"])
async def tier(request: pytest.FixtureRequest) -> AsyncIterator[HostTier]:
    tier = HostTier(BYTES, SLOTS * BYTES, at_once=16, register=partial(register, device=0) if request.param else None)
    await tier.open()
    yield tier
    await tier.close()


async def test_what_comes_back_is_what_went_out(pool: "CudaPool", access: Access, tier: HostTier) -> None:
    before = pool.slots.clone()
    assert await tier.put(MANY, SlotsEnd(ORDER, access)) == SLOTS
    pool.slots.zero_()
    torch.cuda.synchronize()
    assert await tier.get(MANY[:7], SlotsEnd(ORDER[:7], access)) == 7
    assert [slot for slot in range(SLOTS) if pool.slots[slot].any()] == sorted(ORDER[:7])
    assert await tier.get(MANY, SlotsEnd(ORDER, access)) == SLOTS
    assert torch.equal(pool.slots, before)


async def test_a_stored_block_has_the_digest_of_what_the_pool_had(
    pool: "CudaPool", access: Access, tier: HostTier
) -> None:
    await tier.put(MANY, SlotsEnd(ORDER, access))
    for key, slot in zip(MANY, ORDER, strict=True):
        right = seal(pool.slots[slot].cpu().numpy().data).digest
        assert tier.arena.digests[tier._shelf.slots()[key]] == right


async def test_a_flipped_bit_in_host_memory_is_found(pool: "CudaPool", access: Access, tier: HostTier) -> None:
    await tier.put(MANY, SlotsEnd(ORDER, access))
    tier.arena.slots[tier._shelf.slots()[MANY[150]], BYTES // 2] ^= 4
    assert await tier.get(MANY, SlotsEnd(ORDER, access)) == 150
    assert tier.usage().damaged == 1
    assert not (await tier.contains(MANY))[150]


async def test_slots_that_are_closed_are_neither_read_nor_written(
    pool: "CudaPool", access: Access, tier: HostTier
) -> None:
    end = SlotsEnd(ORDER, access)
    end.close()
    assert await tier.put(MANY, end) == 0
    assert await tier.put(MANY, SlotsEnd(ORDER, access)) == SLOTS
    before = pool.slots.clone()
    assert await tier.get(MANY, end) == 0
    assert torch.equal(pool.slots, before)


async def test_one_block_at_a_time(pool: "CudaPool", access: Access) -> None:
    """As other tiers do."""
    before, end = pool.slots.clone(), SlotsEnd(ORDER, access)
    for index in range(10):
        block = end.block(index)
        assert block is not None
        assert block == seal(before[ORDER[index]].cpu().numpy().data)
        assert SlotsEnd([ORDER[index + 10]], access).place(0, block)
    assert torch.equal(pool.slots[ORDER[10:20]], before[ORDER[:10]])


@pytest.mark.parametrize("size", [256, 320, 960, 1024, 1088, 2048, 9216, 9280, 300_032, 917_504])
def test_digests_are_those_of_the_library(size: int) -> None:
    slots = torch.randint(0, 256, (5, size), dtype=torch.uint8, device=GPU)
    torch.cuda.synchronize()
    host = np.empty((4, size), np.uint8)
    digests = staging(slots)().read([3, 0, 4], host, [2, 1, 3])
    assert np.array_equal(host[[2, 1, 3]], slots[[3, 0, 4]].cpu().numpy())
    assert digests == [seal(host[place].data).digest for place in (2, 1, 3)]


def test_blocks_that_are_no_whole_stripes_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 64"):
        staging(torch.zeros(2, 328, dtype=torch.uint8, device=GPU))().read([0], np.empty((1, 328), np.uint8), [0])


async def test_a_closed_tier_leaves_no_memory_registered() -> None:
    tier = HostTier(BYTES, SLOTS * BYTES, register=partial(register, device=0))
    await tier.open()
    address = tier.arena.slots.ctypes.data
    assert runtime.cudaHostGetFlags(address)[0] == 0
    await tier.close()
    assert runtime.cudaHostGetFlags(address)[0] != 0
    runtime.cudaGetLastError()
