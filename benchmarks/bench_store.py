"""What the store's tiers make of the machine, and what they save a request.

- host tier against memcpy, disk tier against raw direct I/O: the same bytes, in turn
- looking up a prefix of 4,000 blocks; finding 100,000 blocks again at start
- time to first token of a long prompt that is in a tier, against computing it (``--only ttft``)
- eviction: least recently used against S3-FIFO, on a made-up trace of conversations among long prompts

``python -m benchmarks.bench_store``, a few minutes. Tiers are on the disk that ``--path`` is on.
"""

import argparse
import asyncio
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import numpy as np

from benchmarks.bench_handover import stream
from benchmarks.common import Row, report, row, seconds
from benchmarks.servers import free_port, running
from twostroke.kv.memory import PoolMemory
from twostroke.links.staging import HostStaging
from twostroke.store.direct import PAGE, aligned, open_direct, pages, read_at, write_at
from twostroke.store.directory import DirectoryTier
from twostroke.store.disk import disk_tier
from twostroke.store.eviction import POLICIES, Policy
from twostroke.store.format import HEADER_BYTES, Header, pack
from twostroke.store.host import HostTier
from twostroke.store.segment import Segment
from twostroke.store.shelf import Shelf
from twostroke.store.slots import SlotTier
from twostroke.store.store import Store
from twostroke.store.tier import Tier
from twostroke.worker.offload import SlotsEnd

FINGERPRINT = "ab" * 16
SIZES = {"368,640": 368_640, "1 MiB": 1 << 20, "4 MiB": 4 << 20}  # bytes of a block; the first is the built-in model's
DISK_THREADS = 4
PROMPT = 4000  # tokens


def key(*parts: object) -> bytes:
    """A block key."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


class Pool:
    """Random bytes in slots, taken in random order, as a request's are."""

    def __init__(self, blocks: int, size: int) -> None:
        self.memory = PoolMemory(blocks, size, "bench")
        self.memory.slots[:] = np.random.default_rng(0).integers(0, 256, self.memory.slots.shape, dtype=np.uint8)
        self.order = np.random.default_rng(1).permutation(blocks).tolist()

    def end(self) -> SlotsEnd:
        """Source or target of these slots."""
        return SlotsEnd(self.order, lambda: HostStaging(self.memory.slots))


async def timed(tier: SlotTier, pool: Pool, turn: int) -> tuple[float, float]:
    """Bytes a second of putting all slots, and of getting them."""
    keys = [key(turn, index) for index in range(len(pool.order))]
    total = pool.memory.slots.nbytes
    start = time.perf_counter()
    assert await tier.put(keys, pool.end()) == len(keys)
    put = time.perf_counter() - start
    start = time.perf_counter()
    assert await tier.get(keys, pool.end()) == len(keys)
    return total / put / 1e9, total / (time.perf_counter() - start) / 1e9


