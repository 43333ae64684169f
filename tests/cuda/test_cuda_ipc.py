"""A pool in GPU memory, shared with real other processes through CUDA IPC."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import msgspec
import numpy as np
import pytest
import torch

from tests.peer_process import CLAIM, content, peer_process
from twostroke.errors import HandoverFailed, MemoryTooSmall
from twostroke.messages import CudaMemory, MemoryFile, PoolAddress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
if torch.cuda.is_available():
    from twostroke.kv.cuda_memory import CudaPool, map_peer, unmap
    from twostroke.links.cuda_ipc import CudaIpcLink

SLOTS, BYTES, PEER_SLOTS = 6, 30_000, 8
LARGE = 64 << 20  # bytes of a slot, where the GPU's memory is watched
GPU = torch.device("cuda", 0)


class Setup:
    """A link, our slots, and a peer's address."""

    def __init__(self, address: PoolAddress) -> None:
        self.own = torch.zeros((SLOTS, BYTES), dtype=torch.uint8, device=GPU)
        torch.cuda.synchronize()
        self.link = CudaIpcLink(self.own)
        self.address = address

    def changed(self, **fields: object) -> PoolAddress:
        return msgspec.structs.replace(self.address, **fields)

    @property
    def bytes(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """What our slots hold."""
        found: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = self.own.cpu().numpy()
        return found


@pytest.fixture(scope="module")
def peer() -> Iterator[PoolAddress]:
    with peer_process(PEER_SLOTS, BYTES, gpu=0) as (_, address):
        yield address


@pytest.fixture
def setup(peer: PoolAddress) -> Iterator[Setup]:
    setup = Setup(peer)
    yield setup
    setup.link.close()


def free() -> int:
    """Bytes of the GPU that nobody holds."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(GPU)[0])


async def until_free(amount: int) -> None:
    async with asyncio.timeout(30):
        while free() < amount:  # noqa: ASYNC110 - what another process or the driver changes
            await asyncio.sleep(0.05)


# -- the pool --------------------------------------------------------------------------------------------------------


def test_the_owner_sees_its_slots() -> None:
    pool = CudaPool(3, 1000, "me", GPU)
    assert pool.slots.shape == (3, 1000)
    assert pool.slots.dtype == torch.uint8
    assert pool.slots.device == GPU
    assert pool.slots.is_contiguous()
    assert not pool.slots.any()
    pool.slots[1] = 7
    assert pool.slots.sum(dim=1).tolist() == [0, 7000, 0]
    pool.close()


def test_its_address() -> None:
    pool = CudaPool(3, 1000, "me", torch.device("cuda"))
    assert msgspec.json.decode(msgspec.json.encode(pool.address), type=PoolAddress) == pool.address
    assert isinstance(pool.address.memory, CudaMemory)
    assert pool.address.memory.device == str(torch.cuda.get_device_properties(0).uuid)
    pool.close()


def test_closing_gives_the_memory_back_at_once() -> None:
    before = free()
    pool = CudaPool(16, LARGE, "me", GPU)
    assert free() <= before - 16 * LARGE
    pool.close()
    assert free() >= before - LARGE


def test_a_pool_that_is_too_large_takes_nothing() -> None:
    before = free()
    with pytest.raises(MemoryTooSmall, match="lower --kv-memory or --gpu-memory-utilization"):
        CudaPool(before // LARGE + 2, LARGE, "me", GPU)
    assert free() >= before - LARGE
    torch.ones(10, device=GPU).sum().item()  # no error is left over


def test_what_torch_keeps_in_store_is_free_for_a_pool() -> None:
    slots = free() // LARGE * 2 // 3
    held = torch.empty((slots, LARGE), dtype=torch.uint8, device=GPU)
    del held
    CudaPool(slots, LARGE, "me", GPU).close()


# -- the link --------------------------------------------------------------------------------------------------------


async def test_bytes_arrive_pairwise(setup: Setup) -> None:
    remote, local = [7, 0, 3, 4, 5], [1, 5, 2, 3, 4]
    await setup.link.read(setup.address, remote, local, CLAIM)
    expected = np.zeros((SLOTS, BYTES), np.uint8)
    expected[local] = content(PEER_SLOTS, BYTES)[remote]
    assert (setup.bytes == expected).all()


async def test_several_reads_at_once(setup: Setup) -> None:
    await asyncio.gather(*(setup.link.read(setup.address, [slot], [slot], CLAIM) for slot in range(SLOTS)))
    assert (setup.bytes == content(PEER_SLOTS, BYTES)[:SLOTS]).all()


async def test_many_large_slots() -> None:
    slots, size = 300, 1 << 20
    order = np.random.default_rng(0).permutation(slots)
    own = torch.zeros((slots, size), dtype=torch.uint8, device=GPU)
    torch.cuda.synchronize()
    link = CudaIpcLink(own)
    with peer_process(slots, size, gpu=0) as (_, address):
        await link.read(address, order.tolist(), list(range(slots)), CLAIM)
        assert (own.cpu().numpy() == content(slots, size)[order]).all()
        link.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("ours", "theirs"), [(0, 1), (1, 0), (1, 1)])
async def test_across_gpus(ours: int, theirs: int) -> None:
    own = torch.zeros((SLOTS, BYTES), dtype=torch.uint8, device=torch.device("cuda", ours))
    torch.cuda.synchronize(ours)
    link = CudaIpcLink(own)
    with peer_process(PEER_SLOTS, BYTES, gpu=theirs) as (_, address):
        await link.read(address, [7, 0, 1], [1, 4, 5], CLAIM)
        assert (own.cpu().numpy()[[1, 4, 5]] == content(PEER_SLOTS, BYTES)[[7, 0, 1]]).all()
        link.close()


@pytest.mark.parametrize("remote", [[PEER_SLOTS], [0, PEER_SLOTS], [2**31 - 1], [-1]])
async def test_slots_outside_the_peers_pool(setup: Setup, remote: list[int]) -> None:
    with pytest.raises(HandoverFailed, match="outside"):
        await setup.link.read(setup.address, remote, list(range(len(remote))), CLAIM)
    assert not setup.bytes.any()


@pytest.mark.parametrize("fields", [{"num_slots": 2**20}, {"memory": "beyond"}])
async def test_a_peer_that_overstates_its_pool(setup: Setup, fields: dict[str, object]) -> None:
    """To read beyond what is mapped would break our own context."""
    await setup.link.read(setup.address, [0], [0], CLAIM)
    if "memory" in fields:
        fields = {"memory": msgspec.structs.replace(setup.address.memory, offset=1 << 40)}
    with pytest.raises(HandoverFailed, match="smaller"):
        await setup.link.read(setup.changed(**fields), [1], [1], CLAIM)
    await setup.link.read(setup.address, [2], [2], CLAIM)
    expected = content(PEER_SLOTS, BYTES)[:SLOTS]
    expected[[1, 3, 4, 5]] = 0
    assert (setup.bytes == expected).all()


async def test_what_is_refused(setup: Setup) -> None:
    refused = {
        "bytes": setup.changed(block_bytes=BYTES - 1),
        "another machine": setup.changed(host="elsewhere"),
        "process is gone": setup.changed(pid=2**31 - 1),
        "is a memory file, ours GPU memory": setup.changed(memory=MemoryFile(3)),
        "cannot be mapped": setup.changed(memory=msgspec.structs.replace(setup.address.memory, handle="00" * 64)),
    }
    for why, address in refused.items():
        with pytest.raises(HandoverFailed, match=why):
            await setup.link.read(address, [0], [0], CLAIM)
    assert not setup.bytes.any()
    await setup.link.read(setup.address, [0], [0], CLAIM)
    assert setup.bytes[0].any()


async def test_our_own_pool_is_refused(setup: Setup) -> None:
    pool = CudaPool(2, BYTES, "me", GPU)
    with pytest.raises(HandoverFailed, match="own"):
        await setup.link.read(pool.address, [0], [0], CLAIM)
    pool.close()


async def test_a_peer_killed_after_a_read_takes_nothing_down(setup: Setup) -> None:
    with peer_process(PEER_SLOTS, BYTES, "gone", gpu=0) as (process, address):
        await setup.link.read(address, [0], [0], CLAIM)
        process.kill()
        process.wait()
    with pytest.raises(HandoverFailed, match="process is gone"):
        await setup.link.read(address, [1], [1], CLAIM)
    assert not setup.bytes[1].any()
    await setup.link.read(setup.address, [2], [2], CLAIM)
    assert (setup.bytes[2] == content(PEER_SLOTS, BYTES)[2]).all()


def test_a_mapping_outlives_its_owner_unharmed(setup: Setup) -> None:
    """A peer can be killed while we copy. What is read then does not count, but must not break our context."""
    with peer_process(PEER_SLOTS, BYTES, "gone", gpu=0) as (process, address):
        pool = map_peer(address, 0)
        process.kill()
        process.wait()
    setup.link._copy(pool, [0, 5], [0, 5])
    unmap(pool)
    assert setup.own.sum().item() >= 0
    with suppress(HandoverFailed):  # whether CUDA refuses a stale handle or not: it does no harm
        unmap(map_peer(address, 0))
    torch.ones(10, device=GPU).sum().item()


async def test_memory_of_a_killed_peer_is_free_again_without_another_read() -> None:
    """Its worker, started again, needs it."""
    own = torch.zeros((1, LARGE), dtype=torch.uint8, device=GPU)
    link = CudaIpcLink(own)
    before = free()
    with peer_process(16, LARGE, "gone", gpu=0) as (process, address):
        await link.read(address, [0], [0], CLAIM)
        assert free() <= before - 16 * LARGE
        process.kill()
        process.wait()
        await until_free(before - 4 * LARGE)
    link.close()


async def test_close_lets_go_of_peers() -> None:
    own = torch.zeros((1, LARGE), dtype=torch.uint8, device=GPU)
    before = free()
    link = CudaIpcLink(own)
    with peer_process(16, LARGE, "gone", gpu=0) as (process, address):
        await link.read(address, [0], [0], CLAIM)
        link.close()
        process.kill()
        process.wait()
    await until_free(before - 4 * LARGE)
