"""What the store's tiers make of the machine, and what they save a request.

- host tier against memcpy, disk tier against raw direct I/O: the same bytes, in turn
- looking up a prefix of 4,000 blocks; finding 100,000 blocks again at start
- the cache service against memcpy and a raw socket (``store_service.py``)
- eviction: least recently used against S3-FIFO, on a made-up trace of conversations among long prompts
- end to end: time to first token, conversations, decode (``store_serving.py``)

``python -m benchmarks.bench_store``, 15 minutes. ``--only`` measures one section, in at most 5, and keeps the others in
the result file. Tiers are on the disk that ``--path`` is on.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import store_service, store_serving
from benchmarks.common import Row, report, row, seconds
from benchmarks.store_pool import FINGERPRINT, SIZES, Pool, key, timed
from twostroke.kv.direct import PAGE, aligned, open_direct, pages, read_at, write_at
from twostroke.kv.keys import block_keys, root_key
from twostroke.kv.memory import PoolMemory
from twostroke.store.directory import DirectoryTier
from twostroke.store.disk import DISK_THREADS, disk_tier
from twostroke.store.eviction import POLICIES, Policy
from twostroke.store.format import HEADER_BYTES, Header, pack
from twostroke.store.host import HostTier
from twostroke.store.segment import Segment
from twostroke.store.shelf import Shelf
from twostroke.store.store import Store
from twostroke.store.tier import Tier


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
    """Rewriting slots of a full tier, against rewriting the same places of its files by direct I/O alone, with the
    same pieces and threads. (Other places of a virtual disk can be three times as fast, or as slow.)
    """
    blocks = max(32, (384 << 20) // size)
    pool = Pool(blocks, size)
    capacity = int(1.2 * Segment.file_bytes(blocks, size))
    tier = disk_tier(path / f"tier-{size}", size, FINGERPRINT, capacity, "bench")
    await tier.open()
    await timed(tier, pool, -1)  # so that its files are there
    files = [open_direct(str(file), os.O_RDWR) for file in sorted((path / f"tier-{size}").rglob("*.segment"))]
    places = [place for fd in files for place in _places(fd, size)][:blocks]
    buffers = [aligned(size) for _ in range(DISK_THREADS)]
    for buffer in buffers:
        buffer[:size] = pool.memory.slots[0].data
    threads = ThreadPoolExecutor(DISK_THREADS)

    def raw(work: Callable[[int, memoryview, int], None]) -> float:
        def some(thread: int) -> None:
            for fd, offset in places[thread::DISK_THREADS]:
                work(fd, buffers[thread], offset)

        return len(places) * size / 1e9 / seconds(lambda: list(threads.map(some, range(DISK_THREADS))))

    figures: dict[str, list[float]] = {"put": [], "get": [], "write": [], "read": []}
    for turn in range(repeats + 2):
        if turn % 2:  # who comes first has what a virtual disk gives after a pause
            put, get = await timed(tier, pool, turn)
        write, read = raw(write_at), raw(read_at)
        if not turn % 2:
            put, get = await timed(tier, pool, turn)
        if turn > 1:  # before that, each writes its part of the disk for the first time
            for what, value in (("put", put), ("get", get), ("write", write), ("read", read)):
                figures[what].append(value)
    for fd in files:
        os.close(fd)
    await tier.close()
    pool.memory.close()
    return [
        row(f"disk put, {name}", "GB/s", figures["put"], figures["write"], "raw direct writes", ">= 0.85"),
        row(f"disk get, {name}", "GB/s", figures["get"], figures["read"], "raw direct reads", ">= 0.85"),
    ]


def _places(fd: int, size: int) -> list[tuple[int, int]]:
    """Where a segment's slots for blocks of this size are."""
    end, stride = os.fstat(fd).st_size, pages(size)
    count = end // stride
    while Segment.file_bytes(count, size) > end:
        count -= 1
    return [(fd, end - (count - slot) * stride) for slot in range(count)]


