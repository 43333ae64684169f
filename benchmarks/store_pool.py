"""What benchmarks of the store put into tiers: a pool's slots, in random order."""

import hashlib
import time

import numpy as np

from twostroke.kv.memory import PoolMemory
from twostroke.links.staging import HostStaging
from twostroke.store.tier import Tier
from twostroke.worker.offload import SlotsEnd

FINGERPRINT = "ab" * 16
SIZES = {"368,640": 368_640, "1 MiB": 1 << 20, "4 MiB": 4 << 20}  # bytes of a block; the first is the built-in model's


def key(*parts: object) -> bytes:
    """A block key."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=24).digest()


class Pool:
    """Random bytes in slots, taken in random order, as a request's are."""

    def __init__(self, blocks: int, size: int) -> None:
        self.memory = PoolMemory(blocks, size, "bench")
        self.memory.slots[:] = np.random.default_rng(0).integers(0, 256, self.memory.slots.shape, dtype=np.uint8)
        self.order = np.random.default_rng(1).permutation(blocks).tolist()

    def end(self) -> SlotsEnd:
        """Source or target of these slots."""
        return SlotsEnd(self.order, lambda: HostStaging(self.memory.slots), self.memory.address)


async def timed(tier: Tier, pool: Pool, turn: int) -> tuple[float, float]:
    """Bytes a second of putting all slots, and of getting them."""
    keys = [key(turn, index) for index in range(len(pool.order))]
    total = pool.memory.slots.nbytes
    start = time.perf_counter()
    assert await tier.put(keys, pool.end()) == len(keys)
    put = time.perf_counter() - start
    start = time.perf_counter()
    assert await tier.get(keys, pool.end()) == len(keys)
    return total / put / 1e9, total / (time.perf_counter() - start) / 1e9