async def host(name: str, size: int, repeats: int) -> list[Row]:
    """Against one thread's memcpy, and against two threads', since the tier has two."""
    blocks = max(32, (256 << 20) // size)
    pool, other = Pool(blocks, size), PoolMemory(blocks, size, "other")
    tier = HostTier(size, blocks * size)
    await tier.open()
    pair = ThreadPoolExecutor(2)

    def memcpy(first: int, step: int) -> None:
        for index in range(first, blocks, step):
            np.copyto(other.slots[index], pool.memory.slots[pool.order[index]])

    def both() -> None:
        list(pair.map(memcpy, (0, 1), (2, 2)))

    figures: dict[str, list[float]] = {"put": [], "get": [], "one": [], "two": []}
    for turn in range(repeats + 1):
        one = seconds(lambda: memcpy(0, 1))
        two = seconds(both)
        put, get = await timed(tier, pool, turn)
        if turn:
            total = pool.memory.slots.nbytes / 1e9
            for what, value in (("put", put), ("get", get), ("one", total / one), ("two", total / two)):
                figures[what].append(value)
    await tier.close()
    other.close()
    pool.memory.close()
    return [
        row(f"host {what}, {name}", "GB/s", figures[what], figures[threads], f"memcpy, threads: {threads}", goal)
        for what in ("put", "get")
        for threads, goal in (("one", ">= 0.85" if size >= 1 << 20 else ""), ("two", ""))
    ]


async def disk(path: Path, name: str, size: int, repeats: int) -> list[Row]:
    """Rewriting slots of a full tier, against rewriting a file of the same size with the same pieces and threads."""
    blocks = max(32, (384 << 20) // size)
    pool = Pool(blocks, size)
    capacity = int(1.2 * Segment.file_bytes(blocks, size))
    tier = disk_tier(path / f"tier-{size}", size, FINGERPRINT, capacity, "bench")
    await tier.open()
    fd = open_direct(str(path / "raw"), os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, blocks * pages(size))
    buffers = [aligned(size) for _ in range(DISK_THREADS)]
    for buffer in buffers:
        buffer[:size] = pool.memory.slots[0].data
    threads = ThreadPoolExecutor(DISK_THREADS)

    def raw(work: Callable[[int, memoryview, int], None]) -> float:
        def some(thread: int) -> None:
            for index in range(thread, blocks, DISK_THREADS):
                work(fd, buffers[thread], index * pages(size))

        return blocks * size / 1e9 / seconds(lambda: list(threads.map(some, range(DISK_THREADS))))

    figures: dict[str, list[float]] = {"put": [], "get": [], "write": [], "read": []}
    for turn in range(repeats + 2):
        write, read = raw(write_at), raw(read_at)
        put, get = await timed(tier, pool, turn)
        if turn > 1:  # before that, each writes its part of the disk for the first time
            for what, value in (("put", put), ("get", get), ("write", write), ("read", read)):
                figures[what].append(value)
    os.close(fd)
    (path / "raw").unlink()
    await tier.close()
    pool.memory.close()
    return [
        row(f"disk put, {name}", "GB/s", figures["put"], figures["write"], "raw direct writes", ">= 0.85"),
        row(f"disk get, {name}", "GB/s", figures["get"], figures["read"], "raw direct reads", ">= 0.85"),
    ]


async def lookup(path: Path, repeats: int) -> list[Row]:
    """4,000 blocks of which the host tier has the first half, the disk the second, and all are in the directory."""
    size, count = 512, 4000
    keys = [key("lookup", index) for index in range(count)]
    tiers: list[Tier] = [
        HostTier(size, size * count),
        disk_tier(path / "lookup", size, FINGERPRINT, 64 << 20, "bench"),
        DirectoryTier(path / "shared", size, FINGERPRINT),
    ]
    store = Store(tiers, size)
    await asyncio.gather(*(stage.open() for stage in store.stages))
    pool = Pool(count, size)
    await tiers[0].put(keys[: count // 2], pool.end())
    await tiers[1].put(keys[count // 2 :], pool.end())
    await tiers[2].put(keys, pool.end())
    times: list[float] = []
    for _ in range(repeats * 4):
        start = time.perf_counter()
        assert len(await store.find(keys)) == count
        times.append(1e3 * (time.perf_counter() - start))
    await store.close()
    pool.memory.close()
    return [row("lookup of 4,000 blocks in host, disk and dir", "ms", times, [2.0], "the goal", "<= 1")]


async def rebuild(path: Path, repeats: int) -> list[Row]:
    """100,000 blocks of the built-in model: their headers, with nothing in the slots (a sparse file of 37 GB)."""
    size, blocks, layout = 368_640, 100_000, bytes.fromhex(FINGERPRINT)
    folder = path / "rebuild" / f"{FINGERPRINT}-bench"
    folder.mkdir(parents=True)
    directory = os.open(folder, os.O_RDONLY)
    Segment.create(directory, "000000.segment", 1, size, layout).close()
    os.close(directory)
    with (folder / "000000.segment").open("r+b") as out:
        first = bytearray(out.read(PAGE))
        first[12:16] = blocks.to_bytes(4, "little")
        table = b"".join(pack(Header(key(index), layout, size, index, bytes(16))) for index in range(blocks))
        assert len(table) == blocks * HEADER_BYTES
        out.seek(0)
        out.write(bytes(first) + table)
        out.truncate(Segment.file_bytes(blocks, size))
    times: list[float] = []
    for _ in range(repeats):
        tier = disk_tier(path / "rebuild", size, FINGERPRINT, 64 << 30, "bench")
        start = time.perf_counter()
        await tier.open()
        times.append(time.perf_counter() - start)
        assert tier.usage().blocks == blocks
        await tier.close()
    return [row("index of 100,000 blocks on disk, at start", "s", times, [1.0], "the goal", "<= 1")]


def trace() -> Iterator[list[int]]:
    """Prompts as numbers of their blocks: 20 users with 8 turns each, among prompts of 300 blocks that come once."""
    rng, fresh = random.Random(45), iter(range(10**9))
    history: list[list[int]] = [[next(fresh) for _ in range(20)] for _ in range(20)]
    turns = [user for user in range(20) for _ in range(8)]
    rng.shuffle(turns)
    for number, user in enumerate(turns):
        history[user] += [next(fresh) for _ in range(rng.randint(5, 40))]
        yield history[user]
        if number % 4 == 0:
            yield [next(fresh) for _ in range(300)]


def hit_rate(policy: Policy, capacity: int) -> float:
    """Of all blocks that the trace asks for, how many a tier of so many blocks has, as a prefix."""
    shelf, asked, hits = Shelf(capacity, policy), 0, 0
    for prompt in trace():
        keys = [key(block) for block in prompt]
        found = shelf.contains(keys)
        hits += found.index(False) if False in found else len(found)
        asked += len(keys)
        for one in reversed([one for one, here in zip(keys, found, strict=True) if not here]):
            if shelf.take(one) is not None:
                shelf.publish(one)
    return hits / asked


def eviction() -> list[Row]:
    """For tiers of several sizes; no timing in it."""
    return [
        row(
            f"hit rate, S3-FIFO, {capacity:,} blocks",
            "",
            [hit_rate(POLICIES["s3-fifo"](), capacity)],
            [hit_rate(POLICIES["lru"](), capacity)],
            "LRU",
            "",
        )
        for capacity in (1000, 1500, 2000, 3000, 4000)
    ]


async def serve(path: Path, tiers: Sequence[str], repeats: int) -> list[Row]:
    """In turn: a new prompt is computed; an old one, which the pool has lost since, is loaded."""
    rows = []
    for tier in tiers:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = ["twostroke", "serve", "--port", str(port), "--kv-memory", "110MiB", "--store", tier]
        name, goal = tier.partition(":")[0], {"host": "<= 0.10", "disk": "<= 0.20"}.get(tier.partition(":")[0], "")
        fresh, loaded = [], []
        # The pool holds one of the prompts: each leaves it when the other comes.
        prompts = [[random.Random(number).randrange(100, 49_000) for _ in range(PROMPT)] for number in range(2)]
        with running(command, f"{url}/ready"):
            async with aiohttp.ClientSession() as session:
                for number, prompt in enumerate(prompts):
                    fresh.append(1e3 * (await stream(session, url, PROMPT, f"fresh-{number}", prompt))[0])
                    await asyncio.sleep(1.0)  # it is written
                for turn in range(2 * repeats):
                    one = await stream(session, url, PROMPT, f"loaded-{turn}", prompts[turn % 2])
                    loaded.append(1e3 * one[0])
        rows.append(row(f"TTFT, {PROMPT:,} tokens in {name}", "ms", loaded, fresh, "computed", goal))
    return rows


async def measure(path: Path, repeats: int) -> list[Row]:
    """The tiers by themselves."""
    rows: list[Row] = []
    for name, size in SIZES.items():
        rows += await host(name, size, repeats)
    for name, size in SIZES.items():
        rows += await disk(path, name, size, repeats)
    rows += await lookup(path, repeats)
    rows += await rebuild(path, repeats)
    return rows + eviction()


def main() -> None:
    """Measure and report, the tiers by themselves and what they save a request apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--path", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", choices=["tiers", "ttft"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.path) as path:
        if options.only != "ttft":
            rows = asyncio.run(measure(Path(path), options.repeats))
            report("store", rows, repeats=options.repeats, disk_threads=DISK_THREADS, host_threads=2)
        if options.only != "tiers":
            rows = asyncio.run(serve(Path(path), ["host:1GiB", f"disk:{path}/serve:2GiB"], options.repeats))
            report("store_ttft", rows, repeats=2 * options.repeats, computed=2, prompt_tokens=PROMPT)


if __name__ == "__main__":
    main()