async def lookup(path: Path, repeats: int) -> list[Row]:
    """4,000 blocks in one tier; half of them in the first of two; all of them also in a directory below these.

    Each time it is asked for names that were made anew, as a request's are: nobody has hashed them for a table yet.
    """
    size, count, block_tokens = 512, 4000, 16
    root, ids = root_key(FINGERPRINT, ""), list(range(count * block_tokens))
    pool, keys, rows, naming = Pool(count, size), block_keys(root, ids, block_tokens), list[Row](), list[float]()
    host, half = [("host", keys)], [("host", keys[: count // 2]), ("disk", keys[count // 2 :])]
    for parts in (host, half, [*half, ("dir", keys)]):
        names = ", ".join(name for name, _ in parts)
        tiers: dict[str, Tier] = {
            "host": HostTier(size, size * count),
            "disk": disk_tier(path / names, size, FINGERPRINT, 64 << 20, "bench"),
            "dir": DirectoryTier(path / "shared", size, FINGERPRINT),
        }
        store = Store([tiers[name] for name, _ in parts], size)
        await asyncio.gather(*(stage.open() for stage in store.stages))
        for stage, (_, some) in zip(store.stages, parts, strict=True):
            await stage.put(some, pool.end())
        times: list[float] = []
        for _ in range(repeats * 4):
            start = time.perf_counter()
            fresh = block_keys(root, ids, block_tokens)
            named = time.perf_counter()
            assert len(await store.find(fresh)) == count
            times.append(1e3 * (time.perf_counter() - named))
            naming.append(1e3 * (named - start))
        await store.close()
        rows.append(row(f"lookup of 4,000 blocks: {names}", "ms", times, [2.0], "the goal", "<= 1"))
    pool.memory.close()
    return [*rows, row("naming 4,000 blocks of 16 tokens", "ms", naming, [2.0], "a lookup's goal", "")]


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
            shelf.publish([*shelf.take([one])])
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


async def tiers(path: Path, repeats: int) -> list[Row]:
    """The tiers by themselves."""
    rows: list[Row] = []
    for name, size in SIZES.items():
        rows += await host(name, size, repeats)
    for name, size in SIZES.items():
        rows += await disk(path, name, size, repeats)
    rows += await lookup(path, repeats)
    return rows + await rebuild(path, repeats)


def main() -> None:
    """Measure and report, one section after the other."""
    sections = ["tiers", "service", "eviction", "ttft", "chat", "decode"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--path", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", choices=sections)
    parser.add_argument("--threads", type=int, default=0, help="of a worker; all cores if it is not given")
    options = parser.parse_args()
    for section in sections if options.only is None else [options.only]:
        with tempfile.TemporaryDirectory(dir=options.path) as path:
            rows, settings = run(section, Path(path), options.repeats, options.threads)
        report("store", rows, section, **settings)


def run(section: str, path: Path, repeats: int, threads: int) -> tuple[list[Row], dict[str, object]]:
    """Its rows, and what they were measured with."""
    settings: dict[str, object]
    match section:
        case "tiers":
            rows = asyncio.run(tiers(path, repeats))
            return rows, {"repeats": repeats, "disk_threads": DISK_THREADS, "host_threads": 2}
        case "service":
            return asyncio.run(store_service.measure(repeats)), {"repeats": repeats}
        case "ttft":
            rows = asyncio.run(store_serving.ttft(path, repeats, threads))
            settings = {"repeats": 2 * repeats, "computed": 2, "prompt_tokens": store_serving.PROMPT}
        case "chat":
            rows = asyncio.run(store_serving.chat(path, threads))
            settings = {
                "users": store_serving.USERS,
                "turns": store_serving.TURNS,
                "at_once": store_serving.AT_ONCE,
                "opening_tokens": store_serving.OPENING,
                "question_tokens": store_serving.QUESTION,
                "answer_tokens": store_serving.ANSWER,
                "pool_tokens": store_serving.CHAT_POOL,
            }
        case "decode":
            rows = asyncio.run(store_serving.decode(path, repeats, threads))
            settings = {
                "repeats": repeats,
                "decodes": store_serving.DECODES,
                "steps": store_serving.STEPS,
                "background_tokens": store_serving.BACKGROUND,
                "background_every": store_serving.EVERY,
            }
        case _:
            return eviction(), {}
    return rows, {**settings, "dtype": store_serving.DTYPE, "threads": threads or os.cpu_count()}


if __name__ == "__main__":
    main()
