"""Tiers in files under a pool in GPU memory: the GPU reads and writes them by itself, or else the host does."""

import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.store.blocks import FINGERPRINT, keys
from twostroke.links.staging import Staging, of_thread, staging
from twostroke.store.directory import DirectoryTier
from twostroke.store.disk import disk_tier
from twostroke.store.tier import Tier
from twostroke.worker.offload import SlotsEnd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
if torch.cuda.is_available():
    from twostroke.kv.cuda_memory import CudaPool

SLOTS = 40
SIZES = [300_032, 73 * 4096]  # bytes: no whole number of pages, and one
MANY = keys(*range(SLOTS))
ORDER = random.Random(3).sample(range(SLOTS), SLOTS)
KINDS = ["disk", "dir"]
Access = Callable[[], Staging]


@pytest.fixture(params=SIZES)
def pool(request: pytest.FixtureRequest) -> "Iterator[CudaPool]":
    pool = CudaPool(SLOTS, request.param, "test", torch.device("cuda", 0))
    pool.slots.copy_(torch.randint(0, 256, pool.slots.shape, dtype=torch.uint8, device="cuda:0"))
    torch.cuda.synchronize()
    yield pool
    pool.close()


@pytest.fixture
def access(pool: "CudaPool") -> Access:
    pytest.importorskip("kvikio")
    return of_thread(staging(pool.slots, "on"))


def made(kind: str, path: Path, size: int) -> Tier:
    """A new tier over what is there."""
    if kind == "dir":
        return DirectoryTier(path, size, FINGERPRINT)
    return disk_tier(path, size, FINGERPRINT, 2 * SLOTS * size, "test")


def works(access: Access) -> bool:
    """Whether this thread's GPU moves files by itself."""
    files = access().files
    return files is not None and files._works  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
async def test_blocks_come_back_and_are_the_same_to_the_host(
    tmp_path: Path, pool: "CudaPool", access: Access, kind: str
) -> None:
    size, before, through_host = pool.slots.shape[1], pool.slots.clone(), of_thread(staging(pool.slots))
    for writes, reads in ((access, access), (access, through_host), (through_host, access)):
        path = tmp_path / f"{writes is access}-{reads is access}"
        path.mkdir()
        tier = made(kind, path, size)
        await tier.open()
        assert await tier.put(MANY, SlotsEnd(ORDER, writes)) == SLOTS
        pool.slots.zero_()
        torch.cuda.synchronize()
        assert await tier.get(MANY[:7], SlotsEnd(ORDER[:7], reads)) == 7
        assert [slot for slot in range(SLOTS) if pool.slots[slot].any()] == sorted(ORDER[:7])
        assert await tier.get(MANY, SlotsEnd(ORDER, reads)) == SLOTS
        assert torch.equal(pool.slots, before)
        assert tier.usage().damaged == 0
        await tier.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_flipped_bit_is_seen_before_it_is_in_a_slot(
    tmp_path: Path, pool: "CudaPool", access: Access, kind: str
) -> None:
    tier = made(kind, tmp_path, pool.slots.shape[1])
    await tier.open()
    assert await tier.put(MANY[:1], SlotsEnd([0], access)) == 1
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]  # noqa: ASYNC240
    where = file.read_bytes().index(pool.slots[0, 1000:1100].cpu().numpy().tobytes())
    with file.open("r+b") as out:
        out.seek(where)
        out.write(bytes([int(pool.slots[0, 1000]) ^ 1]))
        out.flush()
        os.fsync(out.fileno())
    pool.slots.zero_()
    torch.cuda.synchronize()
    assert await tier.get(MANY[:1], SlotsEnd([0], access)) == 0
    assert not pool.slots.any()
    assert tier.usage().damaged == 1
    await tier.close()


async def test_where_kvikio_fails_the_host_does_it(tmp_path: Path, pool: "CudaPool", access: Access) -> None:
    """It cannot open the segment again, since the process has no file descriptors left."""
    before = pool.slots.clone()
    tier = made("disk", tmp_path, pool.slots.shape[1])
    await tier.open()
    assert await tier.put(MANY[:1], SlotsEnd(ORDER[:1], of_thread(staging(pool.slots)))) == 1  # makes the segment
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert works(access)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    spare = []
    try:
        while True:
            spare.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    try:
        assert await tier.get(MANY[:1], SlotsEnd(ORDER[:1], access)) == 1
    finally:
        for one in spare:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert await tier.put(MANY, SlotsEnd(ORDER, access)) == SLOTS
    pool.slots.zero_()
    torch.cuda.synchronize()
    assert await tier.get(MANY, SlotsEnd(ORDER, access)) == SLOTS
    assert torch.equal(pool.slots, before)
    await tier.close()
